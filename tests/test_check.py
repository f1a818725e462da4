"""`check_operator` finds each fault that a user's operator can have and no other, and `check_gradient` each wrong gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import nablasolve as ns
from nablasolve.check import CheckError, CheckItem, CheckReport, check_gradient, check_operator

F32, F64, C64, C128 = torch.float32, torch.float64, torch.complex64, torch.complex128
LAYOUTS = {
    "coo": Tensor.to_sparse_coo,
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
    "bsr": lambda m: m.to_sparse_bsr((2, 2)),
    "bsc": lambda m: m.to_sparse_bsc((2, 2)),
}


def draw(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def well(n: int = 6, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    """A well-conditioned general matrix."""
    return 0.3 * draw(n, n, dtype=dtype, seed=seed) + 2 * torch.eye(n, dtype=dtype)


def definite(n: int = 6, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    W = draw(n, n, dtype=dtype, seed=seed)
    return W @ W.mH / n + torch.eye(n, dtype=dtype)


R, C, V, Z = draw(6, 6, seed=1), draw(6, 6, dtype=C128, seed=2), torch.zeros(6, dtype=F64), torch.zeros(6, dtype=C128)


class NumPy:
    """A symmetric operator that autograd cannot follow."""

    def __call__(self, v: Tensor) -> Tensor:
        return torch.from_numpy(2 * v.detach().numpy())


class NoBias(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(6, 6, bias=False, dtype=F64)

    def forward(self, v: Tensor) -> Tensor:
        return self.inner(v)


class WrongBackward(torch.autograd.Function):
    """`s v`, with derivatives that are twice too large in `v` or in `s`."""

    @staticmethod
    def forward(ctx, v: Tensor, s: Tensor, in_v: float, in_s: float) -> Tensor:
        ctx.save_for_backward(v, s)
        ctx.factors = in_v, in_s
        return v * s

    @staticmethod
    def backward(ctx, g: Tensor):
        v, s = ctx.saved_tensors
        return ctx.factors[0] * g * s, ctx.factors[1] * g * v, None, None


# -- check_operator: what is right passes ------------------------------------------------------------------------------

RIGHT = {
    "real dense": (R, V, {}),
    "complex dense": (C, Z, {}),
    "real dense on a complex vector": (R, Z, {}),
    "definite dense": (definite(), V, dict(positive_definite=True)),
    "complex definite dense": (definite(dtype=C128), Z, dict(positive_definite=True)),
    "float32": (R.to(F32), V.to(F32), {}),
    "complex64": (C.to(C64), Z.to(C64), {}),
    "float16": (lambda v: 2 * v - v.roll(1), torch.zeros(6, dtype=torch.float16), {}),
    "bfloat16": (lambda v: 2 * v - v.roll(1), torch.zeros(6, dtype=torch.bfloat16), {}),
    "batch of dense": (draw(2, 6, 6), torch.zeros(2, 6, dtype=F64), dict(batch_dims=1)),
    "wide dense": (draw(4, 6), V, {}),
    "tall dense": (draw(9, 6, dtype=C128), Z, {}),
    **{f"{name}, real": (to(R), V, {}) for name, to in LAYOUTS.items()},
    **{f"{name}, complex": (to(C), Z, {}) for name, to in LAYOUTS.items()},
    "module": (NoBias(), V, {}),
    "0-d": (lambda v: 3 * v, torch.zeros((), dtype=F64), dict(positive_definite=True)),
    "empty": (lambda v: 3 * v, torch.zeros(0, dtype=F64), {}),
    "image": (lambda v: v.roll((1, 1), (0, 1)) - 4 * v, torch.zeros(3, 4, dtype=F64), {}),
    "circulant by FFT": (lambda v: torch.fft.ifft(torch.fft.fft(v) * torch.fft.fft(C[0])), Z, {}),
    "given adjoint": (lambda v: C @ v, Z, dict(adjoint=lambda y: C.mH @ y)),
    "rectangular, nothing declared": (lambda v: v[1:] - v[:-1], V, {}),
    "rectangular, declared": (ns.LinearOperator(lambda v: v[1:] - v[:-1], domain=V, codomain=V[1:]), V, {}),
    "real to complex": (torch.fft.rfft, V, {}),
    "real to complex, declared": (ns.LinearOperator(torch.fft.fft, domain=V, codomain=Z), V, {}),
    "tree": (lambda d: {"u": 2 * d["u"] + d["w"].sum(), "w": d["w"] - d["u"].sum()}, {"u": V, "w": V[:2]}, {}),
    "tree to tensor": (lambda d: torch.cat([d["u"], d["w"]]), {"u": V, "w": V[:2]}, {}),
    "params": (lambda v, W: W @ v, V, dict(params=(R,))),
    "gram": (ns.aslinearoperator(draw(9, 6)).gram(0.5), V, {}),
    "sum": (ns.aslinearoperator(R) + (lambda v: v.flip(0)), V, {}),
    "derived adjoint as an operator": (ns.LinearOperator(lambda v: R @ v).H, V, {}),
    "opaque and claimed": (NumPy(), V, dict(hermitian=True)),
    "opaque with an adjoint": (NumPy(), V, dict(adjoint=NumPy())),
    "identity, the argument itself": (lambda v: v, V, {}),
    "zero": (lambda v: 0 * v, V, {}),
}  # fmt: skip


@pytest.mark.parametrize(("A", "like", "options"), RIGHT.values(), ids=RIGHT)
def test_a_right_operator_passes(A, like, options):
    report = check_operator(A, like, **options)
    assert report.ok, str(report)
    assert report["result"].ok


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", [F32, F64, C64, C128])
def test_rounding_alone_never_fails(seed, dtype):
    n = (1, 2, 7, 60)[seed % 4]
    A = ns.aslinearoperator(draw(2 * n, n, dtype=dtype, seed=seed)).gram(0.1) @ draw(n, n, dtype=dtype, seed=seed + 100)
    report = check_operator(A, torch.zeros(n, dtype=dtype), seed=seed)
    assert report.ok, str(report)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("size", [1000, 2**16])
def test_rounding_of_large_operators_passes(size, dtype):
    A = (
        draw(size, size, dtype=dtype)
        if size <= 1000
        else lambda v: torch.fft.irfft(torch.fft.rfft(v) * torch.linspace(0, 9, size // 2 + 1))
    )
    report = check_operator(A, torch.zeros(size, dtype=dtype), samples=1)
    assert report.ok, str(report)


# -- check_operator: each fault is found -------------------------------------------------------------------------------

BUFFER = torch.zeros(6, dtype=F64)


def into_a_buffer(v: Tensor) -> Tensor:
    return torch.mul(v, 2, out=BUFFER)


GENERATOR = torch.Generator().manual_seed(0)


def dropped_out(v: Tensor) -> Tensor:
    return v * torch.bernoulli(torch.full_like(v, 0.5), generator=GENERATOR)


def into_its_argument(v: Tensor) -> Tensor:
    return v.mul_(2)


def rounded(v: Tensor, bits: int = 13) -> Tensor:
    """float32 with the last bits cut off, as TF32 reads it."""
    return ((v.view(torch.int32) + (1 << (bits - 1))) & -(1 << bits)).view(F32)


def wrong_backward(v: Tensor) -> Tensor:
    return WrongBackward.apply(v, V + 3, 2.0, 1.0)


def skewed(v: Tensor) -> Tensor:
    return definite() @ v + 1e-6 * (v.roll(1) - v.roll(-1))


FAULTY = {
    "raises": (lambda v: v @ torch.zeros(3, dtype=F64), V, {}, "result", "RuntimeError"),
    "returns a list": (lambda v: v.tolist(), V, {}, "result", "Tensors"),
    "returns another dtype": (lambda v: v.float(), V, {}, "result", "float32"),
    "is complex on a real vector": (lambda v: 1j * v, V, {}, "result", "complex vector"),
    "returns NaN": (lambda v: v / 0 * 0, V, {}, "result", "NaN"),
    "differs from its codomain": (ns.LinearOperator(lambda v: v[:3], domain=V, codomain=V[:4]), V, {}, "result", "codomain"),
    "is given a vector outside its domain": (ns.LinearOperator(lambda v: v, domain=V[:3]), V, {}, "result", "expected shape"),
    "is claimed Hermitian and rectangular": (lambda v: v[1:], V, dict(hermitian=True), "result", "Hermitian"),
    "is random": (dropped_out, V, {}, "repeatable", "dropout"),
    "writes into its argument": (into_its_argument, V, {}, "input kept", "clone"),
    "reuses a buffer": (into_a_buffer, V, {}, "result kept", "buffer"),
    "is affine": (torch.nn.Linear(6, 6, dtype=F64), V, {}, "additivity", "affine"),
    "is slightly affine": (lambda v: R @ v + 1e-9, V, {}, "additivity", "affine"),
    "is quadratic": (lambda v: v + 1e-6 * v**2, V, {}, "additivity", "not linear"),
    "takes a modulus": (lambda v: v.abs(), V, {}, "additivity", "not linear"),
    "normalises": (lambda v: v / v.norm(), V, {}, "additivity", "not linear"),
    "clamps": (lambda v: v.clamp(-30, 30), V, {}, "homogeneity", "not linear"),
    "has an absolute epsilon": (lambda v: v * v.norm() / (v.norm() + 1e-12), V, {}, "additivity", "not linear"),
    "drops what is small": (lambda v: torch.where(v.abs() < 1e-5, 0.0, v), V, {}, "homogeneity", "not linear"),
    "conjugates": (lambda v: C @ v.conj(), Z, {}, "complex homogeneity", "over the reals"),
    "takes the real part": (lambda v: v.real + 0j, Z, {}, "complex homogeneity", "over the reals"),
    "takes the real part of a leaf": (lambda d: [d[0], d[1].real + 0j], [Z, Z], {}, "complex homogeneity", "over the reals"),
    "detaches its argument": (lambda v: R @ v.detach(), V, {}, "adjoint", "adjoint=..."),
    "detaches a part": (lambda v: v + R @ v.detach(), V, {}, "adjoint", "detach"),
    "is opaque": (NumPy(), V, {}, "adjoint", "adjoint=..."),
    "has a wrong backward": (wrong_backward, V, {}, "adjoint", "custom backward"),
    "has A for an adjoint": (lambda v: R @ v, V, dict(adjoint=lambda y: R @ y), "adjoint", "not the adjoint"),
    "has a transpose for an adjoint": (lambda v: C @ v, Z, dict(adjoint=lambda y: C.T @ y), "adjoint", "conjugated"),
    "has a scaled adjoint": (lambda v: R @ v, V, dict(adjoint=lambda y: 1.0001 * (R.mT @ y)), "adjoint", "not the adjoint"),
    "has an adjoint of a wrong shape": (lambda v: v[1:], V, dict(adjoint=lambda y: y), "adjoint", "expected A^H y"),
    "has a right adjoint and a wrong backward": (wrong_backward, V, dict(adjoint=lambda y: 3 * y), "autograd", "is wrong"),
    "is not Hermitian": (R, V, dict(hermitian=True), "hermitian", "drop the claim"),
    "is symmetric and not Hermitian": (C + C.T, Z, dict(hermitian=True), "hermitian", "drop the claim"),
    "is almost Hermitian": (skewed, V, dict(hermitian=True), "hermitian", "drop the claim"),
    "is claimed Hermitian itself": (ns.aslinearoperator(R, hermitian=True), V, {}, "hermitian", "drop the claim"),
    "is indefinite": (definite() - 2 * torch.eye(6), V, dict(positive_definite=True), "positive definite", "drop the claim"),
    "is negative definite": (-definite(), V, dict(positive_definite=True), "positive definite", "-A and -b"),
    "mixes the batch": (lambda v: v + v.mean(0), torch.zeros(3, 4, dtype=F64), dict(batch_dims=1), "batch", "independent"),
}  # fmt: skip


@pytest.mark.parametrize(("A", "like", "options", "name", "words"), FAULTY.values(), ids=FAULTY)
def test_a_fault_is_found_and_named(A, like, options, name, words):
    report = check_operator(A, like, **options)
    assert not report.ok
    assert not report[name].ok
    assert words in report[name].message
    # the fault has that name first: what comes before it in the report is right
    assert next(item.name for item in report.items if item.required and not item.ok) == name


@pytest.mark.parametrize("size", [50, 5000, 200_000])
def test_reduced_precision_is_found_at_every_size_and_named(size):
    kernel = torch.linspace(1, 2, 5)
    report = check_operator(lambda v: torch.conv1d(rounded(v)[None], kernel[None, None]).squeeze(0), torch.zeros(size))
    assert not report["additivity"].ok
    assert "TF32" in report["additivity"].message


@pytest.mark.parametrize(("inner", "outer"), [(F32, F64), (torch.float16, F32), (torch.bfloat16, F32), (C64, C128)])
def test_a_cast_inside_is_found_and_named(inner, outer):
    report = check_operator(lambda v: 3 * v.to(inner).to(outer) - v.roll(1), torch.zeros(40, dtype=outer))
    assert not report.ok
    assert "narrower format" in report["additivity"].message


def test_a_nonlinearity_is_not_taken_for_reduced_precision():
    report = check_operator(lambda v: v + 1e-4 * v.sin(), V)
    assert not report.ok
    assert "narrower format" not in str(report)


def test_a_looser_tolerance_admits_an_inexact_operator():
    A = lambda v: R @ v + 1e-7 * v.abs()  # noqa: E731
    assert not check_operator(A, V).ok
    assert check_operator(A, V, tolerance=1e-5).ok


def test_what_is_not_linear_has_no_adjoint_to_test():
    report = check_operator(torch.abs, V)
    assert "adjoint" not in report
    assert "narrower format" not in str(report)


def test_a_slightly_scaled_adjoint_of_large_opaque_code_is_found():
    """Two random vectors are nearly orthogonal, and their products would differ by 1e-5: y = A x shows it."""
    n = 100_000

    def adjoint(y: Tensor) -> Tensor:
        return 2.01 * y

    assert not check_operator(NumPy(), torch.zeros(n), adjoint=adjoint)["adjoint"].ok


def test_a_rare_fault_in_the_adjoint_is_found():
    """One wrong row of a thousand: a dot test with two random vectors alone would see 1/1000 of nothing."""
    n = 1000

    def adjoint(y: Tensor) -> Tensor:
        x = 2 * y
        x[17] += 1e-3 * y[18]
        return x

    assert not check_operator(lambda v: 2 * v, torch.zeros(n, dtype=F64), adjoint=adjoint).ok


def test_one_negative_eigenvalue_is_found_among_many():
    """A random vector has a negative quotient with probability near 0; the Lanczos process finds the eigenvalue."""
    d = torch.linspace(1, 2, 400, dtype=F64)
    d[13] = -0.5
    assert not check_operator(lambda v: d * v, d, positive_definite=True)["positive definite"].ok


# -- check_operator: information ---------------------------------------------------------------------------------------

KINDS = {
    "general": (R, False, None),
    "definite": (definite(), True, True),
    "indefinite": (R + R.mT, True, False),
    "negative definite": (-definite(), True, False),
    "semidefinite": (draw(6, 2) @ draw(6, 2).mT, True, False),
}


@pytest.mark.parametrize(("A", "hermitian", "positive"), KINDS.values(), ids=KINDS)
def test_what_is_not_claimed_is_told_and_not_required(A, hermitian, positive):
    report = check_operator(A, V)
    assert report.ok
    assert report["hermitian"].ok is hermitian
    assert not report["hermitian"].required
    if positive is None:
        assert "positive definite" not in report
    else:
        assert report["positive definite"].ok is positive
        assert not report["positive definite"].required
    assert ("claim positive_definite=True" in str(report)) is bool(positive)


def test_a_semidefinite_operator_passes_as_claimed_with_a_word_about_it():
    report = check_operator(lambda v: 2 * v - v.roll(1) - v.roll(-1), V, positive_definite=True)
    assert report.ok
    assert "semidefinite" in report["positive definite"].message


def test_opaque_code_with_a_right_adjoint_is_told_not_to_have_second_derivatives():
    report = check_operator(NumPy(), V, adjoint=NumPy())
    assert report.ok
    assert not report["autograd"].ok
    assert not report["autograd"].required
    assert "second derivatives" in report["autograd"].message


# -- both: side effects, options, reports ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check", [lambda A, b: check_operator(A, b), lambda A, b: check_gradient(A, b)], ids=["operator", "gradient"]
)
def test_a_check_leaves_no_trace(check):
    W, b = well().requires_grad_(), draw(6).requires_grad_()
    module = NoBias()
    tensors = [W, b, module.inner.weight]
    before = [(t.detach().clone(), t._version, t.data_ptr()) for t in tensors]
    state = torch.get_rng_state()
    check(lambda v: W @ v + 0.1 * module(v), b)
    assert torch.equal(torch.get_rng_state(), state)
    for tensor, (values, version, pointer) in zip(tensors, before, strict=True):
        assert torch.equal(tensor.detach(), values)
        assert (tensor._version, tensor.data_ptr(), tensor.grad) == (version, pointer, None)


@pytest.mark.parametrize("check", [check_operator, check_gradient])
def test_the_same_seed_gives_the_same_report_and_another_seed_another(check):
    W, b = well().requires_grad_(), draw(6)
    assert check(W, b, seed=3) == check(W, b, seed=3)
    assert check(W, b, seed=3) != check(W, b, seed=4)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("check", [check_operator, check_gradient])
def test_grad_mode_outside_does_not_matter(check, grad):
    W = well().requires_grad_()
    expected = check(lambda v: W @ v, draw(6))
    with torch.set_grad_enabled(grad):
        assert check(lambda v: W @ v, draw(6)) == expected
        assert torch.is_grad_enabled() is grad


def test_a_report_reads_as_text_and_as_values():
    report = check_operator(R, V, hermitian=True)
    text = str(report)
    assert text.splitlines()[0] == "check_operator: DenseOperator on (6,) float64: FAILED: hermitian"
    assert len(text.splitlines()) == 1 + len(report.items)
    line = next(line for line in text.splitlines() if line.split()[1] == "hermitian")
    assert line.split()[0] == "FAIL"
    item = report["hermitian"]
    assert item.measured > item.tolerance > 0
    assert f"{item.measured:.1e}" in line
    assert f"{item.tolerance:.1e}" in line
    assert not report
    assert "positive definite" not in report
    with pytest.raises(KeyError, match="additivity"):
        report["no such item"]
    with pytest.raises(AttributeError):
        item.ok = True


def test_only_required_items_decide():
    items = (CheckItem("a", True), CheckItem("b", False, required=False))
    assert CheckReport("subject", items).ok
    assert not CheckReport("subject", (*items, CheckItem("c", False))).ok


WRONG_CHECKS = {
    "operator": lambda **options: check_operator(R, V, hermitian=True, **options),
    "gradient": lambda **options: check_gradient(
        lambda v: (2 * V.new_ones(6).requires_grad_()).detach() * v, V + 1, maxiter=0, **options
    ),
}


@pytest.mark.parametrize("check", WRONG_CHECKS.values(), ids=WRONG_CHECKS)
def test_raise_on_error_raises_the_report(check):
    with pytest.raises(CheckError) as caught:
        check(raise_on_error=True)
    assert caught.value.report == check()
    assert str(caught.value) == str(check())


def test_raise_on_error_returns_a_report_that_is_ok():
    assert check_operator(R, V, raise_on_error=True).ok
    assert check_gradient(well(), V + 1, raise_on_error=True).ok


MISUSED = {
    "operator, unknown option": (lambda: check_operator(R, V, hermitan=True), TypeError, "did you mean 'hermitian'"),
    "operator, no tensor": (lambda: check_operator(R, [1.0]), TypeError, "like"),
    "operator, integers": (lambda: check_operator(R, torch.arange(6)), ValueError, "like.*int64"),
    "operator, batch_dims": (lambda: check_operator(R, V, batch_dims=2), ValueError, "batch_dims"),
    "operator, samples": (lambda: check_operator(R, V, samples=0), ValueError, "samples"),
    "operator, nothing like one": (lambda: check_operator("A", V), TypeError, "A: expected"),
    "gradient, unknown option": (lambda: check_gradient(R, V, rtoll=1e-3), TypeError, "did you mean 'rtol'"),
    "gradient, unknown option of its own": (lambda: check_gradient(R, V, direction=1), TypeError, "did you mean 'directions'"),
    "gradient, none": (lambda: check_gradient(R, V, grad="none"), ValueError, "grad"),
    "gradient, directions": (lambda: check_gradient(R, V, directions=0), ValueError, "directions"),
    "gradient, rectangular": (lambda: check_gradient(R[:3], V), ValueError, "square"),
}


@pytest.mark.parametrize(("call", "error", "words"), MISUSED.values(), ids=MISUSED)
def test_misuse_raises_and_names_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()


# -- check_gradient: what is right passes ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64, C64, C128])
@pytest.mark.parametrize("method", ["cg", "minres", "gmres", "bicgstab", "direct"])
def test_a_right_gradient_passes(method, dtype):
    W = (definite(dtype=dtype) if method in ("cg", "minres") else well(dtype=dtype)).requires_grad_()
    A = W if method == "direct" else lambda v: W @ v
    report = check_gradient(A, draw(6, dtype=dtype, seed=5), method=method)
    assert report.ok, str(report)
    assert [item.name for item in report.items] == ["solve", "adjoint solve", "b", "A" if method == "direct" else "W"]


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("to", LAYOUTS.values(), ids=LAYOUTS)
def test_a_sparse_matrix_is_moved_on_its_own_pattern(to, dtype):
    dense = well(dtype=dtype)
    dense[0, 1] = dense[4, 2] = 0
    A = to(dense).requires_grad_()
    before = to(dense).to_dense()
    report = check_gradient(A, draw(6, dtype=dtype))
    assert report.ok, str(report)
    assert report["A"].measured > 0
    assert torch.equal(A.detach().to_dense(), before)


def test_a_non_leaf_and_what_it_comes_from_are_moved_each_alone():
    theta = draw(6).requires_grad_()
    weights = torch.softmax(theta, 0)
    flipped = theta.flip(0)
    view = theta[:3]
    saved = [t.detach().clone() for t in (theta, weights, flipped, view)]
    b = draw(6)

    def A(v: Tensor) -> Tensor:
        return (3 + theta.sin() + weights + 0.1 * flipped.sin() + view.sum().cos()) * v - 0.5 * v.roll(1)

    report = check_gradient(A, b)
    assert report.ok, str(report)
    assert {"theta", "weights", "flipped", "view"} <= {item.name for item in report.items}
    assert all(torch.equal(t.detach(), s) for t, s in zip((theta, weights, flipped, view), saved, strict=True))
    # the graph that was there before can still be used
    (grad,) = torch.autograd.grad((weights * draw(6)).sum() + view.sum(), theta)
    assert grad.shape == (6,)


def test_elements_that_share_memory_are_moved_each_alone():
    theta = draw(6).requires_grad_()
    repeated, windows = theta[:1].expand(6), theta.unfold(0, 3, 1)[:, 1].repeat(2)[:6]
    overlapping = theta.unfold(0, 2, 1)
    report = check_gradient(lambda v: (3 + repeated.sin() + windows.sin() + overlapping.sin().sum(1).sum()) * v, draw(6))
    assert report.ok, str(report)
    assert {"repeated", "windows", "overlapping"} <= {item.name for item in report.items}


class Smoother:
    def __init__(self) -> None:
        self.strength = torch.tensor(0.3, dtype=F64, requires_grad=True)
        self.kernels = [draw(6).requires_grad_()]

    def apply(self, v: Tensor) -> Tensor:
        return 3 * v + self.strength.exp() * v.roll(1) + 0.1 * self.kernels[0] * v


GLOBAL = torch.full((6,), 0.4, dtype=F64, requires_grad=True)
SPARSE = definite().to_sparse_coo().coalesce().requires_grad_()
NAMED = {
    "a global": (lambda v: (2 + GLOBAL) * v, {}, {"GLOBAL"}),
    "a bound method": (Smoother().apply, {}, {"strength", "kernels[0]"}),
    "a module": (NoBias(), {}, {"inner.weight"}),
    "a composition": (
        ns.aslinearoperator(NoBias()) + 3 * ns.aslinearoperator(lambda v: v * GLOBAL.exp()),
        {},
        {"parts[0].inner.weight", "GLOBAL"},
    ),
    "params": (lambda v, s, t: s * v + t * v.roll(1), dict(params=(GLOBAL + 2, GLOBAL)), {"params[0]", "params[1]"}),
    "params in trees": (
        lambda v, p: p["s"] * v,
        dict(params=({"s": GLOBAL + 2, "t": [GLOBAL]},)),
        {"params[0]['s']", "params[0]['t'][0]"},
    ),
    "a sparse matrix in a composition": (ns.aslinearoperator(SPARSE) + (lambda v: 3 * v), {}, {"parts[0].source"}),
    "a sparse non-leaf in a composition": (ns.aslinearoperator(2 * SPARSE) + (lambda v: 3 * v), {}, {"parts[0]"}),
    "a non-leaf sparse matrix": (2 * SPARSE, {}, {"A"}),
}


@pytest.mark.parametrize(("A", "options", "expected"), NAMED.values(), ids=NAMED)
def test_tensors_have_the_names_that_the_user_gave_them(A, options, expected):
    report = check_gradient(A, draw(6), rtol=1e-12, **options)
    assert report.ok, str(report)
    names = {item.name for item in report.items} - {"solve", "adjoint solve", "b"}
    assert len(names) == len(expected)
    assert all(any(word in name for name in names) for word in expected), names


def test_a_tree_a_batch_and_an_operator_with_claims_pass():
    s = torch.tensor([0.5, 1.5], dtype=F64, requires_grad=True)
    b = {"u": draw(2, 3), "w": draw(2, 4)}

    def A(d: dict[str, Tensor]) -> dict[str, Tensor]:
        coupled = d["w"].sum(1, keepdim=True)
        return {"u": (3 + s[:, None]) * d["u"] + 0.1 * coupled, "w": 4 * d["w"] + 0.1 * d["u"].sum(1, keepdim=True)}

    report = check_gradient(ns.LinearOperator(A, positive_definite=True), b, batch_dims=1)
    assert report.ok, str(report)
    assert {"b['u']", "b['w']", "s"} <= {item.name for item in report.items}
    report = check_gradient(draw(3, 6, 6).div(5).add(torch.eye(6) * 2).requires_grad_(), draw(3, 6))
    assert report.ok, str(report)


def test_an_ill_conditioned_system_passes_by_smaller_steps():
    d = torch.logspace(0, -6, 12, dtype=F64).requires_grad_()
    report = check_gradient(lambda v: d * v, torch.ones(12, dtype=F64), method="cg", rtol=1e-13)
    assert report.ok, str(report)


def test_a_zero_tensor_has_a_step():
    shift = torch.zeros(6, dtype=F64, requires_grad=True)
    report = check_gradient(lambda v: (2 + shift) * v, draw(6))
    assert report.ok, str(report)
    assert report["shift"].measured > 0


def test_callbacks_see_the_checked_solve_only():
    W, b = definite().requires_grad_(), draw(6).requires_grad_()
    seen, expected = [], []

    def note(into: list) -> object:
        return lambda state: into.append((state.phase, state.iteration))

    ns.solve(lambda v: W @ v, b, method="cg", callback=note(expected)).sum().backward()
    assert check_gradient(lambda v: W @ v, b, method="cg", callback=note(seen), history=True).ok
    assert seen[: sum(phase == "forward" for phase, _ in seen)] == [item for item in expected if item[0] == "forward"]
    assert len(seen) < 2 * len(expected)


def test_an_unrolled_gradient_is_compared_with_the_iteration_that_was_run():
    W = well().requires_grad_()
    report = check_gradient(lambda v: W @ v, draw(6), method="gmres", grad="unroll", maxiter=2)
    assert not report["solve"].ok
    assert report["b"].ok, str(report)
    assert report["W"].ok, str(report)


# -- check_gradient: each fault is found -------------------------------------------------------------------------------

LAM = torch.tensor(0.7, dtype=F64, requires_grad=True)


def without_a_graph(v: Tensor) -> Tensor:
    with torch.no_grad():
        strength = LAM.exp()
    return 3 * v + strength * v.roll(1)


WRONG = {
    "item": (lambda v: 3 * v + LAM.item() * v.roll(1), "LAM", "no gradient reaches it"),
    "detach": (lambda v: 3 * v + LAM.detach() * v.roll(1), "LAM", "no gradient reaches it"),
    "detached in part": (lambda v: 3 * v + (LAM + LAM.detach()) * v.roll(1), "LAM", "not the derivative"),
    "no_grad": (without_a_graph, "LAM", "no gradient reaches it"),
    "wrong backward": (lambda v: WrongBackward.apply(v, 3 + LAM.expand(6), 1.0, 2.0), "LAM", "not the derivative"),
}


@pytest.mark.parametrize(("A", "name", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_gradient_is_found_and_named(A, name, words):
    report = check_gradient(A, draw(6), on_failure="ignore")
    assert not report[name].ok
    assert report[name].measured > 0.1
    assert words in report[name].message


def test_a_lost_dependency_is_reported():
    lost = torch.tensor(2.0, dtype=F64, requires_grad=True)

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v: Tensor) -> Tensor:
            return v * 3

        @staticmethod
        def backward(ctx, g: Tensor) -> Tensor:
            return g * 3

    hidden = [lost * 1]

    def A(v: Tensor) -> Tensor:
        return torch._C._nn.linear(v, torch.eye(6, dtype=F64)) * 2 + Opaque.apply(v) * 0 + hide(hidden[0], v)

    report = check_gradient(A, draw(6))
    assert not report.ok
    assert [item.name for item in report.items] == ["dependencies"]
    assert "params=" in report["dependencies"].message


def hide(tensor: Tensor, v: Tensor) -> Tensor:
    """A product that no mode sees."""
    with torch._C.DisableTorchFunction():
        return tensor * v


def test_solves_that_fail_are_reported_in_both_passes():
    W = well().requires_grad_()
    report = check_gradient(lambda v: W @ v, draw(6), method="gmres", maxiter=2)
    assert [item.name for item in report.items if not item.ok] == ["solve", "adjoint solve", "b", "W"]
    assert "iteration limit" in report["solve"].message
    assert "did not converge" in report["W"].message


def test_a_wrong_adjoint_is_a_failed_adjoint_solve():
    W = well().requires_grad_()
    report = check_gradient(ns.LinearOperator(lambda v: W @ v, adjoint=lambda y: W @ y), draw(6))
    assert report["solve"].ok
    assert not report["adjoint solve"].ok


def test_a_loose_rtol_loosens_the_tolerance_and_is_met():
    W = definite().requires_grad_()
    loose, tight = (check_gradient(lambda v: W @ v, draw(6), method="cg", rtol=rtol) for rtol in (1e-5, 1e-12))
    assert loose.ok
    assert tight.ok
    assert tight["W"].tolerance < loose["W"].tolerance
    assert tight["W"].measured < 1e-8


def test_an_infinite_measure_fails():
    report = check_operator(lambda v: v * math.inf, V, tolerance=1.0)
    assert not report.ok
