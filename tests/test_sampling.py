"""Imaging operators against NumPy, SciPy, scikit-image and PyWavelets, and what the grid does not ask of them."""

from __future__ import annotations

import importlib.resources
import math
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from matplotlib import image
from operator_cases import draw
from scipy import ndimage
from skimage import measure, transform
from torch import Tensor

import nablasolve as ns
from nablasolve.operators import (
    DFT,
    CoilSensitivities,
    Downsample,
    Mask,
    Mosaic,
    Radon,
    Subsample,
    Wavelet,
)
from nablasolve.operators.wavelet import FILTERS

DOUBLE = torch.zeros((), dtype=torch.float64)


def close(value: Tensor, expected: Any, tolerance: float = 1e-12) -> bool:
    expected = torch.as_tensor(expected)
    return value.shape == expected.shape and bool((value - expected).abs().max() <= tolerance * expected.abs().max())


# -- masks and samples ---------------------------------------------------------------------------------------------------


def test_a_boolean_mask_drops_what_is_not_a_number() -> None:
    mask = torch.tensor([True, False])
    assert Mask(mask)(torch.tensor([1.0, torch.nan])).tolist() == [1.0, 0.0]


def test_a_boolean_mask_is_a_projection() -> None:
    P = Mask(draw(4, 5) > 0, like=DOUBLE)
    x = draw(4, 5, seed=1)
    assert torch.equal(P(P(x)), P(x))
    assert P.claims.positive_semidefinite
    assert not P.claims.positive_definite
    assert not Mask(draw(3, dtype=torch.complex128)).hermitian


def test_inpainting_is_solved_directly() -> None:
    S = Subsample((4, 5), mask=draw(4, 5) > 0, like=DOUBLE)
    x = draw(4, 5, seed=1)
    solution, info = ns.solve_ex(S.gram(0.5), S.H(S(x)))
    assert info.method == "direct"
    assert close(solution, torch.where(S.mask, x / 1.25, 0.0))


def test_samples_are_those_of_indexing() -> None:
    x = draw(2, 6, 7)
    mask = draw(6, 7, seed=1) > 0
    assert torch.equal(Subsample((6, 7), mask=mask, like=DOUBLE)(x), x[:, mask])
    assert torch.equal(Subsample((6, 7), step=3, like=DOUBLE)(x), x[:, ::3, ::3])
    assert torch.equal(Subsample((6, 7), step=(2, 1), like=DOUBLE)(x), x[:, ::2])
    assert torch.equal(Subsample((6, 7), [[3, 41]], like=DOUBLE)(x), x.flatten(1)[:, None, [3, 41]])


