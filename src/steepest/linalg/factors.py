"""One Kronecker factor at a time: products in full precision, damping, and decompositions that know how to fail."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from steepest.errors import InvalidOptionError, SteepestError

__all__ = [
    "DecompositionError",
    "damped_pi",
    "eigenbasis",
    "exact_dtype",
    "inner",
    "inverse",
    "product",
    "second_moment",
    "symmetrised",
    "transposed",
]


class DecompositionError(SteepestError, ArithmeticError):
    """A Kronecker factor could not be decomposed, in its own precision nor in float64."""


def product(*matrices: Tensor) -> Tensor:
    """Multiply matrices from left to right, in full precision whatever autocast and TF32 say.

    Where the caller lets float32 products be rounded (TF32, bfloat16), they are formed in float64 instead.

    Args:
        *matrices: ``[..., i, j]``, ``[..., j, k]``, ..., all of one dtype. One of one dimension is diagonal.

    Returns:
        ``[..., i, z]``, in the dtype of the matrices.
    """
    first = matrices[0]
    kind, exact = first.device.type, exact_dtype(first)
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return _chain(matrices, exact).to(first.dtype)
    return _chain(matrices, exact).to(first.dtype)


def exact_dtype(matrix: Tensor) -> torch.dtype:
    """Precision to multiply a matrix in, so that nothing is rounded: float64 where float32 products may be."""
    rounded = matrix.dtype == torch.float32 and _rounds_float32(matrix.device.type)
    return torch.float64 if rounded else matrix.dtype


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum of the products of two tensors' entries, 0-dimensional, without a temporary."""
    return torch.dot(left.reshape(-1), right.reshape(-1))


def _chain(matrices: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    result = matrices[0].to(dtype)
    for matrix in matrices[1:]:
        result = _times(result, matrix.to(dtype))
    return result


def _times(left: Tensor, right: Tensor) -> Tensor:
    if right.ndim == 1:
        return left * right
    return left.unsqueeze(-1) * right if left.ndim == 1 else left @ right


def transposed(matrix: Tensor) -> Tensor:
    """Return the transpose; that of a diagonal matrix ``[k]`` is itself."""
    return matrix if matrix.ndim == 1 else matrix.mT


def _rounds_float32(device_type: str) -> bool:
    """Whether the caller allows float32 products of less than float32's precision on these devices."""
    backend = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device_type)
    if backend is None:
        return False
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:  # torch before 2.9
        return torch.get_float32_matmul_precision() != "highest"
    return precision not in {"ieee", "none"}


def damped_pi(input_factor: Tensor, grad_factor: Tensor) -> Tensor:
    r"""Balance of a damping between the two factors (Martens and Grosse 2015, arXiv 1503.05671, section 6.3).

    .. math:: \pi = \sqrt{\frac{\operatorname{tr}(A) / m}{\operatorname{tr}(S) / n}}, \qquad
        A \otimes S + \lambda I \approx (A + \pi \sqrt\lambda I) \otimes (S + \tfrac{\sqrt\lambda}{\pi} I)

    Args:
        input_factor: A, ``[m, m]``, or its diagonal ``[m]``.
        grad_factor: S, ``[n, n]``.

    Returns:
        pi, a 0-dimensional tensor; 1 where a trace is zero and pi has no meaning.

    Example:
        >>> import torch
        >>> damped_pi(4 * torch.eye(3), torch.eye(2))
        tensor(2.)
    """
    a, s = _diagonal(input_factor).mean(), _diagonal(grad_factor).mean()
    # The roots are divided and not the traces: these can be so far apart that their ratio overflows.
    ratio = a.clamp(min=0).sqrt() / s.clamp(min=0).sqrt()
    return torch.where((a > 0) & (s > 0), ratio, torch.ones_like(ratio))


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix if matrix.ndim == 1 else matrix.diagonal()


def symmetrised(factor: Tensor, name: str) -> Tensor:
    """Check one factor and bring it to a form that can be decomposed.

    Args:
        factor: ``[k, k]``, symmetric up to rounding, or the diagonal ``[k]`` of one.
        name: What to call it in a message.

    Returns:
        The same, exactly symmetric, at least float32, without a graph.

    Raises:
        InvalidOptionError: If it is no square matrix.
        DecompositionError: If it holds NaN or infinity.
    """
    if factor.ndim not in {1, 2} or factor.shape[0] != factor.shape[-1]:
        raise InvalidOptionError(f"The {name} has shape {tuple(factor.shape)}: give a square matrix.")
    matrix = factor.detach().to(torch.promote_types(factor.dtype, torch.float32))
    bad = matrix.numel() - int(matrix.isfinite().sum())
    if bad:
        raise DecompositionError(
            f"The {name} {tuple(factor.shape)} holds NaN or infinity in {bad} of {factor.numel()} entries. "
            "Keep such a batch out of the running factors, lower the learning rate, or use float32 instead of half."
        )
    return matrix.clone() if matrix.ndim == 1 else (matrix + matrix.T) / 2


