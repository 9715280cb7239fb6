"""Is a model's output right? Comparison with Hugging Face transformers or with stored outputs."""
