"""The front door: what is refused and how, every form of vector, batches, and what a solve leaves alone."""

import copy
import inspect
import io
import itertools
import logging
import pickle
import re
from collections import OrderedDict, namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nablasolve as ns
from nablasolve import Status

N = 6
KRYLOV = ("cg", "minres", "gmres", "bicgstab")
METHODS = (*KRYLOV, "direct")
FUNCTIONS = {"cg": ns.cg, "minres": ns.minres, "gmres": ns.gmres, "bicgstab": ns.bicgstab}

each_method = pytest.mark.parametrize("method", METHODS)
each_krylov = pytest.mark.parametrize("method", KRYLOV)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spd(*shape, seed=0, dtype=torch.float64):
    """Well-conditioned Hermitian positive definite matrices, which every method solves."""
    W = draw(*shape, shape[-1], seed=seed, dtype=dtype)
    return W @ W.mH / shape[-1] + torch.eye(shape[-1], dtype=dtype)


def matvec(A):
    """The closure of a matrix, or of a batch of them."""
    return lambda v: (A @ v.unsqueeze(-1)).squeeze(-1)


def source(method, A):
    return A if method == "direct" else matvec(A)


def norm(x):
    return torch.linalg.vector_norm(x)


A, b = spd(N), draw(N, seed=1)
apply = matvec(A)


# -- what is refused ------------------------------------------------------------------------------------------------

SPARSE = A.to_sparse_csr()
META = torch.device("meta")

