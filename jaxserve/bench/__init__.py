"""Benchmarks a user can run: `jaxserve bench KIND`; see command.py."""
