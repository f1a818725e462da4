"""Each kernel on its own, for one system and for many, in place and not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from nablasolve.vectors import (
    Basis,
    HostSpace,
    Layout,
    Space,
    TensorSpace,
    accumulator_dtype,
    any_true,
    flatten,
    precise_norm,
    real_dtype,
)

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """A space, and the batch shape of its vectors."""

    name: str
    batch: tuple[int, ...]
    host: bool = False
    in_place: bool = True

    def space(self, like: Tensor) -> Space:
        return HostSpace(like) if self.host else TensorSpace(len(self.batch), self.in_place)

    def vector(self, seed: int, dtype: torch.dtype, shape: tuple[int, ...] = (3, 4)) -> Tensor:
        return torch.randn(*self.batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    def scalar(self, value: complex, like: Tensor) -> Any:
        """The same scalar for every system."""
        if self.host:
            return value
        dtype = like.dtype if isinstance(value, complex) else real_dtype(like.dtype)
        return torch.full(self.batch, value, dtype=dtype)

    def scalars(self, seed: int, like: Tensor) -> tuple[Any, Tensor]:
        """A different scalar for each system, as the space holds it and as a tensor of shape `(*batch, 1, 1)`."""
        values = torch.randn(self.batch, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)
        return values.item() if self.host else values, values.reshape(*self.batch, 1, 1)


CASES = (
    Case("host", (), host=True),
    Case("one system", ()),
    Case("batch", (5,)),
    Case("two batch dimensions", (2, 3)),
    Case("unrolled", (), in_place=False),
    Case("unrolled batch", (5,), in_place=False),
)
every_space = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def as_tensor(scalar: Any) -> Tensor:
    if isinstance(scalar, Tensor):
        return scalar
    kinds = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}
    return torch.tensor(scalar, dtype=kinds[type(scalar)])


def close(actual: Any, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = 1e-5 if real_dtype(dtype) == torch.float32 else 1e-13
    torch.testing.assert_close(
        as_tensor(actual).to(torch.complex128), expected.to(torch.complex128), rtol=tolerance, atol=tolerance
    )


# -- vectors -----------------------------------------------------------------------------------------------------------


@every_space
@every_dtype
def test_the_inner_product_conjugates_its_first_argument(case, dtype):
    x, y = case.vector(0, dtype), case.vector(1, dtype)
    space = case.space(x)
    expected = (x.conj() * y).sum((-2, -1))
    close(space.dot(x, y), expected, dtype)
    close(space.real_dot(x, y), expected.real, dtype)
    assert not as_tensor(space.real_dot(x, y)).is_complex()


@every_space
@every_dtype
def test_the_norm_is_real_and_euclidean(case, dtype):
    x = case.vector(0, dtype)
    norm = case.space(x).norm(x)
    close(norm, (x.abs() ** 2).sum((-2, -1)).sqrt(), dtype)
    assert not as_tensor(norm).is_complex()


@every_space
@every_dtype
def test_strided_vectors_are_read_as_they_are(case, dtype):
    x, y = case.vector(0, dtype, (3, 8))[..., ::2], case.vector(1, dtype, (4, 3)).mT
    close(case.space(x).dot(x, y), (x.conj() * y).sum((-2, -1)), dtype)
    close(case.space(x).norm(y), (y.abs() ** 2).sum((-2, -1)).sqrt(), dtype)


@every_space
@every_dtype
@pytest.mark.parametrize("kernel", ["axpy", "xpay"])
def test_updates_write_over_y_in_place_and_nowhere_else(case, dtype, kernel):
    x, y = case.vector(0, dtype), case.vector(1, dtype)
    kept, before = x.clone(), y.clone()
    space = case.space(x)
    a, spread = case.scalars(2, x)
    expected = y + spread * x if kernel == "axpy" else x + spread * y
    result = space.axpy(a, x, y) if kernel == "axpy" else space.xpay(x, a, y)
    close(result, expected, dtype)
    assert result.dtype == dtype
    assert torch.equal(x, kept)
    if space.in_place:
        assert result.data_ptr() == y.data_ptr()
    else:
        assert torch.equal(y, before)


@every_space
@every_dtype
def test_scaling_makes_a_new_vector(case, dtype):
    x = case.vector(0, dtype)
    kept = x.clone()
    a, spread = case.scalars(2, x)
    result = case.space(x).scale(a, x)
    close(result, spread * x, dtype)
    assert result.dtype == dtype
    assert torch.equal(x, kept)
    assert result.data_ptr() != x.data_ptr()


@every_space
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scaling_by_zero_gives_zero_whatever_the_vector_holds(case, value):
    x = torch.full((*case.batch, 3, 4), value, dtype=torch.float64)
    assert torch.equal(case.space(x).scale(case.scalar(0.0, x), x), torch.zeros_like(x))


def test_one_system_scaled_by_zero_leaves_the_others():
    x = torch.tensor([[math.nan, 1.0], [2.0, 3.0]])
    assert torch.equal(TensorSpace(1).scale(torch.tensor([0.0, 2.0]), x), torch.tensor([[0.0, 0.0], [4.0, 6.0]]))


@every_space
def test_a_copy_is_owned_where_updates_are_in_place(case):
    x, out = case.vector(0, torch.float64), case.vector(1, torch.float64)
    space = case.space(x)
    copy, second = space.copy(x), space.copy(x, out=out)
    assert torch.equal(copy, x)
    assert torch.equal(second, x)
    if space.in_place:
        assert copy.data_ptr() != x.data_ptr()
        assert second.data_ptr() == out.data_ptr()
        assert space.copy(x.mT).is_contiguous()
    else:
        assert copy is x


@every_space
def test_a_complex_scalar_acts_on_a_complex_vector(case):
    x, y = case.vector(0, torch.complex128), case.vector(1, torch.complex128)
    a = case.scalar(0.5 - 2j, x)
    close(case.space(x).axpy(a, x, y.clone()), y + (0.5 - 2j) * x, torch.complex128)


# -- scalars -----------------------------------------------------------------------------------------------------------

UNUSABLE = (
    0.0,
    -0.0,
    math.nan,
    math.inf,
    -math.inf,
    0j,
    complex(math.nan, 1.0),
    complex(1.0, math.inf),
    complex(math.inf, math.nan),
)


@every_space
@pytest.mark.parametrize("denominator", UNUSABLE, ids=str)
@pytest.mark.parametrize("numerator", [1.0, 0.0, -3.5, math.inf, math.nan, 2j], ids=str)
def test_a_ratio_with_an_unusable_denominator_is_zero(case, numerator, denominator):
    like = torch.zeros((*case.batch, 2), dtype=torch.complex128)
    ratio = as_tensor(case.space(like).ratio(case.scalar(numerator, like), case.scalar(denominator, like)))
    assert torch.equal(ratio, torch.zeros_like(ratio))


@every_space
@every_dtype
def test_a_ratio_is_the_quotient_where_it_is_wanted_and_zero_elsewhere(case, dtype):
    like = torch.zeros((*case.batch, 2), dtype=dtype)
    space = case.space(like)
    (a, _), (b, _) = case.scalars(0, like), case.scalars(1, like)
    close(space.ratio(a, b), as_tensor(a) / as_tensor(b), dtype)
    close(space.ratio(a, b, case.host or torch.ones(case.batch, dtype=torch.bool)), as_tensor(a) / as_tensor(b), dtype)
    stopped = False if case.host else torch.zeros(case.batch, dtype=torch.bool)
    assert not as_tensor(space.ratio(a, b, stopped)).any()


@every_space
@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e160, 1e300])
def test_a_ratio_knows_no_absolute_size(case, size):
    like = torch.zeros((*case.batch, 2), dtype=torch.complex128)
    space = case.space(like)
    for number in (1.0, 1.0 + 1.0j):
        ratio = as_tensor(space.ratio(case.scalar(number * size, like), case.scalar(number * size * 2, like)))
        torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5))


@every_space
def test_a_ratio_of_the_largest_complex_numbers_does_not_overflow_into_an_error(case):
    like = torch.zeros((*case.batch, 2), dtype=torch.complex128)
    ratio = as_tensor(case.space(like).ratio(case.scalar(1.0 + 0j, like), case.scalar(1.7e308 + 1.7e308j, like)))
    assert (ratio.abs() <= 1e-300).all()


def test_a_stopped_system_has_a_zero_ratio_and_the_others_theirs():
    ratio = TensorSpace(1).ratio(
        torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 0.0, 2.0, math.nan]), torch.tensor([True, True, False, True])
    )
    assert torch.equal(ratio, torch.tensor([0.5, 0.0, 0.0, 0.0]))


@every_space
def test_the_square_root_is_zero_for_negative_and_nan_for_nan(case):
    like = torch.zeros((*case.batch, 2), dtype=torch.float64)
    space = case.space(like)
    for value, expected in (
        (4.0, 2.0),
        (0.0, 0.0),
        (-1.0, 0.0),
        (-1e-300, 0.0),
        (-math.inf, 0.0),
        (math.inf, math.inf),
        (1e-300, 1e-150),
    ):
        root = as_tensor(space.sqrt(case.scalar(value, like)))
        torch.testing.assert_close(root.double(), torch.full_like(root, expected, dtype=torch.float64), rtol=1e-6, atol=0)
    assert torch.isnan(as_tensor(space.sqrt(case.scalar(math.nan, like)))).all()


@every_space
def test_selection_maximum_conjugate_and_modulus(case):
    like = torch.zeros((*case.batch, 2), dtype=torch.complex128)
    space = case.space(like)
    two, three, z = case.scalar(2.0, like), case.scalar(3.0, like), case.scalar(1.0 - 2.0j, like)
    yes = True if case.host else torch.ones(case.batch, dtype=torch.bool)
    no = not yes if case.host else ~yes
    full = lambda value: torch.full(case.batch, value, dtype=torch.complex128)  # noqa: E731
    for actual, expected in (
        (space.where(yes, two, three), 2.0),
        (space.where(no, two, three), 3.0),
        (space.maximum(two, three), 3.0),
        (space.maximum(three, 2.0), 3.0),
        (space.conj(z), 1.0 + 2.0j),
        (space.conj(two), 2.0),
        (space.abs2(z), 5.0),
        (space.abs2(case.scalar(-3.0, like)), 9.0),
    ):
        close(actual, full(expected), torch.complex128)
    assert not as_tensor(space.abs2(z)).is_complex()


@every_space
def test_nan_and_infinity_are_seen(case):
    like = torch.zeros((*case.batch, 2), dtype=torch.float64)
    space = case.space(like)
    for value in (math.nan, math.inf, -math.inf):
        assert as_tensor(space.nonfinite(case.scalar(value, like))).all()
    for value in (0.0, -1e308, 5e-324):
        assert not as_tensor(space.nonfinite(case.scalar(value, like))).any()


@every_space
@every_dtype
def test_scalars_of_every_system_have_the_batch_shape(case, dtype):
    like = torch.zeros((*case.batch, 2), dtype=dtype)
    space = case.space(like)
    assert as_tensor(space.full(0.5, like)).shape == case.batch
    assert as_tensor(space.full(-1, like)).dtype == torch.int64
    assert (as_tensor(space.full(0.5, like)) == 0.5).all()
    coefficients = torch.randn(*case.batch, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    scalars = space.unstack(coefficients)
    assert len(scalars) == 4
    assert torch.equal(space.stack(scalars, like), coefficients)


@every_space
def test_any_is_true_if_one_system_is(case):
    like = torch.zeros((*case.batch, 2))
    space = case.space(like)
    assert space.any(True)
    assert not space.any(False)
    if not case.host:
        condition = torch.zeros(case.batch, dtype=torch.bool)
        assert space.any(condition) is False
        condition.reshape(-1)[-1] = True
        assert space.any(condition) is True


def test_any_looks_over_the_batches_of_vmap():
    seen = []

    def function(condition: Tensor) -> Tensor:
        seen.append(any_true(condition))
        return condition

    torch.vmap(torch.vmap(function))(torch.tensor([[False, False], [False, True]]))
    torch.vmap(function)(torch.zeros(3, dtype=torch.bool))
    assert seen == [True, False]


# -- derivatives of the unrolled kernels -------------------------------------------------------------------------------


def test_unused_branches_have_zero_derivatives_and_no_nan():
    space = TensorSpace(1, in_place=False)
    denominator = torch.tensor([0.0, 2.0, math.inf], requires_grad=True)
    (grad,) = torch.autograd.grad(space.ratio(torch.ones(3), denominator).sum(), denominator)
    assert torch.equal(grad, torch.tensor([0.0, -0.25, 0.0]))
    square = torch.tensor([0.0, 4.0, -1.0], requires_grad=True)
    (grad,) = torch.autograd.grad(space.sqrt(square).sum(), square)
    assert torch.equal(grad, torch.tensor([0.0, 0.25, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_autograd_follows_every_unrolled_kernel(dtype):
    space = TensorSpace(1, in_place=False)
    x, y = (torch.randn(2, 3, generator=torch.Generator().manual_seed(s), dtype=dtype, requires_grad=True) for s in (0, 1))
    a = torch.randn(2, generator=torch.Generator().manual_seed(2), dtype=dtype, requires_grad=True)

    def function(x: Tensor, y: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        basis = Basis(space, x, 3)
        basis.append(y)
        coefficients = basis.project(space.axpy(a, x, y))
        c, s, rho = space.rotation(a, space.norm(y))
        return (
            space.dot(x, y), space.norm(x), space.xpay(x, a, y), space.scale(a, x), space.ratio(a, space.dot(x, y)),
            basis.subtract(y, coefficients), basis.combine(coefficients), c, s, rho,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (x, y, a))


# -- 16 bits -----------------------------------------------------------------------------------------------------------


@every_space
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_sixteen_bit_products_neither_overflow_nor_lose_digits(case, dtype):
    # 300^2 x 2000 is beyond float16, and counting ones in 16 bits stops at 2048 or 256
    large = torch.full((*case.batch, 2000), 300.0, dtype=torch.float32).to(dtype)
    space = case.space(large)
    value = large.flatten()[0].item()
    torch.testing.assert_close(
        as_tensor(space.dot(large, large)).float(), torch.full(case.batch, value**2 * 2000), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        as_tensor(space.norm(large)).float(), torch.full(case.batch, value * 2000**0.5), rtol=1e-5, atol=0
    )
    ones = torch.ones(*case.batch, 10_000, dtype=dtype)
    assert (as_tensor(space.dot(ones, ones)) == 10_000).all()
    if not case.host:
        assert space.dot(ones, ones).dtype == space.norm(ones).dtype == torch.float32
        assert space.full(0.5, ones).dtype == torch.float32


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_sixteen_bit_updates_keep_the_dtype_of_the_vector(case, dtype):
    x, y = case.vector(0, torch.float32).to(dtype), case.vector(1, torch.float32).to(dtype)
    space = case.space(x)
    a = space.norm(x)
    assert space.axpy(a, x, y.clone()).dtype == dtype
    assert space.xpay(x, a, y.clone()).dtype == dtype
    assert space.scale(a, x).dtype == dtype


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_sixteen_bit_coefficients_of_a_basis_lose_no_digits(case, dtype):
    first = torch.full((*case.batch, 4096), 1 / 64, dtype=dtype)
    basis = Basis(case.space(first), first, 2)
    coefficients = basis.project(torch.full((*case.batch, 4096), 1.0, dtype=dtype))
    torch.testing.assert_close(coefficients.float(), torch.full((*case.batch, 1), 64.0), rtol=1e-2, atol=0)


def test_dtypes_of_parts_and_of_sums():
    assert [real_dtype(t) for t in DTYPES] == [torch.float32, torch.float64, torch.float32, torch.float64]
    assert [accumulator_dtype(t) for t in (*SIXTEEN_BITS, *DTYPES)] == [torch.float32, torch.float32, *DTYPES]


# -- the precise norm --------------------------------------------------------------------------------------------------

SIZES = [
    (torch.float64, 1e-300), (torch.float64, 1e-200), (torch.float64, 1e200), (torch.float64, 1e300), (torch.float32, 1e-38),
    (torch.float32, 1e-30), (torch.float32, 1e30), (torch.float32, 1e36), (torch.complex64, 1e-30), (torch.complex128, 1e-200),
    (torch.complex128, 1e200), (torch.float16, 1e-4), (torch.float16, 1e3),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "size"), SIZES, ids=str)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_the_precise_norm_neither_overflows_nor_underflows(dtype, size, batch):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    unit = torch.randn(*batch, 2, 20, generator=torch.Generator().manual_seed(0), dtype=wide)
    x = (unit * size).to(dtype)
    norm = precise_norm(x, len(batch))
    assert norm.dtype == torch.float64
    assert norm.shape == batch
    exact = torch.linalg.vector_norm(flatten(x.to(wide) / size, len(batch)), dim=-1) * size
    torch.testing.assert_close(norm, exact, rtol=1e-12, atol=0)


def test_the_precise_norm_of_zero_nothing_nan_and_infinity():
    for dtype in DTYPES:
        assert precise_norm(torch.zeros(4, dtype=dtype), 0) == 0
        assert precise_norm(torch.zeros(0, dtype=dtype), 0) == 0
        assert precise_norm(torch.zeros(3, 0, 2, dtype=dtype), 1).tolist() == [0.0, 0.0, 0.0]
        assert precise_norm(torch.tensor(-2.0, dtype=dtype), 0) == 2
        rows = torch.tensor([[3.0, 4.0], [math.nan, 1.0], [math.inf, 1.0], [0.0, 0.0]], dtype=dtype)
        norms = precise_norm(rows, 1)
        assert norms[0] == 5
        assert torch.isnan(norms[1])
        assert not torch.isfinite(norms[2])
        assert norms[3] == 0


def test_the_precise_norm_does_not_mix_the_systems_of_a_batch():
    x = torch.tensor([[1e-200, 1e-200], [1e200, 1e200], [math.nan, 0.0]], dtype=torch.float64)
    norms = precise_norm(x, 1)
    torch.testing.assert_close(
        norms[:2], torch.tensor([2**0.5 * 1e-200, 2**0.5 * 1e200], dtype=torch.float64), rtol=1e-14, atol=0
    )


# -- rotations ---------------------------------------------------------------------------------------------------------

number = st.floats(min_value=-1e60, max_value=1e60, allow_nan=False, allow_subnormal=False).filter(
    lambda v: v == 0 or abs(v) > 1e-60
)


@settings(max_examples=60, deadline=None)
@given(real=number, imaginary=number, b=number, case=st.sampled_from(CASES), is_complex=st.booleans())
def test_a_rotation_is_unitary_and_zeroes_the_second_entry(real, imaginary, b, case, is_complex):
    a = complex(real, imaginary) if is_complex else real
    like = torch.zeros((*case.batch, 2), dtype=torch.complex128 if is_complex else torch.float64)
    c, s, rho = (
        as_tensor(t).to(torch.complex128) for t in case.space(like).rotation(case.scalar(a, like), case.scalar(b, like))
    )
    size = math.hypot(real, imaginary if is_complex else 0.0, b)
    torch.testing.assert_close(c.abs() ** 2 + s.abs() ** 2, torch.ones(c.shape, dtype=torch.float64), rtol=1e-12, atol=0)
    assert (c.imag == 0).all()
    assert ((c * a + s * b - rho).abs() <= 1e-12 * size).all()
    assert ((-s.conj() * a + c * b).abs() <= 1e-12 * size).all()
    assert ((rho.abs() - size).abs() <= 1e-12 * size).all()


@every_space
def test_a_rotation_of_nothing_is_the_identity(case):
    like = torch.zeros((*case.batch, 2), dtype=torch.float64)
    c, s, rho = case.space(like).rotation(case.scalar(0.0, like), case.scalar(0.0, like))
    assert (as_tensor(c) == 1).all()
    assert (as_tensor(s) == 0).all()
    assert (as_tensor(rho) == 0).all()


# -- the basis ---------------------------------------------------------------------------------------------------------


@every_space
@every_dtype
def test_a_basis_projects_subtracts_and_combines(case, dtype):
    vectors = [case.vector(seed, dtype) for seed in range(3)]
    w = case.vector(7, dtype)
    space = case.space(w)
    basis = Basis(space, vectors[0], 4)
    for vector in vectors[1:]:
        basis.append(vector)
    assert basis.count == 3
    assert basis.width == 12
    stacked = torch.stack(vectors, dim=len(case.batch))
    axes = (-2, -1)
    coefficients = basis.project(w)
    close(coefficients, (stacked.conj() * w.unsqueeze(len(case.batch))).sum(axes), dtype)
    spread = coefficients.reshape(*coefficients.shape, 1, 1)
    close(basis.combine(coefficients), (spread * stacked).sum(len(case.batch)), dtype)
    close(
        basis.combine(coefficients[..., :2]),
        (spread * stacked)[(*[slice(None)] * len(case.batch), slice(2))].sum(len(case.batch)),
        dtype,
    )
    before = w.clone()
    result = basis.subtract(w, coefficients)
    close(result, before - (spread * stacked).sum(len(case.batch)), dtype)
    assert (result.data_ptr() == w.data_ptr()) == space.in_place
    for index, vector in enumerate(vectors):
        assert torch.equal(basis[index], vector)
        assert basis[index].shape == w.shape


@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: case.name)
def test_a_basis_owns_its_vectors(case):
    first, second = case.vector(0, torch.float64), case.vector(1, torch.float64)
    kept = first.clone(), second.clone()
    basis = Basis(case.space(first), first, 2)
    basis.append(second)
    first.zero_()
    second.zero_()
    assert torch.equal(basis[0], kept[0])
    assert torch.equal(basis[1], kept[1])


@every_space
@every_dtype
def test_two_projections_make_a_vector_orthogonal(case, dtype):
    first = case.vector(0, dtype)
    space = case.space(first)
    first = space.scale(space.ratio(space.full(1.0, first), space.norm(first)), first)
    basis = Basis(space, first, 2)
    w = first + 1e-3 * case.vector(1, dtype)
    for _ in range(2):
        w = basis.subtract(w, basis.project(w))
    small = as_tensor(space.dot(first, w)).abs() / as_tensor(space.norm(w)).abs()
    assert (small <= 1e-14 if real_dtype(dtype) == torch.float64 else small <= 1e-6).all()


# -- the layout --------------------------------------------------------------------------------------------------------


def trees(batch: tuple[int, ...]) -> st.SearchStrategy[Any]:
    """Nested tuples, lists and dicts of tensors that begin with the batch shape."""
    shape = st.lists(st.integers(0, 3), max_size=3).map(lambda dims: (*batch, *dims))
    leaf = st.builds(lambda s, seed: torch.randn(s, generator=torch.Generator().manual_seed(seed)), shape, st.integers(0, 99))
    return st.recursive(
        leaf,
        lambda child: st.one_of(
            st.lists(child, min_size=1, max_size=3),
            st.lists(child, min_size=1, max_size=3).map(tuple),
            st.dictionaries(st.sampled_from("abcd"), child, min_size=1, max_size=3),
        ),
        max_leaves=6,
    )


@settings(max_examples=80, deadline=None)
@given(data=st.data(), batch=st.sampled_from([(), (2,), (3, 1), (0,)]))
def test_packing_and_unpacking_gives_the_tree_back(data, batch):
    tree = data.draw(trees(batch))
    layout = Layout.of(tree, len(batch))
    vector = layout.pack(tree)
    back = layout.unpack(vector)
    leaves, spec = pytree.tree_flatten(tree)
    returned, same = pytree.tree_flatten(back)
    assert same == spec
    assert all(torch.equal(a, b) and a.shape == b.shape for a, b in zip(leaves, returned, strict=True))
    if layout.single:
        assert vector is tree
    else:
        width = sum(math.prod(leaf.shape[len(batch) :]) for leaf in leaves)
        assert vector.shape == (*batch, width)


def test_a_vector_with_another_batch_unpacks_into_that_batch():
    tree = {"a": torch.zeros(2, 3), "b": (torch.zeros(()), torch.zeros(4))}
    layout = Layout.of(tree, 0)
    vector = torch.arange(5 * 11, dtype=torch.float32).reshape(5, 11)
    back = layout.unpack(vector)
    assert back["a"].shape == (5, 2, 3)
    assert back["b"][0].shape == (5,)
    assert back["b"][1].shape == (5, 4)
    assert torch.equal(torch.cat([flatten(leaf, 1) for leaf in pytree.tree_leaves(back)], dim=-1), vector)


@pytest.mark.parametrize(("shape", "batch_dims", "expected"), [
    ((), 0, (1,)), ((3,), 0, (3,)), ((3,), 1, (3, 1)), ((2, 3, 4), 0, (24,)), ((2, 3, 4), 1, (2, 12)),
    ((2, 3, 4), 2, (2, 3, 4)), ((2, 0, 4), 1, (2, 0)), ((0, 3), 1, (0, 3)), ((2, 3), 2, (2, 3, 1)),
])  # fmt: skip
def test_flattening_keeps_the_batch_and_joins_the_rest(shape, batch_dims, expected):
    assert flatten(torch.zeros(shape), batch_dims).shape == expected
