"""Operators: what all of them are in `base.py`, how they combine in `algebra.py`, then one family a file."""

from .banded import Banded, Tridiagonal
from .base import LinearOperator, aslinearoperator
from .blocks import Block, BlockDiagonal, HStack, VStack
from .convolution import Convolution, FourierFilter, VaryingBlur
from .dense import DenseOperator
from .diagonal import Diagonal, Identity, Zero
from .differences import FiniteDifference, Gradient, Laplacian
from .diffusion import ConvectionDiffusion, Diffusion
from .helmholtz import Helmholtz
from .inverse import Inverse
from .kronecker import Kronecker
from .low_rank import LowRank
from .permutation import Permutation
from .sparse import SparseOperator
from .stokes import Stokes
from .toeplitz import Circulant, Hankel, Toeplitz
from .triangular import Triangular

__all__ = [
    "Banded",
    "Block",
    "BlockDiagonal",
    "Circulant",
    "ConvectionDiffusion",
    "Convolution",
    "DenseOperator",
    "Diagonal",
    "Diffusion",
    "FiniteDifference",
    "FourierFilter",
    "Gradient",
    "HStack",
    "Hankel",
    "Helmholtz",
    "Identity",
    "Inverse",
    "Kronecker",
    "Laplacian",
    "LinearOperator",
    "LowRank",
    "Permutation",
    "SparseOperator",
    "Stokes",
    "Toeplitz",
    "Triangular",
    "Tridiagonal",
    "VStack",
    "VaryingBlur",
    "Zero",
    "aslinearoperator",
]