REFUSED = {
    # the operator
    "A None": (lambda: ns.solve(None, b), TypeError, r"^A: expected .*NoneType"),
    "A a string": (lambda: ns.solve("laplace", b), TypeError, r"^A: expected .*str"),
    "A a list of lists": (lambda: ns.solve(A.tolist(), b), TypeError, r"^A: expected .*list"),
    "A an array": (lambda: ns.solve(A.numpy(), b), TypeError, r"^A: expected .*ndarray"),
    "A integer": (lambda: ns.solve(A.long(), b), ValueError, r"^A: expected .*int64"),
    "A bool": (lambda: ns.solve(A > 0, b), ValueError, r"^A: expected .*bool"),
    "A a vector": (lambda: ns.solve(b, b), ValueError, r"^A: expected .*\(6,\)"),
    "A 0-d": (lambda: ns.solve(b[0], b), ValueError, r"^A: expected .*\(\)"),
    "A not square": (lambda: ns.solve(A[:, :4], b), ValueError, r"^A: expected a square .*\(6, 4\)"),
    "A batch not square": (lambda: ns.solve(draw(2, 6, 4), b), ValueError, r"^A: expected a square .*\(2, 6, 4\)"),
    "A sparse not square": (lambda: ns.solve(A[:, :4].to_sparse(), b), ValueError, r"^A: expected a square .*\(6, 4\)"),
    "A sparse batch": (lambda: ns.solve(spd(2, N).to_sparse(), b), ValueError, r"^A: expected a sparse matrix .*\(2, 6, 6\)"),
    "A sparse with dense dimensions": (
        lambda: ns.solve(draw(N, N, 1).to_sparse(2), b), ValueError, r"^A: expected a sparse matrix .*\(6, 6, 1\)"
    ),
    "A rectangular operator": (
        lambda: ns.solve(ns.LinearOperator(lambda v: v[:4], domain=b, codomain=b[:4]), b),
        ValueError, r"A.*expected.*\(4,\)",
    ),
    "A operator on other vectors": (
        lambda: ns.solve(ns.LinearOperator(lambda v: v, domain=b[:4]), b), ValueError, r"expected.*\(4,\).*got.*\(6,\)"
    ),
    # the right-hand side
    "b None": (lambda: ns.solve(apply, None), TypeError, r"^b: expected .*NoneType"),
    "b a number": (lambda: ns.solve(apply, 1.0), TypeError, r"^b: expected .*float"),
    "b a list of numbers": (lambda: ns.solve(apply, [1.0, 2.0]), TypeError, r"^b: expected .*float"),
    "b an array": (lambda: ns.solve(apply, b.numpy()), TypeError, r"^b: expected .*ndarray"),
    "b with a number in its tree": (lambda: ns.solve(apply, {"u": b, "v": 2}), TypeError, r"^b: expected .*int"),
    "b with None in its tree": (lambda: ns.solve(apply, (b, None)), TypeError, r"^b: expected .*NoneType"),
    "b an empty tuple": (lambda: ns.solve(apply, ()), TypeError, r"^b: expected .*empty"),
    "b an empty dict": (lambda: ns.solve(apply, {}), TypeError, r"^b: expected .*empty"),
    "b an empty nested tree": (lambda: ns.solve(apply, {"u": [], "v": ()}), TypeError, r"^b: expected .*empty"),
    "b integer": (lambda: ns.solve(apply, b.long()), ValueError, r"^b: expected .*int64"),
    "b bool": (lambda: ns.solve(apply, b > 0), ValueError, r"^b: expected .*bool"),
    "b integer in a tree": (lambda: ns.solve(apply, (b, b.int())), ValueError, r"^b: expected .*int32"),
    "b in 8 bits": (lambda: ns.solve(apply, b.to(torch.float8_e4m3fn)), ValueError, r"^b: expected .*float8_e4m3fn"),
    "b of two dtypes": (lambda: ns.solve(apply, (b, b.float())), ValueError, r"^b: expected .*float64.*float32"),
    "b on two devices": (lambda: ns.solve(apply, (b, b.to(META))), ValueError, r"^b: expected .*cpu.*meta"),
    "b sparse": (lambda: ns.solve(apply, b.to_sparse()), ValueError, r"^b: expected .*sparse_coo"),
    "b a tree for a Tensor A": (lambda: ns.solve(A, {"u": b}), TypeError, r"^b: expected one Tensor .*dict"),
    "b of another length": (lambda: ns.solve(A, b[:4]), ValueError, r"^b: expected .*6.*\(4,\)"),
    "b of another length, sparse": (lambda: ns.solve(SPARSE, b[:4]), ValueError, r"^b: expected .*6.*\(4,\)"),
    "b 0-d for a Tensor A": (lambda: ns.solve(A, b[0]), ValueError, r"^b: expected .*6.*\(\)"),
    "b as columns": (lambda: ns.solve(A, draw(N, 2)), ValueError, r"^b: expected .*6.*\(6, 2\)"),
    "b in a narrower dtype than A": (lambda: ns.solve(A, b.float()), ValueError, r"^b: expected .*float64.*float32"),
    "b in a wider dtype than A": (lambda: ns.solve(A.float(), b), ValueError, r"^b: expected .*float32.*float64"),
    "b in another dtype, sparse": (lambda: ns.solve(SPARSE, b.float()), ValueError, r"^b: expected .*float64.*float32"),
    "b on another device": (lambda: ns.solve(A, b.to(META)), ValueError, r"^b: expected .*cpu.*meta"),
    "A on another device": (lambda: ns.solve(A.to(META), b), ValueError, r"^b: expected .*meta.*cpu"),
    "batches that do not broadcast": (lambda: ns.solve(spd(3, N), draw(2, N)), ValueError, r"^b: .*\(2,\).*\(3,\)"),
    # what A returns
    "A(v) of another shape": (lambda: ns.solve(lambda v: v[:4], b), ValueError, r"^A: expected .*\(6,\).*\(4,\)"),
    "A(v) a number": (lambda: ns.solve(lambda v: v.sum(), b), ValueError, r"^A: expected .*\(6,\).*\(\)"),
    "A(v) with a dimension more": (lambda: ns.solve(lambda v: v[None], b), ValueError, r"^A: expected .*\(6,\).*\(1, 6\)"),
    "A(v) in another dtype": (lambda: ns.solve(lambda v: v.float(), b), ValueError, r"^A: expected .*float64.*float32"),
    "A(v) complex for a real v": (
        lambda: ns.solve(lambda v: v * 1j, b), ValueError, r"^A: expected .*float64.*complex128.*give b as"
    ),
    "A(v) real for a complex v": (
        lambda: ns.solve(lambda v: v.real, b + 0j), ValueError, r"^A: expected .*complex128.*float64"
    ),
    "A(v) on another device": (lambda: ns.solve(lambda v: v.to(META), b), ValueError, r"^A: expected .*cpu.*meta"),
    "A(v) None": (lambda: ns.solve(lambda v: None, b), TypeError, r"^A: expected .*NoneType"),
    "A(v) an array": (lambda: ns.solve(lambda v: v.detach().numpy(), b), TypeError, r"^A: expected .*ndarray"),
    "A(v) a tuple": (lambda: ns.solve(lambda v: (v, v), b), TypeError, r"^A: expected .*tuple"),
    "A(v) a tensor for a tree": (lambda: ns.solve(lambda v: v["u"], {"u": b}), TypeError, r"^A: expected .*structure"),
    "A(v) another tree": (lambda: ns.solve(lambda v: tuple(v), [b, b]), TypeError, r"^A: expected .*structure"),
    "A(v) with other keys": (lambda: ns.solve(lambda v: {"w": v["u"]}, {"u": b}), TypeError, r"^A: expected .*structure"),
    "A(v) with a leaf missing": (lambda: ns.solve(lambda v: (v[0],), (b, b)), TypeError, r"^A: expected .*structure"),
    "A(v) with a leaf None": (lambda: ns.solve(lambda v: (v[0], None), (b, b)), TypeError, r"^A: expected .*NoneType"),
    "A(v) with leaves exchanged": (
        lambda: ns.solve(lambda v: (v[1], v[0]), (b, b[:4])), ValueError, r"^A: expected .*\(6,\).*\(4,\)"
    ),
    # the preconditioner
    "M a string": (lambda: ns.solve(apply, b, M="jacobi"), TypeError, r"^M: expected .*str"),
    "M a number": (lambda: ns.solve(apply, b, M=0.5), TypeError, r"^M: expected .*float"),
    "M integer": (lambda: ns.solve(apply, b, M=A.long()), ValueError, r"^M: expected .*int64"),
    "M a vector": (lambda: ns.solve(apply, b, M=b), ValueError, r"^M: expected .*\(6,\)"),
    "M a smaller matrix": (lambda: ns.solve(apply, b, M=A[:4, :4]), ValueError, r"^M: expected .*\(4, 4\)"),
    "M not square": (lambda: ns.solve(apply, b, M=A[:, :4]), ValueError, r"^M: expected .*\(6, 4\)"),
    "M in another dtype": (lambda: ns.solve(apply, b, M=A.float()), ValueError, r"^M: expected .*float64.*float32"),
    "M on another device": (lambda: ns.solve(apply, b, M=A.to(META)), ValueError, r"^M: expected .*cpu.*meta"),
    "M sparse of another shape": (
        lambda: ns.solve(apply, b, M=A[:4, :4].to_sparse_csr()), ValueError, r"^M: expected .*\(4, 4\)"
    ),
    "M(r) of another shape": (lambda: ns.solve(apply, b, M=lambda r: r[:4]), ValueError, r"^M: expected .*\(6,\).*\(4,\)"),
    "M(r) in another dtype": (lambda: ns.solve(apply, b, M=lambda r: r.float()), ValueError, r"^M: expected .*float32"),
    "M(r) on another device": (lambda: ns.solve(apply, b, M=lambda r: r.to(META)), ValueError, r"^M: expected .*cpu.*meta"),
    "M(r) None": (lambda: ns.solve(apply, b, M=lambda r: None), TypeError, r"^M: expected .*NoneType"),
    "M(r) a tuple": (lambda: ns.solve(apply, b, M=lambda r: (r,)), TypeError, r"^M: expected .*tuple"),
    "M(r) another tree": (lambda: ns.solve(lambda v: v, [b, b], M=lambda r: r[0]), TypeError, r"^M: expected .*structure"),
    "M(r) with leaves exchanged": (
        lambda: ns.solve(lambda v: v, (b, b[:4]), M=lambda r: (r[1], r[0])), ValueError, r"^M: expected .*\(6,\).*\(4,\)"
    ),
    "M for a direct method": (lambda: ns.solve(A, b, method="direct", M=A), ValueError, r"^M: .*direct"),
    # the guess
    "x0 of another shape": (lambda: ns.solve(apply, b, x0=b[:4]), ValueError, r"^x0: expected .*\(6,\).*\(4,\)"),
    "x0 to be broadcast": (lambda: ns.solve(apply, b, x0=b[:1]), ValueError, r"^x0: expected .*\(6,\).*\(1,\)"),
    "x0 with a dimension more": (lambda: ns.solve(A, b, x0=b[None]), ValueError, r"^x0: expected .*\(6,\).*\(1, 6\)"),
    "x0 of b's shape, not the solution's": (
        lambda: ns.solve(spd(3, N), b, x0=b), ValueError, r"^x0: expected .*\(3, 6\).*\(6,\)"
    ),
    "x0 in another dtype": (lambda: ns.solve(apply, b, x0=b.float()), ValueError, r"^x0: expected .*float64.*float32"),
    "x0 complex for a real b": (lambda: ns.solve(apply, b, x0=b + 0j), ValueError, r"^x0: expected .*float64.*complex128"),
    "x0 integer": (lambda: ns.solve(apply, b, x0=b.long()), ValueError, r"^x0: expected .*float64.*int64"),
    "x0 on another device": (lambda: ns.solve(apply, b, x0=b.to(META)), ValueError, r"^x0: expected .*cpu.*meta"),
    "x0 a number": (lambda: ns.solve(apply, b, x0=0.0), TypeError, r"^x0: expected .*float"),
    "x0 an array": (lambda: ns.solve(apply, b, x0=b.numpy()), TypeError, r"^x0: expected .*ndarray"),
    "x0 a list for a tensor": (lambda: ns.solve(apply, b, x0=[b]), TypeError, r"^x0: expected .*structure"),
    "x0 a tensor for a tree": (lambda: ns.solve(lambda v: v, {"u": b}, x0=b), TypeError, r"^x0: expected .*structure"),
    "x0 with other keys": (lambda: ns.solve(lambda v: v, {"u": b}, x0={"w": b}), TypeError, r"^x0: expected .*structure"),
    "x0 with a leaf of another shape": (
        lambda: ns.solve(lambda v: v, (b, b), x0=(b, b[:4])), ValueError, r"^x0: expected .*\(6,\).*\(4,\)"
    ),
    # tolerances and limits
    **{
        f"{name} {value!r}": (
            lambda name=name, value=value: ns.solve(apply, b, **{name: value}), error, rf"^{name}: expected .*got"
        )
        for name in ("rtol", "atol")
        for value, error in (
            (-1e-8, ValueError),
            (float("nan"), ValueError),
            (float("inf"), ValueError),
            ("tight", TypeError),
            (True, TypeError),
            (1e-8j, TypeError),
            ([1e-8], TypeError),
        )
    },
    "rtol a tensor of two": (lambda: ns.solve(apply, b, rtol=b[:2].abs()), TypeError, r"^rtol: expected .*Tensor"),
    "atol None": (lambda: ns.solve(apply, b, atol=None), TypeError, r"^atol: expected .*NoneType"),
    **{
        f"maxiter {value!r}": (lambda value=value: ns.solve(apply, b, maxiter=value), error, r"^maxiter: expected .*got")
        for value, error in ((-1, ValueError), (10.0, TypeError), ("many", TypeError), (True, TypeError))
    },
    **{
        f"batch_dims {value!r}": (
            lambda value=value: ns.solve(apply, b, batch_dims=value), error, r"^batch_dims: expected .*got"
        )
        for value, error in ((-1, ValueError), (2, ValueError), (1.0, TypeError), (True, TypeError), (None, TypeError))
    },
    "batch_dims beside a Tensor A": (lambda: ns.solve(A, draw(2, 3, N), batch_dims=1), ValueError, r"^batch_dims: .*2.*1"),
    "batch_dims of a leaf too small": (
        lambda: ns.solve(apply, (draw(2, 3), draw(2)), batch_dims=2), ValueError, r"^batch_dims: expected .*1.*\(2,\).*got 2"
    ),
    "batches that differ in a tree": (
        lambda: ns.solve(apply, (draw(2, 3), draw(3, 3)), batch_dims=1), ValueError, r"^b: expected .*\(2,\).*\(3,\)"
    ),
    "restart 0": (lambda: ns.gmres(apply, b, restart=0), ValueError, r"^restart: expected .*got 0"),
    "restart 2.5": (lambda: ns.GMRES(restart=2.5), (TypeError, ValueError), r"^restart: expected .*got 2.5"),
    # choices
    "unknown method": (lambda: ns.solve(apply, b, method="gmress"), ValueError, r"^method: .*'gmress'.*'gmres'"),
    "method a class": (lambda: ns.solve(apply, b, method=ns.CG), TypeError, r"^method: expected"),
    "method a number": (lambda: ns.solve(apply, b, method=1), TypeError, r"^method: expected .*int"),
    "direct on a callable": (lambda: ns.solve(apply, b, method="direct"), ValueError, r"^method: .*'direct' needs .*dense"),
    "Direct() on a callable": (lambda: ns.solve(apply, b, method=ns.Direct()), ValueError, r"^method: .*dense"),
    "direct on a sparse matrix": (lambda: ns.solve(SPARSE, b, method="direct"), ValueError, r"^method: .*dense"),
    "unknown on_failure": (lambda: ns.solve(A, b, on_failure="rise"), ValueError, r"^on_failure: expected .*'rise'.*'raise'"),
    "on_failure None": (lambda: ns.solve(A, b, on_failure=None), (TypeError, ValueError), r"^on_failure: expected .*None"),
    "unknown grad": (lambda: ns.solve(A, b, grad="unrolled"), ValueError, r"^grad: expected .*'unrolled'.*'unroll'"),
    "grad a bool": (lambda: ns.solve(A, b, grad=False), (TypeError, ValueError), r"^grad: expected .*False"),
    "callback not callable": (lambda: ns.solve(A, b, callback="print"), TypeError, r"^callback: expected .*str"),
    # params
    "params a tensor": (lambda: ns.solve(lambda v, t: t * v, b, params=b), TypeError, r"^params: expected .*Tensor"),
    "params for a Tensor A": (lambda: ns.solve(A, b, params=(b,)), TypeError, r"^params: .*Tensor"),
    # the adjoint's options
    "adjoint a string": (lambda: ns.solve(A, b, adjoint="cg"), TypeError, r"^adjoint: expected .*str"),
    "adjoint with an unknown option": (
        lambda: ns.solve(A, b, adjoint={"max_iter": 3}), TypeError, r"^adjoint: unknown option 'max_iter'.*'maxiter'"
    ),
    "adjoint with atol": (lambda: ns.solve(A, b, adjoint={"atol": 1e-3}), TypeError, r"^adjoint: unknown option 'atol'"),
    "adjoint with a negative rtol": (lambda: ns.solve(A, b, adjoint={"rtol": -1.0}), ValueError, r"^adjoint.*rtol.*expected"),
    "adjoint with a limit of 2.5": (
        lambda: ns.solve(A, b, adjoint={"maxiter": 2.5}), TypeError, r"^adjoint.*maxiter.*expected .*float"
    ),
    "adjoint with an unknown method": (
        lambda: ns.solve(A, b, adjoint={"method": "gmress"}), ValueError, r"^adjoint.*method.*'gmress'.*'gmres'"
    ),
    "adjoint direct on a callable": (
        lambda: ns.solve(apply, b, adjoint={"method": "direct"}), ValueError, r"^adjoint.*method.*dense"
    ),
    "adjoint with M a string": (lambda: ns.solve(apply, b, adjoint={"M": "ilu"}), TypeError, r"^adjoint.*M.*expected .*str"),
    # options
    "unknown option": (lambda: ns.solve(A, b, tolerance=1e-8), TypeError, r"^solve: unknown option 'tolerance'"),
    "check_every zero": (lambda: ns.solve(A, b, check_every=0), ValueError, r"^check_every: expected .*at least 1, got 0"),
    "check_every fraction": (lambda: ns.solve(A, b, check_every=1.5), TypeError, r"^check_every: expected an integer"),
    "compile a word": (lambda: ns.solve_ex(A, b, compile="cuda"), TypeError, r"^compile: expected a bool, got str"),
    "compile unrolled": (lambda: ns.solve(A, b, compile=True, grad="unroll"), ValueError, r"^compile: .*grad='unroll'"),
    "SciPy's old tol": (lambda: ns.cg(A, b, tol=1e-8), TypeError, r"^cg: unknown option 'tol'.*'(r|a)tol'"),
    "method for cg": (lambda: ns.cg(A, b, method="gmres"), TypeError, r"^cg: unknown option 'method'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_the_argument_named(case):
    """The right exception, which names the argument and gives expected and got."""
    call, error, pattern = REFUSED[case]
    with pytest.raises(error) as caught:
        call()
    assert re.search(pattern, str(caught.value), flags=re.DOTALL), str(caught.value)
    assert not isinstance(caught.value, ns.ConvergenceError)


@pytest.mark.parametrize("grad", ("implicit", "unroll", "none"))
def test_what_the_operator_returns_is_checked_at_every_call(grad):
    """An operator that goes wrong after its first call is refused as one that is wrong from the start."""
    for wrong, error in ((lambda v: v[:4], ValueError), (lambda v: v.float(), ValueError), (lambda v: None, TypeError)):
        calls = iter([matvec(A)] * 3)
        with pytest.raises(error, match=r"^A: expected"):
            ns.solve(lambda v, calls=calls, wrong=wrong: next(calls, wrong)(v), b, method="cg", grad=grad)


def test_arguments_are_checked_before_the_operator_is_called():
    """A bad option costs no product."""

    def untouched(v):
        raise AssertionError("A was called")

    for options in ({"rtol": -1.0}, {"maxiter": 1.5}, {"method": "cgg"}, {"x0": b[:2]}, {"M": "no"}, {"adjoint": {"tol": 1}}):
        with pytest.raises((TypeError, ValueError), match=r"expected|unknown"):
            ns.solve(untouched, b, **options)


def test_an_error_inside_the_operator_is_the_users_own():
    """An exception of the user's function is neither replaced nor wrapped."""

    class Mine(Exception):
        pass

    def failing(v):
        raise Mine("from A")

    for options in ({"A": failing}, {"A": apply, "M": failing}, {"A": apply, "callback": failing}):
        with pytest.raises(Mine, match="from A"):
            ns.solve(b=b, method="cg", **options)


def test_numbers_of_other_libraries_are_numbers():
    """NumPy's scalars and 0-d tensors serve where a number is due."""
    np = pytest.importorskip("numpy")
    expected = ns.solve(apply, b, rtol=0.5, maxiter=20)
    for rtol in (np.float64(0.5), np.float32(0.5), torch.tensor(0.5)):
        assert torch.equal(ns.solve(apply, b, rtol=rtol, maxiter=np.int64(20)), expected)
    assert ns.solve(lambda v: v, b[None], batch_dims=np.int64(1)).shape == (1, N)


# -- signatures -----------------------------------------------------------------------------------------------------

SOLVE = {
    "A": inspect.Parameter.empty, "b": inspect.Parameter.empty, "method": None, "M": None, "x0": None, "rtol": None,
    "atol": 0.0, "maxiter": None, "batch_dims": 0, "params": (), "nullspace": None, "left_nullspace": None, "gauge": None,
    "grad": "implicit", "adjoint": None, "on_failure": "raise", "callback": None, "progress": False, "history": False,
    "check_every": None, "compile": False,
}  # fmt: skip
LSTSQ = {
    "A": inspect.Parameter.empty, "b": inspect.Parameter.empty, "damp": 0.0, "weight": None, "x_ref": None, "domain": None,
    **{name: default for name, default in SOLVE.items() if name not in ("A", "b", "nullspace", "left_nullspace", "gauge")},
}  # fmt: skip
SCIPY = {
    "A": inspect.Parameter.empty, "b": inspect.Parameter.empty, "x0": None, "rtol": 1e-5, "atol": 0.0, "maxiter": None,
    "M": None, "callback": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "expected", "positional"),
    (
        (ns.solve, SOLVE, ["A", "b"]),
        (ns.solve_ex, {**SOLVE, "on_failure": "warn"}, ["A", "b"]),
        (ns.lstsq, LSTSQ, ["A", "b"]),
        (ns.lstsq_ex, {**LSTSQ, "on_failure": "warn"}, ["A", "b"]),
        (ns.lsmr, {**SCIPY, "damp": 0.0, "domain": None}, ["A", "b", "x0"]),
        (ns.lsqr, {**SCIPY, "damp": 0.0, "domain": None}, ["A", "b", "x0"]),
        (ns.cgls, {**SCIPY, "damp": 0.0, "domain": None}, ["A", "b", "x0"]),
        (ns.cg, SCIPY, ["A", "b", "x0"]),
        (ns.minres, SCIPY, ["A", "b", "x0"]),
        (ns.gmres, {**SCIPY, "restart": 20}, ["A", "b", "x0"]),
        (ns.bicgstab, SCIPY, ["A", "b", "x0"]),
    ),
)
def test_signature_is_the_promised_one(function, expected, positional):
    """Names, defaults, and which arguments may be given by position."""
    parameters = inspect.signature(function).parameters
    assert {name: p.default for name, p in parameters.items()} == expected
    assert [name for name, p in parameters.items() if p.kind == p.POSITIONAL_OR_KEYWORD] == positional
    assert {p.kind for p in parameters.values()} <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    assert function.__doc__
    assert function.__name__ in dir(ns)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_with_scipys_name_is_its_method(name):
    """`cg(A, b, x0)` and its siblings are `solve_ex` with that method."""
    x0 = draw(N, seed=2)
    x, info = FUNCTIONS[name](apply, b, x0, rtol=1e-10, maxiter=50, M=torch.eye(N, dtype=torch.float64))
    assert info.method == name
    assert info.converged
    assert norm(apply(x) - b) <= 1e-9 * norm(b)
    expected, _ = ns.solve_ex(apply, b, method=name, x0=x0, rtol=1e-10, maxiter=50, M=torch.eye(N, dtype=torch.float64))
    assert torch.equal(x, expected)
    _, info = FUNCTIONS[name](apply, b, maxiter=1)
    assert info.status is Status.MAXITER


# -- every form of vector -------------------------------------------------------------------------------------------

VECTORS = {
    "0-d": lambda: draw(),
    "n = 1": lambda: draw(1),
    "all sizes 1": lambda: draw(1, 1, 1),
    "vector": lambda: draw(N),
    "image": lambda: draw(5, 4),
    "image with channels": lambda: draw(2, 3, 4, 5),
    "channels last": lambda: draw(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: draw(4, 5).mT,
    "strided": lambda: draw(12)[::2],
    "negative view": lambda: draw(12).flip(0)[3:],
    "expanded": lambda: draw(1, 4).expand(3, 4),
    "expanded number": lambda: draw(1).expand(5),
    "slice of a larger tensor": lambda: draw(7, 7)[2:5, 1:4],
    "float32": lambda: draw(N, dtype=torch.float32),
    "complex": lambda: draw(N, dtype=torch.complex128),
    "conjugated view": lambda: draw(N, dtype=torch.complex128).conj(),
    "imaginary part": lambda: draw(N, dtype=torch.complex128).imag,
    "parameter": lambda: nn.Parameter(draw(N)),
}


def symmetric(v):
    """A positive definite operator on vectors of any shape, that couples all entries and has a known inverse."""
    return 2 * v + v.sum() / max(1, v.numel())


def symmetric_inverse(b):
    return b / 2 - b.sum() / (6 * max(1, b.numel()))


@each_krylov
@pytest.mark.parametrize("form", VECTORS)
def test_vector_of_any_form_is_solved_and_differentiated(method, form):
    """The solution has the shape and dtype of b, whatever its strides; so has the gradient."""
    base = VECTORS[form]().detach()
    rhs = base.clone(memory_format=torch.preserve_format) if form == "parameter" else base
    rhs.requires_grad_()
    tight = 1e-6 if rhs.dtype == torch.float32 else 1e-12
    x = ns.solve(symmetric, rhs, method=method, rtol=tight)
    assert x.shape == rhs.shape
    assert x.dtype == rhs.dtype
    assert x.device == rhs.device
    assert type(x) is torch.Tensor
    assert norm(x - symmetric_inverse(rhs)) <= 10 * tight * norm(rhs)
    weights = draw(*rhs.shape, seed=5, dtype=rhs.dtype)
    (gradient,) = torch.autograd.grad((x * weights.conj()).sum().real, rhs)
    assert gradient.shape == rhs.shape
    assert norm(gradient - symmetric_inverse(weights)) <= 10 * tight * norm(weights)


@pytest.mark.parametrize(
    ("method", "layout"), (*itertools.product(KRYLOV, ("dense", "sparse", "callable")), ("direct", "dense"))
)
def test_real_and_complex_meet_where_the_equation_has_a_meaning(method, layout):
    """A real `A` acts on a complex b, a complex Tensor `A` makes a real b complex, and a guess may be real."""
    rhs = {kind: draw(N, seed=1, dtype=kind).requires_grad_() for kind in (torch.float64, torch.complex128)}
    for of_A, of_b in ((torch.float64, torch.complex128), (torch.complex128, torch.float64)):
        if layout == "callable" and of_A == torch.complex128:
            continue  # nothing says that the solution is complex: refused, see above
        matrix = spd(N, dtype=of_A)
        A = {"dense": matrix, "sparse": matrix.to_sparse_csr(), "callable": lambda v, real=matrix: _real_on_complex(real, v)}[
            layout
        ]
        x = ns.solve(A, rhs[of_b], method=method, rtol=1e-12, x0=draw(N, seed=3))
        assert x.dtype == torch.complex128
        inverse = torch.linalg.inv(matrix).to(torch.complex128)
        assert norm(x - inverse @ rhs[of_b].to(torch.complex128)) <= 1e-10
        weights = draw(N, seed=2, dtype=torch.complex128)
        (actual,) = torch.autograd.grad((weights.conj() * x).sum().real, rhs[of_b])
        expected = inverse.mH @ weights
        assert actual.dtype == of_b
        assert norm(actual - (expected if of_b.is_complex else expected.real)) <= 1e-10


def _real_on_complex(matrix, v):
    return torch.complex(matrix @ v.real, matrix @ v.imag) if v.is_complex() else matrix @ v


@pytest.mark.parametrize("batch", ((), (4,), (2, 3)))
def test_sparse_matrix_takes_a_batch_of_right_hand_sides(batch):
    """The leading dimensions of b count systems, as for a dense matrix."""
    rhs = draw(*batch, N, seed=1)
    x, info = ns.solve_ex(A.to_sparse_coo(), rhs, rtol=1e-12)
    assert norm(x - rhs @ torch.linalg.inv(A).mT) <= 1e-10
    assert torch.as_tensor(info.converged).shape == batch


@each_krylov
@pytest.mark.parametrize("shape", ((0,), (0, 3), (3, 0), (2, 0, 5)))
def test_empty_vector_is_its_own_solution(method, shape):
    """Nothing to solve: no iteration, converged."""
    rhs = torch.empty(shape, dtype=torch.float64, requires_grad=True)
    x, info = ns.solve_ex(lambda v: 2 * v, rhs, method=method)
    assert x.shape == shape
    assert info.converged
    assert info.iterations == 0
    assert info.residual_norm == 0
    x.sum().backward()
    assert rhs.grad.shape == shape
    matrix = torch.empty(0, 0, dtype=torch.float64, requires_grad=True)
    x = ns.solve(matrix, torch.empty(0, dtype=torch.float64))
    assert x.shape == (0,)


Pair = namedtuple("Pair", "first second")

TREES = {
    "dict": lambda t: {"u": t[0], "v": t[1]},
    "tuple": lambda t: (t[0], t[1]),
    "list": lambda t: [t[0], t[1]],
    "named tuple": lambda t: Pair(t[0], t[1]),
    "ordered dict": lambda t: OrderedDict(z=t[0], a=t[1]),
    "nested": lambda t: {"u": [t[0], (t[1],)], "v": {"w": t[2]}},
    "single-element list": lambda t: [t[0]],
    "single-element dict": lambda t: {"u": t[0]},
    "with a 0-d leaf": lambda t: (t[0], t[3]),
    "with an empty leaf": lambda t: (t[0], t[4]),
}


def leaves_of(tree):
    return torch.utils._pytree.tree_leaves(tree)


def structure(tree):
    return torch.utils._pytree.tree_structure(tree)


@each_krylov
@pytest.mark.parametrize("kind", TREES)
def test_tree_is_solved_as_one_vector_and_comes_back_as_it_went_in(method, kind):
    """A tree of tensors is one vector: the operator receives it whole, couples its leaves, and gradients reach each leaf."""
    parts = [draw(4), draw(2, 3, seed=1).mT, draw(1, 2, seed=2), draw(seed=3), draw(0)]
    rhs = TREES[kind]([t.requires_grad_() for t in parts])
    count = sum(t.numel() for t in leaves_of(rhs))

    def coupled(v):
        assert structure(v) == structure(rhs)
        mean = sum(t.sum() for t in leaves_of(v)) / count
        return torch.utils._pytree.tree_map(lambda t: 2 * t + mean, v)

    def inverse(b):
        mean = sum(t.sum() for t in leaves_of(b)) / count
        return [t / 2 - mean / 6 for t in leaves_of(b)]

    x, info = ns.solve_ex(coupled, rhs, method=method, rtol=1e-12, x0=torch.utils._pytree.tree_map(torch.ones_like, rhs))
    assert type(x) is type(rhs)
    assert structure(x) == structure(rhs)
    assert info.converged is True
    assert isinstance(info.iterations, int)
    for got, expected, given_leaf in zip(leaves_of(x), inverse(rhs), leaves_of(rhs), strict=True):
        assert got.shape == given_leaf.shape
        assert norm(got - expected) <= 1e-10
    loss = sum((t * (i + 1)).sum() for i, t in enumerate(leaves_of(x)))
    grads = torch.autograd.grad(loss, leaves_of(rhs), allow_unused=True, materialize_grads=True)
    weights = [torch.full_like(t, i + 1) for i, t in enumerate(leaves_of(rhs))]
    for got, expected in zip(grads, inverse(weights), strict=True):
        assert norm(got - expected) <= 1e-10


@each_krylov
def test_preconditioner_of_a_tree_receives_the_tree(method):
    """`M` sees what `A` sees."""
    rhs = {"u": draw(4), "v": draw(2, 2, seed=1)}

    def halve(r):
        assert set(r) == {"u", "v"}
        assert r["v"].shape == (2, 2)
        return {name: t / 2 for name, t in r.items()}

    x, info = ns.solve_ex(lambda v: {"v": 2 * v["v"], "u": 2 * v["u"]}, rhs, method=method, M=halve)
    assert info.converged
    assert info.iterations == 1
    for name in rhs:
        assert norm(x[name] - rhs[name] / 2) <= 1e-8


# -- what a solve leaves alone --------------------------------------------------------------------------------------


def watched(*tensors):
    """Tensors beside copies of their values, and a check that nothing has written to them."""
    before = [(t, t.detach().clone(), t._version) for t in tensors]

    def check():
        for t, value, version in before:
            assert t._version == version
            assert torch.equal(t.detach(), value)

    return check


@each_method
@pytest.mark.parametrize("grad", ("implicit", "unroll", "none"))
def test_inputs_are_never_written_to(method, grad):
    """b, x0, params, captured tensors and the preconditioner's are as they were; and so is the random state."""
    matrix, scale = spd(N).requires_grad_(), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    rhs, x0, inverse = draw(N, seed=1).requires_grad_(), draw(N, seed=2), torch.diag(1 / spd(N).diagonal())
    check = watched(matrix, scale, rhs, x0, inverse)
    random_state = torch.get_rng_state()
    if method == "direct":
        x = ns.solve(matrix, rhs, x0=x0, method=method, grad=grad)
    else:
        x = ns.solve(lambda v, s: s * (matrix @ v), rhs, params=(scale,), x0=x0, M=inverse, method=method, grad=grad)
    check()
    if grad != "none":
        torch.autograd.grad(x.square().sum(), (matrix, rhs))
        check()
    with torch.no_grad():
        x.fill_(7.0)
    check()
    assert torch.equal(torch.get_rng_state(), random_state)


@each_method
@pytest.mark.parametrize("grad", ("implicit", "unroll", "none"))
def test_solution_is_memory_of_its_own(method, grad):
    """Whatever the case that returns early, the solution is neither b nor x0 nor a view of them."""
    zero, eye = torch.zeros(N, dtype=torch.float64), torch.eye(N, dtype=torch.float64)
    for rhs, x0 in ((zero, None), (zero, zero), (b, b), (b, b.clone()), (b, None), (b[:0], b[:0])):
        n = rhs.numel()
        for A in (eye[:n, :n],) if method == "direct" else (lambda v: v, eye[:n, :n]):
            x = ns.solve(A, rhs, x0=x0, method=method, grad=grad)
            assert norm(x - rhs) <= 1e-14
            check = watched(rhs, *(() if x0 is None else (x0,)))
            x.add_(1.0)
            check()
    tree = [torch.zeros(3), torch.zeros(2)]
    for leaf in ns.solve(lambda v: v, tree, grad=grad):
        leaf.add_(1.0)
    assert not any(t.count_nonzero() for t in tree)


def in_place_temporaries(v):
    y = v.clone()
    y.mul_(2.0).add_(v.sum() / N)
    y[0] += 1.0 * v[0]
    return y


def reference_of(A):
    return torch.stack([A(e) for e in torch.eye(N, dtype=torch.float64)], dim=1)


OPERATORS = {
    "returns its input": lambda v: v,
    "returns a view of its input": lambda v: v.view(2, 3).reshape(N),
    "returns an alias": lambda v: v[:],
    "returns a transposed tensor": lambda v: (A @ v.unsqueeze(-1)).mT.squeeze(0),
    "returns every other entry": lambda v: torch.stack([matvec(A)(v), v], dim=-1)[..., 0],
    "returns an expanded product": lambda v: v + v.sum().expand(N) / N,
    "works in place on its own": in_place_temporaries,
    "detaches nothing but copies": lambda v: matvec(A)(v.clone()).clone(),
}


PRECONDITIONERS = {
    "none": None,
    "returns its input": lambda r: r,
    "returns a view": lambda r: r.view(2, 3).reshape(N),
    "diagonal": lambda r: r / torch.arange(1, N + 1, dtype=torch.float64),
}


@each_krylov
@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("M", PRECONDITIONERS)
def test_operator_may_return_any_kind_of_tensor(method, kind, M):
    """Its input, a view, a non-contiguous or an expanded result: all is as if it had returned a tensor of its own.

    The number of iterations is compared as well, since a restart from the true residual repairs much.
    """
    operator, M = OPERATORS[kind], PRECONDITIONERS[M]
    dense = reference_of(operator)
    rhs = draw(N, seed=1).requires_grad_()
    x, info = ns.solve_ex(operator, rhs, method=method, rtol=1e-12, M=M)
    assert norm(x - torch.linalg.inv(dense) @ rhs) <= 1e-10
    x.sum().backward()
    assert norm(rhs.grad - torch.linalg.inv(dense).mH.sum(1)) <= 1e-10
    own_M = None if M is None else lambda r: M(r.clone()).clone()
    clean, clean_info = ns.solve_ex(lambda v: operator(v.clone()).clone(), rhs, method=method, rtol=1e-12, M=own_M)
    assert norm(x - clean) <= 1e-13 * norm(x)
    assert info.iterations == clean_info.iterations


@each_krylov
@pytest.mark.parametrize("batched", (False, True))
@pytest.mark.parametrize("with_M", (False, True))
def test_operator_may_return_the_same_buffer_at_each_call(method, batched, with_M):
    """What `A` and `M` return is valid until their next call, and no longer."""
    n = 20
    matrix, rhs = spd(n), draw(3, n, seed=1)
    buffers = [torch.empty_like(rhs), torch.empty_like(rhs)]
    inverse = torch.diag(1 / torch.arange(1, n + 1, dtype=torch.float64))
    options = {"method": method, "rtol": 1e-12, "batch_dims": int(batched)}

    def solve(A, M):
        return ns.solve_ex(A, rhs, M=M if with_M else None, **options)

    x, info = solve(
        lambda v: torch.mm(v, matrix.mT, out=buffers[0]),
        lambda r: torch.mm(r, inverse, out=buffers[1]),
    )
    clean, clean_info = solve(lambda v: torch.mm(v, matrix.mT), lambda r: torch.mm(r, inverse))
    assert torch.equal(x, clean)
    assert torch.equal(torch.as_tensor(info.iterations), torch.as_tensor(clean_info.iterations))
    assert norm(x - rhs @ torch.linalg.inv(matrix).mT) <= 1e-10
    for buffer in buffers:
        assert x.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr()


def test_operator_with_a_buffer_is_differentiable_where_it_is_claimed_hermitian():
    """The adjoint of a Hermitian operator is the operator: autograd need not see through `out=`."""
    buffer, rhs = torch.empty(N, dtype=torch.float64), draw(N, seed=1).requires_grad_()
    x = ns.solve(lambda v: torch.mv(A, v, out=buffer), rhs, method="cg", rtol=1e-12)
    x.sum().backward()
    assert norm(rhs.grad - torch.linalg.inv(A).sum(1)) <= 1e-10


# -- batches --------------------------------------------------------------------------------------------------------


def hard_batch():
    """Systems that end in every way, and easy ones between them; the operator acts entry by entry, so that it is the same
    to the last bit for one system and for many."""
    n = 24
    easy = torch.linspace(1, 3, n, dtype=torch.float64)
    ill = torch.logspace(0, 9, n, dtype=torch.float64)
    diagonals = torch.stack([easy, easy, easy, ill, easy, easy.flip(0), torch.full_like(easy, 2.0), easy, easy])
    rhs = draw(9, n)
    rhs[1] = 0
    rhs[2, 3] = torch.nan
    rhs[4, 5] = torch.inf
    diagonals[7, 2] = torch.nan
    return diagonals, rhs


HARD = {
    "easy": (0, Status.CONVERGED),
    "zero": (1, Status.CONVERGED),
    "NaN in b": (2, Status.NONFINITE),
    "ill-conditioned": (3, Status.MAXITER),
    "Inf in b": (4, Status.NONFINITE),
    "easy too": (5, Status.CONVERGED),
    "trivial": (6, Status.CONVERGED),
    "NaN in A": (7, Status.NONFINITE),
    "easy last": (8, Status.CONVERGED),
}


@each_krylov
@pytest.mark.parametrize("grad", ("none", "implicit"))
def test_hard_zero_and_nonfinite_systems_change_no_other(method, grad):
    """Each system of a batch has the solution, the status and the iterations that it has alone."""
    diagonals, rhs = hard_batch()
    options = {"method": method, "rtol": 1e-9, "maxiter": 20, "batch_dims": 1, "grad": grad}
    x, info = ns.solve_ex(lambda v: diagonals * v, rhs, **options)
    assert info.status.tolist() == [status for _, status in HARD.values()]
    assert info.iterations[1] == 0
    assert info.iterations[6] == 1
    assert info.iterations[3] == 20
    assert x.isfinite().all()
    assert x[1].count_nonzero() == 0
    for name, (i, status) in HARD.items():
        alone, alone_info = ns.solve_ex(lambda v, i=i: diagonals[i : i + 1] * v, rhs[i : i + 1], **options)
        single, single_info = ns.solve_ex(lambda v, i=i: diagonals[i] * v, rhs[i], **{**options, "batch_dims": 0})
        assert alone_info.status.item() == single_info.status == status, name
        assert info.iterations[i] == alone_info.iterations.item() == single_info.iterations, name
        size = max(1e-300, norm(single).item())
        assert norm(x[i] - alone[0]) <= 1e-12 * size, name
        if status == Status.CONVERGED:  # rounding of the sums differs between one system and many
            assert norm(x[i] - single) <= 1e-12 * size, name
            assert info.residual_norm[i] <= 1e-9 * norm(rhs[i])
    assert info.relative_residual[3] == pytest.approx((norm(rhs[3] - diagonals[3] * x[3]) / norm(rhs[3])).item())


@each_krylov
def test_hard_systems_change_no_others_gradient(method):
    """A NaN cotangent of one system reaches no other, and a failed adjoint of one leaves the others' gradients right."""
    diagonals, rhs = hard_batch()
    diagonals[7] = diagonals[0]
    rhs = torch.where(rhs.isfinite(), rhs, 1.0).requires_grad_()
    easy = [0, 1, 5, 6, 8]
    weights = draw(*rhs.shape, seed=3)
    weights[2, 0] = torch.nan
    x, info = ns.solve_ex(
        lambda v: diagonals * v, rhs, method=method, rtol=1e-12, maxiter=23, batch_dims=1, on_failure="ignore"
    )
    (gradient,) = torch.autograd.grad((x * weights).sum(), rhs)
    expected = weights / diagonals
    assert norm((gradient - expected)[easy]) <= 1e-9
    assert info.adjoint.status[easy].tolist() == [Status.CONVERGED] * len(easy)
    assert info.adjoint.status[2] == Status.NONFINITE
    assert not info.adjoint.converged[3]


def test_direct_method_keeps_systems_apart():
    """A singular matrix, and NaN or zero in b or A, leave the other systems of a dense batch as they are alone."""
    matrices, rhs = spd(6, N), draw(6, N, seed=1)
    matrices[1] = 0
    rhs[2, 0] = torch.nan
    rhs[3] = 0
    matrices[4, 2, 2] = torch.inf
    x, info = ns.solve_ex(matrices, rhs)
    assert info.method == "direct"
    assert info.converged.tolist() == [True, False, False, True, False, True]
    assert info.status[2] == info.status[4] == Status.NONFINITE
    assert x[3].count_nonzero() == 0
    assert info.iterations[3] == 0
    for i in (0, 5):
        assert norm(x[i] - ns.solve(matrices[i], rhs[i])) <= 1e-13


@each_krylov
def test_restart_of_one_system_is_not_paid_from_the_others_budget(method):
    """`maxiter` counts the steps of each system: one that restarts behind a slow one still converges.

    The first system's products go wrong at the start, so that its true residual is larger than the method knows.
    """
    n = 30
    diagonals = torch.stack([torch.linspace(1, 3, n), torch.logspace(0, 9, n)]).double()
    rhs = draw(2, n)

    def operator(systems, error=1e-4):
        calls = iter(range(10_000))

        def A(v):
            y = diagonals[systems] * v
            if next(calls) in (1, 2):
                y = torch.cat([y[:1] + error * v[:1].roll(1, -1), y[1:]])
            return y

        return A

    options = {"method": method, "rtol": 1e-9, "maxiter": 60, "batch_dims": 1, "grad": "none"}
    alone, alone_info = ns.solve_ex(operator([0]), rhs[:1], **options)
    x, info = ns.solve_ex(operator([0, 1]), rhs, **options)
    _, undisturbed = ns.solve_ex(operator([0], error=0.0), rhs[:1], **options)
    assert alone_info.iterations.item() >= undisturbed.iterations.item() + 3  # it did restart
    assert alone_info.converged.item()
    assert alone_info.iterations.item() < 60
    assert info.status.tolist() == [Status.CONVERGED, Status.MAXITER]
    assert info.iterations.tolist() == [alone_info.iterations.item(), 60]
    assert norm(x[0] - alone[0]) <= 1e-12 * norm(alone)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    method=st.sampled_from(METHODS),
    sizes=st.lists(st.floats(-3, 3), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 99),
)
def test_permuting_a_batch_permutes_its_solutions(method, sizes, order, seed):
    """Each system's solution, status and iterations depend on that system alone."""
    count = len(sizes)
    matrices = spd(count, N, seed=seed) * (10.0 ** torch.tensor(sizes, dtype=torch.float64))[:, None, None]
    rhs = draw(count, N, seed=seed + 1)
    permutation = order.sample(range(count), count)
    dims = {} if method == "direct" else {"batch_dims": 1}
    x, info = ns.solve_ex(source(method, matrices), rhs, method=method, **dims)
    y, permuted = ns.solve_ex(source(method, matrices[permutation]), rhs[permutation], method=method, **dims)
    assert norm(y - x[permutation]) <= 1e-12 * norm(x)
    assert torch.equal(permuted.status, info.status[permutation])
    assert torch.equal(permuted.iterations, info.iterations[permutation])
    for i in range(count):
        single, alone = ns.solve_ex(source(method, matrices[i]), rhs[i], method=method)
        assert norm(x[i] - single) <= 1e-7 * norm(single)
        assert alone.converged
        assert info.converged[i]
        assert abs(alone.iterations - info.iterations[i].item()) <= 1


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    method=st.sampled_from(METHODS), exponents=st.lists(st.integers(-40, 40), min_size=2, max_size=4), seed=st.integers(0, 99)
)
def test_scaling_one_system_of_a_batch_scales_its_solution_alone(method, exponents, seed):
    """Powers of two scale exactly: the solutions then agree to the last bit, in the same number of iterations."""
    count = len(exponents)
    matrices, rhs = spd(count, N, seed=seed), draw(count, N, seed=seed + 1)
    factors = torch.tensor([2.0**e for e in exponents], dtype=torch.float64)[:, None]
    dims = {} if method == "direct" else {"batch_dims": 1}
    x, info = ns.solve_ex(source(method, matrices), rhs, method=method, **dims)
    scaled, scaled_info = ns.solve_ex(source(method, matrices), factors * rhs, method=method, **dims)
    assert torch.equal(scaled, factors * x)
    assert torch.equal(scaled_info.iterations, info.iterations)


