"""PyLops, GPyTorch's linear_operator and deepinv: their operators become this library's and back, gradients included."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
import warnings

import linear_operator
import numpy as np
import pylops
import pytest
import torch
from torch import Tensor

import nablasolve as ns
from nablasolve.interop.deepinv import from_deepinv, to_deepinv
from nablasolve.interop.linear_operator import from_linear_operator, to_linear_operator
from nablasolve.interop.pylops import from_pylops, to_pylops
from nablasolve.operators import BlockDiagonal, Diagonal

F64, C128 = torch.float64, torch.complex128


def draw(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# -- PyLops ------------------------------------------------------------------------------------------------------------


def smoothing() -> pylops.LinearOperator:
    return pylops.Smoothing2D((3, 3), dims=(5, 6), dtype="float64")


def test_a_pylops_operator_acts_on_images_and_batches():
    P = smoothing()
    A = from_pylops(P)
    x = draw(2, 5, 6)
    expected = np.stack([P @ image for image in x.numpy()])
    assert np.allclose(A(x).numpy(), expected)
    assert torch.allclose(A.to_dense(), torch.as_tensor(P.todense()))
    assert ns.check_operator(A, x[0]).ok
    assert np.allclose(A(x + 1j * x).imag.numpy(), expected)


def test_a_pylops_problem_is_solved_with_a_gradient():
    P = smoothing()
    y = draw(5, 6).requires_grad_()
    A = from_pylops(P)
    x = ns.solve(A.gram(0.5), A.H @ y, rtol=1e-12)
    dense = torch.as_tensor(P.todense())
    normal = dense.mT @ dense + 0.25 * torch.eye(30, dtype=F64)
    expected = torch.linalg.solve(normal, dense.mT @ y.reshape(-1)).reshape(5, 6)
    assert torch.allclose(x, expected)
    (g,) = torch.autograd.grad(x.square().sum(), y)
    (wanted,) = torch.autograd.grad(expected.square().sum(), y)
    assert torch.allclose(g, wanted)


def test_an_operator_of_ours_serves_pylops():
    d = draw(2, 3)
    P = to_pylops(Diagonal(d))
    assert P.dims == (2, 3)
    assert np.allclose(P @ np.ones((2, 3)), d.numpy())
    assert pylops.utils.dottest(P, 6, 6)
    stacked = pylops.VStack([P, 2 * P])
    assert np.allclose(stacked @ np.ones(6), np.concatenate([d.numpy().ravel(), 2 * d.numpy().ravel()]))
    assert to_pylops(BlockDiagonal(Diagonal(d), Diagonal(d[0]))).shape == (9, 9)
    assert np.allclose(to_pylops(from_pylops(smoothing())).todense(), smoothing().todense())


def test_a_complex_pylops_operator_keeps_its_phase():
    P = pylops.Diagonal(np.array([1.0, 1j, 2 - 1j]), dtype="complex128")
    A = from_pylops(P)
    assert np.allclose(A.to_dense().numpy(), np.diag([1.0, 1j, 2 - 1j]))
    assert np.allclose(A.H.to_dense().numpy(), np.diag([1.0, -1j, 2 + 1j]))


# -- linear_operator ---------------------------------------------------------------------------------------------------


def covariance(x: Tensor, lengthscale: Tensor) -> Tensor:
    return torch.exp(-0.5 * ((x[:, None] - x) / lengthscale) ** 2)


@pytest.mark.parametrize("kind", ["dense", "sum", "low rank", "toeplitz"])
def test_a_linear_operator_is_solved_with_gradients_to_its_tensors(kind):
    x = torch.linspace(0, 1, 8, dtype=F64)
    scale = torch.tensor(0.3, dtype=F64, requires_grad=True)
    K = covariance(x, scale)
    L, dense = {
        "dense": (linear_operator.to_linear_operator(K).add_jitter(0.1), K + 0.1 * torch.eye(8, dtype=F64)),
        "sum": (linear_operator.operators.DiagLinearOperator(scale + x) + K, K + torch.diag(scale + x)),
        "low rank": (
            linear_operator.operators.RootLinearOperator(K[:, :3]) + linear_operator.operators.DiagLinearOperator(1 + x),
            K[:, :3] @ K[:, :3].mT + torch.diag(1 + x),
        ),
        "toeplitz": (
            linear_operator.operators.ToeplitzLinearOperator(K[0]).add_jitter(0.1),
            K + 0.1 * torch.eye(8, dtype=F64),
        ),
    }[kind]
    A = from_linear_operator(L, positive_definite=True)
    b = draw(8).requires_grad_()
    got, info = ns.solve_ex(A, b, rtol=1e-12)
    expected = torch.linalg.solve(dense, b)
    assert info.method == "cg"
    assert torch.allclose(got, expected, rtol=1e-8)
    for g, w in zip(
        torch.autograd.grad(got.square().sum(), [scale, b], retain_graph=True),
        torch.autograd.grad(expected.square().sum(), [scale, b], retain_graph=True),
        strict=True,
    ):
        assert torch.allclose(g, w, rtol=1e-7)


def test_a_linear_operator_acts_on_batches_and_complex_vectors():
    M = draw(3, 5)
    A = from_linear_operator(linear_operator.to_linear_operator(M))
    x, y = draw(2, 4, 5, dtype=C128), draw(2, 3)
    assert torch.allclose(A(x), x @ M.mT.to(C128))
    assert torch.allclose(A.H(y), y @ M)
    with pytest.raises(ValueError, match=r"A: expected a linear_operator of shape \(m, n\), got \(2, 3, 3\)"):
        from_linear_operator(linear_operator.to_linear_operator(draw(2, 3, 3)))


def test_an_operator_of_ours_serves_linear_operator_with_gradients():
    W = draw(4, 4).requires_grad_()
    L = to_linear_operator(ns.LinearOperator(lambda v: W @ v, domain=W[0]))
    x = draw(4, 3)
    assert torch.allclose(L @ x, W @ x)
    assert torch.allclose(L.mT @ x, W.mT @ x)
    assert torch.allclose((L @ x[:, 0]), W @ x[:, 0])
    (g,) = torch.autograd.grad((L @ x).sum(), W)
    assert torch.allclose(g, x.sum(1).expand(4, 4))
    assert torch.allclose(L.to_dense(), W)
    sandwich = (L @ L.mT).to_dense()
    assert torch.allclose(sandwich, W @ W.mT)
    image = to_linear_operator(Diagonal(draw(2, 3)))
    assert image.shape == (6, 6)


def test_what_linear_operator_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="does not know its domain"):
        to_linear_operator(lambda v: v)
    with pytest.raises(ValueError, match="expected an operator on one real tensor"):
        to_linear_operator(Diagonal(draw(3, dtype=C128)))


# -- deepinv -----------------------------------------------------------------------------------------------------------


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An empty torchvision, which deepinv imports and these tests do not use: its wheels replace torch."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)

        def attribute(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = attribute
        return module

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module")
def deepinv():
    finder = Stubs()
    sys.meta_path.insert(0, finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepinv
    finally:
        sys.meta_path.remove(finder)
    return deepinv


def test_physics_of_deepinv_is_solved_with_a_gradient_to_its_filter(deepinv):
    kernel = torch.rand(1, 1, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    psf = kernel / kernel.sum()
    physics = deepinv.physics.Blur(filter=psf.detach(), padding="circular")
    image = draw(2, 1, 6, 5)
    A = from_deepinv(physics, image, filter=psf)
    assert torch.allclose(A(image), physics.A(image, filter=psf))
    assert ns.check_operator(A, image, batch_dims=1).ok

    def solution(operator: ns.LinearOperator) -> Tensor:
        return ns.solve(operator.gram(0.5), operator.H @ image, batch_dims=1, rtol=1e-12)

    x = solution(A)
    (g,) = torch.autograd.grad(x.square().sum(), kernel)
    change = draw(1, 1, 3, 3, seed=2)

    def value(step: float) -> float:
        moved = kernel.detach() + step * change
        return float(solution(from_deepinv(physics, image, filter=moved / moved.sum())).square().sum())

    assert (g * change).sum().item() == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-6)


def test_an_operator_of_ours_is_physics_of_deepinv(deepinv):
    mask = (draw(6, 5) > 0).to(F64)
    physics = to_deepinv(Diagonal(mask), img_size=(1, 6, 5))
    x = draw(2, 1, 6, 5)
    assert torch.allclose(physics.A(x), mask * x)
    assert torch.allclose(physics.A_adjoint(x), mask * x)
    assert abs(physics.adjointness_test(x)) < 1e-10
    back = from_deepinv(physics, x)
    assert torch.allclose(back(x), mask * x)


def test_physics_that_changes_the_shape_knows_its_codomain(deepinv):
    physics = deepinv.physics.Downsampling(img_size=(1, 8, 8), factor=2, filter=None)
    A = from_deepinv(physics, torch.zeros(1, 1, 8, 8))
    assert A.codomain.shape == (1, 1, 4, 4)
    assert ns.check_operator(A, torch.zeros(1, 1, 8, 8)).ok
