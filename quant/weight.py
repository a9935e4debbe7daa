"""`Weight`: the interface of quantized weights in any layout, and the two operations of a model: product and lookup.

    y_BF = product(x_BD, weight_DF)          # of an array or of any `Weight`
    row_BD = rows(table_VD, ids_B)

All leading axes of a weight [..., K, M] count as one axis of matrices with one index. So a layer, an expert of a layer,
the matrix of a head and the adapter of a row use the same product. Dimension key: `K` contraction axis, `M` outputs,
`R` rows of activations, `X` matrices.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from quant.activations import check_activations, round_activations
from quant.probe import Probe

# If each row has its own matrix, rows are multiplied one by one up to this many rows in all and per matrix.
_SINGLE_ROWS = 16
_SINGLE_ROWS_OF_ONE = 2
# The rows of a block are rounded up to a multiple of the first, or of the second for small blocks, to fill vectors.
_ROW_MULTIPLE = 16
_FEW_ROWS_MULTIPLE = 4


class Weight:
    """A weight [..., K, M] (`axis=-2`) or [..., M, K] (`axis=-1`) that is a pytree of arrays, not a plain array.

    Subclasses hold the arrays and define `shape`, `axis`, `dtype`, `nbytes` and `activations` (see `QTensor`), and
    `matrix`, `multiply`, `rows`, `values`, `take` and `split`.
    """

    axis: int
    # Fields or properties of the subclasses.
    dtype: Any
    activations: Any
    nbytes: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this object represents."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def matrices(self) -> int:
        """X, the number of matrices: the product of the leading axes."""
        return math.prod(self.shape[:-2])

    def product(self, x: jax.Array, index: jax.Array | int | None = None) -> jax.Array:
        """Multiplies activations with a matrix of this weight, as `quant.product` does; the result is float32."""
        if index is None:
            if self.ndim != 2:
                raise ValueError(
                    f"a product with a weight of shape {self.shape} without an index: expected one number, or one for "
                    f"each row of the activations, from 0 to {self.matrices - 1}"
                )
            return self.multiply(x)
        if jnp.ndim(index) == 0:
            return self.matrix(inside(index, self.matrices)).multiply(x)
        return by_row(x, index, self.matrices, lambda x, one: self.matrix(one).multiply(x))

    def matrix(self, index: jax.Array | int) -> "Weight":
        """Returns one of the X matrices; the int32 index may be traced. The result is a view where possible."""
        raise NotImplementedError

    def multiply(self, x: jax.Array) -> jax.Array:
        """Multiplies [..., K] with this single matrix: float32 [..., M]. Rounds x first as `activations` says."""
        raise NotImplementedError

    def rows(self, row_n: jax.Array) -> jax.Array:
        """Returns rows of a table [M, K]: int32 indices [n] in [0, M) -> float32 [n, K]."""
        raise NotImplementedError

    def values(self) -> jax.Array:
        """Returns the weight's values, float32."""
        raise NotImplementedError

    def take(self, number: int) -> Any:
        """Returns one layer of a stack [L, ...] by its static number, as an array or `Weight` of its own."""
        raise NotImplementedError

    def split(self) -> tuple[Any, Callable[[Any, jax.Array], Any]]:
        """Splits a stack [L, ...] for a scan over its layers.

        Returns:
            A pytree of arrays [L, ...] for `jax.lax.scan` to slice (reverse-mode differentiation goes through these),
            and a function (slice, layer number) -> layer, which closes over the arrays that are not sliced.
        """
        raise NotImplementedError


def is_weight(node: Any) -> bool:
    """Whether a node of a pytree is a `Weight`; use it as `is_leaf` in the functions of `jax.tree`."""
    return isinstance(node, Weight)


