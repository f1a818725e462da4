"""Derivatives of least-squares solutions, for every shape and rank.

A matrix `U V^H` with `U` of shape `(m, k)` and `V` of shape `(n, k)` has rank `k` near almost every `U` and `V`, so that what
moves them stays in directions of constant rank. Its pseudo-inverse `V (V^H V)^-1 (U^H U)^-1 U^H` is the reference, which
torch differentiates rightly in every mode.
"""

from __future__ import annotations

import pytest
import torch
from references import draw, relative_error
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import nablasolve as ns

F64, C128 = torch.float64, torch.complex128
SHAPES = {"tall": (9, 5, 5), "wide": (5, 9, 5), "square": (6, 6, 6), "deficient, tall": (8, 6, 3), "deficient, wide": (6, 8, 3)}
METHODS = ("lsmr", "lsqr", "cgls", "svd")
TIGHT = 1e-13


def pseudo_inverse(U: Tensor, V: Tensor) -> Tensor:
    """Of `U V^H`."""
    inv = torch.linalg.inv
    return V @ inv(V.mH @ V) @ inv(U.mH @ U) @ U.mH


def system(shape: str, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    """`U`, `V` and `b`."""
    m, n, k = SHAPES[shape]
    return draw(m, k, dtype=dtype, seed=1), draw(n, k, dtype=dtype, seed=2), draw(m, dtype=dtype, seed=3)


def solution(method: str | None, U: Tensor, V: Tensor, b: Tensor, **options) -> Tensor:
    """The library's, for a dense matrix (SVD) or for a function."""
    options = {"rtol": TIGHT, "method": method} | options
    if method in ("svd", "qr"):
        return ns.lstsq(U @ V.mH, b, **options)
    return ns.lstsq(lambda v: U @ (V.mH @ v), b, domain=V[:, 0].detach(), **options)


def loss(x: Tensor) -> Tensor:
    """A real one whose cotangent is in no special space."""
    t = (1 + torch.arange(x.numel(), dtype=F64)).cos().to(x.dtype).reshape(x.shape)
    return ((x - t).abs() ** 2).sum() + (t.conj() * x).real.sin().sum()


# -- first order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (F64, C128), ids=str)
@pytest.mark.parametrize("method", (None, *METHODS))
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_that_of_the_pseudo_inverse(shape, method, dtype):
    inputs = [t.requires_grad_() for t in system(shape, dtype)]
    x, reference = solution(method, *inputs), pseudo_inverse(*inputs[:2]) @ inputs[2]
    assert relative_error(x, reference) <= 1e-9
    ours, theirs = (torch.autograd.grad(loss(y), inputs) for y in (x, reference))
    for one, other in zip(ours, theirs, strict=True):
        assert relative_error(one, other) <= 1e-7


@pytest.mark.parametrize("dtype", (F64, C128), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_reverse_mode_are_transposes(shape, dtype):
    """`<x_bar, dx> = <b_bar, db> + <theta_bar, dtheta>`."""
    inputs = system(shape, dtype)
    steps = [draw(*t.shape, dtype=dtype, seed=5 + i) for i, t in enumerate(inputs)]
    x, dx = torch.func.jvp(lambda *a: solution(None, *a), inputs, tuple(steps))
    x_bar = draw(*x.shape, dtype=dtype, seed=9)
    bars = torch.func.vjp(lambda *a: solution(None, *a), *inputs)[1](x_bar)
    left = torch.vdot(x_bar, dx).real
    right = sum(torch.vdot(bar.flatten(), step.flatten()).real for bar, step in zip(bars, steps, strict=True))
    assert abs(left - right) <= 1e-9 * abs(left)


@pytest.mark.parametrize("shape", SHAPES)
def test_dual_numbers_agree(shape):
    inputs = system(shape)
    steps = [draw(*t.shape, dtype=F64, seed=5 + i) for i, t in enumerate(inputs)]
    reference = torch.func.jvp(lambda U, V, b: pseudo_inverse(U, V) @ b, inputs, tuple(steps))[1]
    with forward_ad.dual_level():
        x = solution(None, *(forward_ad.make_dual(t, dt) for t, dt in zip(inputs, steps, strict=True)))
        assert relative_error(forward_ad.unpack_dual(x).tangent, reference) <= 1e-7


def test_zero_rows_and_zero_columns():
    """A rank that the structure holds: the values of a matrix with a zero row and a zero column move, the zeros do not."""
    mask = torch.ones(7, 5, dtype=F64)
    mask[2], mask[:, 3] = 0, 0
    W, b = draw(7, 5, dtype=F64).requires_grad_(), draw(7, dtype=F64, seed=1).requires_grad_()
    x = ns.lstsq(lambda v: (W * mask) @ v, b, domain=torch.zeros(5, dtype=F64), rtol=TIGHT)
    rows, columns = [0, 1, 3, 4, 5, 6], [0, 1, 2, 4]
    kept = W[rows][:, columns]
    reference = torch.linalg.inv(kept.T @ kept) @ (kept.T @ b[rows])
    assert relative_error(x[columns], reference) <= 1e-9
    assert x[3].abs() <= 1e-12
    t = draw(5, dtype=F64, seed=2)
    ours, theirs = (torch.autograd.grad(value, (W, b)) for value in ((x * t).sum(), (reference * t[columns]).sum()))
    for one, other in zip(ours, theirs, strict=True):
        assert relative_error(one * mask if one.ndim == 2 else one, other) <= 1e-7


# -- second order --------------------------------------------------------------------------------------------------


def second_derivatives(f, inputs, steps):
    """The second derivative of `f` along the steps in every mode; the gradient of the slope, or its own slope."""

    def slope(*a):
        return torch.func.jvp(f, a, steps)[1]

    leaves = [t.clone().requires_grad_() for t in inputs]
    gradients = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    along = sum((g * s).sum() for g, s in zip(gradients, steps, strict=True))
    argnums = tuple(range(len(inputs)))
    return {
        "reverse over reverse": torch.autograd.grad(along, leaves),
        "forward over reverse": torch.func.jvp(torch.func.grad(f, argnums), inputs, steps)[1],
        "reverse over forward": torch.func.grad(slope, argnums)(*inputs),
        "forward over forward": (torch.func.jvp(slope, inputs, steps)[1],),
    }


@pytest.mark.parametrize("method", ("lsmr", "svd"))
@pytest.mark.parametrize("shape", SHAPES)
def test_second_derivatives_agree_in_every_mode(shape, method):
    inputs = system(shape)
    steps = tuple(draw(*t.shape, dtype=F64, seed=5 + i) for i, t in enumerate(inputs))
    ours = second_derivatives(lambda *a: loss(solution(method, *a)), inputs, steps)
    theirs = second_derivatives(lambda U, V, b: loss(pseudo_inverse(U, V) @ b), inputs, steps)
    for mode in ours:
        for one, other in zip(ours[mode], theirs["reverse over reverse" if len(ours[mode]) > 1 else mode], strict=True):
            assert relative_error(one, other) <= 1e-6, mode


@pytest.mark.parametrize("shape", ("tall", "wide", "deficient, tall"))
def test_transforms_compose(shape):
    U, V, b = system(shape)
    many = torch.stack([b, 2 * b + 1, -b])

    def by(f):
        return (
            torch.func.vmap(torch.func.grad(lambda b: f(U, V, b)))(many),
            torch.func.vmap(torch.func.grad(f), in_dims=(0, None, None))(torch.stack([U, U + 0.1]), V, b),
            torch.func.hessian(f, argnums=2)(U, V, b),
            torch.func.jacrev(torch.func.jacfwd(f, argnums=0), argnums=2)(U, V, b),
            torch.func.vmap(torch.func.hessian(lambda b: f(U, V, b)))(many[:2]),
        )

    ours = by(lambda *a: loss(solution(None, *a)))
    theirs = by(lambda U, V, b: loss(pseudo_inverse(U, V) @ b))
    for one, other in zip(ours, theirs, strict=True):
        assert relative_error(one, other) <= 1e-6


def test_term_that_vanishes_at_a_point_only_has_its_derivatives():
    """For a tall `A` and a `b` in its range `r = 0`, but the second derivative knows of `dr`; likewise for a cotangent."""
    U, V, _ = system("tall")
    b = U @ draw(5, dtype=F64, seed=8)
    wide_U, wide_V, wide_b = system("wide")
    inside = wide_V @ draw(5, dtype=F64, seed=8)  # a cotangent in the range of A^H
    for inputs, value in (((U, V, b), loss), ((wide_U, wide_V, wide_b), lambda x: inside @ x)):
        steps = tuple(draw(*t.shape, dtype=F64, seed=5 + i) for i, t in enumerate(inputs))
        ours = second_derivatives(lambda *a: value(solution(None, *a)), inputs, steps)  # noqa: B023
        theirs = second_derivatives(lambda U, V, b: value(pseudo_inverse(U, V) @ b), inputs, steps)  # noqa: B023
        for mode in ours:
            for one, other in zip(ours[mode], theirs["reverse over reverse" if len(ours[mode]) > 1 else mode], strict=True):
                assert relative_error(one, other) <= 1e-6, mode


# -- damping, weights, a prior centre ------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", (True, False), ids=("dense", "function"))
@pytest.mark.parametrize("dtype", (F64, C128), ids=str)
@pytest.mark.parametrize("m", (7, 4))
def test_regularised_problem_differentiates_to_everything_it_depends_on(m, dtype, dense):
    n = 5
    tensors = {
        "A": draw(m, n, dtype=dtype), "b": draw(m, dtype=dtype, seed=1), "L": draw(n + 1, n, dtype=dtype, seed=2),
        "x_ref": draw(n, dtype=dtype, seed=3), "damp": torch.tensor(0.4, dtype=F64), "weight": draw(m, dtype=F64).abs() + 0.5,
    }  # fmt: skip
    leaves = [t.requires_grad_() for t in tensors.values()]

    def ours(A, b, L, x_ref, damp, weight):
        operator, domain = (A, None) if dense else ((lambda v: A @ v), torch.zeros(n, dtype=dtype))
        return ns.lstsq(operator, b, damp=(damp, L), weight=weight, x_ref=x_ref, domain=domain, rtol=TIGHT)

    def closed(A, b, L, x_ref, damp, weight):
        weighted = weight.to(dtype)[:, None] * A
        return x_ref + torch.linalg.inv(A.mH @ weighted + damp**2 * (L.mH @ L)) @ (weighted.mH @ (b - A @ x_ref))

    assert relative_error(ours(*leaves), closed(*leaves)) <= 1e-9
    for one, other in zip(*(torch.autograd.grad(loss(f(*leaves)), leaves) for f in (ours, closed)), strict=True):
        assert relative_error(one, other) <= 1e-7
    if dtype == F64:
        assert gradcheck(ours, leaves, check_forward_ad=True)
        assert gradgradcheck(ours, leaves)


def test_damping_of_each_system_has_its_gradient():
    A, b = draw(3, 6, 4, dtype=F64).requires_grad_(), draw(3, 6, dtype=F64, seed=1).requires_grad_()
    damp = torch.tensor([0.1, 0.0, 2.0], dtype=F64, requires_grad=True)
    x = ns.lstsq(A, b, damp=damp, rtol=TIGHT)
    y = ns.lstsq(
        lambda v: (A @ v[..., None])[..., 0], b, damp=damp, domain=torch.zeros(3, 4, dtype=F64), batch_dims=1, rtol=TIGHT
    )
    eye = torch.eye(4, dtype=F64)
    reference = (torch.linalg.inv(A.mT @ A + damp[:, None, None] ** 2 * eye) @ (A.mT @ b[..., None]))[..., 0]
    expected = torch.autograd.grad(loss(reference), (A, b, damp))
    for solved in (x, y):
        for one, other in zip(torch.autograd.grad(loss(solved), (A, b, damp)), expected, strict=True):
            assert relative_error(one, other) <= 1e-7


def test_failure_and_record_are_of_the_solution_with_its_prior_centre():
    A, b, x_ref = draw(8, 5, dtype=F64), draw(8, dtype=F64, seed=1), 100 + draw(5, dtype=F64, seed=2)
    options = {"damp": 0.5, "x_ref": x_ref, "domain": x_ref}
    with pytest.raises(ns.ConvergenceError) as failure:
        ns.lstsq(lambda v: A @ v, b, maxiter=2, **options)
    x, info = ns.lstsq_ex(lambda v: A @ v, b, maxiter=2, **options)
    assert torch.equal(failure.value.x, x)
    assert info.norm_x == pytest.approx(torch.linalg.vector_norm(x).item())


def test_weight_of_zero_leaves_a_row_out_and_has_no_gradient():
    A, b = draw(6, 3, dtype=F64), draw(6, dtype=F64, seed=1).requires_grad_()
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 0.0], dtype=F64)
    rows = weight > 0
    scaled = weight[rows].sqrt()
    x = ns.lstsq(A, b, weight=weight, rtol=TIGHT)
    assert relative_error(x, torch.linalg.pinv(scaled[:, None] * A[rows]) @ (scaled * b[rows])) <= 1e-9
    (gradient,) = torch.autograd.grad(loss(x), b)
    assert (gradient[~rows] == 0).all()
    with pytest.raises(ValueError, match=r"weight: its gradient at a weight of 0"):
        ns.lstsq(A, b, weight=weight.requires_grad_())


