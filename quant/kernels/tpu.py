"""Products with a quantized weight on TPU: `jnp.int4` codes that XLA fuses into the product, and a Mosaic kernel.

Dimension key: `R` rows of activations, `K` contraction axis, `M` outputs, `C` groups along K, `g` elements of a group,
`L` layers of a stack.

Decoding is bound by reading weights, so the number of bytes counts. All choices here are based on XLA's cost model for
each TPU, computed ahead of time and without the hardware (benchmarks/aot_tpu.py); no time has been measured. XLA
computes `dot(x, codes * scale)` in one fusion only sometimes: for 1 row on all generations up to v6e, for 8 rows on
none if K = 14336. Otherwise it writes the dequantized matrix out, which moves 8 times the packed bytes. The kernel
dequantizes one block at a time, in VMEM: it moves 1.00 to 1.08 times the packed bytes in all cases.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from quant.kernels import Layout
from quant.packing import merge_groups, pack, split_groups, unpack
from quant.qtensor import QTensor, is_under_units, units_of
from quant.scheme import Scheme

# The kernel is used up to this many rows; more rows share the matrix that XLA writes out.
MAX_KERNEL_ROWS = 64
# Outputs of a block: the first that fits VMEM. Blocks, each in two buffers, may take _BLOCK_BYTES of the 16 MiB that v4
# and v5 give a kernel.
_BLOCKS = (256, 128)
_BLOCK_BYTES = 12 << 20
# Rows that are dequantized at a time: 1024 x 256 in float32 is 1 MiB.
_MOST_CHUNK = 1024
_LANES = 128


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "zero", "unit", "layer"],
    meta_fields=["scheme", "axis", "dtype", "activations", "kernel"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class TpuWeight(Layout):
    """A weight [..., K, M] (`axis=-2`) or [..., M, K] (`axis=-1`) in the form that a TPU multiplies with.

    w[k, m] = (codes[k, m] - zero[c, m]) * scale[c, m] * unit[m] for k in group c. Arrays are [..., K, M] whatever
    `axis` is: outputs are last, so that a scale is broadcast along sublanes, never along lanes.

    Invariants: all arrays have the same leading axes. scale and zero have one dtype: bfloat16 if that is exact, else
    float32, because no TPU computes in float16. C divides K. If there is a unit, scales are the integer codes of a
    second level, which bfloat16 represents exactly.

    Attributes:
        codes: int4, uint4, int8 or uint8 [..., K, M]: the scheme's value of each code. On the device XLA stores two
            4-bit codes in a byte.
        scale: bfloat16 or float32 [..., C, M].
        zero: [..., C, M] of scale's dtype, or None.
        unit: float32 [..., 1, M] or None: for scales in two levels, the float of each output.
        layer: int32 scalar or None. If given, the object represents one layer of the stack [L, ...] that the arrays
            hold. XLA would copy a slice before passing it to a kernel.
        scheme, axis, dtype, activations: see `QTensor`. `matmul` does not round activations.
        kernel: whether `matmul` may use the kernel. It may not over a mesh: XLA partitions products, but not kernels.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    unit: jax.Array | None = None
    layer: jax.Array | None = None
    _: dataclasses.KW_ONLY
    scheme: Scheme
    axis: int = -2
    dtype: np.dtype = np.dtype("float32")
    activations: str | None = None
    kernel: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this object represents."""
        *lead, length, outputs = self.codes.shape[0 if self.layer is None else 1 :]
        return (*lead, length, outputs) if self.axis == -2 else (*lead, outputs, length)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays on the device, where two codes of 4 bits share a byte (`codes.nbytes` says otherwise)."""
        planes = jax.tree.leaves((self.scale, self.zero, self.unit))
        return self.codes.size * self.scheme.bits // 8 + sum(plane.size * plane.dtype.itemsize for plane in planes)

    @property
    def group_size(self) -> int:
        """Weights along the contraction axis that share a scale."""
        return self.codes.shape[-2] // self.scale.shape[-2]

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
    if weight.scheme.kind not in ("int", "uint") or weight.scheme.bits not in (4, 8):
        return f"{weight.scheme.name} codes are not whole numbers of 4 or 8 bits"
    if isinstance(weight.scale, QTensor) and not is_under_units(weight.scale):
        return "its scales have two levels, with several floats per output"
    if weight.offset is not None:
        return "it has offsets instead of zero points"
    if weight.order is not None:
        return "its groups consist of reordered inputs"
    if weight.outlier is not None:
        return "it has outlier channels"
    return None


