"""Linear operators as values: composing, transposing and adding them makes new ones, and claims follow the algebra."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..adjoint import pull_back
from ..arguments import nearest
from ..vectors import Layout, flatten

Tree = Any  # a tensor, or a pytree of tensors


@dataclass(frozen=True)
class Claims:
    """What is known of an operator. `positive_definite` implies `hermitian`."""

    hermitian: bool = False
    positive_definite: bool = False

    def __post_init__(self) -> None:
        for name in ("hermitian", "positive_definite"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {type(getattr(self, name)).__name__}")
        if self.positive_definite and not self.hermitian:
            object.__setattr__(self, "hermitian", True)

    @classmethod
    def named(cls, claims: dict[str, Any]) -> Claims:
        """The claims of keyword arguments.

        Raises:
            TypeError: for an unknown name, with the nearest known one, or a value that is not a bool.
        """
        known = ("hermitian", "positive_definite")
        for name in claims:
            if name not in known:
                raise TypeError(f"aslinearoperator: unknown claim {name!r}{nearest(name, known)}")
        return cls(**claims)


@dataclass(frozen=True)
class AnyBatch:
    """The domain of a matrix: vectors of shape `(*batch, n)` with any batch; `example` has shape `(n,)`."""

    example: Tensor


class LinearOperator:
    """A linear map given by a function.

    Args:
        fn: `x -> A x` on a tensor of any shape, or on a pytree of tensors. It may close over tensors; gradients reach them.
        adjoint: `y -> A^H y`. Where it is left out, autograd derives it.
        domain: an example of `x` (tensor or pytree, batch dimensions included); only its structure is read. Needed where
            the operator is not square, and by `to_dense()`.
        codomain: an example of `A x`; by default like `domain`.
        hermitian: the claim that `A = A^H`.
        positive_definite: the claim that `A` is Hermitian positive definite.

    Operators combine: `A @ B`, `A + B`, `A - B`, `c * A`, `A / c`, `-A`, `A.H`, `A.T`, `A.conj()`, `A.gram(damp)`; and
    apply: `A @ x`, `A(x)`.

    Raises:
        TypeError: if `fn` or `adjoint` is not callable, or a claim is not a bool.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        adjoint: Callable[..., Any] | None = None,
        domain: Tree = None,
        codomain: Tree = None,
        hermitian: bool = False,
        positive_definite: bool = False,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn: expected a callable, got {type(fn).__name__}")
        if adjoint is not None and not callable(adjoint):
            raise TypeError(f"adjoint: expected a callable or None, got {type(adjoint).__name__}")
        self.fn = fn
        self.adjoint_fn = adjoint
        self.domain = _structure("domain", domain)
        self.codomain = _structure("codomain", codomain) if codomain is not None else self.domain
        self.claims = Claims(hermitian, positive_definite)

    # -- application ---------------------------------------------------------------------------------------------

    def apply(self, x: Tree) -> Tree:
        """`A x`."""
        return self.fn(x)

    def apply_adjoint(self, y: Tree) -> Tree:
        """`A^H y`: the user's adjoint, `A` itself where it is claimed Hermitian, else derived by autograd."""
        if self.adjoint_fn is not None:
            return self.adjoint_fn(y)
        if self.claims.hermitian:
            return self.apply(y)
        return _derived_adjoint(self.apply, y, self.domain, self.codomain)

    @property
    def has_adjoint(self) -> bool:
        """Whether the adjoint is written down rather than derived by autograd."""
        return self.adjoint_fn is not None or self.claims.hermitian

    @property
    def has_user_adjoint(self) -> bool:
        """Whether the adjoint rests on a function that a user supplied."""
        return self.adjoint_fn is not None

    @property
    def hermitian(self) -> bool:
        """Whether the operator is claimed Hermitian."""
        return self.claims.hermitian

    @property
    def positive_definite(self) -> bool:
        """Whether the operator is claimed Hermitian positive definite."""
        return self.claims.positive_definite

    def __call__(self, x: Tree) -> Tree:
        """`A x` for a tensor or a pytree of tensors."""
        check_structure("x", x, self.domain)
        return self.apply(x)

    def to_dense(self, like: Tree = None) -> Tensor:
        """The matrix of the operator, of shape `(m, n)` for flattened vectors, differentiable.

        Args:
            like: an example of `x`, where the operator does not know its domain.

        Raises:
            ValueError: if the domain is not known.
        """
        example = _structure("like", like) if like is not None else self.domain
        if example is None:
            raise ValueError("like: the operator does not know its domain; pass an example: A.to_dense(like=x)")
        zero = _zeros(example)
        layout = Layout.of(zero, 0)
        flat = flatten(layout.pack(zero), 0)

        def column(v: Tensor) -> Tensor:
            x = layout.unpack(v.reshape(layout.shapes[0]) if layout.single else v)
            return torch.cat([flatten(leaf, 0) for leaf in pytree.tree_leaves(self(x))])

        if flat.numel() == 0:
            return column(flat).reshape(-1, 1)[:, :0]
        return torch.stack([column(e) for e in torch.eye(flat.numel(), dtype=flat.dtype, device=flat.device)], dim=1)

    # -- algebra -------------------------------------------------------------------------------------------------

    @property
    def H(self) -> LinearOperator:
        """The adjoint (conjugate transpose)."""
        return self if self.claims.hermitian else _Adjoint(self)

    @property
    def T(self) -> LinearOperator:
        """The transpose."""
        return self.H.conj()

    def conj(self) -> LinearOperator:
        """The complex conjugate, `x -> conj(A conj(x))`."""
        return _Conjugate(self)

    def gram(self, damp: Any = 0.0) -> LinearOperator:
        """`A^H A + damp^2 I`, the operator of the normal equations of `min |A x - b|^2 + damp^2 |x|^2`.

        Hermitian; claimed positive definite where `damp` is a number whose square is positive.

        Args:
            damp: a real number or 0-d tensor.
        """
        _check_scalar("damp", damp)
        if not _is_real(damp):
            raise TypeError("damp: expected a real number or 0-d tensor, got a complex one")
        return _Gram(self, damp)

    def __matmul__(self, other: Any) -> Any:
        """The product with another operator, or the application to a vector (a matrix acts on each vector of a batch)."""
        if isinstance(other, LinearOperator):
            return _Product(self, other)
        return self(other)

    def __add__(self, other: Any) -> LinearOperator:
        return _Sum(self, aslinearoperator(other)) if _is_operator_like(other) else NotImplemented

    def __radd__(self, other: Any) -> LinearOperator:
        if isinstance(other, int) and other == 0:  # where `sum` begins
            return self
        return _Sum(aslinearoperator(other), self) if _is_operator_like(other) else NotImplemented

    def __sub__(self, other: Any) -> LinearOperator:
        return self + (-aslinearoperator(other)) if _is_operator_like(other) else NotImplemented

    def __rsub__(self, other: Any) -> LinearOperator:
        return aslinearoperator(other) + (-self) if _is_operator_like(other) else NotImplemented

    def __mul__(self, other: Any) -> LinearOperator:
        return _Scaled(self, other) if _is_scalar(other) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> LinearOperator:
        return _Scaled(self, 1 / other) if _is_scalar(other) else NotImplemented

    def __neg__(self) -> LinearOperator:
        return _Scaled(self, -1)

    # a tensor or NumPy scalar on the left must leave `*`, `+`, `-` to the methods above
    __array_priority__ = 1000.0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _REFLECTED and not kwargs and len(args) == 2 and isinstance(args[1], LinearOperator):
            return getattr(args[1], _REFLECTED[name])(args[0])
        return NotImplemented

    def __repr__(self) -> str:
        claims = [name for name in ("positive_definite", "hermitian") if getattr(self.claims, name)][:1]
        return f"{self._describe()}" + (f" [{claims[0]}]" if claims else "")

    def _describe(self) -> str:
        return f"LinearOperator({getattr(self.fn, '__qualname__', type(self.fn).__name__)})"


