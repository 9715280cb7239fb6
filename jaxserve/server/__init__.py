"""The HTTP server: OpenAI's API and SGLang's native one, over an `AsyncEngine`."""