def layout(weight: QTensor, *, kernel: bool = True) -> TpuWeight:
    """Lays a weight out for TPU. Codes and values are exactly those of the QTensor.

    Args:
        weight: the weight.
        kernel: must be False if XLA is to partition products over a mesh.

    Raises:
        ValueError: for a weight for which `refusal` gives a reason.
    """
    if reason := refusal(weight):
        raise ValueError(
            f"a weight of shape {weight.shape} cannot be laid out for TPU: {reason}; multiply with the QTensor itself"
        )
    scheme = weight.scheme
    codes = unpack(weight.planes, scheme.bits, weight.group_size, axis=weight.axis)
    # A signed value is its code minus 2**(b-1): flipping the top bit gives two's complement.
    codes = jax.lax.bitcast_convert_type((codes ^ scheme.bias).astype(f"uint{scheme.bits}"), jnp.dtype(scheme.name))
    scale, unit = units_of(weight.scale)
    exact = all(plane is None or plane.dtype in (jnp.bfloat16, jnp.uint8, jnp.int8) for plane in (scale, weight.zero))

    codes = codes if weight.axis == -2 else jnp.swapaxes(codes, -1, -2)

    def place(plane: Any, dtype: jax.typing.DTypeLike = jnp.bfloat16 if exact else jnp.float32) -> jax.Array:
        plane = plane if weight.axis == -2 else jnp.swapaxes(plane, -1, -2)
        # A scale per tensor becomes a scale per output.
        plane = jnp.broadcast_to(plane, (*plane.shape[:-1], codes.shape[-1]))
        return plane.astype(dtype)

    zero = None if weight.zero is None else place(weight.zero)
    unit = None if unit is None else place(unit, jnp.float32)
    rest = {"axis": weight.axis, "dtype": weight.dtype, "activations": weight.activations}
    return TpuWeight(codes, place(scale), zero, unit, scheme=scheme, kernel=kernel, **rest)  # type: ignore[arg-type]


def uses_kernel(weight: TpuWeight, rows: int, dtype: jax.typing.DTypeLike) -> bool:
    """Whether `matmul` uses the kernel rather than XLA, for `rows` rows of `dtype`.

    float32 never uses it: an MXU needs several passes for float32, which XLA implements. float32 is for comparisons.
    """
    few = 1 <= rows <= MAX_KERNEL_ROWS and jnp.dtype(dtype) == jnp.bfloat16
    return weight.kernel and few and _chunk(weight) is not None and _block_columns(weight, rows) is not None


def _chunk(weight: TpuWeight) -> int | None:
    """Returns the rows of the weight that the kernel dequantizes at a time; None if K cannot be cut into such chunks.

    A chunk is a multiple of the lanes of activations, and consists of whole groups or is a whole part of one.
    """
    length, group_size = weight.codes.shape[-2], weight.group_size
    for chunk in range(_MOST_CHUNK, 0, -_LANES):
        if length % chunk == 0 and (chunk % group_size == 0 or group_size % chunk == 0):
            return chunk
    return None


def _block_columns(weight: TpuWeight, rows: int) -> int | None:
    """Returns the outputs of a block, or None if no block fits VMEM beside the activations."""
    length = weight.codes.shape[-2]
    per_output = weight.nbytes * length // weight.codes.size
    fitting = (columns for columns in _BLOCKS if 2 * (columns * per_output + 2 * rows * length) <= _BLOCK_BYTES)
    return next(fitting, None)


def matmul(x_RK: jax.Array, weight: TpuWeight, *, interpret: bool = False) -> jax.Array:
    """Multiplies rows of activations with a weight.

    Args:
        x_RK: bfloat16 or float32 [R, K]; float16 is multiplied as float32.
        weight: [K, M] or [M, K]; a layer of a stack comes from `at_layer` or is sliced out.
        interpret: run the kernel in Pallas' interpreter, on any backend.

    Returns:
        float32 [R, M]. With bfloat16 activations, weights are rounded to bfloat16, after the zero point and after the
        scale: the error is at most 2**-8 * sum(|x| * |w|) plus the rounding of a float32 sum. With float32 activations,
        weights and products are float32.
    """
    if x_RK.dtype != jnp.bfloat16:
        x_RK = x_RK.astype(jnp.float32)
    if weight.unit is not None:
        unit = (
            weight.unit if weight.layer is None else jax.lax.dynamic_index_in_dim(weight.unit, weight.layer, 0, False)
        )
        return matmul(x_RK, dataclasses.replace(weight, unit=None), interpret=interpret) * unit
    if uses_kernel(weight, x_RK.shape[0], x_RK.dtype):
        return _matmul_mosaic(x_RK, weight, interpret)
    precision = jax.lax.Precision.HIGHEST if x_RK.dtype == jnp.float32 else None
    weight_KM = _values(weight.sliced(), x_RK.dtype)
    return jnp.dot(x_RK, weight_KM, precision=precision, preferred_element_type=jnp.float32)


def restore(weight: TpuWeight) -> QTensor:
    """Returns the QTensor again, for uses other than products: the same codes, with one level of float scales."""
    whole, scheme = weight.sliced(), weight.scheme
    if whole.unit is not None:
        whole = dataclasses.replace(whole, scale=whole.scale.astype(jnp.float32) * whole.unit)
    codes = jax.lax.bitcast_convert_type(whole.codes, f"uint{scheme.bits}").astype(jnp.uint8) ^ scheme.bias
    arrays = [codes, whole.scale] if whole.zero is None else [codes, whole.scale, whole.zero]
    codes, scale, *zero = arrays if weight.axis == -2 else [jnp.swapaxes(array, -1, -2) for array in arrays]
    planes = pack(codes, scheme.bits, weight.group_size, axis=weight.axis)
    parts = {"scheme": scheme, "axis": weight.axis, "dtype": weight.dtype, "activations": weight.activations}
    return QTensor(planes, scale, *zero, **parts)  # type: ignore[arg-type]


