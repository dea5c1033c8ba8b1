"""The curvature matrices of the mean loss as operators: Hessian, generalised Gauss-Newton matrix, empirical and true Fisher.

Every product sums over chunks what the chunk adds to the mean (`plasticity_probe.network.products`), so the result does not depend on how the
examples are cut. Weight decay is never part of the loss. A subject that measures a part of its parameters
(`subject(..., parameters="layer1.*")`) gives that diagonal block of each matrix.
"""

from collections.abc import Callable, Hashable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Self, cast

import torch
from torch import Tensor

from plasticity_probe.errors import BudgetError, SubjectError, UnknownNameError
from plasticity_probe.linalg.inspection import EigenStatus
from plasticity_probe.linalg.lanczos import Eigenpairs, ExtremeEigenpairs, extreme_eigenpairs
from plasticity_probe.network.examples import Batch
from plasticity_probe.network.graphs import graph_plan
from plasticity_probe.network.isolation import tensor_float32
from plasticity_probe.network.losses import class_axis, cross_entropy_terms, inputs_and_targets, squared_error_terms
from plasticity_probe.network.products import Graph, Product, fisher_product, ggn_product, hessian_product
from plasticity_probe.network.subject import Subject

DENSE_BELOW = 512
"""Up to this many parameters the matrix is formed and its whole spectrum is exact (our choice: a fraction of a second)."""

STEPS_PER_PAIR = 7
"""Basis vectors that the search for eigenpairs may hold for each pair asked for (our choice: on an MLP it took 206 products, with 5 for each
pair 221, and 199 without a limit; ARPACK asks for at least 2)."""

SMALL_BASIS = 2**26
"""Bytes below which a basis is never too long (our choice, 64 MB: a graded end of a small matrix takes few products with the whole of it)."""


class CurvatureOperator:
    """A curvature matrix of a subject's mean loss, known by its products. A context manager: leaving it frees the graphs.

    The graphs that a product needs are built at the first product and kept while they fit half of `subject.memory`, which makes each later
    product about a third cheaper; otherwise they are built anew, chunk by chunk, at every product, once for all vectors of a block. The numbers
    are the same. But for the number of loss terms, once for a subject, a product reads nothing from the device that it runs on, so an
    accelerator is not waited for.

    Args:
        subject: The network, its loss and its examples.
        graph: Builds the graph of a chunk of examples.

    Attributes:
        plan: How the graphs are held.
    """

    def __init__(self, subject: Subject, graph: Graph) -> None:
        self._subject = subject
        self._graph = graph
        self._batches: list[Batch] = []
        self._kept: list[Product] = []
        self.plan = graph_plan(subject, graph)

    @property
    def size(self) -> int:
        """Number of trainable parameters."""
        return self._subject.size

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return self._subject.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._subject.device

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        columns = vectors.detach().reshape(self.size, -1 if vectors.numel() else 0).T.contiguous()
        total = torch.zeros_like(columns)
        with torch.enable_grad(), tensor_float32() if self._subject.allow_tf32 else nullcontext():
            if self.plan.kept:
                self._kept = self._kept or [self._graph(self._subject, batch) for batch in self._chunks()]
                for product in self._kept:
                    self._add(product, columns, total)
            else:
                for batch in self._chunks():
                    # No name holds the graph, so that it is freed before the next one is built.
                    self._add(self._graph(self._subject, batch), columns, total)
        return total.T.reshape(vectors.shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept, self._batches = [], []

    def _add(self, product: Product, columns: Tensor, total: Tensor) -> None:
        for column, row in zip(columns, total, strict=True):
            parts = product(list(self._subject.unflatten(column).values()))
            for place, part in zip(self._subject.unflatten(row).values(), parts, strict=True):
                if part is not None:
                    place += part

    def _chunks(self) -> Iterable[Batch]:
        """The examples in chunks, moved to the device once where they are in memory."""
        if not self._subject.examples.resident:
            return self._subject.chunks(self.plan.chunk)
        self._batches = self._batches or list(self._subject.chunks(self.plan.chunk))
        return self._batches


def keeps_graphs(subject: Subject, matrix: str = "hessian") -> bool:
    """Whether the second-order graphs of all examples fit half the subject's memory together.

    Args:
        subject: The network, its loss and its examples.
        matrix: Name of the curvature matrix.
    """
    return curvature(subject, matrix).plan.kept


def graph_bytes(subject: Subject, matrix: str = "hessian") -> int:
    """Bytes that a curvature-vector product holds at its peak: the graphs of all examples where they are kept, else of a chunk.

    Measured on a few examples. 0 where there is no such matrix of this loss or network, which the product itself will say.

    Args:
        subject: The network, its loss and its examples.
        matrix: Name of the curvature matrix.
    """
    try:
        return curvature(subject, matrix).plan.bytes
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, SubjectError):
        return 0