# -- what it costs -------------------------------------------------------------------------------------------------


class Counter:
    """A function that counts its applications; `W` is shaped `(m, n)`."""

    def __init__(self, W: Tensor) -> None:
        self.W, self.count = W, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.count += 1
        return self.W @ v


COSTS = {  # m, n, rank, what is known, damping
    "square, full rank": (40, 40, 40, {"full_rank": True}, 0.0),
    "tall, full rank": (60, 30, 30, {"full_rank": True}, 0.0),
    "wide, full rank": (30, 60, 30, {"full_rank": True}, 0.0),
    "tall": (60, 30, 30, {}, 0.0),
    "wide": (30, 60, 30, {}, 0.0),
    "damped": (40, 40, 40, {}, 0.5),
    "deficient, tall": (60, 40, 20, {}, 0.0),
    "deficient, wide": (40, 60, 20, {}, 0.0),
}


@pytest.mark.parametrize("case", COSTS)
def test_gradient_costs_as_many_solves_as_the_theory_asks(case):
    """One adjoint solve; where the rank is deficient, and nothing has left the dual, one more. And a few single products."""
    m, n, k, claims, damp = COSTS[case]
    scale = torch.linspace(1, 2, k, dtype=F64)
    Q, P = (torch.linalg.qr(draw(size, k, dtype=F64, seed=size))[0] for size in (m, n))
    W, b = ((Q * scale) @ P.T).requires_grad_(), draw(m, dtype=F64, seed=3).requires_grad_()
    counter = Counter(W)
    A = ns.LinearOperator(counter, domain=torch.zeros(n, dtype=F64), codomain=torch.zeros(m, dtype=F64), **claims)
    x, info = ns.lstsq_ex(A, b, damp=damp, rtol=1e-10)
    before = counter.count
    loss(x).backward()
    solve = info.adjoint.iterations
    assert info.converged
    assert info.adjoint.converged
    assert 5 <= solve <= 40
    more = solve + 8 if case == "deficient, tall" else 0  # the cotangent has a part in the nullspace
    assert counter.count - before <= solve + more + 12
    # of what autograd transposes the products are not seen by the counter, but they are in the record
    assert info.adjoint.matvecs + info.adjoint.rmatvecs <= 2 * solve + 8


