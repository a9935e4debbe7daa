"""Translates a bundle's StableHLO programs into ONNX, operation by operation.

    python export/targets/to_onnx.py BUNDLE FOLDER onnx

writes FOLDER/decode.onnx, prefill_16.onnx, … and, once, the weights of all of them: FOLDER/weights.bin. The bundle
must have unrolled layers. A graph's inputs and outputs are those of the program, such as `token`, `length`, `key`,
`value` and `logits`, but the state that it returns is called `key_out` and `value_out`. Programs without weights are
left out.

A product with a packed weight is a function of its own in the programs, named after its scheme. It becomes a
`MatMulNBits` (domain com.microsoft), which ONNX Runtime and OpenVINO multiply with as it is packed: codes of up to 4
bits as 4, those of more as two times 4, so that no value changes. Other schemes (nf4, mxfp4, scales of two levels,
offsets, outliers, groups of less than 16) are dequantized as the program says, at each step.

Needs jax (for MLIR), onnx and NumPy; nothing of llamajax.
"""

import functools
import importlib.metadata
import json
import re
import sys
from pathlib import Path

import numpy as np
from jax.interpreters.mlir import make_ir_context
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

OPSET = 21
WEIGHTS_FILE = "weights.bin"
# Values of more elements are not worked out here but when the graph runs.
_LARGEST_FOLDED = 1 << 16
# ONNX wants offsets of whole pages, to map large arrays; small ones would be mostly padding.
_PAGE, _LARGE = 4096, 1 << 16
_DTYPES = {
    "f32": TensorProto.FLOAT,
    "f16": TensorProto.FLOAT16,
    "bf16": TensorProto.FLOAT,
    "i1": TensorProto.BOOL,
    "i32": TensorProto.INT32,
    "i64": TensorProto.INT64,
    "ui8": TensorProto.UINT8,
    "ui32": TensorProto.UINT32,
}
_SAFETENSORS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8", "I32": "int32", "U32": "uint32"}


class Error(Exception):
    """Something that the user has to know, in one line."""


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