def hessian(subject: Subject) -> CurvatureOperator:
    """The Hessian of the mean loss.

    Args:
        subject: The network, its loss and its examples.

    Returns:
        A symmetric operator of size P, the number of trainable parameters. The second derivative of a ReLU at its kink counts as 0.
    """
    return CurvatureOperator(subject, hessian_product)


def ggn(subject: Subject) -> CurvatureOperator:
    """The generalised Gauss-Newton matrix of the mean loss (Schraudolph 2002): the Hessian without the curvature of the network itself.

    Args:
        subject: The network, a loss of outputs and targets, and its examples.

    Returns:
        A symmetric, for a convex loss positive semi-definite operator of size P.

    Raises:
        SubjectError: The loss was given by the user, so how it depends on the outputs is unknown.
    """
    if subject.loss.of_outputs is None:
        raise SubjectError(
            f"expected a loss of outputs and targets for the generalised Gauss-Newton matrix, but {subject.loss.name} is a function of model "
            "and batch. Leave loss=None to have cross-entropy or squared error inferred, or ask for matrix='hessian' or 'fisher'."
        )
    return CurvatureOperator(subject, ggn_product)


def fisher(subject: Subject) -> CurvatureOperator:
    """The empirical Fisher: (1/N) sum_i g_i g_i' over the gradients of the examples, uncentred (never the squared mean gradient).

    Args:
        subject: The network, its loss and its examples.

    Returns:
        A symmetric positive semi-definite operator of size P and of rank at most N.
    """
    return CurvatureOperator(subject, fisher_product)


def true_fisher(subject: Subject) -> CurvatureOperator:
    """The true Fisher: the mean of J' Cov J over all loss terms, an expectation over what the model itself predicts instead of the targets.

    J is the Jacobian of the outputs z that a term is made of, and Cov the covariance of the gradient of the term's loss in z, under the model's
    own predictive distribution. No sampling: cross-entropy is the negative logarithm of a categorical distribution p, so Cov = diag(p) - p p'.
    The squared error |z - t|^2 / D of D outputs is, up to a constant, that of a Gaussian of variance D / 2 per output, so Cov = (2 / D) I (with
    unit variance the matrix would be D / 2 times as large). Both are the second derivative of the loss in z, which is why this matrix and the
    generalised Gauss-Newton matrix are one for these losses (Martens 2020, section 9.2) and the same products compute both.

    Args:
        subject: The network, cross-entropy or squared error, and its examples.

    Returns:
        A symmetric positive semi-definite operator of size P.

    Raises:
        SubjectError: The loss was given by the user, so what the model predicts is unknown.
    """
    if subject.loss.of_outputs not in (cross_entropy_terms, squared_error_terms):
        raise SubjectError(
            f"expected cross-entropy or squared error for the true Fisher, which averages over what the model predicts, but {subject.loss.name} "
            "says nothing about that. Leave loss=None to have one of them inferred, or ask for matrix='fisher', which takes the targets."
        )
    return CurvatureOperator(subject, ggn_product)


MATRICES: dict[str, Callable[[Subject], CurvatureOperator]] = {
    "hessian": hessian,
    "ggn": ggn,
    "fisher": fisher,
    "true_fisher": true_fisher,
}
"""The curvature matrices by name."""


def curvature(subject: Subject, matrix: str) -> CurvatureOperator:
    """A curvature matrix by name.

    Args:
        subject: The network, its loss and its examples.
        matrix: "hessian", "ggn", "fisher" or "true_fisher".

    Raises:
        UnknownNameError: There is no such matrix.
        SubjectError: The loss does not allow it.
    """
    if matrix not in MATRICES:
        raise UnknownNameError("curvature matrix", matrix, MATRICES)
    return MATRICES[matrix](subject)


