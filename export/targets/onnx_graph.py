"""Builds an ONNX graph: values, nodes, and constants that are computed before the graph runs."""

import numpy as np
from jaxlib.mlir import ir
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

# Values of more elements are computed when the graph runs, not here.
_LARGEST_FOLDED = 1 << 16
# ONNX's dtypes by their names in MLIR. ONNX has few operators on bfloat16: such values are float32, rounded.
DTYPES = {
    "f32": TensorProto.FLOAT,
    "f16": TensorProto.FLOAT16,
    "bf16": TensorProto.FLOAT,
    "i1": TensorProto.BOOL,
    "i32": TensorProto.INT32,
    "i64": TensorProto.INT64,
    "ui8": TensorProto.UINT8,
    "ui32": TensorProto.UINT32,
}


class Error(Exception):
    """An error with a message of one line for the user."""


class Graph:
    """Builds an ONNX graph. A value is represented by its name.

    ONNX's operators broadcast. `shapes` has the shape that a value has in the graph, which may have 1 along an axis
    where the program has more; `whole` expands the value to the program's shape. Equal operators with equal inputs are
    one node. A node whose inputs are all known is computed here.
    """

    def __init__(self, weights):
        """An empty graph."""
        self.weights = weights
        self.shapes = {name: array.shape for name, array in weights.arrays.items()}
        self.constants, self.functions = {}, {}
        self.updates = {}  # name: (base, [(update, starts)]), arrays with slices yet to be written: see `settle`
        self._nodes, self._made, self._before_reshape, self._repacked = [], {}, {}, {}

    def constant(self, array):
        """A constant."""
        array = np.asarray(array)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._made:
            name = self._made[key] = f"constant_{len(self.constants)}"
            self.constants[name], self.shapes[name] = array, array.shape
        return self._made[key]

    def repacked(self, name, make):
        """An array that `make` computes from the bundle's weights, once for all graphs."""
        tensor = self._repacked[name] = self.weights.tensor(name, make)
        self.shapes[name] = tuple(tensor.dims)
        return name

    def add(self, operator, inputs, shape, **attributes):
        """Adds a node; returns the name of its result, which has the given shape."""
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
        """Adds a node of an operator that broadcasts."""
        return self.add(operator, inputs, np.broadcast_shapes(*(self.shapes[name] for name in inputs)))

    def cast(self, name, element):
        """The value in another dtype, named as in MLIR; bfloat16 is rounded float32."""
        if element == "bf16":
            rounded = self.add("Cast", [name], self.shapes[name], to=TensorProto.BFLOAT16)
            return self.add("Cast", [rounded], self.shapes[name], to=TensorProto.FLOAT)
        return self.add("Cast", [name], self.shapes[name], to=DTYPES[element])

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
        """The value expanded to the shape that it has in the program."""
        if self.shapes[name] == tuple(shape):
            return name
        return self.add("Expand", [name, self.constant(np.array(shape, np.int64))], shape)

    def cut(self, name, starts, sizes):
        """A slice of the given sizes. Starts are values, int64 [1]."""
        first = self.add("Concat", starts, (len(sizes),), axis=0)
        last = self.elementwise("Add", first, self.constant(np.array(sizes, np.int64)))
        return self.add("Slice", [name, first, last], sizes)

    def updated(self, base, updates):
        """An array with slices that are written into it later."""
        name = f"updated_{len(self.updates)}"
        self.updates[name], self.shapes[name] = (base, updates), self.shapes[base]
        return name

    def settle(self, name):
        """Writes all pending slices of an array with one node, when the array is used.

        The keys and values of all layers are thus written once, at the end. If a runtime is given the same memory for
        input and output, it moves only the new rows.
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
        """Arrays concatenated along the first axis."""
        total = sum(self.shapes[name][0] for name in names)
        shape = (total, *self.shapes[names[0]][1:])
        return names[0] if len(names) == 1 else self.add("Concat", names, shape, axis=0)

    def _places(self, shape, starts):
        """The places of the rows of an update: indices [rows, axes]."""
        grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, len(shape))
        places = self.constant(grid.astype(np.int64))
        for axis, start in enumerate(starts[: len(shape)]):
            step = self.constant((np.arange(len(shape)) == axis).astype(np.int64))
            places = self.elementwise("Add", places, self.elementwise("Mul", start, step))
        return places

    def starts(self, names, shape, sizes):
        """Starts of a slice, int64 [1] each, clamped so that the slice fits, as in StableHLO."""
        return [
            self.between(self.reshape(self.cast(name, "i64"), (1,)), whole - size, np.int64)
            for name, whole, size in zip(names, shape, sizes, strict=True)
        ]

    def between(self, name, most, dtype):
        """The value clamped to 0 to `most`."""
        least = self.elementwise("Max", name, self.constant(np.zeros(1, dtype)))
        return self.elementwise("Min", least, self.constant(np.array([most], dtype)))

    def finish(self, outputs):
        """The nodes and initializers that the outputs need.

        Args:
            outputs: the names that the graph's outputs get, by value.
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
    """How many leading axes determine the place of a part; along the axes after them it spans the whole array."""
    return max([1] + [axis + 1 for axis, (a, b) in enumerate(zip(part, shape, strict=True)) if a != b])


def shape_of(value):
    """The shape of a value in MLIR."""
    return tuple(ir.RankedTensorType(value.type).shape)


def element_of(value):
    """The dtype of a value in MLIR, by MLIR's name."""
    return str(ir.RankedTensorType(value.type).element_type)