@pytest.mark.parametrize(
    ("of_A", "of_b", "batch"),
    (
        ((), (), ()),
        ((), (4,), (4,)),
        ((3,), (), (3,)),
        ((3,), (3,), (3,)),
        ((3, 1), (4,), (3, 4)),
        ((3,), (2, 3), (2, 3)),
        ((1,), (5,), (5,)),
        ((2, 1, 1), (1, 3, 4), (2, 3, 4)),
        ((0,), (), (0,)),
        ((), (0,), (0,)),
    ),
)
@each_method
def test_leading_dimensions_of_a_tensor_broadcast(method, of_A, of_b, batch):
    """Value, record and both gradients of a batch of matrices beside a batch of right-hand sides."""
    W, rhs = draw(*of_A, N, N).requires_grad_(), draw(*of_b, N, seed=1).requires_grad_()

    def matrices():
        return W @ W.mH / N + torch.eye(N, dtype=torch.float64)

    x, info = ns.solve_ex(matrices(), rhs, method=method, rtol=1e-12)
    expected = (torch.linalg.inv(matrices()) @ rhs.unsqueeze(-1)).squeeze(-1)
    assert x.shape == expected.shape == (*batch, N)
    assert norm(x - expected) <= 1e-9
    if batch:
        assert info.converged.shape == batch
        assert info.converged.all()
    weights = draw(*x.shape, seed=2)
    for actual, right in zip(
        torch.autograd.grad((x * weights).sum(), (W, rhs)),
        torch.autograd.grad((expected * weights).sum(), (W, rhs)),
        strict=True,
    ):
        assert actual.shape == right.shape
        assert norm(actual - right) <= 1e-8 * (1 + norm(right))


