"""The methods, one a file. Each reads like its textbook algorithm; `base.py` says what a method is."""

from typing import Any

from .base import Method
from .bicgstab import BiCGStab
from .cg import CG
from .cgls import CGLS
from .craig import CRAIG
from .direct import Direct
from .gmres import GMRES
from .lsmr import LSMR
from .lsqr import LSQR
from .minres import MINRES
from .minres_qlp import MINRESQLP
from .qr import QR
from .svd import SVD

_ALL: tuple[type[Method[Any]], ...] = (CG, MINRES, GMRES, BiCGStab, Direct, LSMR, LSQR, CGLS, CRAIG, MINRESQLP, SVD, QR)
METHODS: dict[str, type[Method[Any]]] = {method.name: method for method in _ALL}
"""Every method by its public name."""

__all__ = [
    "CG",
    "CGLS",
    "CRAIG",
    "GMRES",
    "LSMR",
    "LSQR",
    "METHODS",
    "MINRES",
    "MINRESQLP",
    "QR",
    "SVD",
    "BiCGStab",
    "Direct",
    "Method",
]