class Graph:
    """An ONNX graph in the making. A value is a name.

    Operators broadcast by themselves: `shapes` holds the shape that a value really has, with 1 where the program's may
    have more; `whole` gives it the latter. The same operator with the same inputs is one node; one whose inputs are all
    known is worked out here.
    """

    def __init__(self, weights):
        """An empty graph."""
        self.weights = weights
        self.shapes = {name: array.shape for name, array in weights.arrays.items()}
        self.constants, self.functions = {}, {}
        self.updates = {}  # name: (base, [(update, starts)]), an array with slices still to be written: see `settle`
        self._nodes, self._made, self._before_reshape, self._repacked = [], {}, {}, {}

    def constant(self, array):
        """A value that is known."""
        array = np.asarray(array)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._made:
            name = self._made[key] = f"constant_{len(self.constants)}"
            self.constants[name], self.shapes[name] = array, array.shape
        return self._made[key]

    def repacked(self, name, make):
        """An array that is made from the bundle's weights, once for all graphs."""
        tensor = self._repacked[name] = self.weights.tensor(name, make)
        self.shapes[name] = tuple(tensor.dims)
        return name

    def add(self, operator, inputs, shape, **attributes):
        """One node; the name of its result, which has this shape."""
        inputs = [self.settle(name) for name in inputs]
        key = (operator, *inputs, repr(attributes))
        if key not in self._made:
            name = f"{operator.lower()}_{len(self._nodes)}"
            node = helper.make_node(operator, inputs, [name], **attributes)
            if all(i in self.constants for i in inputs) and np.prod(shape, dtype=int) <= _LARGEST_FOLDED:
                made = ReferenceEvaluator(node).run(None, {i: self.constants[i] for i in inputs})
                name = self.constant(next(iter(made)))
            else:
                self._nodes.append(node)
                self.shapes[name] = tuple(shape)
            self._made[key] = name
        return self._made[key]

    def elementwise(self, operator, *inputs):
        """A node whose operator broadcasts."""
        return self.add(operator, inputs, np.broadcast_shapes(*(self.shapes[name] for name in inputs)))

    def cast(self, name, element):
        """The value in another dtype, named as in MLIR; bfloat16 is float32 that is rounded."""
        if element == "bf16":
            rounded = self.add("Cast", [name], self.shapes[name], to=TensorProto.BFLOAT16)
            return self.add("Cast", [rounded], self.shapes[name], to=TensorProto.FLOAT)
        return self.add("Cast", [name], self.shapes[name], to=_DTYPES[element])

    def reshape(self, name, shape):
        """The value in another shape; no node for a reshape of a reshape."""
        name = self.settle(name)
        name = self._before_reshape.get(name, name)
        if self.shapes[name] == tuple(shape):
            return name
        made = self.add("Reshape", [name, self.constant(np.array(shape, np.int64))], shape)
        self._before_reshape[made] = name
        return made

    def transpose(self, name, order):
        """The axes in another order."""
        shape = [self.shapes[name][axis] for axis in order]
        return name if list(order) == sorted(order) else self.add("Transpose", [name], shape, perm=list(order))

    def whole(self, name, shape):
        """The value with all elements that it has in the program."""
        if self.shapes[name] == tuple(shape):
            return name
        return self.add("Expand", [name, self.constant(np.array(shape, np.int64))], shape)

    def cut(self, name, starts, sizes):
        """A slice of these sizes. Starts are values, int64 [1]."""
        first = self.add("Concat", starts, (len(sizes),), axis=0)
        last = self.elementwise("Add", first, self.constant(np.array(sizes, np.int64)))
        return self.add("Slice", [name, first, last], sizes)

    def updated(self, base, updates):
        """An array with slices to be written into it."""
        name = f"updated_{len(self.updates)}"
        self.updates[name], self.shapes[name] = (base, updates), self.shapes[base]
        return name

    def settle(self, name):
        """Writes the slices that wait for an array to be used, all with one node.

        The keys and values of all layers are then written at the end, once: where a runtime is given the same memory
        for input and output, nothing but the new rows moves.
        """
        if name not in self.updates:
            return name
        base, updates = self.updates[name]
        shape = self.shapes[base]
        depth = max(_depth(self.shapes[update], shape) for update, _ in updates)
        places = [self._places(self.shapes[update][:depth], starts) for update, starts in updates]
        rows = [
            self.reshape(update, (*self.shapes[place][:1], *shape[depth:]))
            for (update, _), place in zip(updates, places, strict=True)
        ]
        return self.add("ScatterND", [base, self._stacked(places), self._stacked(rows)], shape)

    def _stacked(self, names):
        """Arrays behind each other."""
        total = sum(self.shapes[name][0] for name in names)
        shape = (total, *self.shapes[names[0]][1:])
        return names[0] if len(names) == 1 else self.add("Concat", names, shape, axis=0)

    def _places(self, shape, starts):
        """Where the rows of an update go: indices [rows, axes]."""
        grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, len(shape))
        places = self.constant(grid.astype(np.int64))
        for axis, start in enumerate(starts[: len(shape)]):
            step = self.constant((np.arange(len(shape)) == axis).astype(np.int64))
            places = self.elementwise("Add", places, self.elementwise("Mul", start, step))
        return places

    def starts(self, names, shape, sizes):
        """Starts of a slice, int64 [1] each, moved to where the slice fits, as StableHLO has it."""
        return [
            self.between(self.reshape(self.cast(name, "i64"), (1,)), whole - size, np.int64)
            for name, whole, size in zip(names, shape, sizes, strict=True)
        ]

    def between(self, name, most, dtype):
        """The value, at least 0 and at most `most`."""
        least = self.elementwise("Max", name, self.constant(np.zeros(1, dtype)))
        return self.elementwise("Min", least, self.constant(np.array([most], dtype)))

    def finish(self, outputs):
        """Nodes and initializers, those that the outputs need.

        Args:
            outputs: names that values get, by value.
        """
        renamed = {self.settle(name): output for name, output in outputs.items()}
        needed = set(renamed)
        nodes: list[NodeProto] = []
        for node in reversed(self._nodes):
            if node.output[0] in needed:
                needed.update(node.input)
                for names in (node.input, node.output):
                    names[:] = [renamed.get(name, name) for name in names]
                nodes.insert(0, node)
        known = [numpy_helper.from_array(array, name) for name, array in self.constants.items() if name in needed]
        arrays = [name for name in self.weights.arrays if name in needed]
        stored = [self.weights.tensor(name, lambda name=name: self.weights.arrays[name]) for name in arrays]
        return nodes, known + stored + [tensor for name, tensor in self._repacked.items() if name in needed]


