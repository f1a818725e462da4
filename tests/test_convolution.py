"""Convolutions and differences against SciPy and the definitions, and what the grid of operators cannot say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
import torch
from cases_convolution import convolution_matrix, laplacian_matrix, near_delta
from operator_cases import draw
from torch import Tensor

import nablasolve as ns
from nablasolve.operators import (
    Convolution,
    Diagonal,
    FiniteDifference,
    FourierFilter,
    Gradient,
    Identity,
    Laplacian,
    VaryingBlur,
)
from nablasolve.operators.differences import Cosine, Sine

NDIMAGE = {"circular": "wrap", "zero": "constant", "reflect": "mirror", "symmetric": "reflect", "replicate": "nearest"}
SHAPES = {
    "1-D, odd": ((9,), (5,)),
    "1-D, even": ((8,), (4,)),
    "2-D, odd": ((7, 8), (3, 5)),
    "2-D, even": ((6, 7), (4, 2)),
    "2-D, larger than half of the image": ((6, 5), (5, 4)),
    "2-D, of the size of the image": ((5, 6), (5, 6)),
    "3-D": ((4, 5, 3), (3, 2, 3)),
}


def identity(*shape: int) -> Identity:
    return Identity(torch.zeros(shape, dtype=torch.float64))


# -- against SciPy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("method", ["spatial", "fft", None])
@pytest.mark.parametrize("boundary", NDIMAGE)
@pytest.mark.parametrize("size", SHAPES)
def test_convolution_is_that_of_scipy(size: str, boundary: str, method: str | None, dtype: torch.dtype) -> None:
    shape, window = SHAPES[size]
    x, kernel = draw(*shape, dtype=dtype), draw(*window, dtype=dtype, seed=1)
    expected = scipy.ndimage.convolve(x.numpy(), kernel.numpy(), mode=NDIMAGE[boundary])
    result = Convolution(kernel, shape, boundary=boundary, method=method)(x)
    assert result.dtype == dtype
    assert np.allclose(result.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["spatial", "fft"])
@pytest.mark.parametrize("size", SHAPES)
def test_a_zero_boundary_is_the_same_mode_of_scipy_signal(size: str, method: str) -> None:
    shape, window = SHAPES[size]
    x, kernel = draw(*shape), draw(*window, seed=1)
    A = Convolution(kernel, shape, boundary="zero", method=method, center=[(k - 1) // 2 for k in window])
    assert np.allclose(A(x).numpy(), scipy.signal.convolve(x.numpy(), kernel.numpy(), mode="same"), atol=1e-12)


@pytest.mark.parametrize("boundary", NDIMAGE)
def test_varying_blur_with_one_kernel_is_a_convolution(boundary: str) -> None:
    kernel, x = draw(3, 4), draw(5, 6, seed=1)
    A = VaryingBlur(kernel.expand(5, 6, 3, 4), boundary=boundary)
    assert torch.allclose(A(x), Convolution(kernel, (5, 6), boundary=boundary)(x), atol=1e-13)


def test_varying_blur_takes_the_kernel_of_the_pixel_of_the_result() -> None:
    kernels, x = draw(2, 7, 3), draw(2, 7, seed=3)  # two channels of a line of seven pixels
    y = VaryingBlur(kernels, ndim=1, boundary="replicate")(x)
    for c in range(2):
        for n in range(7):
            assert torch.allclose(y[c, n], Convolution(kernels[c, n], 7, boundary="replicate")(x[c])[n], atol=1e-13)


@pytest.mark.parametrize(("basis", "kind"), [(Sine, "dst"), (Cosine, "dct")])
def test_bases_are_the_orthonormal_transforms_of_scipy(basis: Any, kind: str) -> None:
    transform = {"dst": lambda x: scipy.fft.dstn(x, type=1, norm="ortho"), "dct": lambda x: scipy.fft.dctn(x, norm="ortho")}
    for shape in ((1,), (2,), (5,), (4, 7), (3, 1, 6)):
        x = draw(*shape, dtype=torch.complex128)
        c = basis(shape).analyse(x)
        assert np.allclose(c.numpy(), transform[kind](x.numpy().real) + 1j * transform[kind](x.numpy().imag), atol=1e-13)
        assert torch.allclose(basis(shape).synthesise(c), x, atol=1e-13)
        assert basis(shape).analyse(x.real).dtype == torch.float64
    assert basis((4, 5)) == basis((4, 5)) != basis((5, 4))


# -- what ∇-Prox's convolutions compute ----------------------------------------------------------------------------


def centred_otf(psf: np.ndarray, offset: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The transform of a point spread function that stands at an offset in a larger array whose middle is the origin."""
    padded = np.zeros(shape)
    padded[tuple(slice(o, o + k) for o, k in zip(offset, psf.shape, strict=True))] = psf
    return np.fft.fftn(np.fft.ifftshift(padded))


