"""Derivatives of functions as operators: Jacobian, Hessian, Gauss-Newton and Fisher matrices, of which none is formed.

Each product evaluates the function again and costs a few evaluations more. The operators depend on the point `x` and on
every tensor that the function reads, and gradients reach both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..arguments import check_choice
from ..closure import is_differentiable, transforms_active, transparent
from . import spaces
from .base import StructuredOperator, check_scalar, is_real
from .claims import Claims
from .spaces import Tree, any_batch_of, batch_shape

LIKELIHOODS = ("categorical", "gaussian")

Leaves = tuple[Tensor, ...]


class Linearised:
    """A function of some tensors at a point: its values there, and products with its first and second derivatives.

    The function is evaluated at `inputs + z` and differentiated with respect to `z = 0`, a tensor made here: so what
    follows the operations of an operator (a recording, forward mode) sees the inputs enter an ordinary sum. Only reverse
    mode is used, because forward mode does not nest in itself outside `torch.func`. Outside its transforms plain autograd
    does the work, since it goes through functions that `torch.func` does not support.

    Args:
        function: from tensors to a tuple of tensors.
        inputs: the point.
        known: tensors that the inputs depend on, and that are no reason to record products.
    """

    def __init__(self, function: Callable[..., Leaves], inputs: Sequence[Tensor], known: Sequence[Tensor] = ()) -> None:
        self.function, self.inputs = function, tuple(inputs)
        self.transformed = transforms_active()
        zeros = tuple(torch.zeros_like(t) for t in inputs)
        if self.transformed:
            self.zeros = zeros
            self.outputs, self.pull_back = torch.func.vjp(self._moved, *zeros)[:2]
            return
        with torch.enable_grad(), transparent():
            self.zeros = tuple(z.requires_grad_() for z in zeros)
            self.outputs = self._moved(*self.zeros)
        self.attached = torch.is_grad_enabled() and _has_other_leaves(self.outputs, (*self.zeros, *known))

    def _moved(self, *zeros: Tensor) -> Leaves:
        return self.function(*(t + z for t, z in zip(self.inputs, zeros, strict=True)))

    def recording(self, vectors: Sequence[Tensor], *others: Linearised) -> torch.set_grad_enabled:
        """Record the products below only if a derivative of theirs can be asked for: `zeros` alone give no reason to."""
        enabled = torch.is_grad_enabled()
        if enabled and not self.transformed:
            enabled = any(one.attached for one in (self, *others)) or any(v.requires_grad for v in vectors)
        return torch.set_grad_enabled(enabled)

    def back(self, cotangents: Leaves) -> Leaves:
        """`J^H u`."""
        if self.transformed:
            result: Leaves = self.pull_back(cotangents)
            return result
        return _grad(self.outputs, self.zeros, cotangents, torch.is_grad_enabled())

    def forward(self, tangents: Leaves) -> Leaves:
        """`J v`, the adjoint of the linear map `u -> J^H u`."""
        if self.transformed:
            start = tuple(torch.zeros_like(y) for y in self.outputs)
            result: Leaves = torch.func.vjp(lambda *u: self.pull_back(u), *start)[1](tangents)
            return result
        again = torch.is_grad_enabled()
        with torch.enable_grad(), transparent():
            start = tuple(torch.zeros_like(y).requires_grad_() for y in self.outputs)
            pulled = _grad(self.outputs, self.zeros, start, True)
        return _grad(pulled, start, tangents, again)

    def second(self, tangents: Leaves) -> Leaves:
        """`H v`, with the Hessian of a function whose only value is a real number."""
        if self.transformed:
            gradient = torch.func.grad(lambda z: self._moved(*z)[0])
            result: Leaves = torch.func.vjp(gradient, self.zeros)[1](tangents)[0]
            return result
        again = torch.is_grad_enabled()
        with torch.enable_grad(), transparent():
            gradients = _grad(self.outputs, self.zeros, tuple(torch.ones_like(y) for y in self.outputs), True)
        return _grad(gradients, self.zeros, tangents, again)


class _Derivative(StructuredOperator):
    """What the operators made of a function of `x` have in common.

    Args:
        f: the function.
        x: the point, a tensor or a pytree of tensors.
        damping: the multiple of the identity that is added.
        claims: what is known; `positive_semidefinite` of the operator without its damping, all others of the whole.
    """

    def __init__(self, f: Callable[[Tree], Tree], x: Tree, damping: Any, claims: Claims, codomain: Tree = None) -> None:
        check_scalar("damping", damping)
        if not is_real(damping):
            raise TypeError("damping: expected a real number or 0-d tensor, got a complex one")
        super().__init__(any_batch_of("x", x), codomain, claims)
        self.f, self.x, self.damping = f, x, damping
        self.claims = shifted(self.claims, damping)

    def _linearised(self) -> Linearised:
        leaves, spec = pytree.tree_flatten(self.x)
        return Linearised(lambda *given: tuple(pytree.tree_leaves(self.f(pytree.tree_unflatten(given, spec)))), leaves)

    def _mapped(self, product: Callable[[Leaves], Leaves], v: Tree, source: Tree, target: Tree) -> Tree:
        """The linear `product` of leaves, for each vector of a batch and for the parts of a complex one."""
        spec = pytree.tree_structure(source)
        leaves = tuple(spec.flatten_up_to(v))
        batch = batch_shape(pytree.tree_unflatten(leaves, spec), source)

        def real(leaves: Leaves) -> Leaves:
            if not batch:
                return product(leaves)
            flat = tuple(leaf.reshape(-1, *leaf.shape[len(batch) :]) for leaf in leaves)
            return tuple(y.reshape(*batch, *y.shape[1:]) for y in torch.vmap(product)(flat))

        if not spaces.is_complex(source) and any(leaf.is_complex() for leaf in leaves):
            parts = (real(tuple(leaf.real if leaf.is_complex() else leaf for leaf in leaves)), real(tuple(_imag(leaves))))
            y = tuple(re + 1j * im for re, im in zip(*parts, strict=True))
        else:
            y = real(leaves)
        return pytree.tree_unflatten(y, pytree.tree_structure(target))

    def _label(self) -> str:
        name = type(self).__name__
        if isinstance(self.damping, Tensor):
            return f"{name}(damping=tensor)"
        return f"{name}(damping={self.damping})" if self.damping != 0 else name


class Jacobian(_Derivative):
    """`v -> J v`, with the Jacobian `J` of `f` at `x`; the adjoint is `u -> J^H u`.

    Both take reverse mode only: a product costs about four evaluations of `f`, an adjoint product three.

    Args:
        f: a function of a tensor or a pytree of tensors, with values of either kind; holomorphic where `x` is complex. It is
            evaluated once when the operator is built, and it must compute the same thing each time: no dropout.
        x: the point. Gradients reach it, and every tensor that `f` reads.
        claims: `hermitian=True`, `positive_definite=True`, `positive_semidefinite=True` or `unitary=True`, where it is known.

    Vectors are like `x`, with any batch dimensions in front; those are gone through with `torch.vmap`.

    Raises:
        TypeError: if `f` is not callable, or `x` or `f(x)` is no tensor or pytree of tensors.
        ValueError: if `x` or `f(x)` has an integer dtype, or `f(x)` does not depend differentiably on `x`.
    """

    def __init__(self, f: Callable[[Tree], Tree], x: Tree, **claims: Any) -> None:
        y = _values(f, x)
        domain, codomain = spaces.space_of("x", x), any_batch_of("f(x)", y)
        kinds = [[t.dtype for t in spaces.examples(space)] for space in (domain, codomain)]
        square = spaces.agree(domain, y) and kinds[0] == kinds[1]
        super().__init__(f, x, 0.0, Claims.named(claims), None if square else codomain)

    @classmethod
    def of_module(cls, module: nn.Module, inputs: Any, *, params: Tree = None, **claims: Any) -> Jacobian:
        """The Jacobian of `module(inputs)` with respect to the parameters; vectors are dictionaries by parameter name.

        Args:
            module: evaluated by `torch.func.functional_call`.
            inputs: one argument, or a tuple of them.
            params: the parameters by name, by default `dict(module.named_parameters())`; the others stay as they are.
            claims: as above.
        """
        return cls(_OfModule(module, inputs), _parameters(module, params), **claims)

    def apply(self, x: Tree) -> Tree:
        def product(v: Leaves) -> Leaves:
            f = self._linearised()
            with f.recording(v):
                return f.forward(v)

        return self._mapped(product, x, self.domain, self.codomain)

    def apply_adjoint(self, y: Tree) -> Tree:
        def product(u: Leaves) -> Leaves:
            f = self._linearised()
            with f.recording(u):
                return f.back(u)

        return self._mapped(product, y, self.codomain, self.domain)


class _Symmetric(_Derivative):
    def _product(self, v: Leaves) -> Leaves:
        """The product without the damping."""
        raise NotImplementedError

    def apply(self, x: Tree) -> Tree:
        y = self._mapped(self._product, x, self.domain, self.domain)
        if not isinstance(self.damping, Tensor) and self.damping == 0:
            return y
        return pytree.tree_map(lambda a, b: a + self.damping * b, y, _like(y, x))

    def apply_adjoint(self, y: Tree) -> Tree:
        return self.apply(y)


class Hessian(_Symmetric):
    """`v -> H v + damping * v`, with the Hessian `H` of the real function `f` at `x`; symmetric.

    A product costs about seven evaluations of `f` (Pearlmutter 1994, "Fast exact multiplication by the Hessian", by reverse
    mode twice).

    Args:
        f: a function of a tensor or a pytree of tensors whose value is a real 0-d tensor. It is evaluated once when the
            operator is built, and it must compute the same thing each time: no dropout.
        x: the point, real. Gradients reach it, and every tensor that `f` reads.
        damping: a real number or 0-d tensor; gradients reach it.
        claims: `positive_semidefinite=True` where `H` is, as that of a convex function: with a positive number as damping the
            operator is then known to be definite. `positive_definite=True` where the operator with its damping is.

    Raises:
        TypeError: if `f` is not callable, `x` is no tensor or pytree of tensors, or `damping` no real number or 0-d tensor.
        ValueError: if `x` is not real, or `f(x)` is no real 0-d tensor that depends differentiably on `x`.
    """

    def __init__(self, f: Callable[[Tree], Tensor], x: Tree, *, damping: Any = 0.0, **claims: Any) -> None:
        _check_real("x", x)
        _check_scalar_value("f(x)", _values(f, x))
        super().__init__(f, x, damping, Claims.named(claims) | Claims(hermitian=True))

    @classmethod
    def of_module(
        cls,
        module: nn.Module,
        inputs: Any,
        loss: Callable[[Any], Tensor],
        *,
        params: Tree = None,
        damping: Any = 0.0,
        **claims: Any,
    ) -> Hessian:
        """The Hessian of `loss(module(inputs))` with respect to the parameters; vectors are dictionaries by parameter name.

        Args:
            module: evaluated by `torch.func.functional_call`.
            inputs: one argument, or a tuple of them.
            loss: a function of the outputs whose value is a real 0-d tensor.
            params: the parameters by name, by default `dict(module.named_parameters())`; the others stay as they are.
            damping: as above.
            claims: as above.
        """
        return cls(_OfModule(module, inputs, loss), _parameters(module, params), damping=damping, **claims)

    def _product(self, v: Leaves) -> Leaves:
        f = self._linearised()
        with f.recording(v):
            return f.second(v)


class GaussNewton(_Symmetric):
    """`v -> J^T H J v + damping * v`, with the Jacobian `J` of `f` at `x` and the Hessian `H` of `loss` at `f(x)`; symmetric.

    The generalised Gauss-Newton matrix of `loss(f(x))`: its Hessian without the curvature of `f` (Schraudolph 2002, "Fast
    curvature matrix-vector products for second-order gradient descent").

    Args:
        f: the model, a function of a tensor or a pytree of tensors, with real values of either kind. It is evaluated once
            when the operator is built, and it must compute the same thing each time: no dropout.
        loss: a function of the outputs `f(x)` whose value is a real 0-d tensor.
        x: the point, real. Gradients reach it, and every tensor that `f` and `loss` read.
        damping: a real number or 0-d tensor; gradients reach it.
        claims: `positive_semidefinite=True` where `loss` is convex: with a positive number as damping the operator is then
            known to be definite, and solved by conjugate gradients. `positive_definite=True` where the operator with its
            damping is.

    Raises:
        TypeError: if `f` or `loss` is not callable, `x` is no tensor or pytree of tensors, or `damping` no real number or 0-d
            tensor.
        ValueError: if `x` or `f(x)` is not real, `f(x)` does not depend differentiably on `x`, or the value of `loss` is no
            real 0-d tensor.
    """

    def __init__(
        self, f: Callable[[Tree], Tree], loss: Callable[[Any], Tensor], x: Tree, *, damping: Any = 0.0, **claims: Any
    ) -> None:
        _check_real("x", x)
        y = _values(f, x)
        _check_real("f(x)", y)
        if not callable(loss):
            raise TypeError(f"loss: expected a callable, got {type(loss).__name__}")
        _check_scalar_value("loss(f(x))", _values(loss, y, "loss", "f(x)"))
        super().__init__(f, x, damping, Claims.named(claims) | Claims(hermitian=True))
        self.loss = loss
        self.outputs = spaces.space_of("f(x)", y)

    @classmethod
    def of_module(
        cls,
        module: nn.Module,
        inputs: Any,
        loss: Callable[[Any], Tensor],
        *,
        params: Tree = None,
        damping: Any = 0.0,
        **claims: Any,
    ) -> GaussNewton:
        """The same for `loss(module(inputs))` and the parameters; vectors are dictionaries by parameter name.

        Args:
            module: evaluated by `torch.func.functional_call`.
            inputs: one argument, or a tuple of them.
            loss: a function of the outputs whose value is a real 0-d tensor.
            params: the parameters by name, by default `dict(module.named_parameters())`; the others stay as they are.
            damping: as above.
            claims: as above.
        """
        return cls(_OfModule(module, inputs), loss, _parameters(module, params), damping=damping, **claims)

    def _product(self, v: Leaves) -> Leaves:
        f, spec = self._linearised(), pytree.tree_structure(self.outputs)
        loss = Linearised(lambda *y: (self.loss(pytree.tree_unflatten(y, spec)),), f.outputs, known=f.zeros)
        with f.recording(v, loss):
            return f.back(loss.second(f.forward(v)))


class Fisher(_Symmetric):
    """`v -> J^T F J v + damping * v`, with the Fisher information `F` of a likelihood at the outputs of `f`; semidefinite.

    The mean over the samples of the Fisher information of `x`, in closed form and without labels (Martens 2020, "New insights
    and perspectives on the natural gradient method"). The outputs, and with them `F`, are:

    - `"categorical"`: logits of shape `(..., classes)`, every dimension but the last counting samples; for a sample with the
      probabilities `p` the block of `F` is `diag(p) - p p^T`.
    - `"gaussian"`: means of shape `(samples, ...)`, or one of shape `()`; the block of a sample is `I / sigma^2`.

    Args:
        f: the model, a function of a tensor or a pytree of tensors whose value is one real tensor. It is evaluated once when
            the operator is built, and it must compute the same thing each time: no dropout.
        x: the point, real. Gradients reach it, and every tensor that `f` reads.
        likelihood: `"categorical"` or `"gaussian"`.
        sigma: the standard deviation of `"gaussian"`, in the units of the outputs: a real number or 0-d tensor, not zero.
        damping: a real number or 0-d tensor; with a positive number the operator is known to be definite. Gradients reach it.
        claims: `positive_definite=True` where the operator with its damping is.

    Raises:
        TypeError: if `f` is not callable, `x` is no tensor or pytree of tensors, `f(x)` no tensor, or `sigma` or `damping` no
            real number or 0-d tensor.
        ValueError: if `x` or `f(x)` is not real, `f(x)` has a shape that the likelihood does not have or does not depend
            differentiably on `x`, `likelihood` is unknown, or `sigma` is zero.
    """

    def __init__(
        self,
        f: Callable[[Tree], Tensor],
        x: Tree,
        *,
        likelihood: str = "categorical",
        sigma: Any = 1.0,
        damping: Any = 0.0,
        **claims: Any,
    ) -> None:
        check_choice("likelihood", likelihood, LIKELIHOODS)
        check_scalar("sigma", sigma)
        if not is_real(sigma):
            raise TypeError("sigma: expected a real number or 0-d tensor, got a complex one")
        if not isinstance(sigma, Tensor) and sigma == 0:
            raise ValueError("sigma: expected a standard deviation that is not zero, got 0")
        _check_real("x", x)
        y = _values(f, x)
        if not isinstance(y, Tensor):
            raise TypeError(f"f(x): expected one tensor of outputs, got {type(y).__name__}")
        _check_real("f(x)", y)
        if likelihood == "categorical" and y.ndim == 0:
            raise ValueError("f(x): expected logits of shape (..., classes), got shape ()")
        super().__init__(f, x, damping, Claims.named(claims) | Claims(positive_semidefinite=True))
        self.likelihood, self.sigma = likelihood, sigma

    @classmethod
    def of_module(
        cls,
        module: nn.Module,
        inputs: Any,
        *,
        params: Tree = None,
        likelihood: str = "categorical",
        sigma: Any = 1.0,
        damping: Any = 0.0,
        **claims: Any,
    ) -> Fisher:
        """The same for the outputs of a module and its parameters; vectors are dictionaries by parameter name.

        Args:
            module: evaluated by `torch.func.functional_call`.
            inputs: one argument, or a tuple of them.
            params: the parameters by name, by default `dict(module.named_parameters())`; the others stay as they are.
            likelihood: as above.
            sigma: as above.
            damping: as above.
            claims: as above.
        """
        f, x = _OfModule(module, inputs), _parameters(module, params)
        return cls(f, x, likelihood=likelihood, sigma=sigma, damping=damping, **claims)

    def _product(self, v: Leaves) -> Leaves:
        f = self._linearised()
        with f.recording((*v, *(t for t in (self.sigma,) if isinstance(t, Tensor)))):
            (y,), (u,) = f.outputs, f.forward(v)
            if self.likelihood == "categorical":
                p = torch.softmax(y, dim=-1)
                samples = max(1, y.shape[:-1].numel())
                u = p * (u - (p * u).sum(dim=-1, keepdim=True))
            else:
                samples = y.shape[0] if y.ndim else 1
                u = u / self.sigma**2
            return f.back((u / max(1, samples),))

    def _label(self) -> str:
        options = [self.likelihood]
        if isinstance(self.damping, Tensor) or self.damping != 0:
            options.append(f"damping={'tensor' if isinstance(self.damping, Tensor) else self.damping}")
        return f"Fisher({', '.join(options)})"


# -- helpers -------------------------------------------------------------------------------------------------------


class _OfModule:
    """The outputs of a module, or a loss of them, as a function of its parameters."""

    def __init__(self, module: nn.Module, inputs: Any, loss: Callable[[Any], Tensor] | None = None) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
        if loss is not None and not callable(loss):
            raise TypeError(f"loss: expected a callable, got {type(loss).__name__}")
        self.module, self.inputs, self.loss = module, inputs if isinstance(inputs, tuple) else (inputs,), loss

    def __call__(self, parameters: dict[str, Tensor]) -> Any:
        outputs = torch.func.functional_call(self.module, parameters, self.inputs)
        return outputs if self.loss is None else self.loss(outputs)


def _parameters(module: nn.Module, params: Any) -> dict[str, Tensor]:
    own: dict[str, Tensor] = dict(module.named_parameters())
    if params is None:
        return own
    if not isinstance(params, dict):
        raise TypeError(f"params: expected a dict of tensors by parameter name, got {type(params).__name__}")
    for name in params:
        if name not in own:
            raise ValueError(f"params: {type(module).__name__} has no parameter {name!r}")
    return params


def shifted(claims: Claims, shift: Any) -> Claims:
    """Of `A + shift * I`, where `positive_semidefinite` is said of `A` and all else of the sum; a tensor is not read."""
    number = not isinstance(shift, Tensor)
    semidefinite = claims.positive_semidefinite and number and bool(shift >= 0)
    return Claims(
        hermitian=claims.hermitian,
        positive_semidefinite=semidefinite,
        positive_definite=claims.positive_definite or (semidefinite and bool(shift > 0)),
        isometric=claims.isometric,
        coisometric=claims.coisometric,
        full_column_rank=claims.full_column_rank,
        full_row_rank=claims.full_row_rank,
    )


def _values(f: Callable[[Any], Any], x: Any, name: str = "f", of: str = "x") -> Any:
    """`f(x)` without derivatives, once it is known to have some."""
    if not callable(f):
        raise TypeError(f"{name}: expected a callable, got {type(f).__name__}")
    _check_differentiable(of, x)
    watched = not transforms_active()
    with torch.set_grad_enabled(watched), transparent():
        point = pytree.tree_map(lambda t: t.detach().requires_grad_() if watched else t, x)
        y = f(point)
    _check_differentiable(f"{name}({of})", y)
    if watched and not any(leaf.requires_grad for leaf in pytree.tree_leaves(y)):
        raise ValueError(f"{name}: {name}({of}) does not depend differentiably on {of}: autograd finds no path between them")
    return pytree.tree_map(torch.detach, y)


def _check_differentiable(name: str, tree: Any) -> None:
    leaves = pytree.tree_leaves(tree)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError(f"{name}: expected a tensor or a pytree of tensors, got {type(tree).__name__}")
    for leaf in leaves:
        if not is_differentiable(leaf):
            raise ValueError(f"{name}: expected a floating-point or complex dtype, got {leaf.dtype}")


def _check_real(name: str, tree: Any) -> None:
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.is_complex():
            raise ValueError(f"{name}: expected real tensors, got dtype {leaf.dtype}")


def _check_scalar_value(name: str, y: Any) -> None:
    if not isinstance(y, Tensor) or y.ndim != 0 or y.is_complex():
        got = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"{name}: expected a real 0-d tensor, got {got}")


def _imag(leaves: Leaves) -> Leaves:
    return tuple(leaf.imag if leaf.is_complex() else torch.zeros_like(leaf) for leaf in leaves)


def _like(structure: Tree, x: Tree) -> Tree:
    """`x` with its leaves in the order of another tree; dictionaries are read by key."""
    spec = pytree.tree_structure(structure)
    return pytree.tree_unflatten(spec.flatten_up_to(x), spec)


def _grad(outputs: Leaves, inputs: Leaves, cotangents: Leaves, create_graph: bool) -> Leaves:
    """The vector-Jacobian product in a graph that is kept; zero where there is no path."""
    pairs = [(y, u) for y, u in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(z) for z in inputs)
    ys, us = zip(*pairs, strict=True)
    return torch.autograd.grad(
        ys, inputs, us, create_graph=create_graph, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def _has_other_leaves(outputs: Sequence[Tensor], known: Sequence[Tensor]) -> bool:
    """Whether the graph of the outputs reaches a leaf that is none of the known ones."""
    if any(y.requires_grad and y.grad_fn is None for y in outputs):
        return True
    stack, seen = [y.grad_fn for y in outputs if y.grad_fn is not None], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and not any(leaf is z for z in known):
            return True
        stack.extend(following for following, _ in node.next_functions if following is not None)
    return False