def _depth(part, shape):
    """How many leading axes it takes to say where a part is: behind them, it has all of the array."""
    return max([1] + [axis + 1 for axis, (a, b) in enumerate(zip(part, shape, strict=True)) if a != b])


def _shape(value):
    return tuple(ir.RankedTensorType(value.type).shape)


def _element(value):
    return str(ir.RankedTensorType(value.type).element_type)


def _operands(graph, operation, names):
    """The operands with all their elements."""
    return [graph.whole(name, _shape(operand)) for name, operand in zip(names, operation.operands, strict=True)]


def _elementwise(operator, on_bools=None):
    """A translator for an operation that ONNX has too; another operator for booleans."""

    def translate(graph, operation, names):
        is_bool = _element(operation.operands[-1]) == "i1"
        return graph.elementwise(on_bools if is_bool and on_bools else operator, *names)

    return translate


def _shift(direction):
    def translate(graph, operation, names):
        shape = np.broadcast_shapes(*(graph.shapes[name] for name in names))
        return graph.add("BitShift", names, shape, direction=direction)

    return translate


def _constant(graph, operation, names):
    attribute = ir.DenseElementsAttr(operation.attributes["value"])
    if _element(operation.results[0]) != "bf16":
        return graph.constant(np.array(attribute))
    if not attribute.is_splat:  # MLIR's Python gives no others of this dtype
        raise Error("a constant in bfloat16 of several values: expected one")
    number = np.float32(ir.FloatAttr(attribute.get_splat_value()).value)
    return graph.reshape(graph.constant(number), [1] * len(_shape(operation.results[0])))


def _iota(graph, operation, names):
    axis, shape = operation.attributes["iota_dimension"].value, _shape(operation.results[0])
    array = np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return graph.cast(graph.constant(array), _element(operation.results[0]))


def _broadcast(graph, operation, names):
    shape = [1] * len(_shape(operation.results[0]))
    for axis, size in zip(operation.attributes["broadcast_dimensions"], graph.shapes[names[0]], strict=True):
        shape[axis] = size
    return graph.reshape(names[0], shape)


def _reshape(graph, operation, names):
    return graph.reshape(_operands(graph, operation, names)[0], _shape(operation.results[0]))


def _convert(graph, operation, names):
    before, after = _element(operation.operands[0]), _element(operation.results[0])
    return names[0] if before == after or (before, after) == ("bf16", "f32") else graph.cast(names[0], after)


def _compare(graph, operation, names):
    operators = {"LT": "Less", "LE": "LessOrEqual", "GT": "Greater", "GE": "GreaterOrEqual", "EQ": "Equal"}
    direction = stablehlo.ComparisonDirectionAttr(operation.attributes["comparison_direction"]).value
    if _element(operation.operands[0]) in ("ui8", "i1"):  # runtimes compare few dtypes
        names = [graph.cast(name, "i32") for name in names]
    if direction == "NE":
        return graph.elementwise("Not", graph.elementwise("Equal", *names))
    return graph.elementwise(operators[direction], *names)


def _rsqrt(graph, operation, names):
    return graph.elementwise("Reciprocal", graph.elementwise("Sqrt", *names))


def _reduce(graph, operation, names):
    inner = operation.regions[0].blocks[0].operations[0].operation.name
    operators = {"stablehlo.add": ("ReduceSum", 0), "stablehlo.maximum": ("ReduceMax", -np.inf)}
    operator, identity = {**operators, "stablehlo.and": ("ReduceMin", True)}.get(inner, ("", None))
    if not operator or graph.constants.get(names[1]) != identity:
        raise Error(f"stablehlo.reduce with {inner}: expected a sum from 0, a maximum from -inf or an `and` from true")
    name, shape = _operands(graph, operation, names)[0], _shape(operation.results[0])
    axes = graph.constant(np.array(operation.attributes["dimensions"], np.int64))
    if inner != "stablehlo.and":
        return graph.add(operator, [name, axes], shape, keepdims=0)
    return graph.cast(graph.add(operator, [graph.cast(name, "i32"), axes], shape, keepdims=0), "i1")


def _slice(graph, operation, names):
    bounds = [np.array(operation.attributes[key], np.int64) for key in ("start_indices", "limit_indices", "strides")]
    starts, limits, steps = map(graph.constant, bounds)
    inputs = [_operands(graph, operation, names)[0], starts, limits, graph.constant(np.arange(len(bounds[0]))), steps]
    return graph.add("Slice", inputs, _shape(operation.results[0]))


