"""Matrices that are stored, dense and sparse, and inverses."""

from __future__ import annotations

import torch
from operator_cases import OperatorCase, draw
from references import pattern, sparse
from torch import Tensor

from nablasolve import aslinearoperator
from nablasolve.operators import Diagonal, Inverse


def square(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"M": draw(6, 6, dtype=dtype) / 6**0.5 + 3 * torch.eye(6, dtype=dtype)}


CASES = [
    OperatorCase("dense", square, lambda M: aslinearoperator(M), lambda M: M, direct=True),
    OperatorCase(
        "dense, tall",
        lambda dtype: {"M": draw(6, 4, dtype=dtype)},
        lambda M: aslinearoperator(M),
        lambda M: M,
        solvable=False,
    ),
    OperatorCase(
        "product of dense and diagonal",
        lambda dtype: square(dtype) | {"d": 2 + 0.3 * draw(6, dtype=dtype, seed=1)},
        lambda M, d: aslinearoperator(M) @ Diagonal(d) / 2,
        lambda M, d: M * d / 2,
        direct=True,
    ),
    OperatorCase(
        "inverse",
        square,
        lambda M: Inverse(M, rtol=1e-13),
        lambda M: torch.linalg.inv(M),
        dtypes=(torch.float64, torch.complex128),
        direct=True,
        batched=False,
        movable=False,  # its tolerance is for 64 bits
    ),
    OperatorCase(
        "Schur complement",
        lambda dtype: square(dtype) | {"B": draw(6, 4, dtype=dtype, seed=2)},
        lambda M, B: (
            aslinearoperator(5 * torch.eye(4, dtype=M.dtype))
            - aslinearoperator(B).H @ Inverse(M, rtol=1e-13) @ aslinearoperator(B)
        ),
        lambda M, B: 5 * torch.eye(4, dtype=M.dtype) - B.mH @ torch.linalg.inv(M) @ B,
        dtypes=(torch.float64, torch.complex128),
        movable=False,
    ),
    *(
        OperatorCase(
            str(layout).removeprefix("torch.sparse_"),
            square,
            lambda M, layout=layout: aslinearoperator(sparse(layout, M, "general")),
            lambda M, layout=layout: M * pattern("general", 2 if layout in (torch.sparse_bsr, torch.sparse_bsc) else 1),
            dtypes=(torch.float32, torch.float64),  # torch builds no complex matrix of most layouts differentiably
            mappable=False,  # nor under its transforms
        )
        for layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
    ),
]
