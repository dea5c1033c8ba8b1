"""The curvature matrices of the mean loss as operators: Hessian, generalised Gauss-Newton matrix and empirical Fisher.

With L = sum of all loss terms / their number, parameters theta of length P and examples in chunks c:

    hessian   H = d^2 L / d theta^2                      by reverse over reverse (Pearlmutter 1994)
    ggn       G = sum_c J_c' (d^2 L_c / d z_c^2) J_c     z the outputs, J their Jacobian (Schraudolph 2002)
    fisher    F = (1/N) sum_i g_i g_i'                   g_i the gradient of l_i, where L = (1/N) sum_i l_i

Every product sums over chunks what the chunk adds to the mean, so the result does not depend on how the examples are cut. Only reverse mode is
used: a Jacobian-vector product is the derivative of the vector-Jacobian product, which is linear in its vector (Townsend 2017). Weight decay
is never part of L.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Literal, Self, cast

import torch
from torch import Tensor

from plasticity_probe.errors import BudgetError, SubjectError, UnknownNameError
from plasticity_probe.linalg.inspection import EigenStatus
from plasticity_probe.linalg.lanczos import Eigenpairs, ExtremeEigenpairs, Krylov, extreme_eigenpairs
from plasticity_probe.network.examples import Batch
from plasticity_probe.network.losses import Terms, inputs_and_targets
from plasticity_probe.network.subject import Subject

Matrix = Literal["hessian", "ggn", "fisher"]
Product = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""What one chunk of examples adds to a product: parameter-shaped tensors in, the same out."""

DENSE_BELOW = 512
"""Up to this many parameters the matrix is formed and its whole spectrum is exact (our choice: a fraction of a second)."""

KEPT = 4
"""Bytes of a kept second-order graph per byte of a first-order one (measured: 2 for a ResNet, 3 to 5 for GELU networks, GRU and transformer,
7 for a tanh MLP; the half of the memory that is left free covers those above 4)."""