def _concatenate(graph, operation, names):
    axis = operation.attributes["dimension"].value
    return graph.add("Concat", _operands(graph, operation, names), _shape(operation.results[0]), axis=axis)


def _transpose(graph, operation, names):
    return graph.transpose(names[0], list(operation.attributes["permutation"]))


def _pad(graph, operation, names):
    keys = ("edge_padding_low", "edge_padding_high", "interior_padding")
    low, high, inner = (list(operation.attributes[key]) for key in keys)
    if any(inner) or min(low + high) < 0:
        raise Error("stablehlo.pad: expected elements to be added at the edges alone")
    (name, padding), pads = _operands(graph, operation, names), graph.constant(np.array(low + high, np.int64))
    return graph.add("Pad", [name, pads, padding], _shape(operation.results[0]))


def _dot(graph, operation, names):
    """A dot_general as MatMul of [batch, rows, contraction] and [batch, contraction, columns]."""
    numbers = stablehlo.DotDimensionNumbers(operation.attributes["dot_dimension_numbers"])
    left, right = _operands(graph, operation, names)
    batch, contracted = list(numbers.lhs_batching_dimensions), list(numbers.lhs_contracting_dimensions)
    free = [axis for axis in range(len(graph.shapes[left])) if axis not in batch + contracted]
    size = lambda name, axes: int(np.prod([graph.shapes[name][axis] for axis in axes]))  # noqa: E731
    sizes, rows, depth = [graph.shapes[left][axis] for axis in batch], size(left, free), size(left, contracted)
    left = graph.reshape(graph.transpose(left, batch + free + contracted), (*sizes, rows, depth))
    batch, contracted = list(numbers.rhs_batching_dimensions), list(numbers.rhs_contracting_dimensions)
    free = [axis for axis in range(len(graph.shapes[right])) if axis not in batch + contracted]
    columns = size(right, free)
    right = graph.reshape(graph.transpose(right, batch + contracted + free), (*sizes, depth, columns))
    product = graph.add("MatMul", [left, right], (*sizes, rows, columns))
    return graph.reshape(product, _shape(operation.results[0]))


def _gather(graph, operation, names):
    """Whole slices along one axis, as `jnp.take` makes them."""
    numbers = stablehlo.GatherDimensionNumbers(operation.attributes["dimension_numbers"])
    (table, indices), shape = _operands(graph, operation, names), _shape(operation.results[0])
    axes, whole = list(numbers.collapsed_slice_dims), graph.shapes[table]
    index_shape = graph.shapes[indices][:-1]
    if (
        len(axes) != 1
        or list(numbers.start_index_map) != axes
        or numbers.index_vector_dim != len(index_shape)
        or list(operation.attributes["slice_sizes"]) != [1 if i in axes else n for i, n in enumerate(whole)]
        or shape != (*whole[: axes[0]], *index_shape, *whole[axes[0] + 1 :])
    ):
        raise Error("stablehlo.gather: expected whole slices along one axis, as jnp.take makes them")
    indices = graph.between(graph.reshape(indices, index_shape), whole[axes[0]] - 1, np.int32)
    return graph.add("Gather", [table, indices], shape, axis=axes[0])


def _dynamic_slice(graph, operation, names):
    array, sizes = _operands(graph, operation, names)[0], _shape(operation.results[0])
    shape = graph.shapes[array]
    if shape == sizes:
        return array
    starts = graph.starts(names[1:], shape, sizes)
    base, updates = graph.updates.get(array, (array, []))
    # One layer of a cache that waits for updates, each of one layer, all known: those of this layer suffice.
    layers = [start[0] for _, start in updates] + [starts[0]]
    if (
        sizes == (1, *shape[1:])
        and all(layer in graph.constants for layer in layers)
        and all(graph.shapes[update][0] == 1 for update, _ in updates)
    ):
        first = graph.constant(np.zeros(1, np.int64))
        mine = [(update, [first, *start[1:]]) for update, start in updates if start[0] == starts[0]]
        part = graph.cut(base, starts, sizes)
        return graph.updated(part, mine) if mine else part
    return graph.cut(array, starts, sizes)


def _dynamic_update_slice(graph, operation, names):
    array, update = _operands(graph, operation, names)[:2]
    starts = graph.starts(names[2:], graph.shapes[array], graph.shapes[update])
    base, updates = graph.updates.get(array, (array, []))
    return graph.updated(base, [*updates, (update, starts)])


