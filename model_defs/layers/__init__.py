"""Building blocks: every file holds a frozen spec and the NNX module it builds."""
