"""The methods, one a file. Each reads like its textbook algorithm; `base.py` says what a method is."""

from typing import Any

from .base import Method
from .bicgstab import BiCGStab
from .cg import CG
from .direct import Direct
from .gmres import GMRES
from .minres import MINRES

METHODS: dict[str, type[Method[Any]]] = {method.name: method for method in (CG, MINRES, GMRES, BiCGStab, Direct)}
"""Every method by its public name."""

__all__ = ["CG", "GMRES", "METHODS", "MINRES", "BiCGStab", "Direct", "Method"]
