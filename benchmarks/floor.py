"""The floor: textbook loops as one writes them by hand in torch, in place, without checks and without any generality."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def cg(A: Product, b: Tensor, rtol: float, maxiter: int, x0: Tensor | None = None) -> Tensor:
    """Conjugate gradients."""
    x = torch.zeros_like(b) if x0 is None else x0.clone()
    r = b.clone() if x0 is None else b - A(x)
    p = r.clone()
    rho = torch.vdot(r.view(-1), r.view(-1)).item()
    limit = rtol**2 * torch.vdot(b.view(-1), b.view(-1)).item()
    for _ in range(maxiter):
        if rho <= limit:
            break
        q = A(p)
        alpha = rho / torch.vdot(p.view(-1), q.view(-1)).item()
        x.add_(p, alpha=alpha)
        r.sub_(q, alpha=alpha)
        rho, before = torch.vdot(r.view(-1), r.view(-1)).item(), rho
        torch.add(r, p, alpha=rho / before, out=p)
    return x


def batched_cg(A: Product, b: Tensor, rtol: float, maxiter: int) -> Tensor:
    """Conjugate gradients for the systems along the first dimension, all of them run until the last is done."""
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rho = torch.linalg.vecdot(r, r)
    limit = rtol**2 * rho
    for _ in range(maxiter):
        if (rho <= limit).all().item():
            break
        q = A(p)
        alpha = torch.nan_to_num_(rho / torch.linalg.vecdot(p, q))[:, None]
        x.addcmul_(alpha, p)
        r.addcmul_(alpha, q, value=-1)
        rho, before = torch.linalg.vecdot(r, r), rho
        torch.addcmul(r, torch.nan_to_num_(rho / before)[:, None], p, out=p)
    return x


def bicgstab(A: Product, b: Tensor, rtol: float, maxiter: int) -> Tensor:
    """The stabilised biconjugate gradient method."""
    dot = torch.vdot
    x, r, shadow, p = torch.zeros_like(b), b.clone(), b.view(-1), b.clone()
    rho = dot(shadow, r.view(-1)).item()
    limit = rtol * torch.linalg.vector_norm(b).item()
    for _ in range(maxiter):
        v = A(p)
        alpha = rho / dot(shadow, v.view(-1)).item()
        x.add_(p, alpha=alpha)
        r.sub_(v, alpha=alpha)
        if torch.linalg.vector_norm(r).item() <= limit:
            break
        t = A(r)
        omega = dot(t.view(-1), r.view(-1)).item() / dot(t.view(-1), t.view(-1)).item()
        x.add_(r, alpha=omega)
        r.sub_(t, alpha=omega)
        if torch.linalg.vector_norm(r).item() <= limit:
            break
        rho, before = dot(shadow, r.view(-1)).item(), rho
        p.sub_(v, alpha=omega)
        torch.add(r, p, alpha=rho / before * alpha / omega, out=p)
    return x


def gmres(A: Product, b: Tensor, rtol: float, maxiter: int, restart: int) -> Tensor:
    """Restarted GMRES by classical Gram-Schmidt and Givens rotations."""
    x = torch.zeros_like(b)
    limit = rtol * torch.linalg.vector_norm(b).item()
    V = torch.empty(restart + 1, b.numel(), dtype=b.dtype)
    r = b.clone()
    steps = 0
    while steps < maxiter:
        norm = torch.linalg.vector_norm(r).item()
        if norm <= limit:
            break
        torch.div(r.view(-1), norm, out=V[0])
        R, rotations, g = [], [], [norm]
        for j in range(restart):
            w = A(V[j].view(b.shape)).view(-1)
            h = V[: j + 1] @ w
            w.addmv_(V[: j + 1].T, h, alpha=-1)
            below = torch.linalg.vector_norm(w).item()
            torch.div(w, below, out=V[j + 1])
            column = h.tolist()
            for i, (c, s) in enumerate(rotations):
                column[i : i + 2] = c * column[i] + s * column[i + 1], c * column[i + 1] - s * column[i]
            rho = (column[-1] ** 2 + below**2) ** 0.5
            c, s = column[-1] / rho, below / rho
            column[-1] = rho
            R.append(column)
            rotations.append((c, s))
            g[-1:] = [c * g[-1], -s * g[-1]]
            steps += 1
            if abs(g[-1]) <= limit or steps == maxiter:
                break
        y = [0.0] * len(R)
        for i in reversed(range(len(R))):
            y[i] = (g[i] - sum(R[k][i] * y[k] for k in range(i + 1, len(R)))) / R[i][i]
        x.view(-1).addmv_(V[: len(R)].T, torch.tensor(y, dtype=b.dtype))
        r = b - A(x)
    return x


def cgls(A: Product, AT: Product, b: Tensor, damp: float, rtol: float, maxiter: int) -> Tensor:
    """Conjugate gradients on the normal equations of `min |A x - b|^2 + damp^2 |x|^2`."""
    r = b.clone()
    s = AT(r)
    x, p = torch.zeros_like(s), s.clone()
    gamma = torch.vdot(s.view(-1), s.view(-1)).item()
    limit = rtol**2 * gamma
    for _ in range(maxiter):
        if gamma <= limit:
            break
        q = A(p)
        curvature = torch.vdot(q.view(-1), q.view(-1)).item() + damp**2 * torch.vdot(p.view(-1), p.view(-1)).item()
        alpha = gamma / curvature
        x.add_(p, alpha=alpha)
        r.sub_(q, alpha=alpha)
        s = AT(r).sub_(x, alpha=damp**2)
        gamma, before = torch.vdot(s.view(-1), s.view(-1)).item(), gamma
        torch.add(s, p, alpha=gamma / before, out=p)
    return x


def iterations(method: str, products: int, restart: int = 30) -> int:
    """How many iterations so many products with A and its transpose are."""
    if method == "gmres":
        return products * restart // (restart + 1)  # a product a cycle is that of the residual
    return products // 2 if method in ("bicgstab", "cgls") else products


def unrolled_cg(A: Product, b: Tensor, iterations: int) -> Tensor:
    """Conjugate gradients that autograd can follow, so that every iteration is stored."""
    x, r, p = torch.zeros_like(b), b, b
    rho = (r * r).sum()
    for _ in range(iterations):
        q = A(p)
        alpha = rho / (p * q).sum()
        x, r = x + alpha * p, r - alpha * q
        rho, before = (r * r).sum(), rho
        p = r + (rho / before) * p
    return x