@each_krylov
def test_two_batch_dimensions_count_systems_of_images(method):
    """`batch_dims=2` on vectors that are images themselves."""
    scales = torch.linspace(1, 6, 6, dtype=torch.float64).reshape(2, 3, 1, 1)
    rhs = draw(2, 3, 4, 5)
    rhs[1, 2] = 0

    def A(v):
        return scales * v + v.mean((-2, -1), keepdim=True)

    x, info = ns.solve_ex(A, rhs, method=method, batch_dims=2, rtol=1e-10)
    assert info.converged.shape == (2, 3)
    assert info.converged.all()
    assert info.iterations[1, 2] == 0
    assert x[1, 2].count_nonzero() == 0
    for i in range(2):
        for j in range(3):
            alone = ns.solve(lambda v, i=i, j=j: scales[i, j] * v + v.mean(), rhs[i, j], method=method, rtol=1e-10)
            assert norm(x[i, j] - alone) <= 1e-8


@each_krylov
def test_batch_of_trees_keeps_its_systems_apart(method):
    """Each leaf brings the batch dimensions; statuses have their shape."""
    rhs = {"u": draw(3, 4), "v": draw(3, 2, 2, seed=1)}
    rhs["u"][1], rhs["v"][1] = 0, 0
    rhs["v"][2, 0, 0] = torch.nan
    for t in rhs.values():
        t.requires_grad_()

    def A(v):
        mean = (v["u"].sum(1) + v["v"].sum((1, 2))) / 8
        return {"u": 2 * v["u"] + mean[:, None], "v": 2 * v["v"] + mean[:, None, None]}

    x, info = ns.solve_ex(A, rhs, method=method, batch_dims=1, rtol=1e-12, on_failure="ignore")
    assert {name: t.shape for name, t in x.items()} == {"u": (3, 4), "v": (3, 2, 2)}
    assert info.status.tolist() == [Status.CONVERGED, Status.CONVERGED, Status.NONFINITE]
    mean = (rhs["u"][0].sum() + rhs["v"][0].sum()) / 8
    assert norm(x["u"][0] - (rhs["u"][0] / 2 - mean / 6)) <= 1e-10
    assert x["u"][1].count_nonzero() == x["v"][1].count_nonzero() == 0
    grads = torch.autograd.grad(x["u"][:2].sum(), tuple(rhs.values()))
    assert norm(grads[0][:2] - (1 / 2 - 4 / 48)) <= 1e-10
    assert norm(grads[1][:2] + 4 / 48) <= 1e-10


