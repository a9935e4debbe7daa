"""How the model uses a weight, quantized or not: as a matrix (`einsum`) or as a table of rows (`take_rows`)."""

import jax
import jax.numpy as jnp

from quant.qtensor import QTensor, dequantize


def einsum(
    equation: str, activations: jax.Array, weight: jax.Array | QTensor, *, dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """Contracts activations with a weight, as `jnp.einsum(equation, activations, weight)`.

    Products are summed in float32 whatever the inputs are, and the result is rounded once, to `dtype`: a sum over
    thousands of bfloat16 terms kept in bfloat16 would lose the small ones. float32 inputs are multiplied in float32 on
    every backend: TPU and recent GPU would otherwise round them to bfloat16 or TF32 first.

    Args:
        equation: einsum equation with the activations first, for example "BTD,DF->BTF".
        activations: float array.
        weight: float array, or a QTensor: then the result is that of its dequantized float32 values.
        dtype: of the result; that of the activations unless given.

    Returns:
        The contraction, in `dtype`.
    """
    dtype = dtype or activations.dtype
    if isinstance(weight, QTensor):
        return _einsum_quantized(equation, activations, weight).astype(dtype)
    precision = jax.lax.Precision.HIGHEST if activations.dtype == jnp.float32 else None
    product = jnp.einsum(equation, activations, weight, precision=precision, preferred_element_type=jnp.float32)
    return product.astype(dtype)


def _einsum_quantized(equation: str, activations: jax.Array, weight: QTensor) -> jax.Array:
    """The product with a QTensor, float32. This is the one place where a lowering for the backend is chosen.

    The only one so far is the reference: dequantize, then contract, both in float32. The weight is not rounded to the
    activations' type, so that what other lowerings are compared with has no error but the quantizer's.
    """
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum(equation, activations.astype(jnp.float32), dequantize(weight), precision=precision)


def take_rows(table: jax.Array | QTensor, ids: jax.Array) -> jax.Array:
    """Looks up rows of an embedding table; of a quantized one only those rows are dequantized.

    Args:
        table: [V, D], array or QTensor. A QTensor must be grouped along D (`axis=-1`): then a row is a few contiguous
            runs of bytes, and the same table serves as a head, "...D,VD->...V", contracted along its groups.
        ids: int [...], in [0, V). An id of V or more gives a row of NaN. Negative ids count from the end.

    Returns:
        [..., D] in the table's dtype.

    Raises:
        ValueError: if a QTensor is grouped along V, or is not a matrix.
    """
    if not isinstance(table, QTensor):
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

    rows = dequantize(jax.tree.map(pick, table), table.dtype)
    rows = jnp.where(((row >= 0) & (row < height))[:, None], rows, jnp.nan)
    return rows.reshape(*ids.shape, table.shape[1])
