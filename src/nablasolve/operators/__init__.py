"""Operators: the base class and its algebra in `base.py`, then one family a file."""

from .base import LinearOperator, aslinearoperator
from .dense import DenseOperator
from .sparse import SparseOperator

__all__ = ["DenseOperator", "LinearOperator", "SparseOperator", "aslinearoperator"]
