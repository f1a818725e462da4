"""Every operator equals its matrix, in everything that an operator can do; see `operator_cases.py`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from operator_cases import Instance, flat, instances, random_like
from torch import Tensor
from torch.utils import _pytree as pytree

import nablasolve as ns
from nablasolve.operators.spaces import dimension, is_complex

ALL, WIDE = instances(), instances(wide=True)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
EXACT = {torch.float32: 2e-5, torch.complex64: 2e-5, torch.float64: 1e-12, torch.complex128: 1e-12}


def times(M: Tensor, x: Tensor) -> Tensor:
    """The product of a matrix and a vector, of which either may be real."""
    dtype = torch.promote_types(M.dtype, x.dtype)
    return M.to(dtype) @ x.to(dtype)


def close(value: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Equal to a relative tolerance of the whole."""
    dtype = torch.promote_types(value.dtype, expected.dtype) if expected.is_complex() else value.dtype
    value, expected = value.detach().to(dtype), expected.detach().to(dtype)
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    return value.shape == expected.shape and float((value - expected).abs().max() if value.numel() else 0) <= tolerance * (
        scale or 1
    )


@pytest.mark.parametrize("instance", ALL, ids=str)
def test_operator_equals_its_matrix(instance: Instance) -> None:
    p, tolerance = instance.parameters, EXACT[instance.dtype]
    A, M = instance.case.build(**p), instance.case.dense(**p)
    assert (dimension(A.codomain), dimension(A.domain)) == M.shape
    assert close(A.to_dense(), M, tolerance)
    x, y = random_like(A.domain, seed=5), random_like(A.codomain, seed=6)
    assert close(flat(A(x)), times(M, flat(x)), tolerance)
    # the adjoint of an operator from a real into a complex space has real values
    expected = times(M.mH, flat(y))
    assert close(flat(A.H(y)), expected if is_complex(A.domain) or not expected.is_complex() else expected.real, tolerance)


