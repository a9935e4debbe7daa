"""Weights for ONNX: the data file that all graphs share, and packed ones as codes of 4 bits."""

import functools
import json

import numpy as np
from onnx import TensorProto, helper
from onnx_graph import element_of, shape_of

WEIGHTS_FILE = "weights.bin"
# ONNX wants offsets of whole pages, to map large arrays; small ones would be mostly padding.
_PAGE, _LARGE = 4096, 1 << 16
_SAFETENSORS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8", "I32": "int32", "U32": "uint32"}
# Bits of each plane, by the bits of a code.
_PLANES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 8: [8]}


class Weights:
    """The external data file that all graphs share: each array is written when a graph first asks for it."""

    def __init__(self, bundle, manifest, file):
        """Opens the bundle's weights."""
        arrays = _tensors(bundle / "weights.safetensors")
        self.arrays = {weight["name"]: arrays[weight["name"]] for weight in manifest["weights"]}
        self._file, self._written = file, {}

    def tensor(self, name, make):
        """The initializer of that name, its data, `make()`, in the file."""
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


def as_four_bits(graph, scheme, group, axis, names):
    """A packed weight [K, M] as 4-bit codes, or None where it cannot be had like that without loss.

    A code of more bits is two of 4, for which its product is 16 times that of the high ones, plus that of the low ones:
    ONNX Runtime has fast kernels for 4 bits alone.

    Returns:
        Parts, each (codes [M, blocks, block / 2], zero points [M, blocks / 2] or "" for 8, factor); scales [M, blocks].
    """
    arrays = graph.weights.arrays
    prefix = names[0].removesuffix(".planes.0")
    given = {name.removeprefix(f"{prefix}."): arrays[name] for name in names if name in arrays}
    if len(given) < len(names) or given.keys() - {"planes.0", "planes.1", "scale", "zero"}:
        return None
    if axis == 1:
        given = {part: array.T for part, array in given.items()}
    width = 2 if scheme == "ternary" else int(scheme[-1])
    planes = [given[f"planes.{i}"] for i in range(len(_PLANES[width]))]
    K, M = planes[0].shape[0] * 8 // _PLANES[width][0], planes[0].shape[1]
    block = min(group & -group, 256)  # the largest power of 2 in a group: MatMulNBits takes 16 to 256
    if group == K <= 256 and block < 16:
        block = max(16, 1 << (K - 1).bit_length())  # one group, in a block that it does not fill
    zero = given.get("zero", 0 if scheme[0] == "u" else 1 if scheme == "ternary" else 1 << (width - 1))
    # Zero points may be floats, or larger than any code.
    if block < 16 or np.asarray(zero).dtype.kind == "f" or (width <= 4 and np.max(zero) > 15):
        return None
    blocks = -(-K // block)

    def for_blocks(array):
        array = np.broadcast_to(array, (K // group, M))
        return np.repeat(array, max(1, group // block), axis=0).T

    def make_codes(shift):
        codes = np.pad(_unpacked(planes, width, group), ((0, blocks * block - K), (0, 0)))
        return _nibbles(codes.T.reshape(M, blocks, block) >> shift)

    def make_zeros(shift):
        return _nibbles(np.pad(for_blocks(np.asarray(zero, np.uint8)), ((0, 0), (0, blocks % 2))) >> shift)

    parts = []
    for label, shift in ((".high", 4), (".low", 0)) if width > 4 else (("", 0),):
        codes = graph.repacked(f"{prefix}.codes{label}", functools.partial(make_codes, np.uint8(shift)))
        zeros = "" if isinstance(zero, int) and zero >> shift & 15 == 8 else f"{prefix}.zeros{label}"
        if zeros:
            graph.repacked(zeros, functools.partial(make_zeros, np.uint8(shift)))
        parts.append((codes, zeros, float(1 << shift)))
    return parts, graph.repacked(f"{prefix}.scales", lambda: for_blocks(given["scale"]).astype(np.float32))


def _unpacked(planes, width, group):
    """Codes [K, M] of planes [K * bits / 8, M]: slot i of byte j of a group holds its element j + i * bytes."""
    parts, low = [], 0
    for plane, bits in zip(planes, _PLANES[width], strict=True):
        bytes_CnM = plane.reshape(-1, group * bits // 8, plane.shape[1])
        slots = [bytes_CnM >> np.uint8(i) & np.uint8((1 << bits) - 1) for i in range(0, 8, bits)]
        parts.append(np.concatenate(slots, axis=1).reshape(-1, plane.shape[1]) << np.uint8(low))
        low += bits
    return functools.reduce(np.bitwise_or, parts)


def _nibbles(codes):
    """The low four bits of two neighbours in a byte, the first in its low four."""
    return codes[..., 0::2] & np.uint8(15) | codes[..., 1::2] << np.uint8(4)


def matmul(graph, operation, names, parts, scales):
    """The product of activations and a weight `as_four_bits`."""
    x, result = operation.operands[0], operation.results[0]
    name = graph.whole(names[0], shape_of(x))
    (_, K), (_, M), (_, _, half) = shape_of(x), shape_of(result), graph.shapes[parts[0][0]]
    # Accuracy level 1: activations stay float32; by default they may be rounded to 8 bits.
    options = {"K": K, "N": M, "bits": 4, "block_size": 2 * half, "accuracy_level": 1, "domain": "com.microsoft"}
    products = []
    for codes, zeros, factor in parts:
        inputs = [name, codes, scales, zeros] if zeros else [name, codes, scales]
        products.append(_scaled(graph, graph.add("MatMulNBits", inputs, shape_of(result), **options), factor))
    return functools.reduce(functools.partial(graph.elementwise, "Add"), products)


def take_rows(graph, operation, names, parts, scales):
    """Rows of a table: its packed rows are gathered, then dequantized."""
    (rows, K), (height, blocks) = shape_of(operation.results[0]), graph.shapes[scales]
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
    for codes, zeros, factor in parts:
        zero = graph.constant(np.float32(8))
        if zeros:
            zero = graph.reshape(_first(graph, numbers(zeros), (rows, blocks)), (rows, blocks, 1))
        terms.append(_scaled(graph, graph.elementwise("Sub", numbers(codes), zero), factor))
    sum_of_parts = functools.reduce(functools.partial(graph.elementwise, "Add"), terms)
    values = graph.elementwise("Mul", sum_of_parts, graph.reshape(gathered(scales), (rows, blocks, 1)))
    values = _first(graph, graph.reshape(values, (rows, int(np.prod(graph.shapes[values][1:])))), (rows, K))
    element = element_of(operation.results[0])
    return values if element == "f32" else graph.cast(values, element)


def _scaled(graph, name, factor):
    return name if factor == 1 else graph.elementwise("Mul", name, graph.constant(np.float32(factor)))


def _first(graph, name, sizes):
    """The first elements along each axis."""
    starts = [graph.constant(np.zeros(1, np.int64))] * len(sizes)
    return name if graph.shapes[name] == sizes else graph.cut(name, starts, sizes)