def _call(graph, operation, names):
    """A function's operations in its place; one of a packed weight by its name, if it can be."""
    callee = ir.FlatSymbolRefAttr(operation.attributes["callee"]).value
    match = _PACKED.match(callee)
    if match:
        kind, scheme, group, axis = match.groups()
        translate, weight_names = (_product, names[1:]) if kind == "matmul" else (_rows, names[:-1])
        packed = _packed(graph, scheme, int(group), int(axis), weight_names)
        if packed:
            return translate(graph, operation, names, *packed)
    return _body(graph, graph.functions[callee], names)[0]


def _body(graph, function, names):
    """Translates a function's operations; the values that it returns."""
    block = function.regions[0].blocks[0]
    values = dict(zip(block.arguments, names, strict=True))
    for operation in block.operations:
        given = [values[operand] for operand in operation.operands]
        kind = operation.operation.name
        if kind == "func.return":
            return [graph.whole(name, _shape(value)) for name, value in zip(given, operation.operands, strict=True)]
        if kind not in _TRANSLATORS:
            raise Error(f"operation {kind}: not known here: add a translator for it to `_TRANSLATORS`")
        name = _TRANSLATORS[kind](graph, operation, given)
        if _element(operation.results[0]) == "bf16" and kind not in _NOT_ROUNDED:
            name = graph.cast(name, "bf16")
        values[operation.results[0]] = name
    raise Error("a function without a return: the program is damaged")


# Name of the operation: (graph, operation, names of its operands' values) -> name of its result's value.
_TRANSLATORS = {
    "func.call": _call,
    "stablehlo.abs": _elementwise("Abs"),
    "stablehlo.add": _elementwise("Add"),
    "stablehlo.and": _elementwise("BitwiseAnd", "And"),
    "stablehlo.broadcast_in_dim": _broadcast,
    "stablehlo.compare": _compare,
    "stablehlo.concatenate": _concatenate,
    "stablehlo.constant": _constant,
    "stablehlo.convert": _convert,
    "stablehlo.cosine": _elementwise("Cos"),
    "stablehlo.divide": _elementwise("Div"),
    "stablehlo.dot_general": _dot,
    "stablehlo.dynamic_slice": _dynamic_slice,
    "stablehlo.dynamic_update_slice": _dynamic_update_slice,
    "stablehlo.exponential": _elementwise("Exp"),
    "stablehlo.floor": _elementwise("Floor"),
    "stablehlo.gather": _gather,
    "stablehlo.iota": _iota,
    "stablehlo.log": _elementwise("Log"),
    "stablehlo.logistic": _elementwise("Sigmoid"),
    "stablehlo.maximum": _elementwise("Max"),
    "stablehlo.minimum": _elementwise("Min"),
    "stablehlo.multiply": _elementwise("Mul"),
    "stablehlo.negate": _elementwise("Neg"),
    "stablehlo.not": _elementwise("BitwiseNot", "Not"),
    "stablehlo.or": _elementwise("BitwiseOr", "Or"),
    "stablehlo.pad": _pad,
    "stablehlo.power": _elementwise("Pow"),
    "stablehlo.reduce": _reduce,
    "stablehlo.reshape": _reshape,
    "stablehlo.rsqrt": _rsqrt,
    "stablehlo.select": _elementwise("Where"),
    "stablehlo.shift_left": _shift("LEFT"),
    "stablehlo.shift_right_logical": _shift("RIGHT"),
    "stablehlo.sine": _elementwise("Sin"),
    "stablehlo.slice": _slice,
    "stablehlo.sqrt": _elementwise("Sqrt"),
    "stablehlo.subtract": _elementwise("Sub"),
    "stablehlo.tanh": _elementwise("Tanh"),
    "stablehlo.transpose": _transpose,
    "stablehlo.xor": _elementwise("BitwiseXor", "Xor"),
}
# What gives values that it was given, or rounds them itself.
_NOT_ROUNDED = {"func.call", "stablehlo.constant", "stablehlo.convert"} | {
    f"stablehlo.{kind}"
    for kind in "broadcast_in_dim concatenate dynamic_slice dynamic_update_slice gather maximum minimum negate pad "
    "reshape select slice transpose".split()
}
_PACKED = re.compile(r"(matmul|take_rows)_(u?int[2-8]|ternary)_g(\d+)_axis([12])(?:_\d+)?$")
_PLANES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 8: [8]}


def _packed(graph, scheme, group, axis, names):
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