@each_method
def test_batch_of_no_systems_is_solved(method):
    """Size 0: empty record, no failure, gradients of size 0."""
    rhs = torch.empty(0, N, dtype=torch.float64, requires_grad=True)
    matrices = torch.empty(0, N, N, dtype=torch.float64, requires_grad=True)
    dims = {} if method == "direct" else {"batch_dims": 1}
    x, info = ns.solve_ex(source(method, matrices), rhs, method=method, **dims)
    assert x.shape == (0, N)
    for field in ("converged", "status", "iterations", "residual_norm", "relative_residual"):
        assert getattr(info, field).shape == (0,), field
    grads = torch.autograd.grad(ns.solve(source(method, matrices), rhs, method=method, **dims).sum(), (rhs, matrices))
    assert [g.shape for g in grads] == [rhs.shape, matrices.shape]
    assert isinstance(repr(info) + info.message, str)


FIELDS = {
    "converged": (bool, torch.bool),
    "status": (Status, torch.int64),
    "iterations": (int, torch.int64),
    "residual_norm": (float, torch.float64),
    "relative_residual": (float, torch.float64),
    "matvecs": (int, torch.int64),
    "rmatvecs": (int, torch.int64),
}


@each_method
@pytest.mark.parametrize("batch", ((), (4,), (2, 3), (1,)))
def test_record_has_the_shape_of_the_batch(method, batch):
    """Python numbers for one system, tensors of the batch shape for many; the adjoint's record likewise."""
    matrices, rhs = spd(*batch, N), draw(*batch, N, seed=1).requires_grad_()
    dims = {} if method == "direct" else {"batch_dims": len(batch)}
    x, info = ns.solve_ex(source(method, matrices), rhs, method=method, history=True, **dims)
    assert info.adjoint is None
    x.sum().backward()
    for record in (info, info.adjoint):
        assert record.method == method
        for field, (kind, dtype) in FIELDS.items():
            value = getattr(record, field)
            if batch:
                assert (value.shape, value.dtype) == (batch, dtype), field
                assert not value.requires_grad
            else:
                assert type(value) is kind, field
    assert info.history.shape == (int(torch.as_tensor(info.iterations).max()) + 1, *batch)
    assert not info.history.requires_grad
    assert info.message
    assert repr(info)


