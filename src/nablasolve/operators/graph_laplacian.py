"""The Laplacian of a weighted graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_integer
from .base import StructuredOperator
from .claims import Claims
from .in_place import multiplied
from .nullspace import Nullspace
from .spaces import any_batch

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class GraphLaplacian(StructuredOperator):
    """`L = D - W`: `(L x)[i]` is the sum of `w (x[i] - x[j])` over the edges `(i, j)` at node `i`.

    Real, symmetric and positive semidefinite. The nullspace is known: one vector for each connected component, 1 at its
    nodes and 0 elsewhere. So a system has a solution where its right-hand side sums to zero over each component.

    Args:
        edges: an integer Tensor of shape `(2, m)`, the two nodes of each edge. An edge has no direction and is given once:
            the weights of one that comes twice add up, and one from a node to itself counts for nothing.
        weights: a real floating-point Tensor of shape `(*batch, m)`, on the same device. They are positive, which is not
            checked: the components are those of the edges, whatever their weights. Gradients reach them. The operator acts
            on vectors of shape `(..., nodes)`; batch dimensions broadcast.
        nodes: how many there are, by default the largest number of a node in `edges`, and one more.

    Raises:
        TypeError: if `edges` or `weights` is no Tensor, or `nodes` no integer.
        ValueError: for a wrong shape, dtype or device, or a node that is not one of `0 ... nodes - 1`.

    Source: Spielman 2010, "Algorithms, graph theory, and linear equations in Laplacian matrices".
    """

    def __init__(self, edges: Tensor, weights: Tensor, nodes: int | None = None) -> None:
        if not isinstance(edges, Tensor):
            raise TypeError(f"edges: expected a Tensor of integers, got {type(edges).__name__}")
        if edges.ndim != 2 or edges.shape[0] != 2 or edges.dtype not in _INTEGERS:
            raise ValueError(f"edges: expected integers of shape (2, m), got {edges.dtype} of shape {tuple(edges.shape)}")
        _check_weights(weights, edges)
        count = None if nodes is None else check_integer("nodes", nodes)
        self.edges = edges.long()
        low, high = (int(end) for end in self.edges.aminmax()) if edges.numel() else (0, -1)
        self.nodes = high + 1 if count is None else count
        if self.nodes < 1:
            raise ValueError(f"nodes: expected at least 1, got {'no edges' if count is None else count}")
        if low < 0 or high >= self.nodes:
            raise ValueError(f"edges: expected nodes from 0 to {self.nodes - 1}, got {low if low < 0 else high}")
        super().__init__(any_batch((self.nodes,), weights), claims=Claims(positive_semidefinite=True))
        self.weights = weights
        self.components = connected_components(self.edges, self.nodes)

    def apply(self, x: Tensor) -> Tensor:
        i, j = self.edges
        flow = multiplied(x.index_select(-1, i).sub_(x.index_select(-1, j)), self.weights)
        return self._gathered(flow, -1)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        return self.apply(y)

    def _gathered(self, at_edges: Tensor, sign: int) -> Tensor:
        """For each node, the sum over its edges of what they have, with a sign at their second node."""
        i, j = self.edges
        result = at_edges.new_zeros((*at_edges.shape[:-1], self.nodes))
        return result.index_add_(-1, i, at_edges).index_add_(-1, j, at_edges, alpha=sign)

    def exact_diagonal(self) -> Tensor:
        weights = torch.where(self.edges[0] == self.edges[1], 0.0, self.weights)
        return self._gathered(weights, 1)

    def known_nullspace(self) -> Nullspace:
        return tuple((self.components == label).to(self.weights.dtype) for label in self.components.unique())

    def _label(self) -> str:
        return f"GraphLaplacian({self.edges.shape[1]} edges)"


def connected_components(edges: Tensor, nodes: int) -> Tensor:
    """The smallest node of the connected component of each node, an integer tensor of shape `(nodes,)`.

    Args:
        edges: an integer Tensor of shape `(2, m)` of nodes from 0 to `nodes - 1`.
        nodes: how many there are.

    Source: Shiloach & Vishkin 1982 (hooking and shortcutting).
    """
    label = torch.arange(nodes, device=edges.device)  # a node of the same component, no larger: a tree for each component
    while True:
        ends = label[edges]
        lowest = ends.amin(0)
        # the root of each end goes below the lower of the two roots; then every node goes to its root
        joined = label.scatter_reduce(0, ends[0], lowest, "amin").scatter_reduce(0, ends[1], lowest, "amin")
        while not torch.equal(joined, shorter := joined[joined]):
            joined = shorter
        if torch.equal(joined, label):
            return label
        label = joined


def _check_weights(weights: Any, edges: Tensor) -> None:
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights: expected a Tensor, got {type(weights).__name__}")
    if not weights.is_floating_point():
        raise ValueError(f"weights: expected a real floating-point dtype, got {weights.dtype}")
    m = edges.shape[1]
    if weights.ndim == 0 or weights.shape[-1] != m:
        raise ValueError(f"weights: expected shape (..., {m}) for {m} edges, got {tuple(weights.shape)}")
    if weights.device != edges.device:
        raise ValueError(f"weights: expected the device {edges.device} of the edges, got {weights.device}")