def test_memory_saved_does_not_grow_with_the_iterations():
    W, b = draw(80, 60, dtype=F64).requires_grad_(), draw(80, dtype=F64, seed=1)
    sizes = []
    for maxiter in (5, 50):
        kept: list[int] = []

        def pack(t: Tensor) -> Tensor:
            kept.append(t.numel())  # noqa: B023
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ns.lstsq(lambda v: W @ v, b, domain=torch.zeros(60, dtype=F64), maxiter=maxiter, on_failure="ignore")
        sizes.append(sum(kept))
    assert sizes[0] == sizes[1]


# -- honesty -------------------------------------------------------------------------------------------------------


def test_gradient_scales_with_the_loss():
    inputs = [t.requires_grad_() for t in system("deficient, tall")]
    plain, small = (torch.autograd.grad(scale * loss(solution(None, *inputs)), inputs) for scale in (1.0, 1e-12))
    for one, other in zip(small, plain, strict=True):
        assert relative_error(one * 1e12, other) <= 1e-6


@pytest.mark.parametrize("on_failure", ("raise", "warn", "ignore"))
def test_failed_adjoint_solve_is_as_visible_as_a_failed_forward_one(on_failure):
    U, V, b = (t.requires_grad_() for t in system("tall"))
    x, info = ns.lstsq_ex(
        lambda v: U @ (V.mH @ v), b, domain=V[:, 0].detach(), rtol=TIGHT, adjoint={"maxiter": 2}, on_failure=on_failure
    )
    assert info.converged
    if on_failure == "raise":
        with pytest.raises(ns.ConvergenceError, match="adjoint"):
            loss(x).backward()
    elif on_failure == "warn":
        with pytest.warns(ns.ConvergenceWarning, match="adjoint"):
            loss(x).backward()
    else:
        loss(x).backward()
    assert info.adjoint.status == ns.Status.MAXITER