def test_failure_of_a_batch_carries_every_system():
    """The error's solution and record have the batch; its text counts the failures and says what to try."""
    diagonals = torch.stack([torch.ones(N), torch.logspace(0, 2, N), torch.logspace(0, 2, N)])
    with pytest.raises(ns.ConvergenceError, match=r"2 of 3 systems(.|\n)*2 x MAXITER") as caught:
        ns.solve(lambda v: diagonals * v, torch.ones(3, N), method="cg", maxiter=2, batch_dims=1)
    assert caught.value.x.shape == (3, N)
    assert not caught.value.x.requires_grad
    assert caught.value.info.converged.tolist() == [True, False, False]
    tree = {"u": torch.ones(3, N), "v": torch.ones(3, 2)}
    with pytest.raises(ns.ConvergenceError) as caught:
        ns.solve(lambda v: {"u": diagonals * v["u"], "v": v["v"]}, tree, method="cg", maxiter=1, batch_dims=1)
    assert caught.value.x["v"].shape == (3, 2)


# -- LinearSolve ----------------------------------------------------------------------------------------------------


class Jacobi(nn.Module):
    """A preconditioner with a buffer and a parameter."""

    def __init__(self, diagonal):
        super().__init__()
        self.register_buffer("diagonal", diagonal)
        self.weight = nn.Parameter(torch.ones_like(diagonal))

    def forward(self, r):
        return self.weight * r / self.diagonal


