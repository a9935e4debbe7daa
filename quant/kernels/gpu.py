"""Products with a quantized weight on an NVIDIA GPU: a Triton kernel for a few rows, XLA for many.

Dimension key: `R` rows of activations, `K` contraction axis, `M` outputs, `C` groups along K, `g` elements of a group,
`n` bytes of a group, `L` layers of a stack.

Decoding is bound by reading weights. XLA writes the dequantized matrix out and reads it back (benchmarks/aot_gpu.py).
The kernel unpacks in registers instead: a program takes a block of outputs and a part of K, and goes through the packed
bytes. The format at rest needs no change for this: byte j of a group holds elements j, j + n, …, so a slot of
consecutive bytes multiplies consecutive activations, and a row of bytes is contiguous over outputs. Codes are small
integers, exact in float16 and bfloat16: tensor cores multiply them directly, and scaling follows in float32.

On an H200 the kernel is 1.7 to 2.9 times as fast as XLA's product of the same packed weights, at 8 to 27% of the speed
of a copy (benchmarks/NOTES.md). For A100 and H100 it is compiled ahead of time.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from quant.kernels import Layout
from quant.qtensor import QTensor, dequantize, scale_values, units_of
from quant.scheme import Scheme

# Rows of a tile that tensor cores multiply, and the kernel's largest number of rows. Fewer rows are padded, which adds
# no reads of weights. More rows share XLA's dequantized matrix, so that writing it out is worthwhile.
MAX_KERNEL_ROWS = 16
# Programs that keep a card busy: about four for each of the 132 multiprocessors of an H100. If there are fewer blocks
# of outputs, K is split.
_PROGRAMS = 512
# Options of `jax.jit` for programs with these products: independent products, such as query, key and value, then run
# concurrently. On an H200 a decode step of the 1.1B shape takes 2.24 ms without and 1.79 ms with them.
COMPILER_OPTIONS: dict[str, str | bool] = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
# Outputs of a program: the first of these that divides M. A memory transaction moves at most 128 bytes.
_BLOCKS = (128, 64, 32, 16)
# Byte rows of a step: the first of these that divides a group's byte rows, so that a step's elements share scales.
_STEPS = (32, 16)
# Byte rows whose loads are issued together. According to ptxas a thread then uses 79 to 134 registers, so that at least
# three programs fit a multiprocessor; with 64 rows it uses 121 to 255.
_ROWS_IN_FLIGHT = 32


@functools.partial(jax.tree_util.register_dataclass, data_fields=["columns", "unit", "layer"], meta_fields=["axis"])
@dataclasses.dataclass(frozen=True, eq=False)
class GpuWeight(Layout):
    """A quantized weight [..., K, M] (`axis=-2`) or [..., M, K] (`axis=-1`), its bytes contiguous over outputs.

    Attributes:
        columns: QTensor [..., K, M], contraction axis -2, with one plane of bytes and one level of scales, for every
            group and output: floats, or int8 if there is a `unit`.
        unit: float32 [..., 1, M] or None: for scales in two levels, the float of each output.
        layer: int32 scalar or None. If given, the object represents one layer of the stack [L, ...] that `columns`
            holds. XLA would copy a slice before passing it to a kernel.
        axis: contraction axis of the weight.
    """

    columns: QTensor
    unit: jax.Array | None = None
    layer: jax.Array | None = None
    _: dataclasses.KW_ONLY
    axis: int = -2

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, or of one layer if `layer` is given."""
        *lead, length, outputs = self.columns.shape[0 if self.layer is None else 1 :]
        return (*lead, length, outputs) if self.axis == -2 else (*lead, outputs, length)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the weight that this object represents."""
        return self.columns.dtype

    @property
    def scheme(self) -> Scheme:
        """Scheme of the codes."""
        return self.columns.scheme

    @property
    def group_size(self) -> int:
        """Weights along the contraction axis that share a scale."""
        return self.columns.group_size

    @property
    def activations(self) -> str | None:
        """See `QTensor.activations`."""
        return self.columns.activations

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.columns.nbytes + (0 if self.unit is None else 4 * self.unit.size)

    def matmul(self, x_RK: jax.Array) -> jax.Array:
        """Calls the module's function `matmul`."""
        return matmul(x_RK, self)

    def restore(self) -> QTensor:
        """Calls the module's function `restore`."""
        return restore(self)

    def rows(self, row_n: jax.Array) -> jax.Array:
        """Calls the module's function `rows`."""
        return rows(self, row_n)


def refusal(weight: QTensor) -> str | None:
    """Why a weight cannot be laid out like this, or None if it can."""
    if weight.scheme.codebook is not None:
        return f"{weight.scheme.name} codes are looked up in a table"
    if len(weight.planes) > 1:
        return f"its codes of {weight.scheme.bits} bits are in {len(weight.planes)} planes"
    if weight.order is not None:
        return "its groups consist of reordered inputs"
    if weight.outlier is not None:
        return "it has outlier channels"
    return None


