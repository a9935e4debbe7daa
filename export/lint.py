"""Checks that a lowered program contains only operations and types that runtimes other than XLA support."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxlib.mlir import ir

from export.profiles import Profile
from llamajax import LlamaJaxError

# A constant of more elements is a weight that was closed over.
LARGEST_CONSTANT = 4096
# Types of arguments that every runtime takes.
_ARGUMENT_TYPES = ("f32", "bf16", "f16", "ui8", "i32", "ui32")


def tidy(module: ir.Module, aliases: Mapping[int, int]) -> None:
    """Removes jax's own attributes of the module, of arguments and of results.

    Args:
        module: the module, with a function `main` and others.
        aliases: index of an argument of `main`: index of the result that may be written into its memory.
    """
    for name in list(module.operation.attributes):
        if name.startswith("mhlo."):
            del module.operation.attributes[name]
    for function in module.body.operations:
        for kind in ("arg_attrs", "res_attrs"):
            if kind in function.attributes:
                del function.attributes[kind]
        if ir.StringAttr(function.attributes["sym_name"]).value == "main":
            i32 = ir.IntegerType.get_signless(32)
            given: list[dict[str, ir.Attribute]] = [{} for _ in function.regions[0].blocks[0].arguments]
            for argument, result in aliases.items():
                given[argument]["tf.aliasing_output"] = ir.IntegerAttr.get(i32, result)
            function.attributes["arg_attrs"] = ir.ArrayAttr.get([ir.DictAttr.get(attributes) for attributes in given])


def check(module: ir.Module, profile: Profile, name: str) -> dict[str, int]:
    """Counts a program's operations, and refuses those that other runtimes cannot run.

    Raises:
        LlamaJaxError: for a custom call, a scatter or another operation that is not in the profile's list; an argument
            of another type than float, uint8, int32 or uint32; a weight that was closed over instead of passed.
    """
    counts: Counter[str] = Counter()
    for operation in _walk(module.operation):
        kind = operation.name.rpartition(".")[2]
        counts[kind] += 1
        if kind not in profile.operations and operation.name != "builtin.module":
            raise LlamaJaxError(
                f"program {name}: operation {operation.name} is not in the list of profile {profile.name!r}: other "
                "runtimes may lack it"
            )
        if kind == "constant" and (size := ir.ShapedType(operation.results[0].type)) is not None:
            elements = int(np.prod(size.shape))
            splat = ir.DenseElementsAttr(operation.attributes["value"]).is_splat
            if elements > LARGEST_CONSTANT and not splat:
                raise LlamaJaxError(
                    f"program {name}: a constant of shape {tuple(size.shape)}: expected no weight in the program; pass "
                    "it as an argument"
                )
    for function in module.body.operations:
        if ir.StringAttr(function.attributes["sym_name"]).value != "main":
            continue
        for index, argument in enumerate(function.regions[0].blocks[0].arguments):
            element = str(ir.ShapedType(argument.type).element_type)
            if element not in _ARGUMENT_TYPES:
                raise LlamaJaxError(
                    f"program {name}: argument {index} is {argument.type}: expected one of "
                    f"{', '.join(_ARGUMENT_TYPES)}, which every runtime takes"
                )
    del counts["module"], counts["func"], counts["return"]
    return dict(sorted(counts.items()))


def _walk(operation: Any) -> Iterator[Any]:
    """Yields an operation and all operations inside it."""
    yield operation
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield from _walk(inner.operation)