_REFLECTED = {"mul": "__rmul__", "add": "__radd__", "sub": "__rsub__"}


class _Composite(LinearOperator):
    """An operator made of others; its adjoint is known where its parts' are."""

    def __init__(self, parts: tuple[LinearOperator, ...], domain: Tree, codomain: Tree, claims: Claims) -> None:
        self.parts = parts
        self.domain, self.codomain, self.claims = domain, codomain, claims

    @property
    def has_adjoint(self) -> bool:
        return self.claims.hermitian or all(part.has_adjoint for part in self.parts)

    @property
    def has_user_adjoint(self) -> bool:
        return any(part.has_user_adjoint for part in self.parts)


class _Adjoint(_Composite):
    def __init__(self, of: LinearOperator) -> None:
        super().__init__((of,), of.codomain, of.domain, of.claims)

    def apply(self, x: Tree) -> Tree:
        return self.parts[0].apply_adjoint(x)

    def apply_adjoint(self, y: Tree) -> Tree:
        return self.parts[0].apply(y)

    @property
    def has_adjoint(self) -> bool:
        return True

    @property
    def H(self) -> LinearOperator:
        return self.parts[0]

    def _describe(self) -> str:
        return f"({self.parts[0]!r}).H"


class _Conjugate(_Composite):
    def __init__(self, of: LinearOperator) -> None:
        super().__init__((of,), of.domain, of.codomain, of.claims)

    def apply(self, x: Tree) -> Tree:
        return _map(torch.conj, self.parts[0].apply(_map(torch.conj, x)))

    def apply_adjoint(self, y: Tree) -> Tree:
        return _map(torch.conj, self.parts[0].apply_adjoint(_map(torch.conj, y)))

    def conj(self) -> LinearOperator:
        return self.parts[0]

    def _describe(self) -> str:
        return f"({self.parts[0]!r}).conj()"