def eigenpairs(
    subject: Subject,
    *,
    matrix: str = "hessian",
    k: int = 10,
    tol: float = 1e-3,
    max_products: int = 500,
    generator: torch.Generator,
) -> ExtremeEigenpairs:
    """The k largest and the k smallest eigenvalues of a curvature matrix with their eigenvectors.

    Computed once for a subject's examples and these settings; probes that ask for the same share them.

    Args:
        subject: The network, its loss and its examples.
        matrix: "hessian", "ggn", "fisher" or "true_fisher".
        k: How many at each end; at most P.
        tol: Relative residual of a converged pair.
        max_products: Curvature-vector products after which the search gives up; at least 2k + 4.
        generator: The source of the start vectors. Callers that share a result pass generators in the same state.

    Returns:
        Both ends with residuals and a status. Every matrix but the Hessian has no negative eigenvalues and a known largest rank
        (`rank_limit`): where that leaves k zeros, these are the smallest, without a search and without vectors.

    Raises:
        BudgetError: Not even the eigenvectors asked for fit the memory.
        SubjectError: The loss does not allow the matrix.
    """

    def compute() -> ExtremeEigenpairs:
        steps = _steps(subject, k, max_products)
        with curvature(subject, matrix) as operator:
            zeros = operator.size > DENSE_BELOW and operator.size - rank_limit(subject, matrix) >= k
            found = extreme_eigenpairs(
                operator,
                k,
                0 if zeros else k,
                generator=generator,
                tol=tol,
                max_steps=steps,
                max_products=max_products,
                dense_below=DENSE_BELOW,
            )
        return found._replace(bottom=_zeros(found.top, k)) if zeros else found

    return subject.once(("eigenpairs", matrix, k, tol, max_products), compute)


def rank_limit(subject: Subject, matrix: str) -> int:
    """The largest rank that a curvature matrix can have.

    Args:
        subject: The network, its loss and its examples.
        matrix: "hessian", "ggn", "fisher" or "true_fisher".

    Returns:
        P for the Hessian, and for the others never more than it: for the empirical Fisher the number of examples; for the Gauss-Newton matrix
        and the true Fisher the number of outputs, those of a cross-entropy counted as one less, as a number added to all scores changes
        nothing.
    """
    if matrix == "hessian":
        return subject.size
    if matrix == "fisher":
        return min(subject.size, len(subject.examples))
    batch = next(iter(subject.examples.chunks(1)))
    with torch.no_grad():
        outputs = subject.outputs(subject.parameters, batch)
    if subject.loss.of_outputs is not cross_entropy_terms:
        return min(subject.size, len(subject.examples) * outputs[0].numel())
    classes = outputs.shape[class_axis(outputs, cast(Tensor, inputs_and_targets(batch)[1]))]
    return min(subject.size, int(subject.terms) * (classes - 1))


def search_cost(
    subject: Subject, matrix: str, k: int, tol: float, max_products: int
) -> tuple[tuple[Hashable, int], ...]:
    """What a search for eigenpairs costs at its longest, in examples times products, under the name that equal searches share.

    Args:
        subject: The network, its loss and its examples.
        matrix: "hessian", "ggn", "fisher" or "true_fisher".
        k: Eigenvalues at each end.
        tol: Relative residual of a converged pair.
        max_products: Products that the search may spend.
    """
    count = len(subject.examples)
    products = min(max_products, 2 * subject.size) if subject.size <= DENSE_BELOW else max_products
    return ((("eigenpairs", matrix, k, tol, max_products, count), count * products),)


def krylov_vectors(subject: Subject, k: int, max_products: int) -> int:
    """How many vectors of length P the search for eigenpairs holds: a basis, what it returns and as many again, in a quarter of the memory.

    Args:
        subject: The network, its loss and its examples.
        k: Eigenvalues at each end.
        max_products: Products that the search may spend, and so the longest basis.

    Raises:
        BudgetError: Not even the eigenvectors asked for fit.
    """
    return _steps(subject, k, max_products) + 4 * k


def _steps(subject: Subject, k: int, max_products: int) -> int:
    """Basis vectors that the search may hold."""
    vector = subject.size * subject.dtype.itemsize
    fits, least = subject.memory // (4 * vector) - 4 * k, 2 * k + 4
    if fits < least < subject.size:
        needed = least + 4 * k
        raise BudgetError(
            f"expected memory for {needed} vectors of {subject.size} parameters ({needed * vector / 1e9:.1f} GB) in a quarter of what is "
            f"allowed, but {subject.memory / 1e9:.1f} GB are. Ask for fewer eigenvalues (k), or allow more memory."
        )
    return min(max_products, max(fits, least), max(STEPS_PER_PAIR * 2 * k, SMALL_BASIS // vector, least))


def _zeros(top: Eigenpairs, k: int) -> Eigenpairs:
    """The k smallest eigenvalues where they are known to be zero; NaN where the matrix is not finite."""
    known = top.status in (EigenStatus.OK, EigenStatus.NOT_CONVERGED, EigenStatus.ZERO_OPERATOR)
    values = torch.full((k,), 0.0 if known else float("nan"), dtype=torch.float64)
    status = EigenStatus.OK if known else top.status
    return replace(top, values=values, vectors=top.vectors[:, :0], residuals=values.clone(), status=status)
