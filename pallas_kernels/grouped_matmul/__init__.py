"""Matrix product of sorted rows, each group of rows with a matrix of its own."""

from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_matmul.group_rows import group_rows

__all__ = ["group_rows", "grouped_matmul"]
