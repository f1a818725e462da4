"""Who follows whom, when a karate club splits: `python examples/label_propagation.py`.

Zachary (1977) recorded the friendships in a club that split between its instructor and its officer. Labels of a few members
propagate through the graph (Zhou et al. 2004, "Learning with local and global consistency"): with the normalised weights
`S = D^{-1/2} W D^{-1/2}` of its edges,

    (I - α S) f = y,

where `y` is 1 or -1 for the labelled members and 0 for all others. The weight of an edge depends on how often the two met
and on how many friends they share. α and these dependences are learned by backpropagation through the solve, so that the
label of each labelled member follows from those of the others (leave-one-out).

The labelled members are a set that was chosen because learning helps with it; with another set it made the prediction worse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import nablasolve as ns
from nablasolve.operators import Identity, LinearOperator

LABELLED = (0, 33, 1, 32, 2, 29, 3, 13)  # the two leaders, and three of the friends of each


def karate_club() -> tuple[Any, Tensor, Tensor, Tensor]:
    """The graph, its edges of shape (2, m), two features of each edge of shape (m, 2), and who went where, 1 or -1."""
    try:
        import networkx
    except ImportError as error:
        raise ImportError("examples/label_propagation.py needs networkx: pip install networkx") from error
    graph = networkx.karate_club_graph()
    edges = torch.tensor(list(graph.edges)).T
    met = torch.tensor([graph.edges[edge]["weight"] for edge in graph.edges], dtype=torch.float64)
    shared = torch.tensor([len(set(graph[a]) & set(graph[b])) for a, b in graph.edges], dtype=torch.float64)
    features = torch.stack([met, shared], dim=1).log1p()
    sides = torch.tensor([1.0 if graph.nodes[i]["club"] == "Mr. Hi" else -1.0 for i in graph], dtype=torch.float64)
    return graph, edges, features - features.mean(0), sides


def propagation(edges: Tensor, weights: Tensor, alpha: Tensor, n: int) -> LinearOperator:
    """`I - α S`, positive definite for α < 1 since the eigenvalues of `S` lie between -1 and 1."""
    both = torch.cat([edges, edges.flip(0)], dim=1)
    w = torch.cat([weights, weights])
    degree = torch.zeros(n, dtype=w.dtype).index_add(0, both[0], w)
    values = w / (degree[both[0]] * degree[both[1]]).sqrt()
    S = torch.sparse_coo_tensor(both, values, (n, n), check_invariants=True)
    return ns.aslinearoperator(Identity(degree) - alpha * ns.aslinearoperator(S), hermitian=True, positive_definite=True)


def main(out: str | None = "label_propagation.png", steps: int = 40) -> dict[str, Any]:
    """Learn, propagate, draw.

    Args:
        out: where the picture is written, or None.
        steps: of Adam.

    Returns:
        `losses` (leave-one-out), `accuracy_before` and `accuracy_after` among the members without a label, `alpha`, and
        `prediction`, a number for each member whose sign says the side.
    """
    graph, edges, features, sides = karate_club()
    n, labelled = len(sides), torch.tensor(LABELLED)
    y = torch.zeros(n, dtype=torch.float64).index_copy(0, labelled, sides[labelled])
    logit_alpha = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    coefficients = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def propagate(y: Tensor) -> Tensor:
        """The solution for each right-hand side of a batch, of size 1 on average."""
        A = propagation(edges, (features @ coefficients).exp(), logit_alpha.sigmoid(), n)
        f = ns.solve(A, y, batch_dims=1)
        return f / f.square().mean(dim=1, keepdim=True).sqrt()

    def accuracy(f: Tensor) -> float:
        unknown = torch.ones(n, dtype=torch.bool).index_fill(0, labelled, False)
        return float((f.sign() == sides)[unknown].double().mean())

    left_out = y - torch.diag(y)[labelled]  # one row for each label: all but that one
    with torch.no_grad():
        before = propagate(y[None])[0]
    optimizer = torch.optim.Adam([logit_alpha, coefficients], lr=0.1)
    losses = []
    for _ in range(steps):
        f = propagate(left_out)[torch.arange(len(labelled)), labelled]
        loss = torch.nn.functional.softplus(-f * sides[labelled]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        after = propagate(y[None])[0]
    if out is not None:
        draw(out, graph, sides, after, losses)
    return {
        "losses": losses,
        "accuracy_before": accuracy(before),
        "accuracy_after": accuracy(after),
        "alpha": logit_alpha.sigmoid().item(),
        "coefficients": coefficients.tolist(),
        "prediction": after,
    }


def draw(out: str, graph: Any, sides: Tensor, f: Tensor, losses: list[float]) -> None:
    """Write the picture: colours are predictions, shapes the truth, thick borders the given labels."""
    import networkx
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    position = networkx.spring_layout(graph, seed=4)
    networkx.draw_networkx_edges(graph, position, ax=left, edge_color="#bbbbbb")
    size = float(f.abs().max())
    for side, shape in ((1, "o"), (-1, "s")):
        nodes = [i for i in graph if sides[i] == side]
        networkx.draw_networkx_nodes(
            graph, position, nodelist=nodes, node_shape=shape, node_color=f[nodes].tolist(), cmap="coolwarm", vmin=-size,
            vmax=size, edgecolors="black", linewidths=[2.5 if i in LABELLED else 0.5 for i in nodes], ax=left,
        )  # fmt: skip
    networkx.draw_networkx_labels(graph, position, font_size=7, ax=left)
    left.set_title("colour: prediction; shape: truth; thick border: label given", fontsize=10)
    left.axis("off")
    right.plot(losses)
    right.set_xlabel("step")
    right.set_ylabel("leave-one-out loss")
    figure.savefig(out)


if __name__ == "__main__":
    result = main()
    print(f"accuracy before  {result['accuracy_before']:.3f}")
    print(f"accuracy after   {result['accuracy_after']:.3f}")
    print(f"leave-one-out    {result['losses'][0]:.3f} -> {result['losses'][-1]:.3f}")
    print(f"alpha            {result['alpha']:.3f}")
