"""Kronecker products and operators made of blocks."""

from __future__ import annotations

import torch
from operator_cases import OperatorCase, away_from_zero, draw
from torch import Tensor

from nablasolve import LinearOperator, aslinearoperator
from nablasolve.closure import matvec
from nablasolve.operators import Block, BlockDiagonal, Diagonal, HStack, Identity, Kronecker, VStack, Zero
from nablasolve.operators.base import StructuredOperator
from nablasolve.operators.spaces import any_batch


def matrices(dtype: torch.dtype) -> dict[str, Tensor]:
    """A well-conditioned 3 x 3 matrix, and a tall one."""
    return {"M": draw(3, 3, dtype=dtype) / 3 + 2 * torch.eye(3, dtype=dtype), "B": draw(4, 3, dtype=dtype, seed=1)}


def with_diagonal(dtype: torch.dtype) -> dict[str, Tensor]:
    return matrices(dtype) | {"d": away_from_zero(4, dtype=dtype, seed=2)}


def definite(M: Tensor) -> LinearOperator:
    return aslinearoperator(M @ M.mH, positive_definite=True)


class Unfolding(StructuredOperator):
    """`B` from vectors of 3 entries to 2 x 2 images."""

    def __init__(self, B: Tensor) -> None:
        super().__init__(any_batch((3,), B), any_batch((2, 2), B))
        self.B = B

    def apply(self, x: Tensor) -> Tensor:
        return matvec(self.B, x).unflatten(-1, (2, 2))

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return matvec(self.B.mH, y.flatten(-2))


def saddle(M: Tensor, B: Tensor) -> LinearOperator:
    """A Hermitian table, which is seen from its off-diagonal blocks being one operator and its adjoint."""
    C = (aslinearoperator(B) @ Identity(B[0])) * 1
    A = Block([[definite(M), C.H], [C, -Identity(B[:, 0])]])
    assert A.hermitian
    return A


CASES = [
    OperatorCase(
        "kronecker",
        with_diagonal,
        lambda M, B, d: Kronecker(M, Diagonal(d), 2 * Identity(d[:2])),
        lambda M, B, d: torch.kron(torch.kron(M, torch.diag(d)), 2 * torch.eye(2, dtype=M.dtype)),
        direct=True,
    ),
    OperatorCase(
        "kronecker of definite",
        matrices,
        lambda M, B: Kronecker(definite(M), definite(M[:2, :2])),
        lambda M, B: torch.kron(M @ M.mH, M[:2, :2] @ M[:2, :2].mH),
        direct=True,
    ),
    OperatorCase(
        "rectangular kronecker with an image among its factors",
        lambda dtype: matrices(dtype) | {"d": away_from_zero(2, 2, dtype=dtype, seed=2)},
        lambda M, B, d: Kronecker(B, Diagonal(d), B.mH),
        lambda M, B, d: torch.kron(torch.kron(B, torch.diag(d.reshape(-1))), B.mH.contiguous()),
        solvable=False,
    ),
    OperatorCase(
        "kronecker of what changes the number of dimensions",
        matrices,
        lambda M, B: Kronecker(Unfolding(B), M),
        lambda M, B: torch.kron(B, M),
        solvable=False,
    ),
    OperatorCase(
        "block diagonal",
        with_diagonal,
        lambda M, B, d: BlockDiagonal(M, Diagonal(d)),
        lambda M, B, d: torch.block_diag(M, torch.diag(d)),
        direct=True,
    ),
    OperatorCase(
        "block diagonal of rectangles and a nested one",
        matrices,
        lambda M, B: BlockDiagonal([B, BlockDiagonal(M, B)]),
        lambda M, B: torch.block_diag(B, M, B),
        solvable=False,
    ),
    OperatorCase(
        "definite block diagonal",
        matrices,
        lambda M, B: BlockDiagonal(definite(M), definite(M[:2, :2])),
        lambda M, B: torch.block_diag(M @ M.mH, M[:2, :2] @ M[:2, :2].mH),
        direct=True,
    ),
    OperatorCase(
        "vertical stack",
        matrices,
        lambda M, B: VStack(M, B, Identity(M[0])),
        lambda M, B: torch.cat([M, B, torch.eye(3, dtype=M.dtype)]),
        solvable=False,
    ),
    OperatorCase(
        "horizontal stack",
        matrices,
        lambda M, B: HStack(M, B.mH),
        lambda M, B: torch.cat([M, B.mH], 1),
        solvable=False,
    ),
    OperatorCase(
        "table",
        with_diagonal,
        lambda M, B, d: Block([[2 * aslinearoperator(M), B.mH / 4], [None, Diagonal(d)]]),
        lambda M, B, d: torch.cat(
            [torch.cat([2 * M, B.mH / 4], 1), torch.cat([torch.zeros(4, 3, dtype=M.dtype), torch.diag(d)], 1)]
        ),
    ),
    OperatorCase(
        "saddle point",
        matrices,
        lambda M, B: saddle(M, B[:2]),
        lambda M, B: torch.cat([torch.cat([M @ M.mH, B[:2].mH], 1), torch.cat([B[:2], -torch.eye(2, dtype=M.dtype)], 1)]),
    ),
    OperatorCase(
        "rectangular table with zeros",
        matrices,
        lambda M, B: Block([[M, None, M], [None, B, Zero(M[0], B[:, 0])]]),
        lambda M, B: torch.cat(
            [torch.cat([M, torch.zeros_like(M), M], 1), torch.cat([torch.zeros_like(B), B, torch.zeros_like(B)], 1)]
        ),
        solvable=False,
    ),
]
