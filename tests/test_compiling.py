"""`compile=True` and `check_every`: the same results, one compilation, and no waiting where none is needed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import nablasolve as ns
from nablasolve import vectors
from nablasolve.lookout import Lookout
from nablasolve.vectors import TensorSpace

N = 12


@pytest.fixture(autouse=True)
def _quiet_import() -> Iterator[None]:
    """Importing the compiler warns of what torch itself calls deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*")
        yield


def compilations() -> int:
    import torch._dynamo

    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def definite(W: Tensor) -> Callable[[Tensor], Tensor]:
    half = torch.tanh(W)  # a tensor that is no leaf
    return lambda v: (half.mT @ (half @ v[..., None]))[..., 0] + v


def general(W: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: 0.2 * (W @ v) + v


def tall(W: Tensor) -> Callable[[Tensor], Tensor]:
    half = W[:, : N // 2]
    return lambda v: half @ v


def problem(seed: int, dtype: torch.dtype = torch.float64, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(*batch, N, N, generator=generator, dtype=dtype).requires_grad_()
    return W, torch.randn(*batch, N, generator=generator, dtype=dtype).requires_grad_()


SQUARE = {"cg": definite, "minres": definite, "gmres": general, "bicgstab": general}
RECTANGULAR = ("lsmr", "lsqr", "cgls")


@pytest.mark.parametrize("method", (*SQUARE, *RECTANGULAR))
def test_compiled_solves_equal_eager_ones_and_a_new_closure_compiles_nothing(method: str) -> None:
    counts = []
    for seed in range(3):
        W, b = problem(seed)
        results = []
        for compile in (False, True):
            if method in SQUARE:
                x, info = ns.solve_ex(SQUARE[method](W), b, method=method, compile=compile)
            else:
                options = dict(method=method, domain=torch.zeros(N // 2, dtype=b.dtype), rtol=1e-12)
                x, info = ns.lstsq_ex(tall(W), b, compile=compile, **options)
            assert info.converged
            results.append((x, *torch.autograd.grad(x.square().sum(), (W, b)), info))
        (*eager, eager_info), (*compiled, compiled_info) = results
        for one, other in zip(eager, compiled, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
        assert abs(eager_info.iterations - compiled_info.iterations) <= 1
        assert eager_info.adjoint.converged
        assert compiled_info.adjoint.converged
        counts.append(compilations())
    assert counts[0] > 0
    assert counts[0] == counts[1] == counts[2]


def test_a_python_number_that_changes_does_not_compile_each_time() -> None:
    W, b = problem(0)
    half, counts = W.detach(), []
    for k in range(1, 12):
        shift = float(k)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ns.CompileWarning)
            x = ns.solve(lambda v, shift=shift: half.mT @ (half @ v) + shift * v, b.detach(), method="cg", compile=True)
        expected = torch.linalg.solve(half.mT @ half + shift * torch.eye(N, dtype=b.dtype), b.detach())
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-7)
        counts.append(compilations())
    assert counts[-1] == counts[2]


@pytest.mark.parametrize("method", ["cg", "bicgstab"])
def test_a_product_that_returns_a_slice_of_what_it_has_made(method: str) -> None:
    b = torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def rows_and_columns(v: Tensor) -> Tensor:
        p = torch.nn.functional.pad(v, (1, 1, 1, 1))
        return (5 * p - sum(p.roll(s, d) for s in (1, -1) for d in (0, 1)))[1:-1, 1:-1]

    def columns(v: Tensor) -> Tensor:
        p = torch.nn.functional.pad(v, (2, 2))
        return (3 * p - p.roll(1, 1) - p.roll(-1, 1))[:, 2:-2]

    for A in (rows_and_columns, columns):
        (x, info), (expected, eager) = (ns.solve_ex(A, b, method=method, rtol=1e-10, compile=c) for c in (True, False))
        assert info.converged
        assert abs(info.iterations - eager.iterations) <= 1
        torch.testing.assert_close(x, expected)


def test_products_of_compiled_steps_are_counted() -> None:
    W, b = problem(0)
    infos = [ns.solve_ex(definite(W), b, method="cg", compile=compile)[1] for compile in (False, True)]
    assert infos[0].matvecs == infos[1].matvecs
    info = ns.lstsq_ex(tall(W), b, method="lsmr", domain=torch.zeros(N // 2, dtype=b.dtype), compile=True)[1]
    assert info.matvecs >= info.iterations
    assert info.rmatvecs >= info.iterations


def test_a_batch_with_a_zero_a_nan_and_a_hard_system() -> None:
    W, b = problem(0, batch=(4,))
    b = b.detach().clone()
    b[1], b[2] = 0.0, torch.nan
    W = (W.detach() * torch.tensor([1.0, 1.0, 1.0, 50.0], dtype=W.dtype)[:, None, None]).requires_grad_()
    x, info = ns.solve_ex(definite(W), b, method="cg", batch_dims=1, compile=True)
    eager, eager_info = ns.solve_ex(definite(W), b, method="cg", batch_dims=1)
    assert info.status.tolist() == eager_info.status.tolist()
    assert info.status[2] == ns.Status.NONFINITE
    assert (x[1] == 0).all()
    torch.testing.assert_close(x, eager, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.complex128))
def test_other_dtypes(dtype: torch.dtype) -> None:
    W, b = problem(0, dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*complex operators.*")  # torch compiles those less well, and says so
        x = ns.solve(general(W), b, method="bicgstab", compile=True)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-6
    A = torch.eye(N, dtype=dtype) + 0.2 * W
    torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=tolerance, atol=tolerance)


def test_a_preconditioner_and_params_are_compiled_with_the_step() -> None:
    W, b = problem(0)
    diagonal = torch.linspace(1, 4, N, dtype=b.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ns.CompileWarning)
        x = ns.solve(lambda v, W: W @ (W.mT @ v) + v, b, method="cg", M=lambda r: r / diagonal, params=(W,), compile=True)
    torch.testing.assert_close(x, torch.linalg.solve(W @ W.mT + torch.eye(N, dtype=b.dtype), b), rtol=1e-6, atol=1e-7)


def test_an_operator_that_cannot_be_compiled_says_why_and_runs_eagerly() -> None:
    W, b = problem(0)
    half = W.detach()

    def A(v: Tensor) -> Tensor:
        image = half.mT @ (half @ v)
        return image + v if image.isfinite().all() else v  # reads a number from a tensor

    with pytest.warns(ns.CompileWarning, match="runs eagerly, since") as caught:
        x = ns.solve(A, b, method="cg", compile=True)
    assert [w.filename for w in caught if w.category is ns.CompileWarning] == [__file__]
    torch.testing.assert_close(x, ns.solve(definite_of(half), b, method="cg"), rtol=1e-6, atol=1e-7)


def definite_of(half: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: half.mT @ (half @ v) + v


def test_under_a_transform_it_runs_eagerly_and_is_right() -> None:
    W, b = problem(0)

    def loss(W: Tensor, compile: bool) -> Tensor:
        return ns.solve(definite(W), b.detach(), method="cg", compile=compile).square().sum()

    with pytest.warns(ns.CompileWarning, match="transform"):
        gradient = torch.func.grad(loss)(W.detach(), True)
    torch.testing.assert_close(gradient, torch.func.grad(loss)(W.detach(), False), rtol=1e-8, atol=1e-9)


def test_a_number_is_solved_eagerly() -> None:
    A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    with pytest.warns(ns.CompileWarning, match="no dimensions"):
        x = ns.solve(lambda v: 1e-3 * v, A[1, 1], method="minres", compile=True, check_every=5)
    torch.testing.assert_close(x, 1e3 * A[1, 1])


def test_a_failure_of_a_compiled_solve_is_seen() -> None:
    W, b = problem(0)
    with pytest.raises(ns.ConvergenceError, match="MAXITER"):
        ns.solve(definite(5 * W), b, method="cg", maxiter=4, compile=True)
    indefinite = torch.linspace(-1, 2, N, dtype=b.dtype)
    info = ns.solve_ex(lambda v: indefinite * v, b, method="cg", compile=True)[1]
    assert info.status is ns.Status.INDEFINITE


def test_second_derivatives_of_compiled_solves() -> None:
    W, b = problem(0)
    torch.autograd.gradgradcheck(lambda b, w: ns.solve(definite(w * W.detach()), b, method="cg", rtol=1e-13, compile=True), (
        b, torch.tensor(0.3, dtype=b.dtype, requires_grad=True),
    ))  # fmt: skip


def test_the_layer_compiles() -> None:
    W, b = problem(0)
    layer = ns.LinearSolve(method="cg", compile=True)
    torch.testing.assert_close(layer(definite(W), b), ns.solve(definite(W), b, method="cg"), rtol=1e-7, atol=1e-8)


# -- how often the host looks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_dims", (0, 1))
@pytest.mark.parametrize("method", (*SQUARE, *RECTANGULAR))
def test_a_rare_look_changes_nothing_but_the_products(method: str, batch_dims: int) -> None:
    W, b = problem(0, batch=(3,) * batch_dims)
    W, b = W.detach(), b.detach()

    def A(v: Tensor) -> Tensor:
        return (W @ (W.mT @ v[..., None]))[..., 0] + v

    solve = ns.solve_ex if method in SQUARE else ns.lstsq_ex
    options = dict(method=method, batch_dims=batch_dims) | ({} if method in SQUARE else {"domain": b})
    once, often = (solve(A, b, check_every=k, **options) for k in (1, 7))
    assert torch.equal(once[0], often[0])
    for one, other in zip((once[1].iterations, once[1].status), (often[1].iterations, often[1].status), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    assert torch.as_tensor(often[1].matvecs >= once[1].matvecs).all()


def test_a_history_and_a_callback_see_every_step_however_rarely_the_host_looks() -> None:
    W, b = problem(0)
    seen: list[int] = []
    _, info = ns.solve_ex(
        definite(W.detach()), b.detach(), method="cg", history=True, check_every=7, callback=lambda s: seen.append(s.iteration)
    )
    assert len(info.history) == info.iterations + 1
    assert seen == list(range(1, info.iterations + 1))
    assert info.iterations % 7 != 0  # else a rare look would see the end by chance


def test_the_host_asks_once_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator each question to `any` is a wait; a step itself asks `may`, which never waits there."""
    asked = 0

    def counting(condition: Tensor | bool) -> bool:
        nonlocal asked
        asked += 1
        return bool(torch.as_tensor(condition).any())

    monkeypatch.setattr(vectors, "any_true", counting)
    monkeypatch.setattr(TensorSpace, "may", lambda self, condition: True)  # as on a device
    W, b = problem(0, batch=(2,))
    W, b = 20 * W.detach(), b.detach()
    counts = {}
    for every in (1, 8):
        for steps in (16, 48):
            asked = 0
            ns.solve_ex(definite(W), b, method="cg", batch_dims=1, rtol=0.0, maxiter=steps, check_every=every, grad="none")
            counts[every, steps] = asked
    assert counts[1, 48] - counts[1, 16] == 32
    assert counts[8, 48] - counts[8, 16] == 4


def test_what_is_asked_of_an_accelerator() -> None:
    class Device:
        type = "cuda"

    class Vector:
        device = Device()

        def __init__(self, numel: int) -> None:
            self.size = numel

        def numel(self) -> int:
            return self.size

    assert Lookout(None, Vector(1000), exact=False).every == 10
    assert Lookout(None, Vector(10**8), exact=False).every == 1
    assert Lookout(3, Vector(1000), exact=False).every == 3
    assert not Lookout(3, Vector(1000), exact=True).late
    assert Lookout(None, torch.zeros(3), exact=False).every == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ("cg", "minres", "bicgstab"))
def test_no_step_waits_for_the_gpu(method: str) -> None:
    W, b = (t.detach().cuda() for t in problem(0))
    state = []

    def A(v: Tensor) -> Tensor:
        if len(state) == 2:  # inside the loop
            torch.cuda.set_sync_debug_mode("error")
        if len(state) == 6:
            torch.cuda.set_sync_debug_mode("default")
        state.append(None)
        return W @ (W.mT @ v) + v

    try:
        x = ns.solve(A, b, method=method, check_every=50, grad="none")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(state) > 6
    torch.testing.assert_close(A(x), b, rtol=1e-6, atol=1e-6)