class CurvatureOperator:
    """A curvature matrix of a subject's mean loss, known by its products. A context manager: leaving it frees the graphs.

    The graphs that a product needs are built at the first product and kept while they fit half of `subject.memory`, which makes each later
    product about a third cheaper; otherwise they are built anew, chunk by chunk, at every product. The numbers are the same.

    Args:
        subject: The network, its loss and its examples.
        of_chunk: Builds the graph of one chunk and returns its product.
    """

    def __init__(self, subject: Subject, of_chunk: Callable[[Subject, Batch], Product]) -> None:
        self._subject = subject
        self._of_chunk = of_chunk
        self._kept: list[Product] = []

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
        pieces = [list(self._subject.unflatten(column).values()) for column in columns]
        total = torch.zeros_like(columns)
        with torch.enable_grad():
            for product in self._products():
                for row, piece in zip(total, pieces, strict=True):
                    row += torch.cat([part.reshape(-1) for part in product(piece)])
        return total.T.reshape(vectors.shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept = []

    def _products(self) -> Iterable[Product]:
        built = (self._of_chunk(self._subject, batch) for batch in self._subject.chunks())
        if not keeps_graphs(self._subject):
            return built
        self._kept = self._kept or list(built)
        return self._kept


def keeps_graphs(subject: Subject) -> bool:
    """Whether the second-order graphs of all examples fit half the subject's memory together."""
    return KEPT * subject.activation_bytes * len(subject.examples) <= subject.memory // 2


def graph_bytes(subject: Subject) -> int:
    """Bytes that the graphs of a curvature operator take: of all examples where they are kept, else of a chunk."""
    examples = len(subject.examples)
    return KEPT * subject.activation_bytes * (examples if keeps_graphs(subject) else min(subject.chunk, examples))


def hessian(subject: Subject) -> CurvatureOperator:
    """The Hessian of the mean loss.

    Args:
        subject: The network, its loss and its examples.

    Returns:
        A symmetric operator of size P, the number of trainable parameters. The second derivative of a ReLU at its kink counts as 0.
    """
    return CurvatureOperator(subject, _hessian_of)


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
    return CurvatureOperator(subject, _ggn_of)


def fisher(subject: Subject) -> CurvatureOperator:
    """The empirical Fisher: (1/N) sum_i g_i g_i' over the gradients of the examples, uncentred (never the squared mean gradient).

    Args:
        subject: The network, its loss and its examples.

    Returns:
        A symmetric positive semi-definite operator of size P and of rank at most N.
    """
    return CurvatureOperator(subject, _fisher_of)


MATRICES: dict[str, Callable[[Subject], CurvatureOperator]] = {"hessian": hessian, "ggn": ggn, "fisher": fisher}
"""The curvature matrices by name."""


def curvature(subject: Subject, matrix: str) -> CurvatureOperator:
    """A curvature matrix by name.

    Args:
        subject: The network, its loss and its examples.
        matrix: "hessian", "ggn" or "fisher".

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
    max_products: int = 300,
    generator: torch.Generator,
) -> ExtremeEigenpairs:
    """The k largest and the k smallest eigenvalues of a curvature matrix with their eigenvectors.

    Computed once for a subject's examples and these settings; probes that ask for the same share them.

    Args:
        subject: The network, its loss and its examples.
        matrix: "hessian", "ggn" or "fisher".
        k: How many at each end; at most P.
        tol: Relative residual of a converged pair.
        max_products: Curvature-vector products after which the search gives up; at least 2k + 4. Where a quarter of the memory does not
            hold twice as many vectors of length P, the Krylov space stays smaller.
        generator: The source of the start vectors. Callers that share a result pass generators in the same state.

    Returns:
        Both ends with residuals and a status. Of the Krylov space only its coefficients are kept, not its basis. The Fisher and the Gauss-Newton
        matrix have no negative eigenvalues and a rank of at most N and N times the outputs: where that leaves k zeros, these are the
        smallest, without a search and without vectors.

    Raises:
        BudgetError: Not even the eigenvectors asked for fit the memory.
        SubjectError: The loss does not allow the matrix.
    """

    def compute() -> ExtremeEigenpairs:
        steps = krylov_vectors(subject, k, max_products) // 2
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
        return found._replace(
            krylov=_without_basis(found.krylov), bottom=_zeros(found.top, k) if zeros else found.bottom
        )

    return subject.once(("eigenpairs", matrix, k, tol, max_products), compute)


def rank_limit(subject: Subject, matrix: str) -> int:
    """The largest rank that a curvature matrix can have.

    Args:
        subject: The network, its loss and its examples.
        matrix: "hessian", "ggn" or "fisher".

    Returns:
        P for the Hessian; at most one for each example for the Fisher, and for each output of each example for the Gauss-Newton matrix.
    """
    if matrix == "hessian":
        return subject.size
    if matrix == "fisher":
        return min(subject.size, len(subject.examples))
    with torch.no_grad():
        outputs = subject.outputs(subject.parameters, next(iter(subject.examples.chunks(1))))
    return min(subject.size, len(subject.examples) * outputs[0].numel())


def search_cost(
    subject: Subject, matrix: str, k: int, tol: float, max_products: int
) -> tuple[tuple[Hashable, int], ...]:
    """What a search for eigenpairs costs at its longest, in examples times products, under the name that equal searches share.

    Args:
        subject: The network, its loss and its examples.
        matrix: "hessian", "ggn" or "fisher".
        k: Eigenvalues at each end.
        tol: Relative residual of a converged pair.
        max_products: Products that the search may spend.
    """
    count = len(subject.examples)
    products = min(max_products, 2 * subject.size) if subject.size <= DENSE_BELOW else max_products
    return ((("eigenpairs", matrix, k, tol, max_products, count), count * products),)


def krylov_vectors(subject: Subject, k: int, max_products: int) -> int:
    """How many vectors of length P the search for eigenpairs holds: two Krylov spaces that fit a quarter of the subject's memory.

    Args:
        subject: The network, its loss and its examples.
        k: Eigenvalues at each end.
        max_products: Products that the search may spend, and so the longest space.

    Raises:
        BudgetError: Not even the eigenvectors asked for fit.
    """
    vector = subject.size * subject.dtype.itemsize
    fits, least = subject.memory // (8 * vector), 2 * k + 4
    if fits < least < subject.size:
        raise BudgetError(
            f"expected memory for {2 * least} vectors of {subject.size} parameters ({2 * least * vector / 1e9:.1f} GB) in a quarter of what is "
            f"allowed, but {subject.memory / 1e9:.1f} GB are. Ask for fewer eigenvalues (k), or allow more memory."
        )
    return 2 * min(max_products, max(fits, least))


def _zeros(top: Eigenpairs, k: int) -> Eigenpairs:
    """The k smallest eigenvalues where they are known to be zero; NaN where the matrix is not finite."""
    known = top.status in (EigenStatus.OK, EigenStatus.NOT_CONVERGED, EigenStatus.ZERO_OPERATOR)
    values = torch.full((k,), 0.0 if known else float("nan"), dtype=torch.float64)
    status = EigenStatus.OK if known else top.status
    return replace(top, values=values, vectors=top.vectors[:, :0], residuals=values.clone(), status=status)


def _without_basis(krylov: Krylov | None) -> Krylov | None:
    if krylov is None:
        return None
    nothing = krylov.basis[:0].clone()
    return replace(krylov, basis=nothing, following=None, locked=nothing)


def _hessian_of(subject: Subject, batch: Batch) -> Product:
    parameters = list(subject.parameters.values())
    sums, _ = subject.losses(subject.parameters, batch)
    loss = sums.sum() / subject.terms
    return _transposed_jacobian(_gradients([loss], parameters, [torch.ones_like(loss)]), parameters)


def _ggn_of(subject: Subject, batch: Batch) -> Product:
    of_outputs = cast(Callable[[Tensor, Tensor], Terms], subject.loss.of_outputs)
    outputs = subject.outputs(subject.parameters, batch)
    free = outputs.detach().requires_grad_()
    sums, _ = of_outputs(free, cast(Tensor, inputs_and_targets(batch)[1]))
    loss = sums.sum() / subject.terms
    of_loss = _transposed_jacobian(_gradients([loss], [free], [torch.ones_like(loss)]), [free])
    return _sandwich(outputs, list(subject.parameters.values()), lambda tangent: of_loss([tangent])[0])


def _fisher_of(subject: Subject, batch: Batch) -> Product:
    sums, _ = subject.losses(subject.parameters, batch)
    examples = len(subject.examples)
    losses = sums * (examples / subject.terms)
    return _sandwich(losses, list(subject.parameters.values()), lambda tangent: tangent / examples)


def _sandwich(values: Tensor, parameters: Sequence[Tensor], inner: Callable[[Tensor], Tensor]) -> Product:
    """The product with J' B J, where J is the Jacobian of `values` and B the map `inner`."""
    cotangent = torch.zeros_like(values, requires_grad=True)
    transposed = _transposed_jacobian([values], parameters)
    forward = _transposed_jacobian(_gradients([values], parameters, [cotangent]), [cotangent])
    return lambda vector: transposed([inner(forward(vector)[0])])


def _transposed_jacobian(values: Sequence[Tensor], inputs: Sequence[Tensor]) -> Product:
    """The map u -> (d values / d inputs)' u on a graph that is kept; inputs without influence get zeros."""
    return lambda cotangents: _gradients(values, inputs, cotangents, create_graph=False)


def _gradients(
    values: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], *, create_graph: bool = True
) -> Sequence[Tensor]:
    live = [(value, cotangent) for value, cotangent in zip(values, cotangents, strict=True) if value.requires_grad]
    if not live:
        return [torch.zeros_like(tensor) for tensor in inputs]
    return torch.autograd.grad(
        [value for value, _ in live],
        inputs,
        [cotangent for _, cotangent in live],
        retain_graph=True,
        create_graph=create_graph,
        materialize_grads=True,
    )
