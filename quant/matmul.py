"""How the model uses a weight, quantized or not: as a matrix (`einsum`) or as a table of rows (`take_rows`)."""

import jax
import jax.numpy as jnp

from quant.activations import check_activations, round_activations
from quant.kernels import Layout
from quant.probe import Probe
from quant.qtensor import QTensor, dequantize, outlier_slots


def einsum(
    equation: str,
    activations: jax.Array,
    weight: jax.Array | QTensor | Layout | Probe,
    *,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Contracts activations with a weight, as `jnp.einsum(equation, activations, weight)`.

    Products are summed in float32 whatever the inputs are, and the result is rounded once, to `dtype`: a sum over
    thousands of bfloat16 terms kept in bfloat16 would lose the small ones. float32 inputs are multiplied in float32 on
    every backend: TPU and recent GPU would otherwise round them to bfloat16 or TF32 first.

    Args:
        equation: einsum equation with the activations first, for example "BTD,DF->BTF".
        activations: float array.
        weight: float array, or a QTensor: then the result is that of its dequantized float32 values, with activations
            rounded first where it says so (`QTensor.activations`). Gradients pass by that rounding. Or what `prepare`
            makes of a QTensor for a backend: the same, but for the order of sums.
        dtype: of the result; that of the activations unless given.

    Returns:
        The contraction, in `dtype`.

    Raises:
        ValueError: if activations are to be rounded and the equation contracts anything but the weight's contraction
            axis, or outlier channels differ between leading axes of the weight.
    """
    dtype = dtype or activations.dtype
    if isinstance(weight, Probe):
        weight.seen[weight.name] = activations
        weight = weight.weight
    if isinstance(weight, QTensor | Layout):
        return _einsum_quantized(equation, activations, weight).astype(dtype)
    precision = jax.lax.Precision.HIGHEST if activations.dtype == jnp.float32 else None
    product = jnp.einsum(equation, activations, weight, precision=precision, preferred_element_type=jnp.float32)
    return product.astype(dtype)


def _einsum_quantized(equation: str, activations: jax.Array, weight: QTensor | Layout) -> jax.Array:
    """The product with a quantized weight, float32. This is the one place where a lowering is chosen: by the layout.

    A QTensor, and whatever is no plain product of a matrix, takes the reference: dequantize, then contract, both in
    float32. The weight is not rounded to the activations' type, so that what other lowerings are compared with has no
    error but the quantizer's. Activations in int8 are rounded, and multiplied as floats: up to the rounding of sums,
    what products of integers give.
    """
    if weight.activations is not None:
        activations = _round_for(equation, activations.astype(jnp.float32), weight)
    if isinstance(weight, Layout):
        if _is_matmul(equation, weight.axis):
            y_RM = weight.matmul(activations.reshape(-1, activations.shape[-1]))
            return y_RM.reshape(*activations.shape[:-1], -1)
        weight = weight.restore()
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum(equation, activations.astype(jnp.float32), dequantize(weight), precision=precision)


def _is_matmul(equation: str, weight_axis: int) -> bool:
    """Whether an equation contracts the last axis of the activations with a matrix, as "BTD,DF->BTF" with axis -2."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    term, _, weight_term = inputs.partition(",")
    if len(weight_term) != 2:
        return False
    contracted, free = tuple(weight_term) if weight_axis == -2 else tuple(reversed(weight_term))
    return term.endswith(contracted) and output == term.removesuffix(contracted) + free


def _round_for(equation: str, activations: jax.Array, weight: QTensor | Layout) -> jax.Array:
    """Activations as `weight.activations` rounds them, float32 of the same shape.

    Outlier channels are not rounded to int8, and not seen by the scales: that is what they are for (LLM.int8()).
    """
    check_activations(weight.activations, weight.order is not None)
    if weight.activations == "bfloat16":
        # Not two conversions, which XLA may leave out for "excess precision".
        return jax.lax.reduce_precision(activations, exponent_bits=8, mantissa_bits=7)
    axis = _contraction_axis(equation, weight.axis)
    group_size = weight.group_size if weight.activations == "int8-group" else "token"
    x_K = jnp.moveaxis(activations, axis, -1)
    if weight.outlier_index is None:
        rounded_K = round_activations(x_K, group_size)
    else:
        if weight.ndim > 2:
            raise ValueError(
                f"int8 activations for a weight of shape {weight.shape} with outlier channels: expected a matrix, as "
                "each index of its leading axes may have other channels; index, scan or vmap these axes first"
            )
        is_outlier_K = outlier_slots(weight.outlier_index, weight.shape[weight.axis], weight.axis).reshape(-1) >= 0
        rounded_K = round_activations(jnp.where(is_outlier_K, 0, x_K), group_size)
        rounded_K = jnp.where(is_outlier_K, x_K, rounded_K)
    return jnp.moveaxis(rounded_K, -1, axis)


def _contraction_axis(equation: str, weight_axis: int) -> int:
    """The axis of the activations that an equation contracts with a weight's axis, -1 or -2.

    Raises:
        ValueError: if it contracts something else, or more.
    """
    inputs, _, output = equation.replace(" ", "").partition("->")
    term, _, weight_term = inputs.partition(",")
    letter = weight_term[weight_axis:][:1]
    contracted = set(term) & set(weight_term) - set(output) - {"."}
    if "->" not in equation or contracted != {letter} or term.count(letter) != 1:
        raise ValueError(
            f"equation {equation!r} with int8 activations: expected it to contract axis {weight_axis} of the weight "
            f"and no other, as {'BK,KM->BM' if weight_axis == -2 else 'BK,MK->BM'!r}"
        )
    # Axes before "..." are counted from the front, those behind it from the back.
    before = term.partition("...")[0]
    return before.index(letter) if letter in before else term.index(letter) - len(term)


def take_rows(table: jax.Array | QTensor | Layout, ids: jax.Array) -> jax.Array:
    """Looks up rows of an embedding table; of a quantized one only those rows are dequantized.

    Args:
        table: [V, D], array or QTensor. A QTensor must be grouped along D (`axis=-1`): then a row is a few contiguous
            runs of bytes, and the same table serves as a head, "...D,VD->...V", contracted along its groups.
        ids: int [...], in [0, V). An id of V or more gives a row of NaN. Negative ids count from the end.

    Returns:
        [..., D], of an array in its dtype, of a quantized table in float32: rounding is the caller's, to the dtype of
        its activations.

    Raises:
        ValueError: if a QTensor is grouped along V, or is not a matrix.
    """
    if not isinstance(table, QTensor | Layout):
        return jnp.take(table, ids, axis=0, mode="fill")
    if table.axis != -1 or table.ndim != 2:
        raise ValueError(
            f"a table of shape {table.shape} quantized along axis {table.axis}: expected [V, D] along -1, "
            "so that a row can be looked up; quantize it with axis=-1"
        )
    ids = jnp.asarray(ids)
    height = table.shape[0]
    row = ids.reshape(-1).astype(jnp.int32)
    row = jnp.where(row < 0, row + height, row)

    def pick(plane: jax.Array) -> jax.Array:
        # A plane that is the same for all rows (a scale per tensor, the order) has height 1 and broadcasts.
        return jnp.take(plane, row, axis=0, mode="clip") if plane.shape[0] == height else plane

    if isinstance(table, Layout):
        rows = table.take_rows(jnp.clip(row, 0, height - 1))
    else:
        rows = dequantize(jax.tree.map(pick, table))
    rows = jnp.where(((row >= 0) & (row < height))[:, None], rows, jnp.nan)
    return rows.reshape(*ids.shape, table.shape[1])
