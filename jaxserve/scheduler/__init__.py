"""Decide on the host what each step computes; see scheduler.py. Imports no jax."""
