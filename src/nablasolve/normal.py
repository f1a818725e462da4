"""The normal equations of a least-squares solve: when they are met, and the dual that a method finds on its way."""

from __future__ import annotations

import torch
from torch import Tensor

from . import certify
from .info import Status
from .methods.base import CLAIMED, LeastSquaresState
from .operands import Operands, Rescaled
from .problem import Problem
from .vectors import HostSpace, Scalar, Space, accumulator_dtype, divide, precise_norm, real_dtype, select


class NormalEquations:
    """`|A^H r|` in one cycle of a least-squares method: its stopping by what the method estimates, and its recomputation.

    The test is that of Paige & Saunders (1982, §6), `|A^H r| <= rtol |A| |r|`. Where `A` is known to reach every `b` the test
    serves only to stop where it does not, at the level of rounding.
    """

    def __init__(self, problem: Problem, state: LeastSquaresState, space: Space, aim: Tensor) -> None:
        self.problem, self.space, self.eps = problem, space, state.problem.epsilon
        eps = self.eps
        self.sought = problem.least_squares and not problem.onto
        rcond = getattr(problem.options.method, "rcond", None) or 0.0  # what the SVD leaves out it leaves in A^H r
        self.rtol = max(problem.options.rtol, eps, rcond) if self.sought else certify.NULL_SLACK * eps
        self.meaning = Status.LEAST_SQUARES if self.sought else Status.INCONSISTENT
        self.tolerance = as_scalar(self.rtol * aim, space, state.problem.rhs.dtype)
        self.limit = 1 / (certify.NULL_SLACK * eps)
        self.first = state.normal_norm

    def look(self, state: LeastSquaresState) -> None:
        """Stop the systems whose estimates meet the test, or whose condition leaves no digit."""
        small = state.normal_norm <= self.tolerance * state.norm_A * state.residual_norm
        state.stop(CLAIMED, small)
        state.stop(Status.ILL_CONDITIONED, state.cond_A >= self.limit)

    def close(self, state: LeastSquaresState, rescaled: Rescaled | None, scale: Tensor) -> None:
        """Keep the estimates, in the units of `A` and `b`, when the cycle has ended."""
        unit = 1.0 if rescaled is None or rescaled.size is None else rescaled.size
        wide = [torch.as_tensor(a, device=scale.device).detach().to(scale) for a in (self.first, state.norm_A, state.cond_A)]
        self.before, self.norm_A, self.cond_A = wide[0] * unit * scale, wide[1] * unit, wide[2]

    def recomputed(self, operands: Operands, r: Tensor, norm_r: Tensor, norm_b: Tensor, x: Tensor) -> certify.Normal:
        """What has become of `|A^H r|`; with a preconditioner of the domain in the norm that it defines, as in the method.

        A least-squares solution is none the worse for the rounding of `b - A x`, which a small `r` may be little more than.
        """
        assert operands.adjoint is not None
        limit = self.rtol * self.norm_A * norm_r
        with torch.no_grad():
            s = operands.adjoint(r.detach())
            if operands.M is not None and not self.problem.transposed:
                square = torch.as_tensor(self.space.real_dot(s, operands.M(s)), device=r.device).to(norm_r)
                after = torch.where(square >= 0, square.clamp(min=0).sqrt(), torch.inf)  # else M has the wrong sign
                return certify.Normal(self.before, after, limit, self.meaning)
            after = precise_norm(s, self.space.batch_dims)
        if self.sought:
            size = norm_b + self.norm_A * precise_norm(x.detach(), self.space.batch_dims)
            rounding = certify.NULL_SLACK * self.eps * size  # of r; of what x has exploded it says nothing
            limit = torch.maximum(limit, self.norm_A * torch.minimum(rounding, self.eps ** (1 / 3) * norm_r))
        return certify.Normal(self.before, after, limit, self.meaning)


def certified_dual(space: Space, operands: Operands, q: Tensor, x: Tensor, r: Tensor, status: Tensor) -> tuple[Tensor, Tensor]:
    """The dual `q` without its part in the nullspace of `A^H`, and the relative error of `x = A^H q`.

    Every vector of the process has a multiple of the residual of the least-squares solution in it, which is in that nullspace.
    """
    assert operands.adjoint is not None
    batch_dims = space.batch_dims
    with torch.no_grad():
        norm_r, norm_x = precise_norm(r, batch_dims), precise_norm(x, batch_dims)
        part = divide(r, torch.where(norm_r > 0, norm_r, 1.0))
        q = select(status == Status.LEAST_SQUARES, space.axpy(-space.dot(part, q), part, q.clone()), q)
        error = precise_norm(x - operands.adjoint(q), batch_dims)
    return q, error / torch.where(norm_x > 0, norm_x, 1.0)


def as_scalar(a: Tensor, space: Space, dtype: torch.dtype) -> Scalar:
    """A float64 tensor of the batch shape as a scalar of the space."""
    return a.item() if isinstance(space, HostSpace) else a.to(accumulator_dtype(real_dtype(dtype)))
