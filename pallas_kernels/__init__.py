"""Accelerator kernels with a plain-JAX fallback; they know nothing of models or requests."""