def test_layer_is_solve_with_its_options():
    """The layer's options hold for each call, those of a call for that one, and the record is kept."""
    layer = ns.LinearSolve(method="cg", rtol=1e-10)
    assert layer.info is None
    rhs = b.clone().requires_grad_()
    x = layer(apply, rhs)
    assert torch.equal(x, ns.solve(apply, rhs, method="cg", rtol=1e-10))
    assert isinstance(layer.info, ns.SolveInfo)
    assert layer.info.method == "cg"
    assert layer.info.relative_residual <= 1e-10
    x.sum().backward()
    assert norm(rhs.grad - torch.linalg.inv(A).sum(1)) <= 1e-8
    assert layer.info.adjoint.converged
    layer(apply, rhs, x0=x, rtol=1e-8)
    assert layer.info.iterations == 0
    layer(apply, torch.ones_like(b))
    assert layer.info.iterations > 0
    assert "method='cg'" in repr(layer)
    assert "rtol=1e-10" in repr(layer)


def test_layer_obeys_its_failure_policy():
    """As `solve`: raise by default, in both passes."""
    hard = torch.logspace(0, 8, N, dtype=torch.float64)
    rhs = b.clone().requires_grad_()
    with pytest.raises(ns.ConvergenceError):
        ns.LinearSolve(method="cg", maxiter=2)(lambda v: hard * v, rhs)
    layer = ns.LinearSolve(method="cg", maxiter=2, on_failure="warn")
    with pytest.warns(ns.ConvergenceWarning, match="The solve"):
        x = layer(lambda v: hard * v, rhs)
    with pytest.warns(ns.ConvergenceWarning, match="adjoint"):
        x.sum().backward()
    assert layer.info.status is Status.MAXITER
    assert not layer.info.adjoint.converged


@pytest.mark.parametrize(
    ("make", "error", "pattern"),
    (
        (lambda: ns.LinearSolve(max_iter=3), TypeError, r"unknown option 'max_iter'.*'maxiter'"),
        (lambda: ns.LinearSolve(checkevery=3), TypeError, "unknown option 'checkevery'.*'check_every'"),
        (lambda: ns.LinearSolve("cg"), TypeError, "positional"),
        (lambda: ns.LinearSolve(method="cg")(A, b, max_iter=3), TypeError, r"unknown option 'max_iter'.*'maxiter'"),
        (lambda: ns.LinearSolve(method="cgg")(A, b), ValueError, "'cgg'.*'cg'"),
    ),
)
def test_layer_refuses_unknown_options(make, error, pattern):
    """By name, and with the nearest known one."""
    with pytest.raises(error, match=pattern):
        make()


def test_preconditioner_of_a_layer_is_a_submodule():
    """Its parameters are the layer's, once; state is saved, loaded, converted and counted with the layer."""
    M = Jacobi(A.diagonal().clone())
    layer = ns.LinearSolve(method="cg", M=M)
    assert dict(layer.named_children()) == {"M": M}
    assert [name for name, _ in layer.named_parameters()] == ["M.weight"]
    assert sorted(layer.state_dict()) == ["M.diagonal", "M.weight"]
    layer(apply, b)
    preconditioned = layer.info.iterations
    layer.load_state_dict({"M.diagonal": A.diagonal(), "M.weight": 2 * torch.ones(N, dtype=torch.float64)})
    assert torch.equal(M.weight.detach(), torch.full((N,), 2.0, dtype=torch.float64))
    layer(apply, b)
    assert abs(layer.info.iterations - preconditioned) <= 1  # M and 2 M are the same preconditioner
    layer.float()
    assert layer(lambda v: A.float() @ v, b.float()).dtype == torch.float32
    assert not ns.LinearSolve(method="cg").state_dict()
    model = nn.Sequential(OrderedDict(solve=ns.LinearSolve(M=M)))
    assert sorted(model.state_dict()) == ["solve.M.diagonal", "solve.M.weight"]


@pytest.mark.parametrize("used", (False, True))
@pytest.mark.parametrize("duplicate", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy))
def test_layer_is_copied_and_pickled(used, duplicate):
    """A copy solves as the original does; a deep one shares nothing with it."""
    layer = ns.LinearSolve(method=ns.GMRES(restart=3), rtol=1e-10, M=Jacobi(A.diagonal().clone()), history=True)
    rhs = b.clone().requires_grad_()
    if used:
        layer(apply, rhs).sum().backward()
    twin = duplicate(layer)
    assert torch.equal(twin(apply, rhs), layer(apply, rhs))
    assert twin.info.iterations == layer.info.iterations
    assert twin.info.method == "gmres"
    if duplicate is not copy.copy:
        with torch.no_grad():
            layer.M.weight.mul_(-3)
        assert torch.equal(twin.M.weight.detach(), torch.ones(N, dtype=torch.float64))


def test_record_is_copied_and_pickled():
    """Also one with an adjoint and a history, or of a batch."""
    rhs = torch.stack([b, b]).requires_grad_()
    x, info = ns.solve_ex(apply, rhs, batch_dims=1, history=True)
    x.sum().backward()
    for twin in (copy.deepcopy(info), pickle.loads(pickle.dumps(info))):
        assert torch.equal(twin.status, info.status)
        assert torch.equal(twin.history, info.history)
        assert torch.equal(twin.adjoint.iterations, info.adjoint.iterations)
    with pytest.raises(ns.ConvergenceError) as caught:
        ns.solve(apply, b, maxiter=1, method="cg")
    twin = pickle.loads(pickle.dumps(caught.value))
    assert str(twin) == str(caught.value)


# -- history, callback, progress and silence ------------------------------------------------------------------------


@each_krylov
def test_history_holds_the_residual_norms_in_the_units_of_b(method):
    """It begins with the initial residual, of x0 where there is one, and ends with one that meets the tolerance."""
    rhs, x0 = 1e6 * b, draw(N, seed=2)
    _, plain = ns.solve_ex(apply, rhs, method=method)
    assert plain.history is None
    for guess, first in ((None, norm(rhs)), (x0, norm(rhs - A @ x0))):
        _, info = ns.solve_ex(apply, rhs, method=method, x0=guess, history=True)
        assert info.history.shape == (info.iterations + 1,)
        assert info.history[0].item() == pytest.approx(first.item(), rel=1e-12)
        assert info.history[-1] <= 1e-8 * norm(rhs)
    for k in (1, 2, 3):  # the residual of the iterate after k steps
        _, early = ns.solve_ex(apply, rhs, method=method, x0=x0, maxiter=k)
        assert info.history[k].item() == pytest.approx(early.residual_norm, rel=1e-6)


def test_history_of_a_batch_stays_where_a_system_stopped():
    """A system that has ended keeps its last norm while the others go on."""
    diagonals = torch.stack([torch.full((N,), 2.0), torch.linspace(1, 5, N)]).double()
    _, info = ns.solve_ex(lambda v: diagonals * v, draw(2, N), method="cg", batch_dims=1, history=True)
    assert info.iterations[0] == 1 < info.iterations[1]
    assert info.history.shape == (info.iterations[1] + 1, 2)
    assert info.history.isfinite().all()
    assert (info.history[1:, 0] <= 1e-8 * info.history[0, 0]).all()


