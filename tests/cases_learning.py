"""Derivatives of functions, and matrices of covariance functions.

The matrices are written down by hand, entry by entry or by the chain rule on stacked rows, without any of torch's transforms.
"""

from __future__ import annotations

import torch
from operator_cases import COMPLEX, REAL, OperatorCase, draw
from torch import Tensor, nn

from nablasolve.operators import Fisher, GaussNewton, Hessian, Jacobian, KernelMatrix


def square(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": 0.5 * draw(6, dtype=dtype), "W": draw(6, 6, dtype=dtype, seed=1) / 8 + 2 * torch.eye(6, dtype=dtype)}


def tall(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": 0.5 * draw(2, 2, dtype=dtype), "W": draw(6, 4, dtype=dtype, seed=1) / 2}


def hidden(x: Tensor, W: Tensor) -> Tensor:
    """`f(x) = W x + (W x)^2 / 8` has the Jacobian `diag(1 + W x / 4) W`."""
    z = W @ x.reshape(-1)
    return z + z * z / 8


def hidden_jacobian(x: Tensor, W: Tensor) -> Tensor:
    return (1 + (W @ x.reshape(-1)) / 4)[:, None] * W


def of_two(tree: dict[str, Tensor], W: Tensor) -> dict[str, Tensor]:
    """A function of and into dictionaries: `first = W a + b^3`, `second = (W b) * b`."""
    a, b = tree["a"], tree["b"]
    return {"first": W @ a.reshape(-1) + b**3, "second": (W @ b) * b}


def of_two_jacobian(a: Tensor, b: Tensor, W: Tensor) -> Tensor:
    zero = torch.zeros_like(W)
    second = torch.diag(W @ b) + b[:, None] * W
    return torch.cat([torch.cat([W, torch.diag(3 * b**2)], 1), torch.cat([zero, second], 1)])


def quartic(x: Tensor, W: Tensor) -> Tensor:
    """`sum((W x)^4) / 12 + |x|^2` has the Hessian `W^T diag((W x)^2) W + 2 I`."""
    return ((W @ x.reshape(-1)) ** 4).sum() / 12 + x.square().sum()


def quartic_hessian(x: Tensor, W: Tensor) -> Tensor:
    return W.mT @ ((W @ x.reshape(-1)) ** 2)[:, None].mul(W) + 2 * torch.eye(x.numel(), dtype=x.dtype)


def softplus_loss(y: Tensor) -> Tensor:
    """Its Hessian is `diag(s (1 - s))` with the sigmoid `s`."""
    return torch.nn.functional.softplus(y).sum() + y.square().sum() / 4


def gauss_newton(x: Tensor, W: Tensor) -> Tensor:
    J, s = hidden_jacobian(x, W), torch.sigmoid(hidden(x, W))
    return J.mT @ ((s * (1 - s) + 0.5)[:, None] * J)


def categorical(x: Tensor, W: Tensor) -> Tensor:
    """Two samples of three classes."""
    J, p = hidden_jacobian(x, W), torch.softmax(hidden(x, W).reshape(2, 3), -1)
    return (
        sum(J[3 * i : 3 * i + 3].mT @ (torch.diag(p[i]) - torch.outer(p[i], p[i])) @ J[3 * i : 3 * i + 3] for i in (0, 1)) / 2
    )


def layer(weight: Tensor, bias: Tensor, inputs: Tensor) -> Tensor:
    return torch.tanh(inputs @ weight.mT + bias)


class Layer(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty_like(weight)), nn.Parameter(torch.empty_like(bias))

    def forward(self, inputs: Tensor) -> Tensor:
        return layer(self.weight, self.bias, inputs)


def module(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"weight": draw(2, 2, dtype=dtype), "bias": draw(2, dtype=dtype, seed=1), "inputs": draw(5, 2, dtype=dtype, seed=2)}


def module_jacobian(weight: Tensor, bias: Tensor, inputs: Tensor) -> Tensor:
    """Rows by sample and output, columns by weight and bias."""
    slope = 1 - layer(weight, bias, inputs) ** 2
    eye = torch.eye(2, dtype=weight.dtype)
    by_weight = slope[:, :, None, None] * eye[None, :, :, None] * inputs[:, None, None, :]
    return torch.cat([by_weight.reshape(10, 4), (slope[:, :, None] * eye).reshape(10, 2)], dim=1)


def points(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "X": draw(7, 2, dtype=dtype),
        "scale": torch.tensor(0.8, dtype=dtype),
        "noise": torch.tensor(0.3, dtype=dtype),
    }


def gaussian(scale: Tensor):
    return lambda a, b: torch.exp(-(a[:, None] - b[None]).square().sum(-1) / (2 * scale**2))


def entries(X: Tensor, Y: Tensor, scale: Tensor) -> Tensor:
    return torch.stack([torch.stack([torch.exp(-((x - y) ** 2).sum() / (2 * scale**2)) for y in Y]) for x in X])


CLOSED = dict(picklable=False, movable=False)  # they hold a function that closes over tensors

CASES = [
    OperatorCase(
        "Jacobian",
        square,
        lambda x, W: Jacobian(lambda x: hidden(x, W), x),
        hidden_jacobian,
        **CLOSED,
    ),
    OperatorCase(
        "Jacobian, tall",
        tall,
        lambda x, W: Jacobian(lambda x: hidden(x, W), x),
        hidden_jacobian,
        solvable=False,
        **CLOSED,
    ),
    OperatorCase(
        "Jacobian of a real function with complex values",
        lambda dtype: {"x": draw(3, dtype=dtype), "W": draw(5, 3, dtype=dtype.to_complex(), seed=1)},
        lambda x, W: Jacobian(lambda x: torch.exp(1j * x.sin()).to(W.dtype) * W, x),
        lambda x, W: 1j * x.cos() * torch.exp(1j * x.sin()) * torch.eye(3, dtype=W.dtype).repeat(5, 1) * W.reshape(-1, 1),
        dtypes=REAL,
        solvable=False,
        **CLOSED,
    ),
    OperatorCase(
        "Jacobian between trees",
        lambda dtype: {
            "a": draw(2, 2, dtype=dtype),
            "b": draw(4, dtype=dtype, seed=3),
            "W": draw(4, 4, dtype=dtype, seed=1) / 8 + torch.eye(4, dtype=dtype),
        },
        lambda a, b, W: Jacobian(lambda tree: of_two(tree, W), {"a": a, "b": b}),
        of_two_jacobian,
        solvable=False,
        **CLOSED,
    ),
    OperatorCase(
        "Jacobian of a module",
        module,
        lambda weight, bias, inputs: Jacobian.of_module(Layer(weight, bias), inputs, params={"weight": weight, "bias": bias}),
        module_jacobian,
        dtypes=REAL,
        solvable=False,
        **CLOSED,
    ),
    OperatorCase(
        "Hessian",
        tall,
        lambda x, W: Hessian(lambda x: quartic(x, W), x),
        quartic_hessian,
        dtypes=REAL,
        **CLOSED,
    ),
    OperatorCase(
        "damped convex Hessian",
        tall,
        lambda x, W: Hessian(lambda x: quartic(x, W), x, damping=0.5, positive_semidefinite=True),
        lambda x, W: quartic_hessian(x, W) + 0.5 * torch.eye(4, dtype=x.dtype),
        dtypes=REAL,
        **CLOSED,
    ),
    OperatorCase(
        "Hessian of a tree",
        lambda dtype: tall(dtype) | {"y": draw(2, dtype=dtype, seed=3), "damping": torch.tensor(0.5, dtype=dtype)},
        lambda x, y, W, damping: Hessian(
            lambda t: quartic(t[0], W) + t[1].square().sum() * t[1][0] / 6, (x, y), damping=damping
        ),
        lambda x, y, W, damping: (
            torch.block_diag(quartic_hessian(x, W), torch.stack([torch.stack([3 * y[0], y[1]]), torch.stack([y[1], y[0]])]) / 3)
            + damping * torch.eye(6, dtype=x.dtype)
        ),
        dtypes=REAL,
        **CLOSED,
    ),
    OperatorCase(
        "Gauss-Newton",
        tall,
        lambda x, W: GaussNewton(lambda x: hidden(x, W), softplus_loss, x),
        gauss_newton,
        dtypes=REAL,
        **CLOSED,
    ),
    OperatorCase(
        "Gauss-Newton, damped",
        lambda dtype: tall(dtype) | {"damping": torch.tensor(0.5, dtype=dtype)},
        lambda x, W, damping: GaussNewton(
            lambda x: {"outputs": hidden(x, W)},
            lambda y: softplus_loss(y["outputs"]),
            x,
            damping=damping,
            positive_definite=True,
        ),
        lambda x, W, damping: gauss_newton(x, W) + damping * torch.eye(4, dtype=x.dtype),
        dtypes=REAL,
        **CLOSED,
    ),
    OperatorCase(
        "Gauss-Newton of a module",
        module,
        lambda weight, bias, inputs: GaussNewton.of_module(
            Layer(weight, bias),
            inputs,
            lambda y: y.square().mean(),
            params={"weight": weight, "bias": bias},
            damping=0.1,
            positive_semidefinite=True,
        ),
        lambda weight, bias, inputs: (
            module_jacobian(weight, bias, inputs).mT @ module_jacobian(weight, bias, inputs) / 5
            + 0.1 * torch.eye(6, dtype=weight.dtype)
        ),
        dtypes=REAL,
        **CLOSED,
    ),
    OperatorCase(
        "categorical Fisher",
        tall,
        lambda x, W: Fisher(lambda x: hidden(x, W).reshape(2, 3), x, damping=0.5),
        lambda x, W: categorical(x, W) + 0.5 * torch.eye(4, dtype=x.dtype),
        dtypes=REAL,
        **CLOSED,
    ),
    OperatorCase(
        "gaussian Fisher",
        lambda dtype: tall(dtype) | {"sigma": torch.tensor(0.7, dtype=dtype)},
        lambda x, W, sigma: Fisher(lambda x: hidden(x, W).reshape(3, 2), x, likelihood="gaussian", sigma=sigma),
        lambda x, W, sigma: hidden_jacobian(x, W).mT @ hidden_jacobian(x, W) / (3 * sigma**2),
        dtypes=REAL,
        **CLOSED,
    ),
    OperatorCase(
        "kernel matrix",
        points,
        lambda X, scale, noise: KernelMatrix(gaussian(scale), X, noise=noise, block_size=3, positive_definite=True),
        lambda X, scale, noise: entries(X, X, scale) + noise * torch.eye(7, dtype=X.dtype),
        dtypes=REAL,
        **CLOSED,
    ),
    OperatorCase(
        "kernel matrix in one block, kept, with noise of each point",
        lambda dtype: points(dtype) | {"noise": 0.2 + draw(7, dtype=dtype, seed=4) ** 2},
        lambda X, scale, noise: KernelMatrix(gaussian(scale), X, noise=noise, checkpoint=False),
        lambda X, scale, noise: entries(X, X, scale) + torch.diag(noise),
        dtypes=REAL,
        **CLOSED,
    ),
    OperatorCase(
        "kernel matrix between two sets of points",
        lambda dtype: {
            "X": draw(7, 2, dtype=dtype),
            "Y": draw(5, 2, dtype=dtype, seed=2),
            "scale": torch.tensor(0.8, dtype=dtype),
        },
        lambda X, Y, scale: KernelMatrix(gaussian(scale), X, Y, block_size=2),
        entries,
        dtypes=REAL,
        solvable=False,
        **CLOSED,
    ),
    OperatorCase(
        "complex kernel matrix",
        lambda dtype: {"X": 0.6 * draw(5, 2, dtype=dtype), "scale": draw(2, dtype=dtype, seed=2).abs().to(dtype)},
        lambda X, scale: KernelMatrix(
            lambda a, b: torch.exp((a * scale.real) @ b.mH), X, noise=0.5, block_size=2, positive_semidefinite=True
        ),
        lambda X, scale: (
            torch.stack([torch.stack([torch.exp((x * scale.real * y.conj()).sum()) for y in X]) for x in X])
            + 0.5 * torch.eye(5, dtype=X.dtype)
        ),
        dtypes=COMPLEX,
        **CLOSED,
    ),
]