def test_false_claim_of_full_rank_fails_in_the_backward_pass():
    U, V, b = (t.requires_grad_() for t in system("deficient, tall"))
    m, n, _ = SHAPES["deficient, tall"]
    A = ns.LinearOperator(
        lambda v: U @ (V.mH @ v), domain=torch.zeros(n, dtype=F64), codomain=torch.zeros(m, dtype=F64), full_rank=True
    )
    x = ns.lstsq(A, b, rtol=1e-10)
    with pytest.raises(ns.ConvergenceError, match="adjoint"):
        loss(x).backward()


def test_guess_with_a_part_in_the_nullspace_gives_no_wrong_gradient():
    """The minimiser that is found from it is not the shortest one, and has not its derivative."""
    U, V, b = (t.requires_grad_() for t in system("deficient, tall"))
    x = ns.lstsq(lambda v: U @ (V.mH @ v), b, x0=draw(6, dtype=F64, seed=7), rtol=TIGHT)
    with pytest.raises(RuntimeError, match=r"x0 had a part in the nullspace"):
        loss(x).backward()


def test_guess_is_not_used_where_there_are_many_minimisers():
    U, V, b = system("wide")
    assert relative_error(solution(None, U, V, b, x0=draw(9, dtype=F64, seed=7)), pseudo_inverse(U, V) @ b) <= 1e-9


