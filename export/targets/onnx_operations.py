"""Translates each operation of StableHLO to ONNX; `body` translates the operations of a function."""

import re

import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo
from onnx_graph import Error, element_of, shape_of
from onnx_packed import SCHEMES
from onnx_weights import as_four_bits, matmul, take_rows


def _operands(graph, operation, names):
    """The operands in their shapes in the program."""
    return [graph.whole(name, shape_of(operand)) for name, operand in zip(names, operation.operands, strict=True)]


def _elementwise(operator, on_bools=None):
    """A translator for an elementwise operation that ONNX has too, with an optional other operator for booleans."""

    def translate(graph, operation, names):
        is_bool = element_of(operation.operands[-1]) == "i1"
        return graph.elementwise(on_bools if is_bool and on_bools else operator, *names)

    return translate


def _shift(direction):
    def translate(graph, operation, names):
        shape = np.broadcast_shapes(*(graph.shapes[name] for name in names))
        return graph.add("BitShift", names, shape, direction=direction)

    return translate


def _constant(graph, operation, names):
    attribute = ir.DenseElementsAttr(operation.attributes["value"])
    if element_of(operation.results[0]) != "bf16":
        return graph.constant(np.array(attribute))
    if not attribute.is_splat:  # MLIR's Python API cannot read others of this dtype
        raise Error("a constant in bfloat16 of several values: expected one")
    number = np.float32(ir.FloatAttr(attribute.get_splat_value()).value)
    return graph.reshape(graph.constant(number), [1] * len(shape_of(operation.results[0])))


def _iota(graph, operation, names):
    axis, shape = operation.attributes["iota_dimension"].value, shape_of(operation.results[0])
    array = np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return graph.cast(graph.constant(array), element_of(operation.results[0]))


def _broadcast(graph, operation, names):
    shape = [1] * len(shape_of(operation.results[0]))
    for axis, size in zip(operation.attributes["broadcast_dimensions"], graph.shapes[names[0]], strict=True):
        shape[axis] = size
    return graph.reshape(names[0], shape)


def _reshape(graph, operation, names):
    return graph.reshape(_operands(graph, operation, names)[0], shape_of(operation.results[0]))


def _convert(graph, operation, names):
    before, after = element_of(operation.operands[0]), element_of(operation.results[0])
    return names[0] if before == after or (before, after) == ("bf16", "f32") else graph.cast(names[0], after)


def _compare(graph, operation, names):
    operators = {"LT": "Less", "LE": "LessOrEqual", "GT": "Greater", "GE": "GreaterOrEqual", "EQ": "Equal"}
    direction = stablehlo.ComparisonDirectionAttr(operation.attributes["comparison_direction"]).value
    if element_of(operation.operands[0]) in ("ui8", "i1"):  # runtimes support comparison for few dtypes
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
    name, shape = _operands(graph, operation, names)[0], shape_of(operation.results[0])
    axes = graph.constant(np.array(operation.attributes["dimensions"], np.int64))
    if inner != "stablehlo.and":
        return graph.add(operator, [name, axes], shape, keepdims=0)
    return graph.cast(graph.add(operator, [graph.cast(name, "i32"), axes], shape, keepdims=0), "i1")


def _slice(graph, operation, names):
    bounds = [np.array(operation.attributes[key], np.int64) for key in ("start_indices", "limit_indices", "strides")]
    starts, limits, steps = map(graph.constant, bounds)
    inputs = [_operands(graph, operation, names)[0], starts, limits, graph.constant(np.arange(len(bounds[0]))), steps]
    return graph.add("Slice", inputs, shape_of(operation.results[0]))


def _concatenate(graph, operation, names):
    axis = operation.attributes["dimension"].value
    return graph.add("Concat", _operands(graph, operation, names), shape_of(operation.results[0]), axis=axis)


def _transpose(graph, operation, names):
    return graph.transpose(names[0], list(operation.attributes["permutation"]))


def _pad(graph, operation, names):
    keys = ("edge_padding_low", "edge_padding_high", "interior_padding")
    low, high, inner = (list(operation.attributes[key]) for key in keys)
    if any(inner) or min(low + high) < 0:
        raise Error("stablehlo.pad: expected elements to be added only at the edges")
    (name, padding), pads = _operands(graph, operation, names), graph.constant(np.array(low + high, np.int64))
    return graph.add("Pad", [name, pads, padding], shape_of(operation.results[0]))


def _dot(graph, operation, names):
    """Translates dot_general to a MatMul of [batch, rows, contraction] and [batch, contraction, columns]."""
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
    return graph.reshape(product, shape_of(operation.results[0]))


def _gather(graph, operation, names):
    """Translates a gather of whole slices along one axis, as `jnp.take` makes it."""
    numbers = stablehlo.GatherDimensionNumbers(operation.attributes["dimension_numbers"])
    (table, indices), shape = _operands(graph, operation, names), shape_of(operation.results[0])
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
    array, sizes = _operands(graph, operation, names)[0], shape_of(operation.results[0])
    shape = graph.shapes[array]
    if shape == sizes:
        return array
    starts = graph.starts(names[1:], shape, sizes)
    base, updates = graph.updates.get(array, (array, []))
    # One layer of a cache with pending updates, each of one known layer: the updates of this layer suffice.
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
    """Inlines a function's operations; a function of a packed weight is recognised by its name, if possible."""
    callee = ir.FlatSymbolRefAttr(operation.attributes["callee"]).value
    match = _PACKED.match(callee)
    if match:
        kind, scheme, group, axis, *of_planes = match.groups()
        translate, weight_names = (matmul, names[1:]) if kind == "matmul" else (take_rows, names[:-1])
        planes = dict(zip(("scale", "offset"), of_planes, strict=True))
        weight = as_four_bits(graph, scheme, int(group), int(axis), planes, weight_names)
        if weight:
            return translate(graph, operation, names, weight)
    return body(graph, graph.functions[callee], names)[0]


def body(graph, function, names):
    """Translates a function's operations; returns the values that the function returns."""
    block = function.regions[0].blocks[0]
    values = dict(zip(block.arguments, names, strict=True))
    for operation in block.operations:
        given = [values[operand] for operand in operation.operands]
        kind = operation.operation.name
        if kind == "func.return":
            return [graph.whole(name, shape_of(value)) for name, value in zip(given, operation.operands, strict=True)]
        if kind not in _TRANSLATORS:
            raise Error(f"operation {kind}: expected one that has a translator: add one to `_TRANSLATORS`")
        name = _TRANSLATORS[kind](graph, operation, given)
        if element_of(operation.results[0]) == "bf16" and kind not in _NOT_ROUNDED:
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
    "stablehlo.round_nearest_even": _elementwise("Round"),
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

# Operations that return values of their operands, or round their results themselves.
_NOT_ROUNDED = {"func.call", "stablehlo.constant", "stablehlo.convert"} | {
    f"stablehlo.{kind}"
    for kind in "broadcast_in_dim concatenate dynamic_slice dynamic_update_slice gather maximum minimum negate pad "
    "reshape select slice transpose".split()
}

_PACKED = re.compile(
    rf"(matmul|take_rows)_({SCHEMES})_g(\d+)_axis([12])(?:_scale_({SCHEMES}))?(?:_offset_({SCHEMES}))?(?:_\d+)?$"
)
