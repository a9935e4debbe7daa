"""An ONNX graph in the making: values, nodes, and what is worked out before the graph runs."""

import numpy as np
from jaxlib.mlir import ir
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

# Values of more elements are not worked out here but when the graph runs.
_LARGEST_FOLDED = 1 << 16
# By the names of MLIR. ONNX has few operators of bfloat16: its values are float32, rounded.
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
    """Something that the user has to know, in one line."""


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


def shape_of(value):
    """The shape of a value in MLIR."""
    return tuple(ir.RankedTensorType(value.type).shape)


def element_of(value):
    """The dtype of a value in MLIR, as MLIR calls it."""
    return str(ir.RankedTensorType(value.type).element_type)
