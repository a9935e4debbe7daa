"""Translates a bundle's StableHLO programs into ONNX, operation by operation.

    python export/targets/to_onnx.py BUNDLE FOLDER onnx

writes FOLDER/decode.onnx, prefill_16.onnx, … and, once, the weights of all of them: FOLDER/weights.bin. The bundle
must have unrolled layers. A graph's inputs and outputs are those of the program, such as `token`, `length`, `key`,
`value` and `logits`, except that the returned state is named `key_out` and `value_out`. Programs without weights are
left out. `in_place` in the manifest lists the state for which a runtime may use the same memory for input and output.

In the programs, each product with a packed weight is a function of its own, named after the weight's scheme. It becomes
a `MatMulNBits` (domain com.microsoft), which ONNX Runtime and OpenVINO multiply in packed form. Codes of up to 4 bits
are stored in 4 bits, larger codes as two 4-bit digits, so that no value changes. For two levels of scales their product
is stored, in float32. Offsets are multiplied with the sums of the activations of each group. Other weights (nf4,
outliers, groups of less than 16) are dequantized by the program's own operations, at each step.

Needs jax (for MLIR), onnx and NumPy; nothing of llamajax.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

from jax.interpreters.mlir import make_ir_context
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo
from onnx import helper

sys.path.append(str(Path(__file__).parent))

from onnx_graph import DTYPES, Error, Graph, element_of, shape_of
from onnx_operations import body
from onnx_weights import WEIGHTS_FILE, Weights

OPSET = 21


def translate(module, name, program, weights):
    """Translates a program to an ONNX model.

    Args:
        module: the program in StableHLO.
        name: the name of the program.
        program: the program's entry in the manifest.
        weights: the `Weights` that all graphs share.

    Returns:
        The model, and the names of the state that may be updated in place.
    """
    graph = Graph(weights)
    for function in module.body.operations:
        graph.functions[ir.StringAttr(function.attributes["sym_name"]).value] = function
    main = graph.functions["main"]
    inputs = [value["name"] for value in program["inputs"]]
    names = [*weights.arrays, *inputs]
    arguments = main.regions[0].blocks[0].arguments
    if any(element_of(value) == "bf16" for value in list(arguments)[-len(inputs) :]):
        raise Error("a cache in bfloat16: expected float32 or float16, which NumPy and ONNX Runtime have")
    graph.shapes.update({name: shape_of(value) for name, value in zip(names, arguments, strict=True)})
    results = body(graph, main, names)
    described = lambda names, values: [  # noqa: E731
        helper.make_tensor_value_info(name, DTYPES[element_of(value)], shape_of(value))
        for name, value in zip(names, values, strict=True)
    ]
    outputs = [value["name"] + "_out" * (value["name"] in inputs) for value in program["outputs"]]
    # State into which only slices are written, all at the end, when everything else has been read: see `Graph.settle`.
    in_place = [
        value["name"]
        for value, result in zip(program["outputs"], results, strict=True)
        if graph.updates.get(result, ("", []))[0] == value["name"]
    ]
    nodes, tensors = graph.finish(dict(zip(results, outputs, strict=True)))
    returned = main.regions[0].blocks[0].operations[-1].operands
    made = helper.make_graph(
        nodes, name, described(inputs, list(arguments)[-len(inputs) :]), described(outputs, returned), tensors
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10, producer_name="llamajax"), in_place


def convert(bundle, folder, target):
    """Converts every program of a bundle that takes weights; returns the target's entry for the manifest."""
    if target != "onnx":
        raise Error(f"target {target!r}: expected onnx")
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    if manifest["profile"] != "unrolled":
        raise Error(f"profile {manifest['profile']!r}: expected 'unrolled': export it with --profile=unrolled")
    folder.mkdir(parents=True, exist_ok=True)
    files, state = [WEIGHTS_FILE], dict[str, bool]()
    with (folder / WEIGHTS_FILE).open("wb") as file, make_ir_context() as context:
        weights = Weights(bundle, manifest, file)
        for name, program in manifest["programs"].items():
            if program["weights"] == "none":
                continue
            try:
                module = stablehlo.deserialize_portable_artifact(context, (bundle / program["file"]).read_bytes())
                model, in_place = translate(module, name, program, weights)
            except Error as error:
                raise Error(f"program {name}: {error}") from None
            (folder / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))
            files.append(f"{name}.onnx")
            inputs = {value["name"] for value in program["inputs"]}
            for value in program["outputs"]:
                if value["name"] in inputs:
                    state[value["name"]] = state.get(value["name"], True) and value["name"] in in_place
    in_place = [name for name, always in state.items() if always]
    versions = {name: importlib.metadata.version(name) for name in ("onnx", "jaxlib")}
    return {"target": target, "files": files, "versions": versions, "opset": OPSET, "in_place": in_place}


def main(arguments):
    """Runs the command line."""
    if len(arguments) != 3:
        sys.exit("usage: to_onnx.py BUNDLE FOLDER onnx")
    try:
        print(json.dumps(convert(Path(arguments[0]), Path(arguments[1]), arguments[2])))
    except (Error, OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