@each_krylov
def test_callback_sees_every_iteration_of_both_passes(method):
    """Once an iteration, numbered from 1, with the phase and the residual norm in the units of b; read-only."""
    states = []
    rhs = (1e3 * b).requires_grad_()
    x, info = ns.solve_ex(apply, rhs, method=method, callback=states.append, history=True)
    forward = list(states)
    assert [s.iteration for s in forward] == list(range(1, info.iterations + 1))
    assert {s.phase for s in forward} == {"forward"}
    assert [s.residual_norm for s in forward] == pytest.approx(info.history[1:].tolist())
    assert all(isinstance(s.residual_norm, float) for s in forward)
    for name in ("iteration", "residual_norm", "phase"):
        with pytest.raises(AttributeError):
            setattr(forward[0], name, 0)
    x.sum().backward()
    backward = states[len(forward) :]
    assert {s.phase for s in backward} == {"adjoint"}
    assert [s.iteration for s in backward] == list(range(1, info.adjoint.iterations + 1))


@each_krylov
@pytest.mark.parametrize("true_value", (True, 1, "stop"))
def test_callback_that_returns_true_stops_without_converging(method, true_value):
    """STOPPED is a failure, also in the adjoint; the iterate is that of the step."""
    rhs = b.clone().requires_grad_()

    def stop_at_2(state):
        return true_value if state.iteration == 2 else None

    x, info = ns.solve_ex(apply, rhs, method=method, callback=stop_at_2)
    assert info.status is Status.STOPPED
    assert info.converged is False
    assert info.iterations == 2
    assert info.residual_norm == pytest.approx(norm(rhs - A @ x).item(), rel=1e-6)
    with pytest.raises(ns.ConvergenceError, match="STOPPED"):
        ns.solve(apply, rhs, method=method, callback=stop_at_2)

    x = ns.solve(apply, rhs, method=method, callback=lambda s: s.phase == "adjoint")
    with pytest.raises(ns.ConvergenceError, match=r"adjoint(.|\n)*STOPPED") as caught:
        x.sum().backward()
    assert caught.value.info.iterations == 1
    assert rhs.grad is None


def test_callback_of_a_batch_sees_one_norm_a_system():
    """And stops all that still run; what had converged stays converged."""
    diagonals = torch.stack([torch.full((N,), 2.0), torch.linspace(1, 5, N)]).double()
    states = []

    def callback(state):
        states.append(state)
        return state.iteration == 2

    _, info = ns.solve_ex(lambda v: diagonals * v, draw(2, N), method="cg", batch_dims=1, callback=callback)
    assert [s.residual_norm.shape for s in states] == [(2,), (2,)]
    assert info.status.tolist() == [Status.CONVERGED, Status.STOPPED]
    assert info.iterations.tolist() == [1, 2]


def test_result_of_a_callback_changes_nothing_else():
    """A callback that returns a false value leaves the solve as it is."""
    for value in (None, False, 0):
        assert torch.equal(ns.solve(apply, b, method="cg", callback=lambda s, v=value: v), ns.solve(apply, b, method="cg"))


def run_everything(**options):
    """Solves that converge, fail and warn, in both passes, by every method."""
    hard = torch.logspace(0, 8, N, dtype=torch.float64)
    rhs = b.clone().requires_grad_()
    for method in METHODS:
        ns.solve(source(method, A), rhs, method=method, **options).sum().backward()
    for A_ in (lambda v: hard * v, lambda v: v * torch.nan, lambda v: 0 * v, lambda v: -v):
        x, _ = ns.solve_ex(A_, rhs, method="cg", maxiter=2, on_failure="ignore", **options)
        x.sum().backward()


def test_nothing_is_printed(capsys):
    """Neither by success nor by failure, to either stream."""
    run_everything()
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_progress_bar_goes_to_the_error_stream(capsys):
    """Only when asked for, only there, in both passes, also for a batch; the result is the same."""
    pytest.importorskip("tqdm")
    rhs = b.clone().requires_grad_()
    x = ns.solve(apply, rhs, method="cg", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "cg" in captured.err
    assert "forward" in captured.err
    x.sum().backward()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "adjoint" in captured.err
    assert torch.equal(x, ns.solve(apply, b, method="cg"))
    assert capsys.readouterr().err == ""
    ns.solve(lambda v: torch.linspace(1, 3, 12).reshape(2, N) * v, torch.ones(2, N), batch_dims=1, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "gmres" in captured.err


def test_logging_goes_to_one_logger(caplog):
    """`logging.getLogger("nablasolve")`, below the level that is shown without being asked for."""
    with caplog.at_level(logging.DEBUG):
        run_everything()
    ours = [record for record in caplog.records if not record.name.startswith("torch")]
    assert ours
    assert {record.name for record in ours} == {"nablasolve"}
    assert all(record.levelno < logging.WARNING for record in ours)
    assert not logging.getLogger("nablasolve").handlers or all(
        isinstance(handler, logging.NullHandler) for handler in logging.getLogger("nablasolve").handlers
    )
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("nablasolve")
    logger.addHandler(handler)
    try:
        logger.setLevel(logging.DEBUG)
        ns.solve(apply, b, method="cg")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert "cg" in stream.getvalue()


# -- what else may come in ---------------------------------------------------------------------------------------------


def test_a_layer_refuses_an_unknown_method_when_it_is_made():
    with pytest.raises(ValueError, match=r"method: unknown method 'cgg'; did you mean 'cg'"):
        ns.LinearSolve(method="cgg")


def test_a_preconditioner_on_other_vectors_is_refused():
    M = ns.LinearOperator(lambda r: r, domain=torch.zeros(4))
    with pytest.raises(ValueError, match=r"M: expected an operator on vectors \(3,\) like b, got one on \(4,\)"):
        ns.solve(lambda v: 2 * v, torch.ones(3), M=M)


def test_a_sparse_guess_is_refused_by_name():
    with pytest.raises(ValueError, match=r"x0: expected a dense tensor, got layout torch\.sparse_coo"):
        ns.solve(lambda v: 2 * v, torch.ones(3), x0=torch.ones(3).to_sparse())


def test_records_of_batches_can_be_compared_and_shown():
    _, first = ns.solve_ex(lambda v: 2 * v, torch.ones(3, 2), batch_dims=1)
    _, second = ns.solve_ex(lambda v: 2 * v, torch.ones(3, 2), batch_dims=1)
    assert first == first
    assert first != second
    layer = ns.LinearSolve(method="gmres")
    torch.vmap(lambda b: layer(lambda v: 2 * v, b))(torch.ones(3, 2))
    assert "torch.vmap" in repr(layer.info)


@pytest.mark.parametrize("method", [ns.GMRES, ns.CG, ns.Direct])
def test_an_unknown_option_of_a_method_names_the_nearest(method):
    option = {ns.GMRES: "restrat", ns.CG: "restart", ns.Direct: "positive_definite"}[method]
    with pytest.raises(TypeError, match=rf"{method.__name__}: unknown option '{option}'"):
        method(**{option: 1})
    with pytest.raises(TypeError, match="did you mean 'restart'"):
        ns.GMRES(restrat=3)


def test_a_warning_names_the_line_of_the_user():
    b = torch.ones(5, requires_grad=True)
    d = torch.logspace(0, 5, 5)
    with pytest.warns(ns.ConvergenceWarning) as forward:
        x = ns.solve(lambda v: d * v, b, method="cg", maxiter=2, on_failure="warn")
    with pytest.warns(ns.ConvergenceWarning) as backward:
        x.sum().backward()
    assert [Path(warning.filename).name for warning in (*forward, *backward)] == [Path(__file__).name] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dense_matrix_of_16_bits_is_factorised_in_32(dtype):
    A = (torch.eye(4) * 3 + torch.arange(16).reshape(4, 4) / 20).to(dtype).requires_grad_()
    b = torch.ones(4, dtype=dtype, requires_grad=True)
    x, info = ns.solve_ex(A, b)
    assert info.method == "direct"
    assert info.converged
    assert x.dtype == dtype
    assert torch.allclose(x.float(), torch.linalg.solve(A.float(), b.float()), rtol=2e-2)
    (g,) = torch.autograd.grad(x.sum(), A)
    assert g.dtype == dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_leaves_no_finite_record_and_no_finite_gradient(value):
    b = torch.ones(2, 3, dtype=torch.float64)
    b[1, 0] = value
    _, info = ns.solve_ex(lambda v: 2 * v, b, batch_dims=1, method="gmres")
    assert info.converged.tolist() == [True, False]
    assert info.relative_residual[1].isnan()
    assert info.residual_norm[1].isnan()
    good = torch.ones(3, dtype=torch.float64, requires_grad=True)
    y = ns.solve(lambda v: 2 * v, good, on_failure="ignore")
    (g,) = torch.autograd.grad((y * value).sum(), good)
    assert g.isnan().all()


def test_a_sharded_vector_is_refused_rather_than_reduced_in_part():
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(TypeError, match=r"b: expected a plain Tensor, got a DTensor"):
        ns.solve(lambda v: 2 * v, torch.ones(3).as_subclass(DTensor))