def product(
    x: jax.Array,
    weight: Any,
    index: jax.Array | int | None = None,
    *,
    axis: int = -2,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Multiplies activations with a weight, quantized or not.

    Products are summed in float32 for every input dtype, and the result is rounded once, to `dtype`: a bfloat16 sum
    over thousands of terms would lose the small ones. float32 inputs are multiplied in float32 on every backend; TPUs
    and recent GPUs would otherwise round them to bfloat16 or TF32 first.

    Args:
        x: float [..., K].
        weight: float array or `Weight`, [..., K, M] or [..., M, K]. A QTensor is multiplied by its dequantized float32
            values; activations are rounded first if `QTensor.activations` says so, and gradients pass straight through
            that rounding. A weight laid out by `prepare` gives the same result but for the order of sums.
        index: index of the matrix along the leading axes, taken as one axis. None for a weight [K, M]; one number; or
            one number for each row of `x`, an array of the shape of x's leading axes. Numbers are clamped to the range.
        axis: the contraction axis, -2 or -1; must be the `Weight`'s own.
        dtype: dtype of the result; default: that of the activations.

    Returns:
        [..., M], in `dtype`.

    Raises:
        ValueError: if the activations' last axis is not as long as the contraction axis, a weight of more than two axes
            comes without an index, the index has another shape than the rows, or a `Weight` has another contraction
            axis.
    """
    dtype = dtype or x.dtype
    if isinstance(weight, Probe):
        weight.seen[weight.name] = x
        made = product(x, weight.weight, index, axis=axis, dtype=dtype)
        return made if weight.added is None else made + weight.added.astype(dtype)
    if is_weight(weight) and weight.axis != axis:
        raise ValueError(f"a product along axis {axis}: expected {weight.axis}, the weight's contraction axis")
    if x.ndim < 1 or x.shape[-1] != weight.shape[axis]:
        raise ValueError(
            f"activations of shape {x.shape} times a weight of shape {weight.shape}: expected "
            f"[..., {weight.shape[axis]}], as long as the weight's axis {axis}"
        )
    if is_weight(weight):
        return weight.product(x, index).astype(dtype)
    return _product_of_array(x, weight, index, axis).astype(dtype)


def _product_of_array(x: jax.Array, weight: jax.Array, index: jax.Array | int | None, axis: int) -> jax.Array:
    """Implements `product` for an array; the result is float32."""
    if index is not None:
        weight = weight.reshape(-1, *weight.shape[-2:])
        if jnp.ndim(index):
            return by_row(x, index, weight.shape[0], lambda x, one: _product_of_array(x, weight, one, axis))
        weight = jax.lax.dynamic_index_in_dim(weight, inside(index, weight.shape[0]), keepdims=False)
    if weight.ndim != 2:
        raise ValueError(
            f"a product with a weight of shape {weight.shape} without an index: expected one number, or one for each "
            f"row of the activations, from 0 to {math.prod(weight.shape[:-2]) - 1}"
        )
    equation = "...K,KM->...M" if axis == -2 else "...K,MK->...M"
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, weight, precision=precision, preferred_element_type=jnp.float32)


def inside(index: jax.Array | int, count: int) -> jax.Array:
    """Returns integers as int32, clamped to 0 ... `count` - 1: negative ones do not count from the end."""
    if isinstance(index, int):
        return jnp.asarray(min(max(index, 0), count - 1), jnp.int32)
    return jnp.clip(jnp.asarray(index).astype(jnp.int32), 0, count - 1)


def by_row(
    x: jax.Array, index: jax.Array | int, matrices: int, one: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Multiplies rows that each have their own matrix, by products of several rows with one matrix.

    A few rows are multiplied one after the other: then only the matrices in use are read, which is what counts in
    decoding. More rows are sorted by matrix, and the rows of one matrix are multiplied together (`_by_blocks`).

    Args:
        x: [..., K].
        index: integers, of the shape of x's leading axes.
        matrices: X; indices are clamped to 0 ... X - 1.
        one: multiplies [r, K] with the matrix of a given index: float32 [r, M].

    Returns:
        float32 [..., M].

    Raises:
        ValueError: if the index has another shape.
    """
    if jnp.shape(index) != x.shape[:-1]:
        raise ValueError(
            f"an index of shape {jnp.shape(index)} for rows {x.shape[:-1]}: expected one number for each row"
        )
    x_RK, index_R = x.reshape(-1, x.shape[-1]), inside(index, matrices).reshape(-1)
    if x_RK.shape[0] <= min(_SINGLE_ROWS, _SINGLE_ROWS_OF_ONE * matrices):
        y_RM = jax.lax.map(_recomputed(lambda row: one(row[0][None], row[1])[0]), (x_RK, index_R))
    else:
        y_RM = _by_blocks(x_RK, index_R, matrices, one)
    return y_RM.reshape(*x.shape[:-1], y_RM.shape[-1])


def _recomputed(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Makes a gradient recompute the step of a loop, so that its float copy of the weight is not kept for each step."""
    return jax.checkpoint(function, prevent_cse=False)


def _by_blocks(
    x_RK: jax.Array, index_R: jax.Array, matrices: int, one: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Implements `by_row` for many rows: sorts them by matrix, then multiplies block by block; returns [R, M].

    It follows MegaBlocks (Gale et al. 2022, arXiv:2211.15841), except that a block has a quarter more rows than a
    matrix has on average: unpacking a matrix costs as much as its product with some tens of rows, so most matrices
    should be unpacked once. The last rows of a matrix use a smaller block if they fit one. Each block overwrites what
    the block before it wrote beyond its own rows.
    """
    R = x_RK.shape[0]
    sizes = _block_sizes(R, matrices)
    most = sizes[-1]
    order_R = jnp.argsort(index_R, stable=True)
    sorted_R = index_R[order_R]
    x_SK = jnp.pad(x_RK[order_R], ((0, most), (0, 0)))
    end_R = jnp.searchsorted(sorted_R, sorted_R, side="right").astype(jnp.int32)
    outputs = jax.eval_shape(one, x_RK, sorted_R[0]).shape[-1]

    def of_size(size: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return lambda x_nK, matrix: jnp.pad(one(x_nK[:size], matrix), ((0, most - size), (0, 0)))

    nothing = lambda x_nK, matrix: jnp.zeros((most, outputs), jnp.float32)  # noqa: E731
    choices = [nothing, *map(of_size, sizes)]
    multiply = _recomputed(lambda fitting, x_nK, matrix: jax.lax.switch(fitting, choices, x_nK, matrix))

    def block(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        first, y_SM = carry
        at = jnp.minimum(first, R - 1)
        count = end_R[at] - first  # 0 where no row is left
        fitting = jnp.sum(jnp.asarray([0, *sizes[:-1]], jnp.int32) < count, dtype=jnp.int32)
        x_nK = jax.lax.dynamic_slice_in_dim(x_SK, first, most)
        y_nM = multiply(fitting, x_nK, sorted_R[at])
        y_SM = jax.lax.dynamic_update_slice_in_dim(y_SM, y_nM, first, 0)
        return (jnp.minimum(first + most, end_R[at]), y_SM), None

    start = (jnp.zeros((), jnp.int32), jnp.zeros((R + most, outputs), jnp.float32))
    (_, y_SM), _ = jax.lax.scan(block, start, None, length=R // most + min(matrices, R))
    # A sort restores the order: some runtimes of exported programs lack a scatter.
    return y_SM[jnp.argsort(order_R)]


def _block_sizes(count: int, matrices: int) -> list[int]:
    """Returns the possible numbers of rows of a block, ascending, for `count` rows and `matrices` matrices."""
    up = lambda size, multiple: -(-size // multiple) * multiple  # noqa: E731
    most = min(count, -(-5 * count // (4 * matrices)))
    if most <= _ROW_MULTIPLE:
        return [up(most, _FEW_ROWS_MULTIPLE)]
    most = up(most, _ROW_MULTIPLE)
    return sorted({_ROW_MULTIPLE, up(most // 4, _ROW_MULTIPLE), most})


def rows(table: Any, ids: jax.Array) -> jax.Array:
    """Looks up rows of an embedding table. Only the rows that are looked up are dequantized.

    Args:
        table: [V, D], array or `Weight`. A `Weight` must be grouped along D (`axis=-1`): then a row is a few contiguous
            runs of bytes, and the same table serves as a head, `product(x, table, axis=-1)`.
        ids: int [...], in [0, V). An id of V or more gives a row of NaN. Negative ids count from the end.

    Returns:
        [..., D]: in the array's dtype, or float32 for a quantized table, which the caller rounds to the dtype of its
        activations.

    Raises:
        ValueError: if a `Weight` is grouped along V, or is not a matrix.
    """
    if not is_weight(table):
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
    found = table.rows(jnp.clip(row, 0, height - 1))
    found = jnp.where(((row >= 0) & (row < height))[:, None], found, jnp.nan)
    return found.reshape(*ids.shape, table.shape[1])


def rounded(x: jax.Array, weight: Any, outlier_K: jax.Array | None) -> jax.Array:
    """Rounds activations [..., K] as `weight.activations` says: float32 of the same shape, or x itself for None.

    Outlier channels are not rounded to int8 and do not affect the scales: this is their purpose (LLM.int8()).

    Args:
        x: float.
        weight: with `activations`, `group_size` and `order`.
        outlier_K: bool, channels that are outliers, or None.
    """
    if weight.activations is None:
        return x
    x = x.astype(jnp.float32)
    check_activations(weight.activations, weight.order is not None)
    if weight.activations == "bfloat16":
        # XLA may drop a pair of conversions ("excess precision"), but not `reduce_precision`.
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    group_size = weight.group_size if weight.activations == "int8-group" else "token"
    if outlier_K is None:
        return round_activations(x, group_size)
    return jnp.where(outlier_K, x, round_activations(jnp.where(outlier_K, 0, x), group_size))


def values(weight: Any) -> jax.Array:
    """Returns the float32 values of a weight, quantized or not."""
    return weight.values() if is_weight(weight) else jnp.asarray(weight).astype(jnp.float32)


def view(weight: Any, place: jax.Array) -> Any:
    """Returns one layer of a stack [L, ...] as a scan sees it; its number may be traced."""
    if not is_weight(weight):
        return jax.lax.dynamic_index_in_dim(weight, place, keepdims=False)
    part, rebuild = weight.split()
    part = jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, place, keepdims=False), part)
    return rebuild(part, place)


def layer_of(weight: Any, number: int) -> Any:
    """Returns one layer of a stack [L, ...], an array or a `Weight`, by its static number."""
    return weight.take(number) if is_weight(weight) else weight[number]


def nbytes(tree: Any) -> int:
    """Returns the bytes that all weights of a pytree take on a device; the weights may be abstract."""
    size = lambda leaf: leaf.nbytes if is_weight(leaf) else math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize  # noqa: E731
    return sum(size(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_weight))


def scan_layers(
    step: Callable[[Any, Any, Any, Any], tuple[Any, Any]], carry: Any, layers: Any, numbers: Any = None
) -> tuple[Any, Any]:
    """Applies a stack of layers one after the other, compiled once.

    `jax.lax.scan` slices arrays and QTensors, which reverse-mode differentiation needs. It does not slice weights laid
    out for a backend or of several types (`Mixed`): each layer gets a view of the whole stack.

    Args:
        step: (carry, one layer, its place in the stack, its numbers) -> (carry, a pytree of arrays to keep).
        carry: pytree of arrays.
        layers: pytree whose leaves are arrays or `Weight`s [L, ...].
        numbers: pytree of arrays [L], sliced alike.

    Returns:
        The carry after the last layer, and what each layer kept, stacked.

    Raises:
        ValueError: if the leaves are stacks of different lengths.
    """
    leaves, structure = jax.tree.flatten(layers, is_leaf=is_weight)
    lengths = {leaf.shape[0] for leaf in leaves}
    if len(lengths) != 1:
        raise ValueError(f"weights of one stack have {sorted(lengths)} layers: expected the same number for all")
    length = lengths.pop()
    parts = [leaf.split() if is_weight(leaf) else (leaf, lambda part, place: part) for leaf in leaves]
    sliced, rebuild = [part for part, _ in parts], [function for _, function in parts]

    def one(carry: Any, scanned: Any) -> tuple[Any, Any]:
        slices, place, numbers = scanned
        layer = [function(part, place) for function, part in zip(rebuild, slices, strict=True)]
        return step(carry, jax.tree.unflatten(structure, layer), place, numbers)

    if length == 1:
        # A loop of one iteration would only make the program harder to read.
        only = jax.tree.map(lambda array: array.reshape(array.shape[1:]), (sliced, numbers))
        carry, kept = one(carry, (only[0], jnp.zeros((), jnp.int32), only[1]))
        return carry, jax.tree.map(lambda array: array[None], kept)
    return jax.lax.scan(one, carry, (sliced, jnp.arange(length, dtype=jnp.int32), numbers))


def flat_stack(weight: Any, leads: int) -> Any:
    """Merges the first `leads` axes of each of a weight's arrays into one."""
    if leads == 1:
        return weight
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[leads:]), weight)
