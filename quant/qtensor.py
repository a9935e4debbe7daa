"""`QTensor`: the quantized weight, a pytree that replaces a weight array.

Dimension key: `K` contraction axis, `M` outputs, `C` groups along K, `g` = K / C elements of a group, `r` outlier
channels. Shapes are written for `axis=-2`, a weight [..., K, M]; a table of embeddings is [..., M, K], `axis=-1`, and
everything else holds.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, Literal, Union

import jax
import jax.numpy as jnp
import numpy as np

from quant.activations import check_activations
from quant.packing import (
    axis_position,
    check_group,
    check_planes,
    merge_groups,
    pack,
    plane_bits,
    split_groups,
    unpack,
    unpack_runs,
)
from quant.scheme import Scheme, e4m3_values, exponent_values
from quant.weight import Weight, flat_stack, rounded

SCALE_DTYPES = ("float32", "bfloat16", "float16")

# A plane of numbers per group: an array, or quantized itself (two levels of scales).
Plane = Union[jax.Array, "QTensor"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["planes", "scale", "zero", "offset", "order", "outlier", "outlier_index"],
    meta_fields=["scheme", "axis", "dtype", "activations"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class QTensor(Weight):
    """A weight [..., K, M] (`axis=-2`) or [..., M, K] (`axis=-1`) in packed codes, with scales per group along K.

    For k in group c, and value(code) by the scheme:

        w[k, m] = (value(code[k, m]) - zero[c, m]) * scale[c, m] + offset[c, m]

    in float32, evaluated from the left. `zero` and `offset` may be None. A few channels k may be kept as floats beside
    the codes: w[outlier_index[i], m] = outlier[i, m], whatever the codes there stand for. FORMAT.md specifies the
    arrays' bytes.

    `validate` checks the invariants. The constructor checks nothing, because jax rebuilds trees with abstract values,
    booleans or None for leaves. Every array has the rank and axis order of the weight, so that scan and vmap slice all
    of them, and one PartitionSpec shards them all (axes of size 1 are replicated, and so are the r outlier channels
    where the mesh does not divide them). The group size, the shape and the set of optional parts follow from the arrays
    and are stored nowhere else.

    Attributes:
        planes: uint8 [..., K * p / 8, M] for each bit plane of p bits.
        scale: float32, bfloat16 or float16 [..., C, M], or [..., 1, 1] for a scale per tensor. C = 1 is a scale per
            channel. mxfp4 has uint8 scales, which stand for 2**(scale - 127), 255 for NaN; nvfp4 has uint8 scales in
            UE4M3, or floats. A QTensor of that shape makes two levels of scales.
        zero: uint8 or float of scale's shape; `uint` schemes only.
        offset: float array or QTensor of scale's shape; `uint` schemes only.
        order: int32 [..., K, 1] ([..., 1, K] with axis -1), a permutation: stored position i holds index order[i] of
            the contraction axis. Groups consist of stored positions. Act-order GPTQ needs it: its groups are scattered.
        outlier: float32, bfloat16 or float16 [..., r, M] ([..., M, r] with axis -1), 1 <= r <= K; `split_outliers`.
        outlier_index: int32 [..., r, 1] ([..., 1, r] with axis -1), distinct indices of the contraction axis, whose
            weights `outlier` holds. Both are given or neither.
        scheme: what a code stands for.
        axis: -2 or -1, the contraction axis of the weight.
        dtype: dtype of the weight that this QTensor replaces.
        activations: how activations are rounded before `product` multiplies them with this weight: None, not at all;
            "bfloat16"; "int8-token", to int8 with one scale for each vector along the contraction axis; "int8-group",
            to int8 with one scale for each group of this weight. Outlier channels are not rounded to int8 and do not
            affect the scales.
    """

    planes: tuple[jax.Array, ...]
    scale: Plane
    zero: jax.Array | None = None
    offset: Plane | None = None
    order: jax.Array | None = None
    outlier: jax.Array | None = None
    outlier_index: jax.Array | None = None
    _: dataclasses.KW_ONLY
    scheme: Scheme
    axis: int = -2
    dtype: np.dtype = np.dtype("float32")
    activations: str | None = None

    @classmethod
    def from_codes(
        cls,
        codes: jax.Array,
        scale: Plane,
        scheme: Scheme,
        *,
        zero: jax.Array | None = None,
        offset: Plane | None = None,
        order: jax.Array | None = None,
        outlier: jax.Array | None = None,
        outlier_index: jax.Array | None = None,
        axis: int = -2,
        dtype: jax.typing.DTypeLike = jnp.float32,
        activations: str | None = None,
    ) -> "QTensor":
        """Packs uint8 codes [..., K, M] and validates the result; the other arguments are those of the class.

        Raises:
            ValueError: if an invariant does not hold.
        """
        groups = scale.shape[axis_position(scale.shape, axis)]
        group_size = _group_size(codes.shape[axis_position(codes.shape, axis)], groups)
        planes = pack(codes, scheme.bits, group_size, axis=axis)
        parts = (planes, scale, zero, offset, order, outlier, outlier_index)
        return cls(*parts, scheme=scheme, axis=axis, dtype=np.dtype(dtype), activations=activations).validate()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        shape = list(self.planes[0].shape)
        shape[self.axis] = shape[self.axis] * 8 // plane_bits(self.scheme.bits)[0]
        return tuple(shape)

    @property
    def group_size(self) -> int:
        """Weights along the contraction axis that share a scale."""
        return _group_size(self.shape[self.axis], self.scale.shape[self.axis])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, on a device and in a file."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, counting all arrays: codes, scales and the rest."""
        return 8 * self.nbytes / self.size

    def __getitem__(self, index: Any) -> "QTensor":
        """Indexes or slices leading axes (layers, experts); the last two axes cannot be indexed.

        Raises:
            IndexError: for a static index that is out of range, or too many of them.
        """
        indices = index if isinstance(index, tuple) else (index,)
        if len(indices) > self.ndim - 2:
            raise IndexError(f"{len(indices)} indices: shape {self.shape} has {self.ndim - 2} leading axes to index")
        for i, length in zip(indices, self.shape, strict=False):
            # jax would clamp the index. This error is also what ends `for layer in qtensor`.
            if isinstance(i, (int, np.integer)) and not -length <= i < length:
                raise IndexError(f"index {i} is out of range for an axis of {length}, of shape {self.shape}")
            if i is None or i is Ellipsis:
                raise IndexError(f"index {i}: expected integers, arrays or slices, one for each leading axis")
        return jax.tree.map(operator.itemgetter(index), self)

    def along(self, axis: int) -> "QTensor":
        """Returns the same arrays, of both levels, with another contraction axis."""
        scale = self.scale.along(axis) if isinstance(self.scale, QTensor) else self.scale
        offset = self.offset.along(axis) if isinstance(self.offset, QTensor) else self.offset
        return dataclasses.replace(self, scale=scale, offset=offset, axis=axis)

    def matrix(self, index: jax.Array | int) -> "QTensor":
        """See `Weight.matrix`; the result is a slice."""
        at = jnp.asarray(index, jnp.int32)
        take = lambda array: jax.lax.dynamic_index_in_dim(array, at, keepdims=False)  # noqa: E731
        return jax.tree.map(take, flat_stack(self, self.ndim - 2))

    def multiply(self, x: jax.Array) -> jax.Array:
        """See `Weight.multiply`. This is the reference: it dequantizes, then contracts, both in float32.

        The weight is not rounded to the activations' dtype, so that the reference for other lowerings has no error but
        the quantizer's. int8 activations are rounded and then multiplied as floats: the result equals that of integer
        products up to the rounding of sums.
        """
        outlier_K = None
        if self.outlier_index is not None:
            outlier_K = outlier_slots(self.outlier_index, self.shape[self.axis], self.axis).reshape(-1) >= 0
        x = rounded(x, self, outlier_K).astype(jnp.float32)
        equation = "...K,KM->...M" if self.axis == -2 else "...K,MK->...M"
        return jnp.einsum(equation, x, dequantize(self), precision=jax.lax.Precision.HIGHEST)

    def rows(self, row_n: jax.Array) -> jax.Array:
        """See `Weight.rows`."""
        height = self.shape[0]

        def pick(plane: jax.Array) -> jax.Array:
            # A plane shared by all rows (a scale per tensor, the order) has height 1 and broadcasts.
            return jnp.take(plane, row_n, axis=0, mode="clip") if plane.shape[0] == height else plane

        return dequantize(jax.tree.map(pick, self))

    def values(self) -> jax.Array:
        """See `Weight.values`; calls `dequantize`."""
        return dequantize(self)

    def take(self, number: int) -> "QTensor":
        """See `Weight.take`."""
        return self[number]

    def split(self) -> tuple["QTensor", Callable[[Any, jax.Array], Any]]:
        """See `Weight.split`; a scan slices all arrays."""
        return self, lambda part, place: part

    def validate(self) -> "QTensor":
        """Checks every invariant that shapes and dtypes show, and returns the tensor itself. Leaves may be abstract.

        Raises:
            ValueError: if one does not hold; the message names the part, its value and the expected value.
        """
        check_planes(self.planes, self.scheme.bits, self.axis)
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype {self.dtype}: expected a float type, that of the weight before quantization")
        *lead, rows, columns = self.shape
        length, outputs = (rows, columns) if self.axis == -2 else (columns, rows)
        per_group = (*lead, "C", outputs) if self.axis == -2 else (*lead, outputs, "C")
        shape = self.scale.shape
        matches = len(shape) == self.ndim and all(n in ("C", m) for n, m in zip(per_group, shape, strict=True))
        if not matches and shape != (*lead, 1, 1):
            raise ValueError(
                f"scale plane of shape {shape}: expected {per_group} with C groups, or {(*lead, 1, 1)}, "
                f"for a weight of shape {self.shape} with contraction axis {self.axis}"
            )
        check_group(length, self.group_size, self.scheme.bits)
        self._check_plane("scale", self.scale, shape, _scale_dtypes(self.scheme))
        for name, plane in (("zero", self.zero), ("offset", self.offset)):
            if plane is not None and self.scheme.kind != "uint":
                raise ValueError(f"{name} plane beside {self.scheme.name} codes: only uint codes have one")
        self._check_plane("zero", self.zero, shape, ("uint8", *SCALE_DTYPES))
        self._check_plane("offset", self.offset, shape, SCALE_DTYPES)
        order_shape = (*lead, length, 1) if self.axis == -2 else (*lead, 1, length)
        self._check_plane("order", self.order, order_shape, ("int32",))
        self._check_outliers(lead, length, outputs)
        check_activations(self.activations, self.order is not None)
        return self

    def _check_outliers(self, lead: list[int], length: int, outputs: int) -> None:
        """Checks the outlier planes against the weight and each other."""
        if self.outlier is None or self.outlier_index is None:
            if self.outlier is not self.outlier_index:
                raise ValueError("one of outlier and outlier_index is None: expected both or neither")
            return
        count = self.outlier.shape[axis_position(self.outlier.shape, self.axis)]
        if not 1 <= count <= length:
            raise ValueError(f"{count} outlier channels: expected 1 to {length}, or None for both planes")
        shapes = [(*lead, count, outputs), (*lead, count, 1)]
        if self.axis == -1:
            shapes = [(*lead, outputs, count), (*lead, 1, count)]
        self._check_plane("outlier", self.outlier, shapes[0], SCALE_DTYPES)
        self._check_plane("outlier_index", self.outlier_index, shapes[1], ("int32",))

    def _check_plane(self, name: str, plane: Plane | None, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        """Checks shape and dtype of one part, or the invariants of a second level; None is valid."""
        if plane is None:
            return
        if plane.shape != shape:
            raise ValueError(f"{name} plane of shape {plane.shape}: expected {shape}")
        if isinstance(plane, QTensor):
            if name not in ("scale", "offset"):
                raise ValueError(f"{name} plane is a QTensor: only scale and offset may have a second level")
            if plane.axis != self.axis:
                raise ValueError(f"{name} plane with contraction axis {plane.axis}: expected {self.axis}, the weight's")
            plane.validate()
        elif plane.dtype.name not in dtypes:
            raise ValueError(f"{name} plane of dtype {plane.dtype}: expected {' or '.join(dtypes)}")


@functools.partial(jax.jit, static_argnames=("dtype", "arithmetic"), inline=True)
def dequantize(
    qtensor: QTensor,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    arithmetic: Literal["integer", "float"] = "integer",
) -> jax.Array:
    """Returns the weight's values by the formula of `QTensor`: computed in float32, then rounded to `dtype`.

    `arithmetic` has the meaning that it has in `unpack`.

    The result is differentiable with respect to float scales, zero points, offsets and outliers. A compiled program may
    round the product with the scale and the sum with `offset` once instead of twice. For ggml's types that changes
    nothing: their products are exact.
    """
    axis = qtensor.axis
    codes_KM = unpack(qtensor.planes, qtensor.scheme.bits, qtensor.group_size, axis=axis, arithmetic=arithmetic)
    weight_CgM = _values(split_groups(codes_KM, qtensor.group_size, axis), qtensor, arithmetic)
    weight_KM = merge_groups(weight_CgM, axis)
    if qtensor.order is not None:
        weight_KM = jnp.take_along_axis(weight_KM, jnp.argsort(qtensor.order, axis=axis), axis=axis)
    if qtensor.outlier is not None and qtensor.outlier_index is not None:
        slot_K1 = outlier_slots(qtensor.outlier_index, weight_KM.shape[axis], axis)
        # Slot -1 fetches some outlier too, and is not selected.
        outlier_KM = jnp.take_along_axis(qtensor.outlier.astype(jnp.float32), slot_K1, axis=axis, mode="clip")
        weight_KM = jnp.where(slot_K1 >= 0, outlier_KM, weight_KM)
    return weight_KM.astype(dtype)


def dequantize_runs(qtensor: QTensor, *, arithmetic: Literal["integer", "float"] = "integer") -> list[jax.Array]:
    """Dequantizes in float32 to the runs of `unpack_runs`, for a product that sums over one run after another.

    Raises:
        ValueError: for a weight with outlier channels or an `order`.
    """
    if qtensor.order is not None or qtensor.outlier is not None:
        raise ValueError("a weight with outlier channels or an order: expected one without either; use `dequantize`")
    codes = unpack_runs(
        qtensor.planes, qtensor.scheme.bits, qtensor.group_size, axis=qtensor.axis, arithmetic=arithmetic
    )
    return [_values(codes_CnM, qtensor, arithmetic) for codes_CnM in codes]


def _values(codes_CnM: jax.Array, qtensor: QTensor, arithmetic: Literal["integer", "float"]) -> jax.Array:
    """Returns the float32 values of codes [..., C, n, M], by the formula of `QTensor`."""
    per_group = lambda plane: jnp.expand_dims(plane, qtensor.axis)  # noqa: E731
    weight_CnM = qtensor.scheme.decode(codes_CnM)
    if qtensor.zero is not None:
        weight_CnM = weight_CnM - per_group(_float32(qtensor.zero))
    weight_CnM = weight_CnM * per_group(scale_values(qtensor.scale, qtensor.scheme, arithmetic=arithmetic))
    if qtensor.offset is not None:
        weight_CnM = weight_CnM + per_group(_float32(qtensor.offset, arithmetic))
    return weight_CnM


def outlier_slots(outlier_index: jax.Array, length: int, axis: int) -> jax.Array:
    """Returns each channel's position among the outliers, or -1: int32 [..., r, 1] -> [..., K, 1], K = `length`.

    It compares all K channels with all r outliers. A scatter is avoided because some runtimes of exported programs lack
    it or copy arrays for it. XLA fuses the lookup and the selection of outliers into the rest of `dequantize`: with 32
    of 2048 channels, axis -2, on a CPU, it is no slower than without outliers, where a product with a one-hot matrix
    takes 3 times as long.
    """
    count = outlier_index.shape[axis]
    channel_K11 = jnp.arange(length, dtype=jnp.int32).reshape(length, *(1,) * -axis)
    slot_r1 = jnp.arange(count, dtype=jnp.int32).reshape(count, *(1,) * (-1 - axis))
    match_Kr1 = jnp.expand_dims(outlier_index, axis - 1) == channel_K11
    return jnp.max(jnp.where(match_Kr1, slot_r1, -1), axis=axis)


def scale_values(scale: Plane, scheme: Scheme, *, arithmetic: Literal["integer", "float"] = "integer") -> jax.Array:
    """Returns scales as float32 of the plane's shape: from floats, from bytes (mxfp4, nvfp4) or from two levels."""
    if scheme.scale_code and not isinstance(scale, QTensor) and scale.dtype == jnp.uint8:
        return (exponent_values if scheme.scale_code == "e8m0" else e4m3_values)(scale)
    return _float32(scale, arithmetic)


def is_under_units(scale: Plane) -> bool:
    """Whether scales have two levels: signed integer codes times one float per output (the unit)."""
    if not isinstance(scale, QTensor) or scale.scheme.kind != "int" or isinstance(scale.scale, QTensor):
        return False
    return scale.scale.shape[scale.axis] == 1 and scale.order is None and scale.outlier is None


def units_of(scale: Plane) -> tuple[Plane, jax.Array | None]:
    """Returns integer scales (int8 of the plane's shape) and their units if `is_under_units`, else (scale, None)."""
    if not isinstance(scale, QTensor) or not is_under_units(scale):
        return scale, None
    assert not isinstance(scale.scale, QTensor)
    codes = unpack(scale.planes, scale.scheme.bits, scale.group_size, axis=scale.axis)
    return (codes.astype(jnp.int32) - scale.scheme.bias).astype(jnp.int8), scale.scale


def has_nan_scales(weight: Any) -> bool:
    """Whether a one-byte scale (mxfp4, nvfp4) is 255, which stands for NaN; float scales are not checked."""
    if not isinstance(weight, QTensor) or weight.scheme.scale_code is None or isinstance(weight.scale, QTensor):
        return False
    return weight.scale.dtype == jnp.uint8 and bool((weight.scale == 255).any())


def _scale_dtypes(scheme: Scheme) -> tuple[str, ...]:
    """Returns the dtypes that a plane of scales may have."""
    return {"mxfp4": ("uint8",), "nvfp4": ("uint8", *SCALE_DTYPES)}.get(scheme.kind, SCALE_DTYPES)


def _float32(plane: Plane, arithmetic: Literal["integer", "float"] = "integer") -> jax.Array:
    """Returns a plane of floats, of integers or of two levels as float32."""
    return dequantize(plane, arithmetic=arithmetic) if isinstance(plane, QTensor) else plane.astype(jnp.float32)


def _group_size(length: int, count: int) -> int:
    """K and C -> g."""
    if count < 1 or length % count:
        raise ValueError(f"{count} groups do not divide a contraction axis of {length}: expected whole groups")
    return length // count
