"""Operators: what all of them are in `base.py`, how they combine in `algebra.py`, then one family a file."""

from .banded import Banded, Tridiagonal
from .base import LinearOperator, aslinearoperator
from .blocks import Block, BlockDiagonal, HStack, VStack
from .dense import DenseOperator
from .diagonal import Diagonal, Identity, Zero
from .inverse import Inverse
from .kronecker import Kronecker
from .low_rank import LowRank
from .permutation import Permutation
from .sparse import SparseOperator
from .toeplitz import Circulant, Hankel, Toeplitz
from .triangular import Triangular

__all__ = [
    "Banded",
    "Block",
    "BlockDiagonal",
    "Circulant",
    "DenseOperator",
    "Diagonal",
    "HStack",
    "Hankel",
    "Identity",
    "Inverse",
    "Kronecker",
    "LinearOperator",
    "LowRank",
    "Permutation",
    "SparseOperator",
    "Toeplitz",
    "Triangular",
    "Tridiagonal",
    "VStack",
    "Zero",
    "aslinearoperator",
]