class _Sum(_Composite):
    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        domain = _same("A + B", "domain", left.domain, right.domain)
        codomain = _same("A + B", "codomain", left.codomain, right.codomain)
        claims = Claims(left.hermitian and right.hermitian, left.positive_definite and right.positive_definite)
        super().__init__((left, right), domain, codomain, claims)

    def apply(self, x: Tree) -> Tree:
        left, right = self.parts
        return _map(_add, left.apply(x), right.apply(x))

    def apply_adjoint(self, y: Tree) -> Tree:
        left, right = self.parts
        return _map(_add, left.apply_adjoint(y), right.apply_adjoint(y))

    def _describe(self) -> str:
        return f"({self.parts[0]!r} + {self.parts[1]!r})"


class _Product(_Composite):
    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        _same("A @ B", "inner space", left.domain, right.codomain)
        super().__init__((left, right), right.domain, left.codomain, Claims())

    def apply(self, x: Tree) -> Tree:
        return self.parts[0].apply(self.parts[1].apply(x))

    def apply_adjoint(self, y: Tree) -> Tree:
        return self.parts[1].apply_adjoint(self.parts[0].apply_adjoint(y))

    def _describe(self) -> str:
        return f"({self.parts[0]!r} @ {self.parts[1]!r})"


class _Scaled(_Composite):
    def __init__(self, of: LinearOperator, factor: Any) -> None:
        _check_scalar("factor", factor)
        real = _is_real(factor)
        # the sign of a tensor is data, and is not read
        positive = real and not isinstance(factor, Tensor) and bool(factor > 0)
        claims = Claims(of.hermitian and real, of.positive_definite and positive)
        super().__init__((of,), of.domain, of.codomain, claims)
        self.factor = factor

    def apply(self, x: Tree) -> Tree:
        return _map(lambda leaf: leaf * self.factor, self.parts[0].apply(x))

    def apply_adjoint(self, y: Tree) -> Tree:
        factor = self.factor.conj() if isinstance(self.factor, Tensor) else self.factor.conjugate()
        return _map(lambda leaf: leaf * factor, self.parts[0].apply_adjoint(y))

    def _describe(self) -> str:
        factor = "tensor" if isinstance(self.factor, Tensor) else self.factor
        return f"{factor} * ({self.parts[0]!r})"


class _Gram(_Composite):
    def __init__(self, of: LinearOperator, damp: Any) -> None:
        definite = not isinstance(damp, Tensor) and bool(damp * damp > 0)
        super().__init__((of,), of.domain, of.domain, Claims(hermitian=True, positive_definite=definite))
        self.damp = damp

    def apply(self, x: Tree) -> Tree:
        y = self.parts[0].apply_adjoint(self.parts[0].apply(x))
        if not isinstance(self.damp, Tensor) and self.damp == 0:
            return y
        return _map(lambda a, b: a + b * self.damp**2, y, x)

    def apply_adjoint(self, y: Tree) -> Tree:
        return self.apply(y)

    def _describe(self) -> str:
        damp = "tensor" if isinstance(self.damp, Tensor) else self.damp
        return f"({self.parts[0]!r}).gram({damp})"


def aslinearoperator(A: Any, **claims: Any) -> LinearOperator:
    """`A` as a `LinearOperator`.

    Args:
        A: a `LinearOperator`, a dense Tensor of shape `(..., m, n)`, a sparse Tensor of shape `(m, n)` in any layout, an
            `nn.Module` or another callable.
        claims: `hermitian=`, `positive_definite=`; for a callable every option of `LinearOperator`.

    Raises:
        TypeError: if `A` is none of these.
        ValueError: if a tensor has a shape or dtype that is no matrix's.
    """
    from .dense import DenseOperator
    from .sparse import SparseOperator

    if isinstance(A, LinearOperator):
        if not claims:
            return A
        new = Claims.named(claims)
        result = copy.copy(A)
        result.claims = Claims(new.hermitian or A.hermitian, new.positive_definite or A.positive_definite)
        return result
    if isinstance(A, Tensor):
        kind = DenseOperator if A.layout == torch.strided else SparseOperator
        return kind(A, **claims)
    if callable(A):
        return LinearOperator(A, **claims)
    raise TypeError(
        f"A: expected a callable, an nn.Module, a Tensor, a sparse Tensor or a LinearOperator, got {type(A).__name__}"
    )


