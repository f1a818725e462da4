"""Operators that multiply each entry by a number."""

from __future__ import annotations

import torch
from operator_cases import OperatorCase, away_from_zero

from nablasolve.operators import Diagonal, Identity, Zero

CASES = [
    OperatorCase(
        "identity",
        parameters=lambda dtype: {"like": torch.zeros(2, 3, dtype=dtype)},
        build=lambda like: Identity(like),
        dense=lambda like: torch.eye(6, dtype=like.dtype),
        direct=True,
    ),
    OperatorCase(
        "identity on a tree",
        parameters=lambda dtype: {"like": torch.zeros(2, 3, dtype=dtype)},
        build=lambda like: Identity({"a": like, "b": like[0]}),
        dense=lambda like: torch.eye(9, dtype=like.dtype),
        direct=True,
        batched=False,
    ),
    OperatorCase(
        "zero",
        parameters=lambda dtype: {"like": torch.zeros(2, 3, dtype=dtype)},
        build=lambda like: Zero(like),
        dense=lambda like: torch.zeros(6, 6, dtype=like.dtype),
        solvable=False,
    ),
    OperatorCase(
        "rectangular zero",
        parameters=lambda dtype: {"like": torch.zeros(2, 3, dtype=dtype)},
        build=lambda like: Zero(like, like[0]),
        dense=lambda like: torch.zeros(3, 6, dtype=like.dtype),
        solvable=False,
        batched=False,
    ),
    OperatorCase(
        "diagonal",
        parameters=lambda dtype: {"d": away_from_zero(6, dtype=dtype)},
        build=lambda d: Diagonal(d),
        dense=lambda d: torch.diag(d),
        direct=True,
    ),
    OperatorCase(
        "diagonal of an image",
        parameters=lambda dtype: {"d": away_from_zero(2, 3, dtype=dtype)},
        build=lambda d: Diagonal(d),
        dense=lambda d: torch.diag(d.reshape(-1)),
        direct=True,
    ),
    OperatorCase(
        "definite diagonal",
        parameters=lambda dtype: {"d": away_from_zero(6, dtype=dtype).abs()},
        build=lambda d: Diagonal(d.abs(), positive_definite=True),
        dense=lambda d: torch.diag(d.abs()),
        dtypes=(torch.float32, torch.float64),
        direct=True,
    ),
    OperatorCase(
        "sum of multiples in one basis",
        parameters=lambda dtype: {"d": away_from_zero(6, dtype=dtype), "e": 0.2 * away_from_zero(6, dtype=dtype, seed=1)},
        build=lambda d, e: (Diagonal(d) @ Diagonal(d).H + 2 * Diagonal(e) + Identity(d) / 2).gram(0.3),
        dense=lambda d, e: torch.diag((d * d.conj() + 2 * e + 0.5).abs().square().to(d.dtype) + 0.09),
        direct=True,
    ),
]
