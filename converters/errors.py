"""Errors a user can cause by handing over a wrong, damaged or unreachable checkpoint."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message names the file and the remedy."""