# -- helpers -------------------------------------------------------------------------------------------------------


def _map(function: Callable[..., Tensor], *trees: Tree) -> Tree:
    if all(isinstance(tree, Tensor) for tree in trees):
        return function(*trees)
    return pytree.tree_map(function, *trees)


def _add(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        raise ValueError(f"A + B: A gave shape {tuple(a.shape)} and B gave {tuple(b.shape)} for the same vector")
    return a + b


def _structure(name: str, example: Tree) -> Tree:
    """Shapes and dtypes of an example, without its data."""
    if example is None or isinstance(example, AnyBatch):
        return example
    leaves = pytree.tree_leaves(example)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError(f"{name}: expected an example tensor or a pytree of tensors, got {type(example).__name__}")
    return pytree.tree_map(lambda t: torch.empty((), dtype=t.dtype, device=t.device).expand(t.shape), example)


def _zeros(structure: Tree) -> Tree:
    if isinstance(structure, AnyBatch):
        structure = structure.example
    return pytree.tree_map(lambda t: torch.zeros(t.shape, dtype=t.dtype, device=t.device), structure)


def _shapes(space: Tree) -> str:
    if isinstance(space, AnyBatch):
        return f"(..., {space.example.shape[0]})"
    return str(pytree.tree_map(lambda t: tuple(t.shape), space))


def _agree(left: Tree, right: Tree) -> bool:
    """Whether two spaces can be the same."""
    if isinstance(left, AnyBatch) and isinstance(right, AnyBatch):
        return left.example.shape == right.example.shape
    if isinstance(right, AnyBatch):
        left, right = right, left
    if isinstance(left, AnyBatch):
        return isinstance(right, Tensor) and right.shape[-1:] == left.example.shape
    return _shapes(left) == _shapes(right)


def _same(expression: str, what: str, left: Tree, right: Tree) -> Tree:
    """The common structure of two spaces, where they are known.

    Raises:
        ValueError: if they differ.
    """
    if left is None or right is None:
        return right if left is None else left
    if not _agree(left, right):
        raise ValueError(f"{expression}: the {what} of A has shape {_shapes(left)}, that of B {_shapes(right)}")
    return right if isinstance(left, AnyBatch) else left


def matrix_spaces(matrix: Tensor) -> tuple[AnyBatch, AnyBatch]:
    """Domain and codomain of a matrix of shape `(*batch, m, n)`."""
    empty = torch.empty((), dtype=matrix.dtype, device=matrix.device)
    return AnyBatch(empty.expand(matrix.shape[-1])), AnyBatch(empty.expand(matrix.shape[-2]))


def check_structure(name: str, x: Tree, space: Tree) -> None:
    """Raise if `x` is no element of a space that is known.

    Raises:
        TypeError: if it is no tensor or pytree of tensors.
        ValueError: if its shape differs.
    """
    if not all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(x)):
        raise TypeError(f"{name}: expected a tensor or a pytree of tensors, got {type(x).__name__}")
    if space is not None and not _agree(x, space):
        raise ValueError(f"{name}: expected shape {_shapes(space)}, got {_shapes(x)}")


def _derived_adjoint(apply: Callable[[Tree], Tree], y: Tree, domain: Tree, codomain: Tree) -> Tree:
    """`A^H y` by autograd; the domain is `y`'s own structure where none was given."""
    example = y if domain is None else _zeros(domain)
    layout_x, layout_y = Layout.of(example, 0), Layout.of(y, 0)
    packed = layout_y.pack(y)
    zero = torch.zeros_like(layout_x.pack(example))
    declared_complex = domain is not codomain and any(leaf.is_complex() for leaf in pytree.tree_leaves(codomain))
    if packed.is_complex() and not declared_complex:  # a real operator acts on complex vectors
        zero = zero.to(packed.dtype)
    return layout_x.unpack(pull_back(lambda v: layout_y.pack(apply(layout_x.unpack(v))), packed, zero))


def _is_real(value: Any) -> bool:
    return not value.is_complex() if isinstance(value, Tensor) else isinstance(value, numbers.Real)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, numbers.Number) or (isinstance(value, Tensor) and value.ndim == 0)


def _is_operator_like(value: Any) -> bool:
    return isinstance(value, LinearOperator) or (isinstance(value, Tensor) and value.ndim >= 2) or callable(value)


def _check_scalar(name: str, value: Any) -> None:
    if not _is_scalar(value):
        raise TypeError(f"{name}: expected a number or a 0-d tensor, got {type(value).__name__}")
