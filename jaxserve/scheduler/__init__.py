"""Which requests run in the next step, in which pages. Pure Python; knows nothing of JAX."""