def layout(weight: QTensor) -> GpuWeight:
    """Lays a weight out for a GPU: unchanged with `axis=-2`, transposed with -1.

    Scales of two levels become float32; with one float per output (and no offset) they stay integers beside a `unit`.

    Raises:
        ValueError: for a weight for which `refusal` gives a reason.
    """
    if reason := refusal(weight):
        raise ValueError(
            f"a weight of shape {weight.shape} cannot be laid out for a GPU: {reason}; multiply with the QTensor itself"
        )
    outputs = weight.shape[-1 if weight.axis == -2 else -2]

    def place(plane: jax.Array) -> jax.Array:
        plane_XM = plane if weight.axis == -2 else jnp.swapaxes(plane, -1, -2)
        # A scale per tensor becomes a scale per output.
        return jnp.broadcast_to(plane_XM, (*plane_XM.shape[:-1], outputs))

    # The unit would not apply to an offset.
    scale, unit = units_of(weight.scale) if weight.offset is None else (weight.scale, None)
    levels: dict[str, Any] = {
        name: dequantize(plane) if isinstance(plane, QTensor) else plane
        for name, plane in (("scale", scale), ("offset", weight.offset))
    }
    columns = jax.tree.map(place, dataclasses.replace(weight, **levels))
    unit = None if unit is None else place(unit.astype(jnp.float32))
    return GpuWeight(dataclasses.replace(columns, axis=-2), unit, axis=weight.axis)


def restore(weight: GpuWeight) -> QTensor:
    """Undoes `layout`, for one layer if `layer` is given; the result has one level of scales."""
    columns, unit = weight.sliced().columns, weight.sliced().unit
    if unit is not None:
        columns = dataclasses.replace(columns, scale=scale_values(columns.scale, columns.scheme) * unit)
    if weight.axis == -2:
        return columns
    return dataclasses.replace(jax.tree.map(lambda plane: jnp.swapaxes(plane, -1, -2), columns), axis=-1)


def rows(table: GpuWeight, row_n: jax.Array) -> jax.Array:
    """Returns rows of a table [M, K] (`axis=-1`): int [n], each in [0, M) -> float32 [n, K]."""
    pick = functools.partial(jnp.take, indices=row_n, axis=-1, mode="clip")
    values_Kn = dequantize(jax.tree.map(pick, table.columns))
    return (values_Kn if table.unit is None else values_Kn * pick(table.unit)).T


def uses_kernel(weight: GpuWeight, rows: int) -> bool:
    """Whether `matmul` uses the kernel rather than XLA, for `rows` rows.

    Triton's blocks are powers of two, so outputs and the bytes of a group must be multiples of 16.
    """
    length, outputs = weight.columns.shape[-2:]
    group_bytes = weight.group_size * weight.scheme.bits // 8
    return 1 <= rows <= MAX_KERNEL_ROWS and outputs % _BLOCKS[-1] == 0 and group_bytes % _STEPS[-1] == 0


def matmul(x_RK: jax.Array, weight: GpuWeight, *, interpret: bool = False) -> jax.Array:
    """Multiplies rows of activations with a weight, or with one layer of a stack.

    Args:
        x_RK: float.
        weight: [K, M] or [M, K], by its `axis`.
        interpret: run the kernel in Pallas' interpreter, on any backend.

    Returns:
        float32 [R, M]. Up to `MAX_KERNEL_ROWS` rows only sums and scalings are rounded, in float32: the error is at
        most (K + 16) * 2**-23 * sum over k of |x_k| * W, where W is the scale times the largest that a code's value,
        the zero point, or the offset over the scale can be in k's group. With more rows, weights are rounded to the
        dtype of the activations: 2**-9 * sum(|x| * |w|) in bfloat16, 2**-12 in float16.
    """
    if weight.unit is not None:
        unit = (
            weight.unit if weight.layer is None else jax.lax.dynamic_index_in_dim(weight.unit, weight.layer, 0, False)
        )
        return matmul(x_RK, dataclasses.replace(weight, unit=None), interpret=interpret) * unit
    if uses_kernel(weight, x_RK.shape[0]):
        return _matmul_kernel(x_RK, weight, interpret)
    precision = jax.lax.Precision.HIGHEST if x_RK.dtype == jnp.float32 else None
    weight_KM = dequantize(weight.sliced().columns, x_RK.dtype)
    return jnp.dot(x_RK, weight_KM, precision=precision, preferred_element_type=jnp.float32)


def _first_divisor(sizes: tuple[int, ...], length: int) -> int:
    return next(size for size in sizes if length % size == 0)


def _parts(iterations: int, wanted: int) -> int:
    """Returns the number of equal parts of K: the smallest divisor of `iterations` that is at least `wanted`, or all.

    For K = 5632 and 2048 outputs that is 44 rather than 8, the greatest power of two: a step of the 1.1B shape takes
    1.97 ms instead of 2.28 ms.
    """
    divisors = (parts for parts in range(1, iterations + 1) if iterations % parts == 0)
    return next((parts for parts in divisors if parts >= wanted), iterations)