def rows(table: TpuWeight, row_n: jax.Array) -> jax.Array:
    """Returns rows of a table [M, K] (`axis=-1`): int [n], each in [0, M) -> float32 [n, K]."""
    pick = functools.partial(jnp.take, indices=row_n, axis=-1, mode="clip")
    found = jax.tree.map(pick, table)
    values_Kn = _values(found, jnp.float32)
    return (values_Kn if found.unit is None else values_Kn * found.unit).T


def _values(weight: TpuWeight, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns the weight's values [..., K, M] in `dtype`, without the unit.

    For bfloat16 values, bfloat16 planes are not converted to float32: XLA would write the converted planes out and read
    them back, 0.45 times the packed bytes at g = 32. A product of 4 and 8 significant bits, rounded to 8, is the same
    either way.
    """
    wide = weight.scale.dtype if weight.scale.dtype == dtype else jnp.float32
    values_CgM = split_groups(weight.codes.astype(wide), weight.group_size, -2)
    if weight.zero is not None:
        values_CgM = values_CgM - weight.zero[..., None, :].astype(wide)
    values_CgM = values_CgM * weight.scale[..., None, :].astype(wide)
    return merge_groups(values_CgM.astype(dtype), -2)


def _matmul_mosaic(x_RK: jax.Array, weight: TpuWeight, interpret: bool) -> jax.Array:
    """Runs a kernel whose grid goes over blocks of outputs."""
    layer = weight.layer
    if layer is None:
        layer, weight = jnp.int32(0), jax.tree.map(lambda array: array[None], weight)
    (R, length), outputs = x_RK.shape, weight.codes.shape[-1]
    planes = [weight.scale] if weight.zero is None else [weight.scale, weight.zero]
    chunk, columns = _chunk(weight), _block_columns(weight, R)
    assert chunk is not None and columns is not None  # `uses_kernel` has checked this
    width = min(columns, outputs)
    # XLA cannot look into a kernel, so its cost is stated here: every block is read once.
    traffic = weight.nbytes // weight.codes.shape[0] + 2 * R * length + 4 * R * outputs
    cost = pl.CostEstimate(flops=2 * R * length * outputs, transcendentals=0, bytes_accessed=traffic)

    def block(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, width), lambda column, layer_ref: (layer_ref[0], 0, column))

    return pl.pallas_call(
        functools.partial(_kernel, chunk=chunk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(outputs, width),),
            in_specs=[
                pl.BlockSpec((R, length), lambda column, layer_ref: (0, 0)),
                block(length),
                *(block(plane.shape[-2]) for plane in planes),
            ],
            out_specs=pl.BlockSpec((R, width), lambda column, layer_ref: (0, column)),
        ),
        out_shape=jax.ShapeDtypeStruct((R, outputs), jnp.float32),
        cost_estimate=cost,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
    )(layer.reshape(1), x_RK, weight.codes, *planes)


def _kernel(layer_ref, x_ref, codes_ref, scale_ref, *rest, chunk: int) -> None:
    """Computes one block of outputs, chunk by chunk of K: dequantizes in VMEM, multiplies in the MXU.

    Args:
        layer_ref: int32 [1], read by the block specs.
        x_ref: bfloat16 [R, K].
        codes_ref: [K, columns].
        scale_ref: [C, columns].
        *rest: zero_ref [C, columns], if there are zero points, and out_ref, float32 [R, columns].
        chunk: rows of codes that are dequantized at a time.
    """
    del layer_ref
    *zero_refs, out_ref = rest
    length, columns = codes_ref.shape
    group_size = length // scale_ref.shape[0]
    total = jnp.zeros(out_ref.shape, jnp.float32)
    # The loop is unrolled: a slice at a dynamic index would have to fill whole tiles, which a chunk's groups need not.
    for start in range(0, length, chunk):
        groups = slice(start // group_size, pl.cdiv(start + chunk, group_size))
        values_CgM = codes_ref[start : start + chunk, :].astype(jnp.float32)
        values_CgM = values_CgM.reshape(-1, min(group_size, chunk), columns)
        for zero_ref in zero_refs:
            values_CgM -= zero_ref[groups, :].astype(jnp.float32)[:, None, :]
        values_CgM *= scale_ref[groups, :].astype(jnp.float32)[:, None, :]
        values_KM = values_CgM.reshape(chunk, columns).astype(jnp.bfloat16)
        total += jnp.dot(x_ref[:, start : start + chunk], values_KM, preferred_element_type=jnp.float32)
    out_ref[...] = total
