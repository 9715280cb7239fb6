"""Matrix product of sorted rows, each group of rows with a matrix of its own."""

from pallas_kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