@pytest.mark.parametrize("instance", WIDE, ids=str)
def test_compositions_equal_those_of_the_matrix(instance: Instance) -> None:
    p, tolerance = instance.parameters, 50 * EXACT[instance.dtype]
    A, M = instance.case.build(**p), instance.case.dense(**p)
    if is_complex(A.codomain) != is_complex(A.domain):
        gram = (M.mH @ M).real
        assert close(A.gram(0.5).to_dense(), gram + 0.25 * torch.eye(len(gram), dtype=gram.dtype), tolerance)
        return
    eye = torch.eye(M.shape[1], dtype=M.dtype)
    assert close(A.gram(0.5).to_dense(), M.mH @ M + 0.25 * eye, tolerance)
    assert close((A.H @ A).to_dense(), M.mH @ M, tolerance)
    assert close((2 * A - A / 4).to_dense(), 1.75 * M, tolerance)
    assert close((-A).H.to_dense(), -M.mH, tolerance)
    assert close(A.T.to_dense(), M.mT, tolerance)
    assert close(A.conj().to_dense(), M.conj(), tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("instance", ALL, ids=str)
def test_operator_passes_its_own_check(instance: Instance, device: str) -> None:
    A = instance.case.build(**{name: t.to(device) for name, t in instance.parameters.items()})
    like = pytree.tree_map(lambda t: t.to(device), random_like(A.domain))
    report = ns.check_operator(A, like, samples=1)
    assert report.ok, report


@pytest.mark.parametrize("instance", WIDE, ids=str)
def test_claims_are_true_of_the_matrix(instance: Instance) -> None:
    p = instance.parameters
    A, M = instance.case.build(**p), instance.case.dense(**p)
    for op, matrix in ((A, M), (A.H, M.mH), (A.gram(0.5), M.mH @ M + 0.25 * torch.eye(M.shape[1], dtype=M.dtype))):
        if op.hermitian:
            assert close(matrix, matrix.mH, 1e-11)
            eigenvalues = torch.linalg.eigvalsh(matrix)
            assert not op.claims.positive_semidefinite or eigenvalues[0] >= -1e-11 * eigenvalues[-1].abs()
            assert not op.positive_definite or eigenvalues[0] > 0
        if op.claims.isometric:
            assert close(matrix.mH @ matrix, torch.eye(matrix.shape[1], dtype=matrix.dtype), 1e-11)
        if op.claims.coisometric:
            assert close(matrix @ matrix.mH, torch.eye(matrix.shape[0], dtype=matrix.dtype), 1e-11)


@pytest.mark.parametrize("instance", WIDE, ids=str)
def test_what_is_called_exact_is_exact(instance: Instance) -> None:
    p = instance.parameters
    A, M = instance.case.build(**p), instance.case.dense(**p)
    if A.exact_norm() is not None:
        assert close(A.norm_estimate(), torch.linalg.matrix_norm(M, ord=2), 1e-10)
    if M.shape[0] != M.shape[1] or is_complex(A.codomain) != is_complex(A.domain):
        return
    value, how = A.diagonal(return_how=True)
    assert how == "exact"
    assert close(flat(value), M.diagonal(), 1e-11)
    value, how = A.trace(return_how=True)
    assert how == "exact"
    assert close(value, M.trace(), 1e-10)
    if A.hermitian:
        (low, high), how = A.eigenvalue_bounds(return_how=True)
        eigenvalues = torch.linalg.eigvalsh(M)
        slack = 1e-9 * eigenvalues.abs().max()
        assert low <= eigenvalues[0] + slack
        assert high >= eigenvalues[-1] - slack
        if how == "exact":
            assert abs(low - eigenvalues[0]) <= slack
            assert abs(high - eigenvalues[-1]) <= slack


@pytest.mark.parametrize("instance", [i for i in WIDE if not i.dtype.is_complex and not i.case.real_only], ids=str)
def test_a_real_operator_acts_on_complex_vectors(instance: Instance) -> None:
    p = instance.parameters
    A, M = instance.case.build(**p), instance.case.dense(**p).to(torch.complex128)
    if is_complex(A.domain) or is_complex(A.codomain):
        return
    x, y = random_like(A.domain, seed=5, complex_=True), random_like(A.codomain, seed=6, complex_=True)
    assert close(flat(A(x)), M @ flat(x), 1e-12)
    assert close(flat(A.H(y)), M.mH @ flat(y), 1e-12)


@pytest.mark.parametrize("instance", WIDE, ids=str)
def test_operator_acts_on_each_vector_of_a_batch_and_under_vmap(instance: Instance) -> None:
    A = instance.case.build(**instance.parameters)
    for op in (A, A.H):
        x = random_like(op.domain, seed=5, batch=(3,))
        ones = [op(pytree.tree_map(lambda leaf, i=i: leaf[i], x)) for i in range(3)]
        expected = torch.stack([flat(y) for y in ones])
        mapped = torch.vmap(op.apply)(x)
        assert close(torch.stack([flat(pytree.tree_map(lambda leaf, i=i: leaf[i], mapped)) for i in range(3)]), expected, 1e-11)
        if instance.case.batched:
            batched = op(x)
            got = torch.stack([flat(pytree.tree_map(lambda leaf, i=i: leaf[i], batched)) for i in range(3)])
            assert close(got, expected, 1e-12)


def system(instance: Instance, p: dict[str, Tensor]) -> tuple[ns.LinearOperator, Tensor]:
    """The operator to solve with, and its matrix."""
    A, M = instance.case.build(**p), instance.case.dense(**p)
    if instance.case.solvable:
        return A, M
    gram = M.mH @ M
    gram = gram.real if M.is_complex() and not is_complex(A.domain) else gram
    return A.gram(1.0), gram + torch.eye(M.shape[1], dtype=gram.dtype)


@pytest.mark.parametrize("instance", WIDE, ids=str)
def test_solve_has_the_gradients_of_the_dense_solution(instance: Instance) -> None:
    p = {name: t.clone().requires_grad_() for name, t in instance.parameters.items()}
    A, M = system(instance, p)
    b = pytree.tree_map(lambda t: t.requires_grad_(), random_like(A.codomain, seed=7))
    x, info = ns.solve_ex(A, b, rtol=1e-12)
    if instance.case.direct:
        assert info.method == "direct"
    expected = torch.linalg.inv(M) @ flat(b)
    assert close(flat(x), expected, 1e-9)
    weights = random_like(A.domain, seed=8)
    inputs = [*p.values(), *pytree.tree_leaves(b)]
    got = torch.autograd.grad((flat(x) * flat(weights)).sum().abs(), inputs, allow_unused=True)
    wanted = torch.autograd.grad((expected * flat(weights)).sum().abs(), inputs, allow_unused=True)
    scale = max(float(w.abs().max()) for w in wanted if w is not None)
    for g, w in zip(got, wanted, strict=True):
        g = torch.zeros(()) if g is None else g
        w = torch.zeros(()) if w is None else w
        assert float((g - w).abs().max()) <= 1e-7 * scale


@pytest.mark.parametrize("instance", [i for i in WIDE if i.case.mappable], ids=str)
def test_solve_works_under_transforms_of_the_parameters(instance: Instance) -> None:
    p = instance.parameters
    names = [name for name in p if p[name].is_floating_point() or p[name].is_complex()]
    A, _ = system(instance, p)
    b, weights = random_like(A.codomain, seed=7), random_like(A.domain, seed=8)

    def loss(dense: bool, *values: Tensor) -> Tensor:
        A, M = system(instance, {**p, **dict(zip(names, values, strict=True))})
        x = torch.linalg.inv(M) @ flat(b) if dense else flat(ns.solve(A, b, rtol=1e-12))
        return (x * flat(weights)).sum().abs().square()

    values = [p[name] for name in names]
    tangents = [draw_like(v, seed=9 + i) for i, v in enumerate(values)]
    for mode in (
        lambda f: torch.func.jvp(f, tuple(values), tuple(tangents))[1],
        lambda f: torch.vmap(f)(*(torch.stack([v, v * 1.1]) for v in values)),
    ):
        got, wanted = (mode(lambda *v, dense=dense: loss(dense, *v)) for dense in (False, True))
        assert float((got - wanted).abs().max()) <= 1e-7 * max(float(wanted.abs().max()), 1e-3)


def draw_like(t: Tensor, seed: int) -> Tensor:
    return torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("instance", WIDE, ids=str)
def test_copies_are_the_same_operator(instance: Instance) -> None:
    A = instance.case.build(**instance.parameters)
    x = random_like(A.domain, seed=5)
    copies = [copy.copy(A), copy.deepcopy(A)]
    if instance.case.picklable:
        copies.append(pickle.loads(pickle.dumps(A)))
    for again in copies:
        assert repr(again) == repr(A)
        assert close(flat(again(x)), flat(A(x)), 1e-14)
        assert close(flat(again.H(A(x))), flat(A.H(A(x))), 1e-14)


@pytest.mark.parametrize("instance", [i for i in WIDE if i.case.movable], ids=str)
def test_an_operator_moves_to_another_precision_and_back(instance: Instance) -> None:
    A = instance.case.build(**instance.parameters)
    narrow = A.to(torch.float32)
    x = pytree.tree_map(lambda t: t.to(torch.complex64 if t.is_complex() else torch.float32), random_like(A.domain, seed=5))
    y = narrow(x)
    assert all(leaf.dtype in (torch.float32, torch.complex64) for leaf in pytree.tree_leaves(y))
    assert close(flat(y), flat(A(random_like(A.domain, seed=5))), 1e-4)
    assert repr(narrow.to(torch.float64)) == repr(A)
    assert repr(A.to("cpu")) == repr(A)


@pytest.mark.parametrize("instance", WIDE, ids=str)
def test_the_repr_shows_shapes_dtypes_and_claims(instance: Instance) -> None:
    A = instance.case.build(**instance.parameters)
    first = repr(A).splitlines()[0]
    assert str(instance.dtype).removeprefix("torch.") in first or "->" in first
    claims = str(A.claims)
    assert first.endswith(f"[{claims}]") if claims else not first.endswith("]")
    assert "\n" not in A.expression


def test_every_operator_of_the_library_stands_in_the_grid() -> None:
    """A new operator is listed in `operators/__init__.py`, and must then have a case."""
    from nablasolve import operators

    seen: set[type] = set()

    def visit(A: ns.LinearOperator) -> None:
        seen.update(type(A).__mro__)
        for part in A.parts:
            visit(part)

    for instance in ALL:
        visit(instance.case.build(**instance.parameters))
    classes = {value for value in vars(operators).values() if isinstance(value, type) and issubclass(value, ns.LinearOperator)}
    assert classes - seen == set()
