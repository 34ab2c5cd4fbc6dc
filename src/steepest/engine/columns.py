"""The columns of a Jacobian: whether what it is multiplied with has the same, and those of one layer."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from steepest.engine.records import Record
from steepest.errors import InvalidOptionError, UnsupportedModelError

__all__ = ["check_columns", "check_vector", "layer_positions", "shaped_vectors"]

Shapes = Mapping[str, torch.Size]


def check_columns(shapes: Shapes, others: Shapes) -> None:
    """Refuse products of two Jacobians that belong to different parameters.

    Args:
        shapes: Shape of every parameter of one of them.
        others: Those of the other.

    Raises:
        InvalidOptionError: If a parameter is missing or has another shape.
    """
    if shapes == others:
        return
    odd = sorted(n for n in {*shapes, *others} if shapes.get(n) != others.get(n))
    raise InvalidOptionError(
        f"Two Jacobians of different parameters have no products: {', '.join(map(repr, odd))} is missing in "
        "one of them or has another shape. Make both with the same params, and restrict both alike."
    )


def check_vector(shapes: Shapes, vector: Mapping[str, Tensor]) -> None:
    """Refuse a vector of another parameter space.

    Args:
        shapes: Shape of every parameter.
        vector: A tensor for each.

    Raises:
        InvalidOptionError: If a parameter is missing or has another shape.
    """
    for name, shape in shapes.items():
        found = tuple(vector[name].shape) if name in vector else None
        if found != tuple(shape):
            raise InvalidOptionError(
                f"jvp vector for {name!r} is {'missing' if found is None else f'of shape {found}'}: "
                f"give a tensor of shape {tuple(shape)} for every parameter."
            )


def shaped_vectors(shapes: Shapes, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check a stack of vectors in parameter space, and bring it to the parameters' shapes.

    Args:
        shapes: Shape of every parameter.
        vectors: ``[L, *shape]`` or ``[L, numel]`` for each.

    Returns:
        ``[L, *shape]`` for each.

    Raises:
        InvalidOptionError: If the vectors belong to other parameters or have other shapes.
    """
    if vectors.keys() != shapes.keys():
        odd = sorted(vectors.keys() ^ shapes.keys())
        raise InvalidOptionError(
            f"The vectors and the Jacobian do not belong to the same parameters: only one of them has "
            f"{', '.join(map(repr, odd))}. Make both with the same params."
        )
    count = len(next(iter(vectors.values())))
    for name, shape in shapes.items():
        found = tuple(vectors[name].shape)
        if found not in {(count, *shape), (count, shape.numel())}:
            raise InvalidOptionError(
                f"The vectors for {name!r} have shape {found}: give {count} of them, as for the other parameters, "
                f"in a tensor of shape {(count, *shape)}."
            )
    return {n: vectors[n].detach().reshape(count, *shape) for n, shape in shapes.items()}


def layer_positions(records: Sequence[Record], shapes: Shapes, weight: str) -> tuple[Tensor, Tensor]:
    """Find what a layer saw.

    Args:
        records: The records of a Jacobian.
        shapes: Shape of every parameter.
        weight: Qualified name of the layer's weight.

    Returns:
        Inputs ``[R, S, d_in (+ 1)]`` and output gradients ``[R, S, d_out]``.

    Raises:
        InvalidOptionError: If there is no such parameter.
        UnsupportedModelError: If its layer has no such form.
    """
    for record in records:
        if weight == record.names[0]:
            try:
                return record.positions("expand")
            except NotImplementedError:
                break
    if weight not in shapes:
        raise InvalidOptionError(
            f"The Jacobian has no parameter {weight!r}: give the weight of a layer among {', '.join(shapes)}."
        )
    raise UnsupportedModelError(
        f"Parameter {weight!r} is not the weight of a linear layer or an ungrouped convolution that the rows use "
        "and that stands for itself (untied, not computed from others, captured by steepest.Capture): it has no "
        "inputs to return. Use per_sample_grads(), or name another layer."
    )