@pytest.mark.parametrize("pattern", ["RGGB", "BGGR", "GRBG", "GBRG"])
def test_a_mosaic_shows_the_color_of_the_pattern(pattern: str) -> None:
    x = draw(3, 4, 6)
    y = Mosaic(x.shape, pattern, like=x)(x)
    for letter, (row, column) in zip(pattern, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        assert torch.equal(y[row::2, column::2], x["RGB".index(letter), row::2, column::2])
    planes = Mosaic(x.shape, pattern, keep_channels=True, like=x)
    assert torch.equal(planes(x).sum(0), y)
    assert torch.equal(planes(planes(x)), planes(x))


def test_demosaicking_of_one_plane_is_solved_directly() -> None:
    M = Mosaic((3, 4, 4), like=DOUBLE)
    y = draw(4, 4)
    x, info = ns.solve_ex(M.gram(1.0), M.H(y))
    assert info.method == "direct"
    assert close(M(x), y / 2)


# -- downsampling --------------------------------------------------------------------------------------------------------


def test_a_box_is_the_mean_of_each_block() -> None:
    x = draw(8, 9)
    expected = measure.block_reduce(x.numpy(), (4, 3), np.mean)
    assert close(Downsample((8, 9), (4, 3), "box", like=x)(x), expected)
    assert close(Downsample((8, 9), (4, 3), "box", like=x)(torch.ones_like(x)), np.ones((2, 3)))


MODES = {"circular": "wrap", "zero": "constant", "reflect": "mirror", "symmetric": "reflect", "replicate": "nearest"}


@pytest.mark.parametrize("boundary", MODES)
def test_filters_at_boundaries_are_those_of_scipy(boundary: str) -> None:
    x, kernel = draw(8, 12), draw(5, 5, seed=1)
    everywhere = ndimage.correlate(x.numpy(), kernel.numpy(), mode=MODES[boundary])
    # a block of three has its centre one pixel after its first, a block of one on it
    assert close(Downsample((8, 12), (1, 3), kernel, boundary=boundary)(x), everywhere[:, 1::3])


def test_a_gaussian_keeps_constants_and_suppresses_the_alias() -> None:
    A = Downsample((32,), 4, boundary="circular", like=DOUBLE)
    assert close(A(torch.ones(32, dtype=torch.float64)), np.ones(8))
    alias = torch.cos(2 * math.pi * torch.arange(32, dtype=torch.float64) / 4)  # every block looks the same
    assert A(alias).abs().max() < 0.02
    assert Subsample((32,), step=4, like=DOUBLE)(alias).abs().max() > 0.99


def test_a_learned_filter_has_a_gradient_under_vmap() -> None:
    kernels, x = draw(3, 4), draw(8, seed=1)

    def loss(kernel: Tensor) -> Tensor:
        return Downsample((8,), 2, kernel)(x).square().sum()

    together = torch.vmap(torch.func.grad(loss))(kernels)
    assert close(together, torch.stack([torch.func.grad(loss)(kernel) for kernel in kernels]))
    assert torch.autograd.gradgradcheck(loss, kernels[0].clone().requires_grad_())


# -- Fourier transform ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["ortho", "backward", "forward"])
@pytest.mark.parametrize("shape", [(6, 5), (4, 7)])
def test_transforms_are_those_of_numpy(norm: str, shape: tuple[int, ...]) -> None:
    x = draw(2, *shape, dtype=torch.complex128)
    F = DFT(shape, norm=norm, like=x)
    assert close(F(x), np.fft.fftn(x.numpy(), axes=(-2, -1), norm=norm))
    assert close(F.inverse()(x), np.fft.ifftn(x.numpy(), axes=(-2, -1), norm=norm))
    centered = DFT(shape, dims=(1,), norm=norm, centered=True, like=x)
    moved = np.fft.fft(np.fft.ifftshift(x.numpy(), -1), axis=-1, norm=norm)
    assert close(centered(x), np.fft.fftshift(moved, -1))
    assert close(centered.inverse()(centered(x)), x)


def test_the_gram_operator_of_a_transform_is_a_multiple_of_the_identity() -> None:
    x = draw(3, 4, dtype=torch.complex128)
    assert close(DFT((3, 4), norm="backward", like=x).gram(2.0)(x), 16 * x)
    assert DFT((3, 4), like=x).unitary
    assert not DFT((3, 4), norm="forward", like=x).unitary


def test_a_centered_transform_of_a_centered_gaussian_is_real_and_positive() -> None:
    t = torch.arange(16) - 8.0
    spectrum = DFT((16,), centered=True)(torch.exp(-(t**2) / 4))
    assert close(spectrum, spectrum.abs() + 0j, 1e-6)
    assert int(spectrum.abs().argmax()) == 8


# -- coils ---------------------------------------------------------------------------------------------------------------


def test_coil_images_are_combined_in_one_division() -> None:
    maps, x = draw(4, 5, 6, dtype=torch.complex128), draw(5, 6, dtype=torch.complex128, seed=1)
    S = CoilSensitivities(maps)
    solution, info = ns.solve_ex(S.gram(), S.H(S(x)))
    assert info.method == "direct"
    assert close(solution, x)


# -- Radon transform -----------------------------------------------------------------------------------------------------


def phantom(n: int) -> Tensor:
    """The phantom of Shepp and Logan, of shape (n, n)."""
    with importlib.resources.as_file(importlib.resources.files("skimage") / "data" / "phantom.png") as path:
        grey = torch.from_numpy(image.imread(path).copy()).double()[..., 0]
    return torch.nn.functional.interpolate(grey[None, None], (n, n), mode="area")[0, 0]


def test_the_sinogram_is_that_of_scikit_image() -> None:
    x, degrees = phantom(129), np.arange(0, 180, 15.0)
    expected = torch.from_numpy(transform.radon(x.numpy(), theta=degrees).T.copy())
    y = Radon((129, 129), torch.from_numpy(np.deg2rad(degrees)), 129)(x)
    assert torch.linalg.vector_norm(y - expected) < 0.01 * torch.linalg.vector_norm(expected)
    assert (y - expected).abs().max() < 0.03 * expected.max()


def test_views_along_the_axes_are_sums_of_columns_and_rows() -> None:
    x = draw(4, 6)
    y = Radon((4, 6), torch.tensor([0.0, math.pi / 2], dtype=torch.float64), 10)(x)
    assert close(y[0, 2:8], x.sum(0))
    assert close(y[1, 3:7], x.sum(1).flip(0))  # upwards
    assert y[0, [0, 1, 8, 9]].abs().max() < 1e-12


@pytest.mark.parametrize("width", [0.4, 1.0, 3.0])
def test_every_view_sees_the_whole_mass(width: float) -> None:
    x = draw(2, 7, 5)
    y = Radon((7, 5), torch.linspace(0, 4, 9, dtype=torch.float64), width=width)(x)
    assert close(width * y.sum(-1), x.sum((-2, -1))[:, None].expand(2, 9))


def test_a_disc_casts_its_chords() -> None:
    n, radius = 101, 30
    t = torch.arange(n, dtype=torch.float64) - n // 2
    x = (t[:, None].square() + t.square() <= radius**2).double()
    y = Radon((n, n), torch.linspace(0, math.pi, 12, dtype=torch.float64), n)(x)
    expected = 2 * (radius**2 - t.square()).clamp(min=0).sqrt()
    inside = t.abs() < 0.9 * radius
    assert (y - expected)[:, inside].abs().max() < 0.05 * 2 * radius


def test_angles_have_a_gradient() -> None:
    x = phantom(17)
    angles = torch.tensor([0.2, 1.0, 2.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda angles: Radon((17, 17), angles)(x), angles)
    along_axes = torch.tensor([0.0, math.pi / 2, math.pi], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(Radon((17, 17), along_axes)(x).square().sum(), along_axes)
    assert bool(gradient.isfinite().all())


# -- wavelets ------------------------------------------------------------------------------------------------------------


def test_coefficients_are_those_of_pywavelets() -> None:
    """As `pywt.dwt(x, "db2", mode="periodization")` gives them."""
    x = torch.arange(1, 9, dtype=torch.float64).square()
    averages = [31.478032514194705, 9.811562211109113, 30.36842684825847, 72.59176178849341]
    details = [-9.506954314672253, -1.224744871391588, -1.2247448713915885, 37.412288180171146]
    assert close(Wavelet((8,), "db2", 1, like=x)(x), torch.tensor(averages + details, dtype=torch.float64))


@pytest.mark.parametrize("name", ["haar", "db2", "db4"])
def test_images_are_analysed_as_by_pywavelets(name: str) -> None:
    x = draw(32, 16)
    coefficients = pywt.wavedec2(x.numpy(), name, mode="periodization", level=2 if name == "db2" else 1)
    expected, _ = pywt.coeffs_to_array(coefficients)
    wavelet = name if name in FILTERS else torch.tensor(pywt.Wavelet(name).rec_lo, dtype=torch.float64)
    assert close(Wavelet((32, 16), wavelet, 2 if name == "db2" else 1, like=x)(x), expected)


def test_wavelets_do_not_see_what_their_moments_annihilate() -> None:
    constant, ramp = torch.ones(16, dtype=torch.float64), torch.arange(16, dtype=torch.float64)
    for name in FILTERS:
        assert Wavelet((16,), name, like=constant)(constant)[2 if name == "haar" else 4 :].abs().max() < 1e-12
    # but for where it wraps around
    assert Wavelet((16,), "db2", 1, like=ramp)(ramp)[9:15].abs().max() < 1e-12
    assert Wavelet((16,), "haar", 1, like=ramp)(ramp)[9:15].abs().min() > 0.5


def test_synthesis_inverts_analysis_in_three_dimensions() -> None:
    x = draw(2, 4, 8, 6)
    W = Wavelet((4, 8, 6), levels=1, like=x)
    assert W.unitary
    assert close(W.H(W(x)), x)
    assert abs(float(torch.linalg.vector_norm(W(x)) / torch.linalg.vector_norm(x)) - 1) < 1e-12


def test_levels_stop_where_a_size_is_odd_or_short() -> None:
    assert Wavelet((40, 64), "haar").levels == 3
    assert Wavelet((64,), "db2").levels == 4
    assert Wavelet((7,), "db2").levels == 0


def test_a_filter_of_a_user_claims_nothing_by_itself() -> None:
    h = torch.tensor(FILTERS["db2"], dtype=torch.float64)
    assert not Wavelet((8,), h).unitary
    assert Wavelet((8,), h, unitary=True).unitary


# -- the front door ------------------------------------------------------------------------------------------------------

ERRORS: list[tuple[Any, type[Exception], str]] = [
    (lambda: Mask([True]), TypeError, "mask: expected a Tensor, got list"),
    (lambda: Mask(torch.ones(3, dtype=torch.int64)), ValueError, "mask: expected a boolean, floating-point or complex dtype"),
    (lambda: Mask(torch.ones(2), (3, 4)), ValueError, r"mask: expected a shape that broadcasts to \(3, 4\), got \(2,\)"),
    (lambda: Mask(torch.ones(2), like=3), TypeError, "like: expected a Tensor"),
    (lambda: Mask(torch.ones(2), definite=True), TypeError, "unknown claim 'definite'"),
    (lambda: Subsample((4,)), TypeError, "expected exactly one of indices, mask and step, got none"),
    (lambda: Subsample((4,), [0], step=2), TypeError, "got indices and step"),
    (lambda: Subsample((4,), [0, 4]), ValueError, r"indices: expected 0 to 3 for shape \(4,\), got 0 to 4"),
    (lambda: Subsample((4,), [1, 1]), ValueError, "indices: expected each entry at most once"),
    (lambda: Subsample((4,), [0.5]), TypeError, "indices: expected integers"),
    (lambda: Subsample((4,), mask=torch.ones(4)), TypeError, "mask: expected a boolean Tensor"),
    (lambda: Subsample((4,), mask=torch.ones(3) > 0), ValueError, r"mask: expected shape \(4,\) like x, got \(3,\)"),
    (lambda: Subsample((4,), mask=torch.ones(4) < 0), ValueError, "mask: expected at least one entry"),
    (lambda: Subsample((4,), step=0), ValueError, "step: expected a positive integer"),
    (lambda: Subsample((4, 0), step=1), ValueError, "shape: expected one or more integers of at least 1"),
    (lambda: Mosaic((4, 4)), ValueError, r"shape: expected \(3, height, width\), got \(4, 4\)"),
    (lambda: Mosaic((3, 4, 4), "RGBY"), ValueError, "pattern: expected four letters of 'RGB'"),
    (lambda: Mosaic((3, 4, 4), keep_channels=1), TypeError, "keep_channels: expected a bool"),
    (lambda: Downsample((5,), 2), ValueError, r"factor: expected divisors of the sizes \(5,\), got \(2,\)"),
    (lambda: Downsample((4,), 2.0), TypeError, "factor: expected an integer, got float"),
    (lambda: Downsample((4,), 2, "gauss"), ValueError, "filter: expected one of .* did you mean 'gaussian'"),
    (lambda: Downsample((4,), 2, boundary="mirror"), ValueError, "boundary: expected one of"),
    (lambda: Downsample((4,), 2, torch.ones(2, 2)), ValueError, "filter: expected a kernel of 1 dimensions"),
    (lambda: Downsample((4,), 2, 3), TypeError, "filter: expected 'box', 'gaussian' or a Tensor"),
    (lambda: Downsample((2, 2, 2, 2), 2), ValueError, "shape: expected one to three dimensions"),
    (lambda: DFT((4.0,)), TypeError, "shape: expected an integer, got float"),
    (lambda: DFT((4,), (1,)), ValueError, "dims: expected dimensions from -1 to 0"),
    (lambda: DFT((4, 4), (1, -1)), ValueError, "dims: expected each dimension once"),
    (lambda: DFT((4,), norm="orthonormal"), ValueError, "norm: expected one of .* did you mean 'ortho'"),
    (lambda: DFT((4,), centered=1), TypeError, "centered: expected a bool"),
    (lambda: CoilSensitivities(torch.ones(4)), ValueError, r"maps: expected shape \(coils, \*shape of the image\), got \(4,\)"),
    (lambda: CoilSensitivities([1]), TypeError, "maps: expected a Tensor"),
    (lambda: CoilSensitivities(torch.ones(2, 2, dtype=torch.int32)), ValueError, "maps: expected a floating-point"),
    (lambda: Radon((4,), torch.ones(2)), ValueError, r"shape: expected \(height, width\), got \(4,\)"),
    (lambda: Radon((4, 4), [0.0]), TypeError, "angles: expected a Tensor in radians"),
    (lambda: Radon((4, 4), torch.ones(2, 2)), ValueError, "angles: expected a 1-d floating-point tensor"),
    (lambda: Radon((4, 4), torch.ones(2), 0), ValueError, "detectors: expected at least 1, got 0"),
    (lambda: Radon((4, 4), torch.ones(2), width=0), ValueError, "width: expected a positive number of pixels"),
    (lambda: Wavelet((8,), "db3"), ValueError, "wavelet: expected one of .* did you mean 'db2'"),
    (lambda: Wavelet((8,), torch.ones(3)), ValueError, "wavelet: expected a 1-d filter of even length"),
    (lambda: Wavelet((8,), 2), TypeError, "wavelet: expected a name or a Tensor"),
    (lambda: Wavelet((12,), levels=3), ValueError, "levels: expected sizes that 2.levels divides, got levels=3"),
]


@pytest.mark.parametrize(("build", "error", "message"), ERRORS, ids=[message for _, _, message in ERRORS])
def test_a_wrong_argument_is_named(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_a_wrong_shape_in_a_composition_is_named_with_the_expression() -> None:
    maps = torch.ones(3, 4, 4, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"Mask @ DFT\(.*\): .* \(\.\.\., 4, 4\) .* \(\.\.\., 3, 4, 4\)"):
        Mask(torch.ones(4, 4) > 0, like=maps) @ DFT(maps.shape, (-2, -1), like=maps)
