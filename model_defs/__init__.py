"""What a model is: specs, modules, weight rules and the registry. Knows nothing of serving."""