def eigenbasis(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of one factor.

    Args:
        matrix: ``[k, k]`` or ``[k]``, as `symmetrised` returns it.
        name: What to call it in a message.

    Returns:
        Eigenvalues ``[k]``, none negative; eigenvectors ``[k, k]``, as columns, or ones ``[k]`` of a diagonal factor.
    """
    if matrix.ndim == 1:
        return matrix.clamp(min=0), torch.ones_like(matrix)

    def eigh(unit: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        values, vectors = torch.linalg.eigh(unit)
        return values.clamp(min=0) * scale, vectors

    values, vectors = _attempt(eigh, matrix, name)
    return values, vectors


def inverse(matrix: Tensor, name: str) -> Tensor:
    """Inverse of one damped factor, by its Cholesky factor.

    Args:
        matrix: ``[k, k]`` or ``[k]``, as `symmetrised` returns it, damping added.
        name: What to call it in a message.

    Returns:
        The same, symmetric.

    Raises:
        DecompositionError: If it is singular.
    """
    if matrix.ndim == 1:
        if not bool((matrix > 0).all()):
            raise DecompositionError(f"The {name} {tuple(matrix.shape)} has zeros: use a damping above 0.")
        return matrix.reciprocal()

    def cholesky(unit: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return (torch.cholesky_inverse(torch.linalg.cholesky(unit)) / scale,)

    (found,) = _attempt(cholesky, matrix, name)
    return found


def _attempt(method: Callable[[Tensor, Tensor], tuple[Tensor, ...]], matrix: Tensor, name: str) -> tuple[Tensor, ...]:
    """Run a decomposition of ``matrix / scale``; a second time in float64 where the first fails."""
    reason = ""
    for candidate in _candidates(matrix):
        mean = candidate.diagonal().mean()
        scale = torch.where(mean > 0, mean, torch.ones_like(mean))  # float32 then sees eigenvalues near 1
        try:
            results = method(candidate / scale, scale)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # LinAlgError, and what the drivers of some devices raise in its place
            reason = str(error).strip().partition("\n")[0]
            continue
        results = tuple(result.to(matrix) for result in results)
        if all(bool(result.isfinite().all()) for result in results):
            return results
        reason = "the result holds NaN or infinity"
    raise DecompositionError(
        f"The {name} {tuple(matrix.shape)} could not be decomposed, not even in float64: {reason} "
        "Use a larger damping, a larger factor_decay, or float32 data instead of half."
    )


def _candidates(matrix: Tensor) -> Iterator[Tensor]:
    """The matrix as it is; then in float64 on the CPU, which has another driver, and float64 on every machine."""
    yield matrix
    if matrix.dtype != torch.float64 or matrix.device.type != "cpu":
        yield matrix.cpu().double()


def second_moment(
    grad_basis: Tensor, input_basis: Tensor, inputs: Tensor, output_grads: Tensor, *, max_memory: int = 1 << 28
) -> Tensor:
    r"""Mean square of the per-sample gradients in a Kronecker eigenbasis, exactly (arXiv 1806.03884).

    .. math:: D = \tfrac1N \sum_n \Big(\sum_t U_S^T g_{nt} x_{nt}^T U_A\Big)^{\circ 2}

    With one position per sample it is one product of squares; with more, samples are taken in chunks.

    Args:
        grad_basis: U_S, ``[n, n]``, eigenvectors as columns.
        input_basis: U_A, ``[m, m]``.
        inputs: x, ``[N, T, m]``, the bias joined as a last column of ones.
        output_grads: g, ``[N, T, n]``, gradients of one sample's loss each.
        max_memory: Bytes that the gradients of a chunk may take; at least one sample is taken.

    Returns:
        D, ``[n, m]``.

    Example:
        >>> import torch
        >>> x, g = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0]]])
        >>> second_moment(torch.eye(1), torch.eye(2), x, g)
        tensor([[ 9., 36.]])
    """
    samples, positions, _ = inputs.shape
    x = product(inputs.to(input_basis.dtype), input_basis)
    g = product(output_grads.to(grad_basis.dtype), grad_basis)
    if positions == 1:
        return product(g[:, 0].square().T, x[:, 0].square()) / samples
    total = x.new_zeros(g.shape[2], x.shape[2])
    chunk = max(1, max_memory // (total.numel() * total.element_size()))
    for left, right in zip(g.split(chunk), x.split(chunk), strict=True):
        total += product(left.mT, right).square_().sum(0)
    return total / samples
