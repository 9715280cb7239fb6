"""The engine: loads a model, sizes its memory, and turns batches into tokens."""
