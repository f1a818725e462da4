"""Operators: what all of them are in `base.py`, how they combine in `algebra.py`, then one family a file."""

from .base import LinearOperator, aslinearoperator
from .blocks import Block, BlockDiagonal, HStack, VStack
from .dense import DenseOperator
from .diagonal import Diagonal, Identity, Zero
from .inverse import Inverse
from .kronecker import Kronecker
from .sparse import SparseOperator

__all__ = [
    "Block",
    "BlockDiagonal",
    "DenseOperator",
    "Diagonal",
    "HStack",
    "Identity",
    "Inverse",
    "Kronecker",
    "LinearOperator",
    "SparseOperator",
    "VStack",
    "Zero",
    "aslinearoperator",
]
