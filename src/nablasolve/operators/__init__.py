"""Operators: what all of them are in `base.py`, how they combine in `algebra.py`, then one family a file."""

from .banded import Banded, Tridiagonal
from .base import LinearOperator, aslinearoperator
from .blocks import Block, BlockDiagonal, HStack, VStack
from .coils import CoilSensitivities
from .convolution import Convolution, FourierFilter, VaryingBlur
from .curvature import Fisher, GaussNewton, Hessian, Jacobian
from .dense import DenseOperator
from .diagonal import Diagonal, Identity, Zero
from .differences import FiniteDifference, Gradient, Laplacian
from .diffusion import ConvectionDiffusion, Diffusion
from .fourier import DFT
from .graph_laplacian import GraphLaplacian
from .helmholtz import Helmholtz
from .inverse import Inverse
from .kernel_matrix import KernelMatrix
from .kronecker import Kronecker
from .low_rank import LowRank
from .permutation import Permutation
from .radon import Radon
from .sampling import Downsample, Mask, Mosaic, Subsample
from .sparse import SparseOperator
from .stokes import Stokes
from .toeplitz import Circulant, Hankel, Toeplitz
from .triangular import Triangular
from .wavelet import Wavelet

__all__ = [
    "DFT",
    "Banded",
    "Block",
    "BlockDiagonal",
    "Circulant",
    "CoilSensitivities",
    "ConvectionDiffusion",
    "Convolution",
    "DenseOperator",
    "Diagonal",
    "Diffusion",
    "Downsample",
    "FiniteDifference",
    "Fisher",
    "FourierFilter",
    "GaussNewton",
    "Gradient",
    "GraphLaplacian",
    "HStack",
    "Hankel",
    "Helmholtz",
    "Hessian",
    "Identity",
    "Inverse",
    "Jacobian",
    "KernelMatrix",
    "Kronecker",
    "Laplacian",
    "LinearOperator",
    "LowRank",
    "Mask",
    "Mosaic",
    "Permutation",
    "Radon",
    "SparseOperator",
    "Stokes",
    "Subsample",
    "Toeplitz",
    "Triangular",
    "Tridiagonal",
    "VStack",
    "VaryingBlur",
    "Wavelet",
    "Zero",
    "aslinearoperator",
]
