"""Solve `A x = b` in PyTorch when `A` is only a function, with exact derivatives to `b` and to everything `A` depends on."""

from .check import CheckError, CheckItem, CheckReport, check_gradient, check_operator
from .info import ConvergenceError, ConvergenceWarning, SolveInfo, Status
from .methods import CG, GMRES, MINRES, BiCGStab, Direct
from .module import LinearSolve
from .operators import LinearOperator, aslinearoperator
from .solve import bicgstab, cg, gmres, minres, solve, solve_ex

__version__ = "0.1.0"

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "BiCGStab",
    "CheckError",
    "CheckItem",
    "CheckReport",
    "ConvergenceError",
    "ConvergenceWarning",
    "Direct",
    "LinearOperator",
    "LinearSolve",
    "SolveInfo",
    "Status",
    "aslinearoperator",
    "bicgstab",
    "cg",
    "check_gradient",
    "check_operator",
    "gmres",
    "minres",
    "solve",
    "solve_ex",
]
