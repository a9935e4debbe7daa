"""Weights for ONNX: the data file that all graphs share, and packed weights as 4-bit codes."""

import dataclasses
import functools
import json

import numpy as np
from onnx import TensorProto, helper
from onnx_graph import element_of, shape_of
from onnx_packed import PackedWeight, bits_of, digits_of, nibbles, raw_digits, values_of

WEIGHTS_FILE = "weights.bin"
# Large arrays begin at whole pages, so that ONNX runtimes can map them. For small arrays this would be mostly padding.
_PAGE, _LARGE = 4096, 1 << 16
_SAFETENSORS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8", "I32": "int32", "U32": "uint32"}


class Weights:
    """The external data file that all graphs share: each array is written when a graph first asks for it."""

    def __init__(self, bundle, manifest, file):
        """Opens the bundle's weights."""
        arrays = _tensors(bundle / "weights.safetensors")
        self.arrays = {weight["name"]: arrays[weight["name"]] for weight in manifest["weights"]}
        self._file, self._written = file, {}

    def tensor(self, name, make):
        """The initializer of that name; the first call writes its data, `make()`, to the file."""
        if name not in self._written:
            array = np.ascontiguousarray(make())
            if array.dtype.name == "bfloat16":
                array = array.astype(np.float32)
            alignment = _PAGE if array.nbytes >= _LARGE else 64
            self._file.write(bytes(-self._file.tell() % alignment))
            tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
            tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
            place = {"location": WEIGHTS_FILE, "offset": self._file.tell(), "length": array.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            self._file.write(array.tobytes())
            self._written[name] = tensor
        return self._written[name]


def _tensors(path):
    """The arrays of a safetensors file, mapped into memory."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data, arrays = np.memmap(path, np.uint8, "r", offset=8 + length), {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            arrays[name] = data[first:last].view(np.dtype(_SAFETENSORS[entry["dtype"]])).reshape(entry["shape"])
    return arrays


@dataclasses.dataclass(frozen=True)
class FourBits:
    """A weight [K, M] in 4-bit codes, as names of arrays in the data file.

    Attributes:
        parts: tuples (codes [M, blocks, block / 2], zero points [M, blocks / 2] or "" for 8, factor). The weight is the
            sum over parts of (code - zero point) * factor, times the scale, plus the offset.
        scales: float32 [M, blocks].
        offsets: float32 [C, M], or "".
        group: g = K / C.
    """

    parts: list
    scales: str
    offsets: str
    group: int


def as_four_bits(graph, scheme, group, axis, of_planes, names):
    """Converts a packed weight to 4-bit codes; returns None if that is not possible without loss.

    Values of more than 4 bits become two 4-bit digits: the product is 16 times that of the high digits plus that of the
    low ones. ONNX Runtime has fast kernels only for 4 bits. Two levels of scales become one.

    Args:
        graph: the graph that multiplies with the weight.
        scheme: the scheme of the codes.
        group: g, elements that share a scale.
        axis: 2 for a weight [K, M], 1 for [M, K].
        of_planes: the schemes of "scale" and "offset", for those that are quantized too.
        names: the names of the weight's arrays.

    Returns:
        `FourBits`, or None.
    """
    arrays, prefix = graph.weights.arrays, names[0].removesuffix(".planes.0")
    given = {name.removeprefix(f"{prefix}."): arrays[name] for name in names if name in arrays}
    if len(given) < len(names) or not PackedWeight.known(given):
        return None
    weight = PackedWeight(given, scheme, group, axis, of_planes)
    (K, M), zero = weight.shape, weight.zero
    block = min(group & -group, 256)  # the largest power of 2 in a group: MatMulNBits takes 16 to 256
    if group == K <= 256 and block < 16:
        block = max(16, 1 << (K - 1).bit_length())  # a single group, in a block that is padded
    if block < 16:
        return None
    blocks = -(-K // block)
    values, unit = values_of(scheme)
    # Zero points that do not fit in codes, such as floats, become a part of the offsets.
    stored = zero is not None and zero.dtype == np.uint8 and (len(values) > 16 or int(np.max(zero)) <= 15)
    shift, digits = (0, raw_digits(bits_of(scheme))) if stored else digits_of(values)

    def for_blocks(array):
        array = np.broadcast_to(array, (K // group, M))
        return np.repeat(array, max(1, group // block), axis=0).T

    def make_codes(table):
        codes = np.pad(weight.codes(), ((0, blocks * block - K), (0, 0)))
        return nibbles(table[codes.T.reshape(M, blocks, block)])

    def make_zeros(factor):
        zeros = for_blocks(zero // np.uint8(factor) if stored else np.zeros((1, 1), np.uint8))
        return nibbles(np.pad(zeros, ((0, 0), (0, blocks % 2))))

    def make_offsets():
        moved = shift * unit - (0.0 if stored or zero is None else zero.astype(np.float64))
        return ((weight.offset() if weight.has_offset else 0) + moved * weight.scale()).astype(np.float32)

    parts = []
    for factor, table, at_zero in digits:
        label = {16: ".high", 1: ".low"}[factor] if len(digits) > 1 else ""
        codes = graph.repacked(f"{prefix}.codes{label}", functools.partial(make_codes, table))
        zeros = "" if at_zero == 8 else f"{prefix}.zeros{label}"
        if zeros:
            graph.repacked(zeros, functools.partial(make_zeros, factor))
        parts.append((codes, zeros, float(factor)))
    scales = graph.repacked(f"{prefix}.scales", lambda: for_blocks(weight.scale() * np.float32(unit)))
    needed = weight.has_offset or shift or (zero is not None and not stored)
    return FourBits(parts, scales, graph.repacked(f"{prefix}.offsets", make_offsets) if needed else "", group)


def matmul(graph, operation, names, weight):
    """Adds the product of activations and a `FourBits`; offsets are multiplied with the activations' sums per group."""
    x, result = operation.operands[0], operation.results[0]
    name = graph.whole(names[0], shape_of(x))
    (R, K), (_, M), (_, _, half) = shape_of(x), shape_of(result), graph.shapes[weight.parts[0][0]]
    # Accuracy level 1: activations stay float32; by default they may be rounded to 8 bits.
    options = {"K": K, "N": M, "bits": 4, "block_size": 2 * half, "accuracy_level": 1, "domain": "com.microsoft"}
    products = []
    for codes, zeros, factor in weight.parts:
        inputs = [name, codes, weight.scales, zeros] if zeros else [name, codes, weight.scales]
        products.append(_scaled(graph, graph.add("MatMulNBits", inputs, shape_of(result), **options), factor))
    if weight.offsets:
        C, axes = K // weight.group, graph.constant(np.array([2], np.int64))
        sums = graph.add("ReduceSum", [graph.reshape(name, (R, C, weight.group)), axes], (R, C), keepdims=0)
        products.append(graph.add("MatMul", [sums, weight.offsets], (R, M)))
    return functools.reduce(functools.partial(graph.elementwise, "Add"), products)


def take_rows(graph, operation, names, weight):
    """Adds the lookup of rows of a table: packed rows are gathered, then dequantized."""
    (rows, K), (height, blocks) = shape_of(operation.results[0]), graph.shapes[weight.scales]
    index = graph.between(graph.whole(names[-1], (rows,)), height - 1, np.int32)

    def gathered(name):
        return graph.add("Gather", [name, index], (rows, *graph.shapes[name][1:]), axis=0)

    def numbers(name):
        packed, shape = gathered(name), (rows, *graph.shapes[name][1:])
        low = graph.elementwise("BitwiseAnd", packed, graph.constant(np.uint8(15)))
        high = graph.add("BitShift", [packed, graph.constant(np.uint8(4))], shape, direction="RIGHT")
        pair = graph.add("Concat", [graph.reshape(part, (*shape, 1)) for part in (low, high)], (*shape, 2), axis=-1)
        return graph.cast(graph.reshape(pair, (*shape[:-1], 2 * shape[-1])), "f32")

    terms = []
    for codes, zeros, factor in weight.parts:
        zero = graph.constant(np.float32(8))
        if zeros:
            zero = graph.reshape(_first(graph, numbers(zeros), (rows, blocks)), (rows, blocks, 1))
        terms.append(_scaled(graph, graph.elementwise("Sub", numbers(codes), zero), factor))
    sum_of_parts = functools.reduce(functools.partial(graph.elementwise, "Add"), terms)
    values = graph.elementwise("Mul", sum_of_parts, graph.reshape(gathered(weight.scales), (rows, blocks, 1)))
    values = _first(graph, graph.reshape(values, (rows, int(np.prod(graph.shapes[values][1:])))), (rows, K))
    if weight.offsets:
        C = K // weight.group
        offsets = graph.add("Gather", [weight.offsets, index], (C, rows), axis=1)
        grouped = graph.reshape(values, (rows, C, weight.group))
        moved = graph.elementwise("Add", grouped, graph.reshape(graph.transpose(offsets, [1, 0]), (rows, C, 1)))
        values = graph.reshape(moved, (rows, K))
    element = element_of(operation.results[0])
    return values if element == "f32" else graph.cast(values, element)


def _scaled(graph, name, factor):
    return name if factor == 1 else graph.elementwise("Mul", name, graph.constant(np.float32(factor)))


def _first(graph, name, sizes):
    """The first `sizes` elements along each axis."""
    starts = [graph.constant(np.zeros(1, np.int64))] * len(sizes)
    return name if graph.shapes[name] == sizes else graph.cut(name, starts, sizes)