def test_wrong_adjoint_of_the_user_fails():
    U, V, b = system("tall")
    W = U @ V.mH
    A = ns.LinearOperator(
        lambda v: W @ v, adjoint=lambda u: (2 * W.mH + W.mH.roll(1, 0)) @ u, domain=V[:, 0], codomain=torch.zeros_like(b)
    )
    assert ns.lstsq_ex(A, b)[1].status == ns.Status.NOT_HERMITIAN


def test_wrong_adjoint_that_certifies_itself_is_found():
    """`c^T r = 0` is met, where `a^T r = 0` is due."""
    a, c, b = (draw(6, dtype=F64, seed=seed).abs() + 0.5 for seed in (1, 2, 3))
    A = ns.LinearOperator(lambda v: a * v, adjoint=lambda u: (c @ u)[None], domain=a[:1], codomain=b)
    for method in ("lsmr", "lsqr", "cgls"):
        assert not ns.lstsq_ex(A, b, method=method, maxiter=1000)[1].converged


def test_operator_that_changes_between_the_passes_raises():
    W = draw(7, 4, dtype=F64).requires_grad_()
    scale = [1.0]
    x = ns.lstsq(lambda v: scale[0] * (W @ v), draw(7, dtype=F64, seed=1), domain=torch.zeros(4, dtype=F64))
    scale[0] = 2.0
    with pytest.raises(RuntimeError, match=r"A changed"):
        x.sum().backward()


def test_operator_that_is_not_linear_raises():
    W, b = draw(7, 4, dtype=F64).requires_grad_(), draw(7, dtype=F64, seed=1)
    x, _ = ns.lstsq_ex(lambda v: W @ (v + 0.3 * v**3), b, domain=torch.zeros(4, dtype=F64), maxiter=20, on_failure="raise")
    with pytest.raises((RuntimeError, ns.ConvergenceError)):
        x.sum().backward()


# -- trees and real-linear operators -------------------------------------------------------------------------------


def test_trees_on_both_sides():
    W, b = draw(7, 5, dtype=F64).requires_grad_(), draw(7, dtype=F64, seed=1).requires_grad_()

    def A(x):
        y = W @ torch.cat([x["u"], x["v"].reshape(-1)])
        return y[:3], y[3:].reshape(2, 2)

    domain = {"u": torch.zeros(3, dtype=F64), "v": torch.zeros(1, 2, dtype=F64)}
    x = ns.lstsq(A, (b[:3], b[3:].reshape(2, 2)), domain=domain, damp=0.3, rtol=TIGHT)
    assert x["v"].shape == (1, 2)
    flat = torch.cat([x["u"], x["v"].reshape(-1)])
    reference = torch.linalg.inv(W.T @ W + 0.09 * torch.eye(5, dtype=F64)) @ (W.T @ b)
    for one, other in zip(*(torch.autograd.grad(loss(y), (W, b)) for y in (flat, reference)), strict=True):
        assert relative_error(one, other) <= 1e-7


