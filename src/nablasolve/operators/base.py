"""Linear operators as values: what every operator is, knows and can do."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..adjoint import pull_back
from ..arguments import names_options
from ..vectors import Layout, flatten
from . import estimates, spaces
from .claims import Claims
from .factorisation import Factorisation
from .nullspace import Nullspace, check_nullspace
from .spaces import AnyBatch, Tree, check_structure, space_of
from .spectrum import Spectrum


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
        positive_semidefinite: the claim that `A` is Hermitian and `x^H A x >= 0`.
        unitary: the claim that `A^H A = A A^H = I`.
        full_rank: the claim that the rank is as large as the sizes allow: that `A x = 0` for `x = 0` only where `x` has no more
            entries than `A x`, and that every `b` is an `A x` where it has no fewer. Without a domain `A` is taken for square.
        nullspace: what is mapped to zero, all of it: a vector (tensor or pytree like `x`) or a list of linearly independent
            vectors, of any norm; or a callable or `LinearOperator` that projects onto it orthogonally. An empty list is the
            claim that `A x = 0` for `x = 0` only.
        left_nullspace: the same of the adjoint, with vectors like `A x`. For a Hermitian operator one serves for both.

    What is claimed is not checked, and not differentiated.

    Operators combine: `A @ B`, `A + B`, `A - B`, `c * A`, `A / c`, `-A`, `A.H`, `A.T`, `A.conj()`, `A.gram(damp)`,
    `A.restrict(V)`, `A.inverse()`; and apply: `A @ x`, `A(x)`.

    Raises:
        TypeError: if `fn` or `adjoint` is not callable, a claim is not a bool, or a nullspace is none of these.
        ValueError: if a vector of a nullspace is not like `x`, or like `A x`; or there is one, and full rank is claimed.
    """

    fn: Callable[..., Any]
    adjoint_fn: Callable[..., Any] | None = None
    parts: tuple[LinearOperator, ...] = ()
    claimed_nullspace: Nullspace | None = None
    claimed_left_nullspace: Nullspace | None = None

    @names_options
    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        adjoint: Callable[..., Any] | None = None,
        domain: Tree = None,
        codomain: Tree = None,
        hermitian: bool = False,
        positive_definite: bool = False,
        positive_semidefinite: bool = False,
        unitary: bool = False,
        full_rank: bool = False,
        nullspace: Any = None,
        left_nullspace: Any = None,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn: expected a callable, got {type(fn).__name__}")
        if adjoint is not None and not callable(adjoint):
            raise TypeError(f"adjoint: expected a callable or None, got {type(adjoint).__name__}")
        self.fn = fn
        self.adjoint_fn = adjoint
        self.domain = space_of("domain", domain)
        self.codomain = space_of("codomain", codomain) if codomain is not None else self.domain
        named = Claims.named(
            {
                "hermitian": hermitian,
                "positive_definite": positive_definite,
                "positive_semidefinite": positive_semidefinite,
                "unitary": unitary,
                "full_rank": full_rank,
            }
        )
        if full_rank and self.domain is None and self.codomain is not None:
            raise ValueError("full_rank: where codomain= is given, it needs domain=, too: an example of x")
        self.claims = of_sizes(named, self.domain, self.codomain)
        _claim_nullspaces(self, nullspace, left_nullspace)

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
        return derived_adjoint(self.apply, y, self.domain, self.codomain)

    @property
    def has_adjoint(self) -> bool:
        """Whether the adjoint is written down rather than derived by autograd."""
        return self.has_user_adjoint or self.claims.hermitian

    @property
    def has_user_adjoint(self) -> bool:
        """Whether the adjoint rests on a function that a user supplied: an argument, or a method of a subclass."""
        return self.adjoint_fn is not None or type(self).apply_adjoint is not LinearOperator.apply_adjoint

    @property
    def known_linear(self) -> bool:
        """Whether the operator is linear by construction; a function of the user's may be anything."""
        return False

    @property
    def constants(self) -> tuple[Tensor, ...] | None:
        """All the tensors that it holds, where it is known that none of them can be asked for a derivative; else None."""
        return None

    @property
    def hermitian(self) -> bool:
        """Whether the operator is known to be Hermitian."""
        return self.claims.hermitian

    @property
    def positive_definite(self) -> bool:
        """Whether the operator is known to be Hermitian positive definite."""
        return self.claims.positive_definite

    @property
    def unitary(self) -> bool:
        """Whether the operator is known to be unitary."""
        return self.claims.unitary

    @property
    def nullspace(self) -> Nullspace | None:
        """What is mapped to zero, all of it: a tuple of linearly independent vectors; None where it is not known.

        The tuple is empty where the nullspace is known to be trivial. Its vectors have the structure of `x`, without batch
        dimensions where these are free, and are to be read only; they may be real where `x` is complex. A callable that
        was given as `nullspace=` is returned as it is: it projects onto the nullspace.
        """
        if self.claims.full_column_rank:
            return ()
        claimed = self.claimed_nullspace
        if claimed is None and self.claims.hermitian:
            claimed = self.claimed_left_nullspace
        return self.known_nullspace() if claimed is None else claimed

    @property
    def left_nullspace(self) -> Nullspace | None:
        """The nullspace of the adjoint, with vectors of the structure of `A x`; as `nullspace`."""
        if self.claims.hermitian:
            return self.nullspace
        if self.claims.full_row_rank:
            return ()
        claimed = self.claimed_left_nullspace
        return self.known_left_nullspace() if claimed is None else claimed

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
        example = space_of("like", like) if like is not None else self.domain
        if example is None:
            raise ValueError("like: the operator does not know its domain; pass an example: A.to_dense(like=x)")
        zero = spaces.zeros(example)
        layout = Layout.of(zero, 0)
        flat = flatten(layout.pack(zero), 0)

        def column(v: Tensor) -> Tensor:
            x = layout.unpack(v.reshape(layout.shapes[0]) if layout.single else v)
            return torch.cat([flatten(leaf, 0) for leaf in pytree.tree_leaves(self(x))])

        if flat.numel() == 0:
            return column(flat).reshape(-1, 1)[:, :0]
        return torch.stack([column(e) for e in torch.eye(flat.numel(), dtype=flat.dtype, device=flat.device)], dim=1)

    def for_one_solve(self) -> LinearOperator:
        """The same operator, in which whatever its tensors determine for all products is computed once, differentiably.

        It is for the products of one solve: a tensor that is changed later does not change it.
        """
        return self

    # -- structure -------------------------------------------------------------------------------------------------

    def spectrum(self) -> Spectrum | None:
        """The operator as a diagonal in a known unitary basis; None where there is none."""
        return None

    def gram_spectrum(self) -> Spectrum | None:
        """The spectrum of `A^H A`, where that is diagonal in a known basis; None where it is not known to be."""
        spectrum = self.spectrum()
        return None if spectrum is None else spectrum.gram(0)

    def known_nullspace(self) -> Nullspace | None:
        """The nullspace that the structure gives; None where it does not."""
        return None

    def known_left_nullspace(self) -> Nullspace | None:
        """The nullspace of the adjoint that the structure gives, of an operator that is not Hermitian; None elsewhere."""
        return None

    def factorise(self) -> Factorisation | None:
        """How to solve with the operator directly; None where its structure does not allow it."""
        spectrum = self.spectrum()
        if spectrum is not None:
            return spectrum.factorise()
        return Factorisation(self.apply_adjoint, self.apply) if self.claims.unitary else None

    def factorise_update(self, whole: LinearOperator) -> Factorisation | None:
        """How to solve with `whole + self` directly, for an operator of low rank; None for any other."""
        return None

    def exact_diagonal(self) -> Tree | None:
        """The diagonal, of the shape of a vector; None where the structure does not give it."""
        spectrum = self.spectrum()
        return None if spectrum is None else spectrum.diagonal()

    def exact_trace(self) -> Tensor | None:
        """The trace; None where the structure does not give it."""
        spectrum = self.spectrum()
        return None if spectrum is None else spectrum.trace()

    def exact_norm(self) -> Tensor | None:
        """The spectral norm; None where the structure does not give it."""
        spectrum = self.spectrum()
        return None if spectrum is None else spectrum.norm()

    def exact_eigenvalue_bounds(self) -> tuple[Tensor, Tensor] | None:
        """The smallest and the largest eigenvalue of a Hermitian operator; None where the structure does not give them."""
        spectrum = self.spectrum()
        return None if spectrum is None else spectrum.eigenvalue_bounds()

    # -- estimates -------------------------------------------------------------------------------------------------

    def diagonal(self, *, samples: int = 64, seed: int = 0, return_how: bool = False) -> Any:
        """The diagonal, of the shape of a vector: exact where the structure gives it or `n <= samples`, else estimated.

        Args:
            samples: how many products an estimate may cost.
            seed: of its random probes.
            return_how: return `(diagonal, how)`, with `"exact"` or `"stochastic"`.

        Raises:
            ValueError: if the operator does not know its domain.

        Source: Bekas, Kokiopoulou & Saad 2007.
        """
        return _answer(estimates.diagonal(self, samples, seed), return_how)

    def trace(self, *, samples: int = 96, seed: int = 0, return_how: bool = False) -> Any:
        """The trace, a 0-d tensor: exact where the structure gives it or `n <= samples`, else estimated.

        Args:
            samples: how many products an estimate may cost.
            seed: of its random probes.
            return_how: return `(trace, how)`, with `"exact"` or `"stochastic"`.

        Raises:
            ValueError: if the operator does not know its domain.

        Source: Meyer, Musco, Musco & Woodruff 2021 (Hutch++).
        """
        return _answer(estimates.trace(self, samples, seed), return_how)

    def norm_estimate(self, *, steps: int = 20, seed: int = 0, return_how: bool = False) -> Any:
        """The spectral norm, a 0-d tensor: exact where the structure gives it, else a lower bound that is mostly close.

        Args:
            steps: how many products with `A` and with `A^H` an estimate may cost.
            seed: of its start.
            return_how: return `(norm, how)`, with `"exact"` or `"Lanczos"`.

        Raises:
            ValueError: if the operator does not know its domain.

        Source: Golub & Van Loan 2013, §10.4.
        """
        return _answer(estimates.norm(self, steps, seed), return_how)

    def eigenvalue_bounds(self, *, steps: int = 30, seed: int = 0, return_how: bool = False) -> Any:
        """The smallest and the largest eigenvalue, 0-d tensors: exact where the structure gives them, else estimated.

        Args:
            steps: how many products an estimate may cost.
            seed: of its start.
            return_how: return `((smallest, largest), how)`, with `"exact"` or `"Lanczos"`.

        Raises:
            ValueError: if the operator does not know its domain, or is not known to be Hermitian.

        Source: Parlett 1998, §13.2.
        """
        return _answer(estimates.eigenvalue_bounds(self, steps, seed), return_how)

    # -- algebra -------------------------------------------------------------------------------------------------

    @property
    def H(self) -> LinearOperator:
        """The adjoint (conjugate transpose)."""
        from .algebra import Adjoint

        return self if self.claims.hermitian else Adjoint(self)

    @property
    def T(self) -> LinearOperator:
        """The transpose."""
        return self.H.conj()

    def conj(self) -> LinearOperator:
        """The complex conjugate, `x -> conj(A conj(x))`."""
        from .algebra import Conjugate

        return Conjugate(self)

    def gram(self, damp: Any = 0.0) -> LinearOperator:
        """`A^H A + damp^2 I`, the operator of the normal equations of `min |A x - b|^2 + damp^2 |x|^2`.

        Hermitian positive semidefinite; claimed definite where `damp` is a number whose square is positive, or `A` is known to
        have full column rank.

        Args:
            damp: a real number or 0-d tensor.
        """
        from .algebra import Gram

        check_scalar("damp", damp)
        if not is_real(damp):
            raise TypeError("damp: expected a real number or 0-d tensor, got a complex one")
        return Gram(self, damp)

    def restrict(self, V: Any) -> LinearOperator:
        """`V^H A V`, the operator on the subspace that `V` spans (Galerkin's projection).

        Args:
            V: an operator or matrix from the small space into that of `A`, such as `Subsample(...).H`.

        Raises:
            ValueError: if `A` does not map the codomain of `V` into itself.
        """
        from .algebra import Restriction

        return Restriction(self, aslinearoperator(V))

    def inverse(self, **options: Any) -> LinearOperator:
        """`A^{-1}` as an operator, each application of which is a `solve` with these options."""
        from .inverse import Inverse

        return Inverse(self, **options)

    def __matmul__(self, other: Any) -> Any:
        """The product with another operator, or the application to a vector (a matrix acts on each vector of a batch)."""
        from .algebra import Product

        if isinstance(other, LinearOperator):
            return Product(self, other)
        return self(other)

    def __add__(self, other: Any) -> LinearOperator:
        from .algebra import Sum

        return Sum(self, aslinearoperator(other)) if _is_operator_like(other) else NotImplemented

    def __radd__(self, other: Any) -> LinearOperator:
        from .algebra import Sum

        if isinstance(other, int) and other == 0:  # where `sum` begins
            return self
        return Sum(aslinearoperator(other), self) if _is_operator_like(other) else NotImplemented

    def __sub__(self, other: Any) -> LinearOperator:
        return self + (-aslinearoperator(other)) if _is_operator_like(other) else NotImplemented

    def __rsub__(self, other: Any) -> LinearOperator:
        return aslinearoperator(other) + (-self) if _is_operator_like(other) else NotImplemented

    def __mul__(self, other: Any) -> LinearOperator:
        from .algebra import Scaled

        if isinstance(other, Tensor):
            return Scaled(self, _check_factor(other))
        return Scaled(self, other) if is_scalar(other) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> LinearOperator:
        from .algebra import Scaled

        if not isinstance(other, Tensor):
            return self * (1 / other) if is_scalar(other) else NotImplemented
        # a tensor is read where the operator is applied, so that each application has a graph of its own
        return Scaled(self, _check_factor(other), divided=True)

    def __neg__(self) -> LinearOperator:
        return self * -1

    # a tensor or NumPy scalar on the left must leave `*`, `+`, `-` to the methods above
    __array_priority__ = 1000.0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _REFLECTED and not kwargs and len(args) == 2 and isinstance(args[1], LinearOperator):
            return getattr(args[1], _REFLECTED[name])(args[0])
        return NotImplemented

    # -- as a value ------------------------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> LinearOperator:
        """A copy on another device or in another precision, with the arguments of `torch.Tensor.to`; differentiable.

        A real dtype changes the precision only: complex tensors stay complex.

        Raises:
            TypeError: if the operator is made of a function that may close over tensors: build that one anew.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)

        def moved(tensor: Tensor) -> Tensor:
            if dtype is None or not (tensor.is_floating_point() or tensor.is_complex()):
                return tensor.to(device)
            return tensor.to(device, dtype.to_complex() if tensor.is_complex() else dtype)

        return _moved(self, moved, {})  # type: ignore[no-any-return]

    @property
    def expression(self) -> str:
        """The operator as one line."""
        return self._label()

    def __repr__(self) -> str:
        """The expression as a tree, with shapes, dtypes and claims."""
        return "\n".join(self._tree())

    def _tree(self) -> list[str]:
        lines = [self._describe()]
        for part in self.parts:
            last = part is self.parts[-1]
            first, *rest = part._tree()
            lines.append(("└─ " if last else "├─ ") + first)
            lines += [("   " if last else "│  ") + line for line in rest]
        return lines

    def _describe(self) -> str:
        """The label with shapes, dtype and claims."""
        known = ""
        if self.domain is not None:
            known = f": {spaces.describe(self.domain)}"
            if self.codomain is not self.domain:
                known += f" -> {spaces.describe(self.codomain)}"
        claims = str(self.claims)
        return f"{self._label()}{known}" + (f" [{claims}]" if claims else "")

    def _label(self) -> str:
        """What stands for the operator in a tree and in an expression."""
        if type(self) is not LinearOperator:
            return type(self).__name__
        return f"LinearOperator({getattr(self.fn, '__qualname__', type(self.fn).__name__)})"


# whose objects may be callable, and take no tensor or give none of ours
_NEIGHBOURS = {
    "scipy": "nablasolve.interop.scipy.from_scipy",
    "pylops": "nablasolve.interop.pylops.from_pylops",
    "linear_operator": "nablasolve.interop.linear_operator.from_linear_operator",
}

_REFLECTED = {"mul": "__rmul__", "add": "__radd__", "sub": "__rsub__"}


class StructuredOperator(LinearOperator):
    """An operator of this library: `apply` and `apply_adjoint` are both written down, and tested against each other.

    A subclass sets its tensors and numbers as attributes, and calls this constructor with its spaces and claims.
    """

    def __init__(self, domain: Tree, codomain: Tree = None, claims: Claims | None = None) -> None:
        self.domain = domain
        self.codomain = domain if codomain is None else codomain
        self.claims = Claims() if claims is None else of_sizes(claims, self.domain, self.codomain)

    def apply(self, x: Tree) -> Tree:
        raise NotImplementedError

    def apply_adjoint(self, y: Tree) -> Tree:
        raise NotImplementedError

    @property
    def has_adjoint(self) -> bool:
        return True

    @property
    def has_user_adjoint(self) -> bool:
        return False

    @property
    def known_linear(self) -> bool:
        return True

    def conj(self) -> LinearOperator:
        real = not spaces.is_complex(self.domain) and not spaces.is_complex(self.codomain)
        return self if real else super().conj()


def aslinearoperator(A: Any, **claims: Any) -> LinearOperator:
    """`A` as a `LinearOperator`.

    Args:
        A: a `LinearOperator`, a dense Tensor of shape `(..., m, n)`, a sparse Tensor of shape `(m, n)` in any layout, an
            `nn.Module` or another callable.
        claims: `hermitian=`, `positive_definite=`, `positive_semidefinite=`, `unitary=`, `full_rank=`, `nullspace=` and
            `left_nullspace=`, as for `LinearOperator`; for a callable every option of it. A `LinearOperator` is copied.

    Raises:
        TypeError: if `A` is none of these, or a claim has the wrong type.
        ValueError: if a tensor has a shape or dtype that is no matrix's, or a vector of a nullspace another shape.
    """
    from .dense import DenseOperator
    from .sparse import SparseOperator

    if isinstance(A, LinearOperator):
        if not claims:
            return A
        nullspaces = claims.pop("nullspace", None), claims.pop("left_nullspace", None)
        claimed = copy.copy(A)
        claimed.claims = A.claims | of_sizes(Claims.named(claims), A.domain, A.codomain)
        _claim_nullspaces(claimed, *nullspaces)
        return claimed
    if isinstance(A, Tensor):
        nullspaces = claims.pop("nullspace", None), claims.pop("left_nullspace", None)
        operator = (DenseOperator if A.layout == torch.strided else SparseOperator)(A, **claims)
        _claim_nullspaces(operator, *nullspaces)
        return operator
    neighbour = type(A).__module__.split(".")[0]
    if neighbour in _NEIGHBOURS:
        raise TypeError(f"A: {type(A).__name__} is of another library; convert it: {_NEIGHBOURS[neighbour]}(A)")
    if callable(A):
        return LinearOperator(A, **claims)
    remedy = "; use torch.from_numpy" if neighbour == "numpy" else ""
    raise TypeError(
        f"A: expected a callable, an nn.Module, a Tensor, a sparse Tensor or a LinearOperator, got {type(A).__name__}{remedy}"
    )


# -- helpers -------------------------------------------------------------------------------------------------------


def _answer(result: tuple[Any, str], return_how: bool) -> Any:
    return result if return_how else result[0]


def of_sizes(claims: Claims, domain: Tree, codomain: Tree) -> Claims:
    """The claims without a full rank that the sizes of the spaces exclude; `full_rank=True` alone claims that of both sides."""
    if domain is codomain or domain is None or codomain is None:
        return claims
    m, n = spaces.dimension(codomain), spaces.dimension(domain)
    if spaces.has_free_batch(domain) != spaces.has_free_batch(codomain):  # their sizes cannot be compared
        return claims.within(rows=False, columns=False)
    # real vectors do not reach all complex ones
    real, into_real = not spaces.is_complex(domain), not spaces.is_complex(codomain)
    return claims.within(rows=m <= n and (into_real or not real), columns=n <= m and (real or not into_real))


def _claim_nullspaces(operator: LinearOperator, nullspace: Any, left_nullspace: Any) -> None:
    """Set what is claimed of the nullspaces of an operator that is being made, whose spaces and claims are known.

    Raises:
        TypeError: if one is neither a vector, nor a list of vectors, nor a callable.
        ValueError: if a vector is not one of the space, or full rank is claimed, and there is one all the same.
    """
    if nullspace is not None:
        operator.claimed_nullspace = check_nullspace("nullspace", nullspace, operator.domain)
    if left_nullspace is not None:
        operator.claimed_left_nullspace = check_nullspace("left_nullspace", left_nullspace, operator.codomain)
    right, left = operator.claimed_nullspace, operator.claimed_left_nullspace
    operator.claims |= Claims(full_column_rank=right == (), full_row_rank=left == ())
    claims = operator.claims
    for name, known, full in (
        ("nullspace", right, claims.full_column_rank),
        ("left_nullspace", left, claims.full_row_rank),
    ):
        if full and isinstance(known, tuple) and known:
            raise ValueError(f"{name}: expected no vectors for an operator that is {claims}, got {len(known)}")


def derived_adjoint(apply: Callable[[Tree], Tree], y: Tree, domain: Tree, codomain: Tree) -> Tree:
    """`A^H y` by autograd; the domain is `y`'s own structure where none was given."""
    example = y if domain is None else spaces.zeros(domain)
    layout_x, layout_y = Layout.of(example, 0), Layout.of(y, 0)
    packed = layout_y.pack(y)
    zero = torch.zeros_like(layout_x.pack(example))
    declared_complex = domain is not codomain and spaces.is_complex(codomain)
    if packed.is_complex() and not declared_complex:  # a real operator acts on complex vectors
        zero = zero.to(packed.dtype)
    return layout_x.unpack(pull_back(lambda v: layout_y.pack(apply(layout_x.unpack(v))), packed, zero))


