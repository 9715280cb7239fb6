"""The first product of a gated network: the halves of its columns, combined."""

from pallas_kernels.gated_matmul.api import gated_matmul

__all__ = ["gated_matmul"]