def _product(graph, operation, names, parts, scales):
    x, result = operation.operands[0], operation.results[0]
    name = graph.whole(names[0], _shape(x))
    (_, K), (_, M), (_, _, half) = _shape(x), _shape(result), graph.shapes[parts[0][0]]
    # Accuracy level 1: activations stay float32; by default they may be rounded to 8 bits.
    options = {"K": K, "N": M, "bits": 4, "block_size": 2 * half, "accuracy_level": 1, "domain": "com.microsoft"}
    products = []
    for codes, zeros, factor in parts:
        inputs = [name, codes, scales, zeros] if zeros else [name, codes, scales]
        products.append(_scaled(graph, graph.add("MatMulNBits", inputs, _shape(result), **options), factor))
    return functools.reduce(functools.partial(graph.elementwise, "Add"), products)


def _rows(graph, operation, names, parts, scales):
    """Rows of a table: its packed rows are gathered, then dequantized."""
    (rows, K), (height, blocks) = _shape(operation.results[0]), graph.shapes[scales]
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
    element = _element(operation.results[0])
    return values if element == "f32" else graph.cast(values, element)


def _scaled(graph, name, factor):
    return name if factor == 1 else graph.elementwise("Mul", name, graph.constant(np.float32(factor)))


def _first(graph, name, sizes):
    """The first elements along each axis."""
    starts = [graph.constant(np.zeros(1, np.int64))] * len(sizes)
    return name if graph.shapes[name] == sizes else graph.cut(name, starts, sizes)


def translate(module, name, program, weights):
    """A program as an ONNX model.

    Args:
        module: StableHLO.
        name: of the program.
        program: its description in the manifest.
        weights: `Weights`.
    """
    graph = Graph(weights)
    for function in module.body.operations:
        graph.functions[ir.StringAttr(function.attributes["sym_name"]).value] = function
    main = graph.functions["main"]
    inputs = [value["name"] for value in program["inputs"]]
    names = [*weights.arrays, *inputs]
    arguments = main.regions[0].blocks[0].arguments
    if any(_element(value) == "bf16" for value in list(arguments)[-len(inputs) :]):
        raise Error("a cache in bfloat16: expected float32 or float16, which NumPy and ONNX Runtime have")
    graph.shapes.update({name: _shape(value) for name, value in zip(names, arguments, strict=True)})
    results = _body(graph, main, names)
    described = lambda names, values: [  # noqa: E731
        helper.make_tensor_value_info(name, _DTYPES[_element(value)], _shape(value))
        for name, value in zip(names, values, strict=True)
    ]
    outputs = [value["name"] + "_out" * (value["name"] in inputs) for value in program["outputs"]]
    nodes, tensors = graph.finish(dict(zip(results, outputs, strict=True)))
    returned = main.regions[0].blocks[0].operations[-1].operands
    made = helper.make_graph(
        nodes, name, described(inputs, list(arguments)[-len(inputs) :]), described(outputs, returned), tensors
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10, producer_name="llamajax")


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


def convert(bundle, folder, target):
    """Converts every program of a bundle that takes weights; what the manifest gets."""
    if target != "onnx":
        raise Error(f"target {target!r}: expected onnx")
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    if manifest["profile"] != "unrolled":
        raise Error(f"profile {manifest['profile']!r}: expected 'unrolled': export the bundle with it")
    folder.mkdir(parents=True, exist_ok=True)
    files = [WEIGHTS_FILE]
    with (folder / WEIGHTS_FILE).open("wb") as file, make_ir_context() as context:
        weights = Weights(bundle, manifest, file)
        for name, program in manifest["programs"].items():
            if program["weights"] == "none":
                continue
            try:
                module = stablehlo.deserialize_portable_artifact(context, (bundle / program["file"]).read_bytes())
                model = translate(module, name, program, weights)
            except Error as error:
                raise Error(f"program {name}: {error}") from None
            (folder / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))
            files.append(f"{name}.onnx")
    versions = {name: importlib.metadata.version(name) for name in ("onnx", "jaxlib")}
    return {"target": target, "files": files, "versions": versions, "opset": OPSET}


def main(arguments):
    """The command line."""
    if len(arguments) != 3:
        sys.exit("usage: to_onnx.py BUNDLE FOLDER onnx")
    try:
        print(json.dumps(convert(Path(arguments[0]), Path(arguments[1]), arguments[2])))
    except (Error, OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