def test_a_circular_psf_of_the_size_of_the_image_is_covered() -> None:
    for shape in ((6, 8), (5, 7)):
        x, psf = draw(*shape), draw(*shape, seed=1)
        expected = np.fft.ifftn(centred_otf(psf.numpy(), (0, 0), shape) * np.fft.fftn(x.numpy())).real
        assert np.allclose(Convolution(psf, shape)(x).numpy(), expected, atol=1e-12)


def test_a_psf_on_an_image_padded_to_twice_its_size_is_covered() -> None:
    # an even difference of the sizes puts the point spread function one pixel beyond the middle there
    shape = (6, 8)
    x, psf = draw(*shape), draw(*shape, seed=1)
    wide = np.pad(x.numpy(), [(3, 3), (4, 4)])
    otf = centred_otf(psf.numpy(), (3 + 1, 4 + 1), wide.shape)
    expected = np.fft.ifftn(otf * np.fft.fftn(wide)).real[3:-3, 4:-4]
    A = Convolution(psf, shape, boundary="zero", center=(6 // 2 - 1, 8 // 2 - 1))
    assert np.allclose(A(x).numpy(), expected, atol=1e-12)


def test_a_gradient_reaches_a_psf_of_the_size_of_the_image() -> None:
    psf = draw(4, 5).requires_grad_()
    x = draw(4, 5, seed=1)
    for boundary in ("circular", "zero"):
        weights = draw(4, 5, seed=2)
        loss = (Convolution(psf, (4, 5), boundary=boundary)(x) * weights).sum()
        expected = ((convolution_matrix(psf, (4, 5), boundary) @ x.reshape(-1)) * weights.reshape(-1)).sum()
        got, wanted = (torch.autograd.grad(value, psf)[0] for value in (loss, expected))
        assert torch.allclose(got, wanted, atol=1e-12)


def test_a_kernel_of_two_entries_is_a_forward_difference() -> None:
    x = draw(6)
    A = Convolution(torch.tensor([1.0, -1.0], dtype=torch.float64), 6)
    assert torch.allclose(A(x), FiniteDifference(6, dtype=torch.float64)(x))
    assert torch.allclose(A(x), x.roll(-1) - x)


# -- channels and batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", NDIMAGE)
def test_each_channel_has_its_kernel(boundary: str) -> None:
    kernel, x = draw(3, 3, 2), draw(4, 3, 5, 6, seed=1)
    A = Convolution(kernel, (5, 6), boundary=boundary)
    for c in range(3):
        assert torch.allclose(A(x)[:, c], Convolution(kernel[c], (5, 6), boundary=boundary)(x[:, c]), atol=1e-13)


def test_leading_channels_of_size_one_count_as_none() -> None:
    kernel, x = draw(1, 1, 3, 3), draw(2, 4, 5, 6, seed=1)
    A = Convolution(kernel, (5, 6))
    assert torch.equal(A(x), Convolution(kernel[0, 0], (5, 6))(x))
    assert torch.equal(A(x[0, 0]), A(x)[0, 0])
    blur = VaryingBlur(draw(1, 3, 3, 2, 2))
    assert blur(draw(3, 3)).shape == blur.domain.example.shape == (3, 3)
    assert Convolution(draw(1, 4, 3, 3), (5, 6))(x).shape == x.shape


def test_channels_of_the_operators_of_one_system_agree() -> None:
    kernel, b = near_delta(3, 3, dtype=torch.float64, channels=(2,)), draw(2, 4, 5)
    H, D = Convolution(kernel, (4, 5)), Gradient((4, 5), channels=(2,), like=kernel)
    assert D(b).shape == (2, 2, 4, 5)
    x, info = ns.solve_ex(H.gram() + 0.1 * D.gram(), b)
    assert info.method == "direct"
    for c in range(2):
        one = ns.solve(Convolution(kernel[c], (4, 5)).gram() + 0.1 * Gradient((4, 5), like=kernel).gram(), b[c])
        assert torch.allclose(x[c], one, atol=1e-12)
    with pytest.raises(ValueError, match=r"\(\.\.\., 2, 4, 5\).*\(\.\.\., 4, 5\)"):
        H.gram() + Gradient((4, 5), like=kernel).gram()


# -- solves ------------------------------------------------------------------------------------------------------------


def deconvolution(kernel: Tensor, lam: Tensor, boundary: str) -> ns.LinearOperator:
    return Convolution(kernel, (5, 6), boundary=boundary).gram() + lam * Gradient((5, 6), like=kernel).gram()


def deconvolution_matrix(kernel: Tensor, lam: Tensor, boundary: str) -> Tensor:
    M = convolution_matrix(kernel, (5, 6), boundary)
    return M.mT @ M - lam * laplacian_matrix((5, 6), "circular")


@pytest.mark.parametrize("boundary", ["circular", "zero"])
def test_deconvolution_with_a_gradient_penalty(boundary: str) -> None:
    kernel = near_delta(3, 4, dtype=torch.float64).requires_grad_()
    lam = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    b, weights = draw(5, 6), draw(5, 6, seed=3)
    x, info = ns.solve_ex(deconvolution(kernel, lam, boundary), b, rtol=1e-13)
    # only circular convolutions are diagonal in the Fourier basis
    assert (info.method == "direct") == (boundary == "circular")
    expected = (torch.linalg.inv(deconvolution_matrix(kernel, lam, boundary)) @ b.reshape(-1)).reshape(5, 6)
    assert torch.allclose(x, expected, rtol=1e-9, atol=1e-10)
    got = torch.autograd.grad((x * weights).sum(), (kernel, lam))
    wanted = torch.autograd.grad((expected * weights).sum(), (kernel, lam))
    for g, w in zip(got, wanted, strict=True):
        assert torch.allclose(g, w, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("boundary", ["zero", "reflect", "symmetric", "replicate"])
def test_no_other_boundary_takes_the_fourier_shortcut(boundary: str) -> None:
    A = identity(5, 6) + Convolution(0.3 * draw(3, 3), (5, 6), boundary=boundary)
    b = draw(5, 6, seed=1)
    assert A.spectrum() is None
    assert A.gram().spectrum() is None
    x = ns.solve(A, b, rtol=1e-12)
    M = torch.eye(30, dtype=torch.float64) + convolution_matrix(0.3 * draw(3, 3), (5, 6), boundary)
    assert torch.allclose(x.reshape(-1), torch.linalg.solve(M, b.reshape(-1)), atol=1e-9)


def test_operators_diagonal_in_different_bases_have_no_common_spectrum() -> None:
    H = Convolution(near_delta(3, 3, dtype=torch.float64), (5, 6))
    assert (H + identity(5, 6)).spectrum() is not None
    assert (H + Diagonal(draw(5, 6))).spectrum() is None
    assert (H + Laplacian((5, 6), boundary="zero", like=H.kernel)).spectrum() is None
    assert (H + Laplacian((5, 6), boundary="neumann", like=H.kernel)).spectrum() is None


def test_deconvolution_has_second_derivatives() -> None:
    kernel = near_delta(2, 3, dtype=torch.float64).requires_grad_()
    lam = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    b = draw(3, 4).requires_grad_()

    def solution(kernel: Tensor, lam: Tensor, b: Tensor) -> Tensor:
        return ns.solve(Convolution(kernel, (3, 4)).gram() + lam * Gradient((3, 4), like=kernel).gram(), b, rtol=1e-13)

    assert torch.autograd.gradgradcheck(solution, (kernel, lam, b))


@pytest.mark.parametrize("method", ["spatial", "fft"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_convolution_has_second_derivatives(method: str, dtype: torch.dtype) -> None:
    kernel, x = draw(2, 3, dtype=dtype).requires_grad_(), draw(3, 3, dtype=dtype, seed=1).requires_grad_()

    def cubic(kernel: Tensor, x: Tensor) -> Tensor:
        A = Convolution(kernel, (3, 3), boundary="symmetric", method=method)
        return A.H(A(x) * x)

    assert torch.autograd.gradcheck(cubic, (kernel, x), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(cubic, (kernel, x))


def test_varying_blur_has_second_derivatives() -> None:
    kernels, x = draw(2, 3, 2, 2).requires_grad_(), draw(2, 3, seed=1).requires_grad_()

    def cubic(kernels: Tensor, x: Tensor) -> Tensor:
        A = VaryingBlur(kernels, boundary="reflect")
        return A.H(A(x) * x)

    assert torch.autograd.gradcheck(cubic, (kernels, x), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(cubic, (kernels, x))


def test_a_change_of_the_kernel_in_place_is_seen() -> None:
    kernel, x = draw(5, 6), draw(8, 8, seed=1)
    A = Convolution(kernel, (8, 8))
    before = A(x)
    kernel *= 2
    assert torch.allclose(A(x), 2 * before)


def test_a_stored_transfer_function_is_the_same_operator() -> None:
    H = Convolution(near_delta(2, 3, 2, dtype=torch.float64), (4, 5))
    F = FourierFilter(H.transfer_function(), dims=2, real=True)
    x = draw(2, 4, 5)
    assert F(x).dtype == torch.float64
    assert torch.allclose(F(x), H(x), atol=1e-13)
    assert torch.allclose(F.H(x), H.H(x), atol=1e-13)
    b = draw(2, 4, 5, seed=1)
    assert torch.allclose(ns.solve(F.gram() + H.gram(), b), ns.solve(2 * H.gram(), b), atol=1e-12)


# -- differences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("boundary", ["circular", "neumann"])
@pytest.mark.parametrize("shape", [(1,), (2,), (6,), (4, 5), (2, 3, 4)])
def test_the_gram_operator_of_the_gradient_is_the_negative_laplacian(shape: tuple[int, ...], boundary: str, kind: str) -> None:
    spacing = tuple(0.5 + i for i in range(len(shape)))
    options: dict[str, Any] = {"boundary": boundary, "spacing": spacing, "dtype": torch.float64}
    G, L = Gradient(shape, kind=kind, **options).gram(0.5), -Laplacian(shape, **options)
    x = draw(*shape)
    assert torch.allclose(G(x), L(x) + 0.25 * x, atol=1e-12)
    assert torch.allclose(G.spectrum().full().values, (L + 0.25 * Identity(x)).spectrum().full().values, atol=1e-12)


def test_gradients_at_a_zero_boundary_have_no_spectrum() -> None:
    # at one end x[0]^2, at the other 2 x[-1]^2: neither sines nor cosines
    A = Gradient((4, 5), boundary="zero", dtype=torch.float64)
    assert A.gram().spectrum() is None
    assert not torch.allclose(A.gram().to_dense(), -laplacian_matrix((4, 5), "zero"))


def test_differences_are_exact_on_straight_lines() -> None:
    x = 3.0 * torch.arange(7, dtype=torch.float64) * 0.25
    for kind in ("forward", "backward", "central"):
        inside = FiniteDifference(7, kind=kind, spacing=0.25, dtype=torch.float64)(x)[1:-1]
        assert torch.allclose(inside, torch.full_like(inside, 3.0))
    image = torch.stack([x + 5 * i for i in range(4)])
    D = Gradient((4, 7), boundary="neumann", spacing=(1.0, 0.25), dtype=torch.float64)(image)
    assert D.shape == (2, 4, 7)
    assert torch.allclose(D[0, :-1], torch.full_like(D[0, :-1], 5.0))
    assert torch.allclose(D[1, :, :-1], torch.full_like(D[1, :, :-1], 3.0))
    assert not D[0, -1].any()
    assert not D[1, :, -1].any()


def test_the_laplacian_is_negative_and_its_negative_is_known_to_be_positive() -> None:
    options: dict[str, Any] = {"spacing": torch.tensor(0.5), "dtype": torch.float64}
    x = torch.arange(8, dtype=torch.float64) ** 2
    assert torch.allclose(Laplacian(8, **options)(x)[1:-1], torch.full((6,), 8.0, dtype=torch.float64))
    for boundary in ("circular", "zero", "neumann"):
        L = Laplacian((4, 5), boundary=boundary, **options)
        assert str(L.claims) == "hermitian"
        definite = "positive_definite" if boundary == "zero" else "positive_semidefinite"
        back = -(positive := -L)
        for again in (positive, -2 * L, L * -0.5, L / -3, 2 * positive, identity(4, 5) - L, -back):
            assert again.claims.positive_semidefinite
        assert str((-L).claims) == str((-2.0 * L).claims) == definite
        assert str(back.claims) == str((2 * L).claims) == str((-2 * positive).claims) == "hermitian"
        low, high = (-L).eigenvalue_bounds()
        assert abs(low) < 1e-12 if boundary != "zero" else low > 0
        assert torch.allclose(high, (-L).norm_estimate())


def test_a_poisson_equation_is_solved_directly_on_a_large_grid() -> None:
    n = 150
    t = torch.arange(1, n + 1, dtype=torch.float64) / (n + 1)
    u = torch.sin(math.pi * t)[:, None] * torch.sin(2 * math.pi * t)
    x, info = ns.solve_ex(-Laplacian((n, n), boundary="zero", spacing=1 / (n + 1), like=u), 5 * math.pi**2 * u)
    assert info.method == "direct"
    assert torch.allclose(x, u, atol=5e-4)  # the error of second differences


def test_vectors_get_the_default_dtype_or_that_of_an_example() -> None:
    like = torch.zeros(3, dtype=torch.complex64)
    assert Laplacian(4).domain.example.dtype == torch.get_default_dtype()
    assert Laplacian(4, like=like).domain.example.dtype == torch.complex64
    assert Gradient(4, like=like, dtype=torch.float64).codomain.example.dtype == torch.float64
    assert FiniteDifference(4, device="meta").domain.example.device.type == "meta"


# -- errors ------------------------------------------------------------------------------------------------------------

KERNEL = draw(3, 3)
ERRORS = {
    "a list for a kernel": (lambda: Convolution([1.0, 2.0], 5), TypeError, "kernel: expected a Tensor, got list"),
    "an integer kernel": (lambda: Convolution(torch.ones(3, dtype=torch.int64), 5), ValueError, "kernel: .*int64"),
    "too few dimensions": (lambda: Convolution(draw(3), (5, 6)), ValueError, r"kernel: expected at least 2 .*\(5, 6\).*\(3,\)"),
    "an empty kernel": (lambda: Convolution(draw(0, 3), (5, 6)), ValueError, r"kernel: .*positive size.*\(0, 3\)"),
    "a size of zero": (lambda: Convolution(KERNEL, (5, 0)), ValueError, r"shape: .*at least 1, got \(5, 0\)"),
    "no sizes": (lambda: Convolution(KERNEL, ()), ValueError, r"shape: .*got \(\)"),
    "a size of 1.5": (lambda: Convolution(KERNEL, (5, 1.5)), TypeError, "shape: expected an integer, got float"),
    "an unknown boundary": (lambda: Convolution(KERNEL, (5, 6), boundary="circle"), ValueError, "boundary: .*mean 'circular'"),
    "an unknown method": (lambda: Convolution(KERNEL, (5, 6), method="FFT2"), ValueError, "method: expected one of 'fft'"),
    "a center outside": (lambda: Convolution(KERNEL, (5, 6), center=(3, 0)), ValueError, r"center: .*\(3, 3\), got \(3, 0\)"),
    "half a center": (lambda: Convolution(KERNEL, (5, 6), center=1), ValueError, r"center: .*\(3, 3\), got 1"),
    "a vector that is none": (
        lambda: Convolution(KERNEL, (5, 6))(draw(6, 5)),
        ValueError,
        r"x: expected shape \(\.\.\., 5, 6\)",
    ),
    "no transfer function": (
        lambda: Convolution(KERNEL, (5, 6), boundary="zero").transfer_function(),
        ValueError,
        "circular convolution has a transfer function, got 'zero'",
    ),
    "one kernel for varying blur": (lambda: VaryingBlur(KERNEL), ValueError, r"kernels: expected at least 4 .*\(3, 3\)"),
    "too many frequencies": (lambda: FourierFilter(draw(4), dims=2), ValueError, r"dims: expected 1 to 1 .*got 2"),
    "real=1": (lambda: FourierFilter(draw(4), real=1), TypeError, "real: expected a bool, got int"),
    "a dimension outside": (lambda: FiniteDifference((4, 5), 2), ValueError, r"dim: expected -2 to 1 .*got 2"),
    "an unknown kind": (lambda: Gradient(4, kind="centred"), ValueError, "kind: .*mean 'central'"),
    "a spacing of zero": (lambda: Gradient(4, spacing=0.0), ValueError, "spacing: expected a positive number, got 0.0"),
    "a complex spacing": (lambda: Laplacian(4, spacing=1j), TypeError, "spacing: expected real numbers .*got complex"),
    "three spacings of two": (lambda: Laplacian((4, 5), spacing=(1, 2, 3)), ValueError, "spacing: .*2 of them, got 3"),
    "an integer dtype": (lambda: Laplacian(4, dtype=torch.int64), ValueError, "dtype: .*int64"),
    "like a number": (lambda: Laplacian(4, like=1.0), TypeError, "like: expected a Tensor or None, got float"),
    "a complex damping": (lambda: Gradient(4).gram(1j), TypeError, "damp: expected a real number"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument_what_was_expected_and_what_came(name: str) -> None:
    build, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        build()


def test_one_solve_transforms_its_kernel_once_and_has_the_same_gradient(monkeypatch) -> None:
    kernel = draw(7, 7, seed=1).requires_grad_()
    H = Convolution(kernel, (12, 10), boundary="reflect", method="fft")
    y = draw(12, 10, seed=2)
    wrapped, seen = Convolution._wrapped, []
    monkeypatch.setattr(Convolution, "_wrapped", lambda self: seen.append(0) or wrapped(self))
    x, info = ns.solve_ex(H.gram(1.0), y, rtol=1e-12)
    assert (info.matvecs > 5, len(seen)) == (True, 1)
    (g,) = torch.autograd.grad(x.square().sum(), kernel)
    M = H.to_dense()
    expected = torch.linalg.solve(M.mT @ M + torch.eye(120, dtype=M.dtype), y.reshape(-1))
    (wanted,) = torch.autograd.grad(expected.square().sum(), kernel)
    assert torch.allclose(g, wanted, rtol=1e-8, atol=1e-10)
