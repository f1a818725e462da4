"""What the grid of operators is told of each of them; the cases stand in `cases_<family>.py`.

A case builds an operator from named tensors, its *parameters*, and the matrix that it ought to be from the same tensors by
other means, differentiably: an explicit construction, never a product with the operator itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nablasolve import LinearOperator

REAL = (torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
DTYPES = (*REAL, *COMPLEX)


@dataclass(frozen=True)
class OperatorCase:
    """One operator.

    Attributes:
        name: of the case, unique in its family.
        parameters: `dtype -> {name: tensor}`, the operator's own tensors, so that a square one is well-conditioned. The
            operators of real tensors act on complex vectors, too, unless `real_only` says otherwise.
        build: `(**parameters) -> operator`.
        dense: `(**parameters) -> matrix` of shape `(m, n)` on flattened vectors, differentiable in the parameters.
        dtypes: of the parameters (where an operator has none, of its vectors).
        solvable: whether the operator is square and well-conditioned, so that `solve` is tried on it; `A.gram(1.0)` is
            solved otherwise.
        direct: whether `solve` is to choose the direct method.
        batched: whether vectors may come with batch dimensions in front.
        real_only: whether complex vectors are no vectors of the operator.
        picklable: whether it holds no function that pickle cannot take.
        movable: whether `.to(dtype)` works.
        mappable: whether torch can build the operator under its function transforms.
    """

    name: str
    parameters: Callable[[torch.dtype], dict[str, Tensor]]
    build: Callable[..., LinearOperator]
    dense: Callable[..., Tensor]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    solvable: bool = True
    direct: bool = False
    batched: bool = True
    real_only: bool = False
    picklable: bool = True
    movable: bool = True
    mappable: bool = True


@dataclass(frozen=True)
class Instance:
    """A case in one dtype."""

    family: str
    case: OperatorCase
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.family}-{self.case.name}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def parameters(self) -> dict[str, Tensor]:
        return self.case.parameters(self.dtype)


def families() -> dict[str, list[OperatorCase]]:
    """All cases, by family."""
    files = sorted(Path(__file__).parent.glob("cases_*.py"))
    return {file.stem.removeprefix("cases_"): importlib.import_module(file.stem).CASES for file in files}


def instances(wide: bool = False) -> list[Instance]:
    """Every case in each of its dtypes, or in the 64-bit ones."""
    result = [Instance(f, case, dtype) for f, cases in families().items() for case in cases for dtype in case.dtypes]
    return [i for i in result if not wide or i.dtype in (torch.float64, torch.complex128)]


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Standard normal numbers from a generator of their own, the same in every precision."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, dtype=wide, generator=torch.Generator().manual_seed(seed)).to(dtype)


def away_from_zero(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Numbers of modulus between 1 and 3 and any phase."""
    x = draw(*shape, dtype=dtype, seed=seed)
    return x / x.abs() * (1 + 2 * torch.sigmoid(x.abs()))


def flat(tree: Any) -> Tensor:
    """The entries of a tensor or a pytree as one vector."""
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


def random_like(space: Any, seed: int = 0, batch: tuple[int, ...] = (), complex_: bool = False) -> Any:
    """A random vector of a space, with batch dimensions in front."""
    from nablasolve.operators.spaces import AnyBatch

    leaves, spec = pytree.tree_flatten(space)
    drawn = []
    for i, leaf in enumerate(leaves):
        example = leaf.example if isinstance(leaf, AnyBatch) else leaf
        dtype = example.dtype.to_complex() if complex_ else example.dtype
        drawn.append(draw(*batch, *example.shape, dtype=dtype, seed=seed + i))
    return pytree.tree_unflatten(drawn, spec)