def test_operator_from_real_to_complex_vectors():
    """Half of the frequencies of a real signal: linear over the reals."""
    mask, b = draw(9, dtype=F64).requires_grad_(), draw(9, dtype=C128, seed=1).requires_grad_()
    A = ns.LinearOperator(
        lambda x: mask * torch.fft.rfft(x, norm="ortho"), domain=torch.zeros(16, dtype=F64), codomain=torch.zeros(9, dtype=C128)
    )
    x = ns.lstsq(A, b, damp=0.5, rtol=TIGHT)
    assert x.dtype == F64
    matrix = torch.view_as_real(mask[:, None] * torch.fft.rfft(torch.eye(16, dtype=F64), norm="ortho").mT).movedim(-1, 0)
    matrix, data = matrix.reshape(18, 16), torch.view_as_real(b).movedim(-1, 0).reshape(18)
    reference = torch.linalg.inv(matrix.T @ matrix + 0.25 * torch.eye(16, dtype=F64)) @ (matrix.T @ data)
    assert relative_error(x, reference) <= 1e-9
    for one, other in zip(*(torch.autograd.grad(loss(y), (mask, b)) for y in (x, reference)), strict=True):
        assert relative_error(one, other) <= 1e-7


# -- where terms are small, and where rounding is not --------------------------------------------------------------


@pytest.mark.parametrize("damp", (1e-1, 1e-4, 1e-8))
@pytest.mark.parametrize("dense", (True, False), ids=("dense", "function"))
def test_small_damping_of_a_wide_operator_has_an_exact_gradient(damp, dense):
    """`b - A x = damp^2 y` is nothing but rounding there, and `y` is what the derivative needs."""
    A, b = draw(4, 7, dtype=F64).requires_grad_(), draw(4, dtype=F64, seed=1).requires_grad_()
    lam = torch.tensor(damp, dtype=F64, requires_grad=True)
    x, info = ns.lstsq_ex(
        A if dense else (lambda v: A @ v), b, damp=lam, domain=None if dense else torch.zeros(7, dtype=F64), rtol=TIGHT
    )
    reference = A.T @ (torch.linalg.inv(A @ A.T + lam**2 * torch.eye(4, dtype=F64)) @ b)
    misfit = b - A @ x
    assert relative_error(x, reference) <= 1e-9
    assert info.residual_norm == pytest.approx(torch.linalg.vector_norm(misfit).item(), rel=1e-3, abs=1e-12)
    assert info.norm_x == pytest.approx(torch.linalg.vector_norm(x).item())
    for one, other in zip(*(torch.autograd.grad(loss(y), (A, b, lam)) for y in (x, reference)), strict=True):
        assert relative_error(one, other) <= 1e-7


def test_derivative_that_rounding_has_taken_is_a_failed_adjoint_solve():
    A, b = draw(4, 7, dtype=F64).requires_grad_(), draw(4, dtype=F64, seed=1)
    x = ns.lstsq(lambda v: A @ v, b, damp=1e-7, domain=torch.zeros(7, dtype=F64), method="lsmr")
    with pytest.raises(ns.ConvergenceError, match=r"adjoint.*ILL_CONDITIONED"):
        loss(x).backward()


@pytest.mark.parametrize("options", ({"rtol": 0.5}, {"atol": 1.0}), ids=str)
def test_loose_tolerance_drops_no_term_of_a_direct_solve(options):
    A = draw(9, 4, dtype=F64).requires_grad_()
    b = A.detach().sum(1) + 0.1 * draw(9, dtype=F64, seed=1)
    x, reference = ns.lstsq(A, b, **options), torch.linalg.inv(A.T @ A) @ (A.T @ b)
    assert relative_error(torch.autograd.grad(loss(x), A)[0], torch.autograd.grad(loss(reference), A)[0]) <= 1e-9


def test_operator_from_complex_to_real_vectors():
    weight, b = draw(6, dtype=F64).requires_grad_(), draw(6, dtype=F64, seed=1)
    x = ns.lstsq(lambda v: weight * torch.fft.irfft(v, 6), b, domain=torch.zeros(4, dtype=C128), rtol=TIGHT)
    assert x.dtype == C128
    assert relative_error(weight * torch.fft.irfft(x, 6), b) <= 1e-9


