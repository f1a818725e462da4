"""SciPy: `LinearOperator`s and sparse arrays, both ways. Needs SciPy: `pip install 'nablasolve[scipy]'`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..operators import LinearOperator, SparseOperator, aslinearoperator, spaces
from ..vectors import Layout
from .external import External, Map


def from_scipy(
    A: Any, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None, **claims: Any
) -> LinearOperator:
    """A SciPy operator, sparse array or sparse matrix as a `LinearOperator` on vectors of shape `(*batch, n)`.

    A sparse array becomes a sparse Tensor in its own layout (COO, CSR, CSC or BSR; others become CSR), whose values share no
    memory with it; gradients reach them through `operator.source`. Any other operator is applied by SciPy on the CPU, one
    vector at a time; the derivative with respect to the vector is known, and there is nothing else for a gradient to reach.

    Args:
        A: an array of `scipy.sparse`, or what `scipy.sparse.linalg.aslinearoperator` takes.
        dtype: of the operator, by default its own; integers become torch's default dtype.
        device: of the vectors.
        claims: `hermitian=`, `positive_definite=`, ...

    Raises:
        ImportError: without SciPy.
    """
    scipy = _scipy()
    dtype = dtype_of(A) if dtype is None else dtype
    if scipy.sparse.issparse(A):
        return SparseOperator(_to_torch(A).to(dtype=dtype, device=device), **claims)
    A = scipy.sparse.linalg.aslinearoperator(A)
    m, n = A.shape

    def forward(x: Tensor) -> Tensor:
        return torch.as_tensor(A.matvec(x.numpy())).to(x.dtype)

    def adjoint(y: Tensor) -> Tensor:
        return torch.as_tensor(A.rmatvec(y.numpy())).to(y.dtype)

    return External(Map(forward, adjoint, (n,), (m,)), dtype, device, **claims)


def to_scipy(A: Any, like: Any = None) -> Any:
    """An operator as one of `scipy.sparse.linalg`, of shape `(m, n)` on flattened vectors; a sparse Tensor as a sparse array.

    Args:
        A: what `aslinearoperator` takes.
        like: an example of `x`, where the operator does not know its domain.

    Returns:
        For a sparse Tensor a `scipy.sparse` array of its layout (BSC becomes CSR), else a `LinearOperator` whose products run
        under `no_grad` on the operator's own device.

    Raises:
        ImportError: without SciPy.
        ValueError: if the domain is not known, or a pytree has leaves of several dtypes.
    """
    scipy = _scipy()
    operator = aslinearoperator(A)
    if isinstance(operator, SparseOperator):
        return _to_scipy_array(operator.matrix)
    domain = operator.domain if like is None else spaces.space_of("like", like)
    if domain is None:
        raise ValueError("like: the operator does not know its domain; pass an example: to_scipy(A, like=x)")
    with torch.no_grad():
        x = spaces.zeros(domain)
        source, target = Layout.of(x, 0), Layout.of(operator(x), 0)
    example = spaces.examples(domain)[0]

    def function(apply: Any, source: Layout) -> Any:
        def product(v: Any) -> Any:
            flat = torch.as_tensor(v.reshape(-1), device=example.device)
            if not flat.is_complex() or example.is_complex():
                flat = flat.to(example.dtype)
            with torch.no_grad():
                tree = apply(source.unpack(flat.reshape(source.shapes[0]) if source.single else flat))
            leaves = pytree.tree_leaves(tree)
            return torch.cat([leaf.reshape(-1) for leaf in leaves]).resolve_conj().cpu().numpy()

        return product

    m, n = (sum(math.prod(shape) for shape in layout.shapes) for layout in (target, source))
    return scipy.sparse.linalg.LinearOperator(
        (m, n),
        matvec=function(operator.apply, source),
        rmatvec=function(operator.apply_adjoint, target),
        dtype=_numpy().dtype(str(example.dtype).removeprefix("torch.")),
    )


def dtype_of(A: Any) -> torch.dtype:
    """The dtype of a SciPy object, torch's default one where it has none or an integer one."""
    own = torch.get_default_dtype() if A.dtype is None else torch.as_tensor(_numpy().zeros((), A.dtype)).dtype
    return own if own.is_floating_point or own.is_complex else torch.get_default_dtype()


def _to_torch(A: Any) -> Tensor:
    """A sparse array as a sparse Tensor that owns its memory."""
    import numpy

    def own(array: Any) -> Tensor:
        return torch.from_numpy(numpy.array(array))

    if A.format == "coo":
        indices = torch.stack([own(A.coords[0]).long(), own(A.coords[1]).long()])
        return torch.sparse_coo_tensor(indices, own(A.data), A.shape, check_invariants=True).coalesce()
    if A.format not in ("csr", "csc", "bsr"):
        A = A.tocsr()
    A.sum_duplicates()
    layout = getattr(torch, f"sparse_{A.format}")
    return torch.sparse_compressed_tensor(
        own(A.indptr).long(), own(A.indices).long(), own(A.data), A.shape, layout=layout, check_invariants=True
    )


def _to_scipy_array(matrix: Tensor) -> Any:
    scipy = _scipy()
    matrix = matrix.detach().cpu()
    shape = tuple(matrix.shape)
    if matrix.layout == torch.sparse_coo:
        matrix = matrix.coalesce()
        return scipy.sparse.coo_array((matrix.values().numpy(), matrix.indices().numpy()), shape=shape)
    if matrix.layout == torch.sparse_bsc:
        return _to_scipy_array(matrix.to_dense().to_sparse_csr())
    kinds = {torch.sparse_csr: "csr_array", torch.sparse_csc: "csc_array", torch.sparse_bsr: "bsr_array"}
    if matrix.layout == torch.sparse_csc:
        pointers, inner = matrix.ccol_indices(), matrix.row_indices()
    else:
        pointers, inner = matrix.crow_indices(), matrix.col_indices()
    kind = getattr(scipy.sparse, kinds[matrix.layout])
    return kind((matrix.values().numpy(), inner.numpy(), pointers.numpy()), shape=shape)


def _scipy() -> Any:
    try:
        import scipy.sparse.linalg
    except ImportError as error:
        raise ImportError("nablasolve.interop.scipy needs SciPy: pip install 'nablasolve[scipy]'") from error
    return scipy


def _numpy() -> Any:
    import numpy

    return numpy