def _matmul_kernel(x_RK: jax.Array, weight: GpuWeight, interpret: bool) -> jax.Array:
    """Runs a kernel over a grid of (blocks of outputs, parts of K), and sums over the parts."""
    columns, layer = weight.columns, weight.layer
    if layer is None:
        columns, layer = jax.tree.map(lambda plane: plane[None], columns), jnp.zeros((), jnp.int32)
    R, outputs = x_RK.shape[0], columns.shape[-1]
    group_bytes = columns.group_size * columns.scheme.bits // 8
    width, step = _first_divisor(_BLOCKS, outputs), _first_divisor(_STEPS, group_bytes)
    steps = columns.planes[0].shape[-2] // step
    together = math.gcd(steps, _ROWS_IN_FLIGHT // step)
    parts = _parts(steps // together, pl.cdiv(_PROGRAMS * width, outputs))
    padded_RK = jnp.pad(x_RK, ((0, MAX_KERNEL_ROWS - R), (0, 0)))
    corrections = [plane for plane in (columns.zero, columns.offset) if plane is not None]
    kernel = functools.partial(
        _kernel,
        scheme=columns.scheme,
        has_zero=columns.zero is not None,
        width=width,
        step=step,
        together=together,
        iterations=steps // together // parts,
    )
    product_PRM = pl.pallas_call(
        kernel,
        grid=(outputs // width, parts),
        out_shape=jax.ShapeDtypeStruct((parts, R, outputs), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(layer.astype(jnp.int32).reshape(1), padded_RK, columns.planes[0], columns.scale, *corrections)
    return jnp.sum(product_PRM, axis=0)


def _kernel(
    layer_ref,
    x_ref,
    bytes_ref,
    scale_ref,
    *rest,
    scheme: Scheme,
    has_zero: bool,
    width: int,
    step: int,
    together: int,
    iterations: int,
) -> None:
    """Computes the product of one block of outputs and one part of K.

    Args:
        layer_ref: int32 [1].
        x_ref: [MAX_KERNEL_ROWS, K].
        bytes_ref: uint8 [L, K * bits / 8, M].
        scale_ref: [L, C, M].
        *rest: zero_ref and offset_ref, of scale_ref's shape, if they exist; out_ref, float32 [parts, R, M].
        scheme: scheme of the codes.
        has_zero: whether the first of `rest` is zero_ref.
        width: outputs of the block.
        step: byte rows that are multiplied at a time, all of one group.
        together: steps of an iteration, whose loads do not wait for one another.
        iterations: number of iterations of a part.
    """
    *correction_refs, out_ref = rest
    bits, slots, layer = scheme.bits, 8 // scheme.bits, layer_ref[0]
    group_size = x_ref.shape[1] // scale_ref.shape[1]
    group_bytes = group_size // slots
    tile = (x_ref.shape[0], width)
    outputs, part = pl.ds(pl.program_id(0) * width, width), pl.program_id(1)

    def one(row, bytes_SW):
        group = row // group_bytes
        element = group * group_size + row % group_bytes
        product_RW, sum_R1 = jnp.zeros(tile, jnp.float32), jnp.zeros((tile[0], 1), jnp.float32)
        for slot in range(slots):
            x_RS = x_ref[:, pl.ds(element + slot * group_bytes, step)]
            value_SW = ((bytes_SW >> (slot * bits)) & (2**bits - 1)) - scheme.bias
            precision = jax.lax.Precision.HIGHEST if x_RS.dtype == jnp.float32 else None
            value_SW = value_SW.astype(x_RS.dtype)
            product_RW += jnp.dot(x_RS, value_SW, precision=precision, preferred_element_type=jnp.float32)
            sum_R1 += jnp.sum(x_RS.astype(jnp.float32), axis=1, keepdims=True)
        corrections = [ref[layer, group, outputs].astype(jnp.float32)[None] for ref in correction_refs]
        if has_zero:
            product_RW -= sum_R1 * corrections.pop(0)
        product_RW *= scale_ref[layer, group, outputs].astype(jnp.float32)[None]
        for offset_1W in corrections:
            product_RW += sum_R1 * offset_1W
        return product_RW

    def iteration(number, total_RW):
        first = (part * iterations + number) * together * step
        rows = [first + i * step for i in range(together)]
        loaded = [bytes_ref[layer, pl.ds(row, step), outputs].astype(jnp.int32) for row in rows]
        return sum((one(row, bytes_SW) for row, bytes_SW in zip(rows, loaded, strict=True)), total_RW)

    total_RW = jax.lax.fori_loop(0, iterations, iteration, jnp.zeros(tile, jnp.float32))
    # Indices instead of a slice, which may not exceed the rows of the output: the mask leaves out rows beyond them.
    row_R1 = jnp.arange(tile[0])[:, None]
    column_1W = pl.program_id(0) * width + jnp.arange(width)[None]
    place = (part, *jnp.broadcast_arrays(row_R1, column_1W))
    plgpu.store(out_ref.at[place], total_RW, mask=row_R1 < out_ref.shape[1])