def test_batched_cotangents_of_autograd():
    A, b = draw(7, 4, dtype=F64).requires_grad_(), draw(7, dtype=F64, seed=1).requires_grad_()
    assert gradcheck(
        lambda A, b: ns.lstsq(lambda v: A @ v, b, domain=torch.zeros(4, dtype=F64), rtol=TIGHT), (A, b), check_batched_grad=True
    )


def test_exact_guess_of_an_inconsistent_problem_takes_no_step():
    A, b = draw(9, 4, dtype=F64), draw(9, dtype=F64, seed=1)
    _, info = ns.lstsq_ex(lambda v: A @ v, b, x0=torch.linalg.pinv(A) @ b)
    assert (info.status, info.iterations) == (ns.Status.LEAST_SQUARES, 0)


def test_no_gradient_where_none_is_asked():
    A, b, x_ref = (draw(*shape, dtype=F64).requires_grad_() for shape in ((7, 4), (7,), (4,)))
    assert not ns.lstsq(A, b, x_ref=x_ref, grad="none").requires_grad


def test_damped_craig_is_consistent():
    A, b = draw(9, 4, dtype=F64), draw(9, dtype=F64, seed=1)
    x, info = ns.lstsq_ex(lambda v: A @ v, b, damp=0.3, domain=torch.zeros(4, dtype=F64), method="craig", rtol=TIGHT)
    assert info.converged
    assert relative_error(x, torch.linalg.inv(A.T @ A + 0.09 * torch.eye(4, dtype=F64)) @ (A.T @ b)) <= 1e-9


@pytest.mark.parametrize(("forward", "backward"), (("svd", "qr"), ("qr", "svd"), ("svd", "lsmr"), ("lsmr", "svd")))
def test_adjoint_by_another_method_takes_no_factors_that_are_not_its_own(forward, backward):
    A, b = draw(7, 4, dtype=F64).requires_grad_(), draw(7, dtype=F64, seed=1)
    x = ns.lstsq(A, b, method=forward, adjoint={"method": backward}, rtol=TIGHT)
    reference = torch.linalg.inv(A.T @ A) @ (A.T @ b)
    assert relative_error(torch.autograd.grad(loss(x), A)[0], torch.autograd.grad(loss(reference), A)[0]) <= 1e-7


def test_exploded_guess_is_not_certified():
    """The rounding of `b - A x` is no excuse where `x` is nothing but a null vector."""
    A, b = draw(9, 3, dtype=F64) @ draw(3, 5, dtype=F64, seed=1), draw(9, dtype=F64, seed=2)
    null = torch.linalg.svd(A)[2][-1]
    x, info = ns.lstsq_ex(lambda v: A @ v, b, x0=1e16 * null)
    normal = torch.linalg.vector_norm(A.T @ (b - A @ x))
    assert not info.converged or normal <= 1e-5 * torch.linalg.matrix_norm(A) * torch.linalg.vector_norm(b - A @ x)


@pytest.mark.parametrize("dense", (True, False), ids=("dense", "function"))
@pytest.mark.parametrize("dtype", (F64, C128), ids=str)
@pytest.mark.parametrize("rank", (8, 5))
def test_hermitian_method_takes_a_damping_and_its_gradient(rank, dtype, dense):
    R, b = draw(8, rank, dtype=dtype).requires_grad_(), draw(8, dtype=dtype, seed=1).requires_grad_()
    damp = torch.tensor(0.3, dtype=F64, requires_grad=True)
    signs = torch.tensor([1.0, -1.0] * 4, dtype=F64)[:rank].to(dtype)
    A = (R * signs) @ R.mH
    x, info = ns.lstsq_ex(A if dense else (lambda v: (R * signs) @ (R.mH @ v)), b, damp=damp, method="minres_qlp", rtol=TIGHT)
    reference = torch.linalg.inv(A @ A + damp**2 * torch.eye(8, dtype=dtype)) @ (A @ b)
    assert info.status == ns.Status.LEAST_SQUARES
    assert info.residual_norm == pytest.approx(torch.linalg.vector_norm(b - A @ x).item())
    assert relative_error(x, reference) <= 1e-9
    ours, theirs = (torch.autograd.grad(loss(y), (R, b, damp), retain_graph=True) for y in (x, reference))
    for one, other in zip(ours, theirs, strict=True):
        assert relative_error(one, other) <= 1e-7