def is_real(value: Any) -> bool:
    """Whether a number or tensor has a real type."""
    return not value.is_complex() if isinstance(value, Tensor) else isinstance(value, numbers.Real)


def is_scalar(value: Any) -> bool:
    """Whether the value is a number or a 0-d tensor."""
    return isinstance(value, numbers.Number) or (isinstance(value, Tensor) and value.ndim == 0)


def _check_factor(factor: Tensor) -> Tensor:
    if factor.ndim:
        raise TypeError(f"factor: expected a number or a 0-d tensor, got shape {tuple(factor.shape)}")
    return factor


def check_scalar(name: str, value: Any) -> None:
    """Raise a TypeError unless the value is a number or a 0-d tensor."""
    if not is_scalar(value):
        raise TypeError(f"{name}: expected a number or a 0-d tensor, got {type(value).__name__}")


def _is_operator_like(value: Any) -> bool:
    return isinstance(value, LinearOperator) or (isinstance(value, Tensor) and value.ndim >= 2) or callable(value)


def _moved(value: Any, move: Callable[[Tensor], Tensor], memo: dict[int, Any]) -> Any:
    """A copy of an attribute with its tensors moved; what is one thing stays one."""
    if id(value) in memo:
        return memo[id(value)]
    result = value
    if isinstance(value, Tensor):
        result = move(value)
    elif isinstance(value, AnyBatch):
        result = AnyBatch(_moved(value.example, move, memo))
    elif isinstance(value, torch.nn.Module):
        result = copy.deepcopy(value)._apply(move)
    elif isinstance(value, LinearOperator):
        result = copy.copy(value)
        for name, attribute in vars(value).items():
            setattr(result, name, _moved(attribute, move, memo))
    elif isinstance(value, tuple | list | dict):
        result = pytree.tree_map(lambda leaf: _moved(leaf, move, memo), value)
    elif callable(value) and not isinstance(value, type):
        name = getattr(value, "__qualname__", type(value).__name__)
        raise TypeError(f"to: the function {name} may close over tensors, which cannot be moved; build the operator anew")
    memo[id(value)] = result
    return result
