"""Checkpoints in, checkpoints out: read HF, GGUF and Orbax folders, write HF and Orbax ones."""
