"""Benchmarks a user can run: `jaxserve bench throughput`, `jaxserve bench step`."""
