"""Makes a CoreML package from a bundle: one function per program, the packed weights once, for iOS 18 or macOS 15.

    python export/targets/to_coreml.py BUNDLE FOLDER coreml      # needs coremltools, stablehlo-coreml-experimental

The package can be made on any system, but only Apple's systems run it. The packages of this script have NOT been
executed, and their entry in the manifest says so. Inputs have their names in the manifest. CoreML requires different
names for outputs: the state is returned as `new_key` and `new_value`.
"""

import contextlib
import copy
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jax.interpreters import mlir
from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import stablehlo

_TYPES = {"uint8": "ui8", "int32": "i32", "float16": "f16", "float32": "f32"}


def module_text(bundle: Path, manifest: dict, program: dict) -> str:
    """The text of a program with its weights as constants, because CoreML has no inputs of bytes."""
    artifact = stablehlo.deserialize_portable_artifact_str((bundle / program["file"]).read_bytes())
    text = str(ir.Module.parse(artifact).operation.get_asm())
    data = (bundle / "weights.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header, lines, called = json.loads(data[8:start]), [], []
    for index, weight in enumerate(manifest["weights"]):
        first, last = header[weight["name"]]["data_offsets"]
        value = f'dense<"0x{data[start + first : start + last].hex()}">'
        lines.append(f"%weight{index} = stablehlo.constant {value} : {_type(weight)}")
        called.append(f"%weight{index}")
    inputs, outputs = program["inputs"], program["outputs"]
    given = ", ".join(f"%{value['name']}: {_type(value)}" for value in inputs)
    called += [f"%{value['name']}" for value in inputs]
    types = ", ".join(_type(value) for value in [*manifest["weights"], *inputs])
    results = ", ".join(_type(value) for value in outputs)
    names = ", ".join(f"%made#{index}" for index in range(len(outputs)))
    main = [
        f"func.func public @main({given}) -> ({results}) {{",
        *lines,
        f"%made:{len(outputs)} = func.call @program({', '.join(called)}) : ({types}) -> ({results})",
        f"return {names} : {results}",
        "}",
    ]
    renamed = text.replace("func.func public @main(", "func.func private @program(", 1)
    return "\n".join([renamed.rstrip().removesuffix("}"), *main, "}"])


def _type(value: dict) -> str:
    if value["dtype"] not in _TYPES:
        raise ValueError(f"{value['name']}: {value['dtype']}: expected one of {', '.join(_TYPES)} for CoreML")
    return f"tensor<{''.join(f'{size}x' for size in value['shape'])}{_TYPES[value['dtype']]}>"


def _operations(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region.blocks:
            for inner in list(block.operations):
                yield inner.operation
                yield from _operations(inner.operation)


def lowered(text: str) -> ir.Module:
    """Parses a module; turns broadcasts that repeat nothing into reshapes, because CoreML cannot tile bytes."""
    module = ir.Module.parse(text)
    passmanager.PassManager.parse("builtin.module(inline,symbol-dce)").run(module.operation)
    for operation in list(_operations(module.operation)):
        if operation.name != "stablehlo.broadcast_in_dim":
            continue
        before, after = (ir.ShapedType(value.type).shape for value in (operation.operands[0], operation.results[0]))
        # Nothing is repeated, and axes keep their order: programs never transpose by broadcasting.
        if np.prod(before) == np.prod(after):
            with ir.InsertionPoint(operation):
                reshaped = stablehlo.reshape(operation.results[0].type, operation.operands[0])
            operation.results[0].replace_all_uses_with(reshaped)
            operation.erase()
    return module


def convert(bundle: Path, package: Path) -> None:
    """Writes the package.

    Raises:
        OSError: if a file cannot be read or written.
        ValueError: if the folder is no bundle, or the bundle has another profile.
    """
    import coremltools as ct
    import stablehlo_coreml

    manifest = json.loads((bundle / "manifest.json").read_bytes())
    kind, profile = manifest.get("format"), manifest.get("profile")
    if (kind, manifest.get("version")) != ("llamajax-bundle", 1):
        raise ValueError(f"{bundle}: format {kind!r}: expected 'llamajax-bundle' version 1")
    if profile != "float":
        raise ValueError(f"{bundle}: profile {profile!r}: CoreML unpacks in floats: export it with --profile=float")
    passes = copy.deepcopy(stablehlo_coreml.DEFAULT_HLO_PIPELINE)
    # This pass would compute what depends only on weights: the file would hold unpacked weights.
    passes.remove_passes({"common::const_elimination"})
    functions = ct.utils.MultiFunctionDescriptor()
    with tempfile.TemporaryDirectory() as folder, mlir.make_ir_context(), ir.Location.unknown():
        for name, program in manifest["programs"].items():
            module = lowered(module_text(bundle, manifest, program))
            converted = ct.convert(
                stablehlo_coreml.convert(module, minimum_deployment_target=ct.target.iOS18),
                source="milinternal",
                minimum_deployment_target=ct.target.iOS18,
                pass_pipeline=passes,
                compute_precision=ct.precision.FLOAT32,
                skip_model_load=True,
            )
            spec, given = converted.get_spec(), {value["name"] for value in program["inputs"]}
            outputs = [value["name"] for value in program["outputs"]]
            outputs = [f"new_{output}" if output in given else output for output in outputs]
            for feature, value in zip(spec.description.input, program["inputs"], strict=True):
                ct.utils.rename_feature(spec, feature.name, value["name"])
            for feature, output in zip(spec.description.output, outputs, strict=True):
                ct.utils.rename_feature(spec, feature.name, output)
            single = f"{folder}/{name}.mlpackage"
            ct.models.MLModel(spec, weights_dir=converted.weights_dir, skip_model_load=True).save(single)
            functions.add_function(single, src_function_name="main", target_function_name=name)
        functions.default_function_name = "decode"
        ct.utils.save_multifunction(functions, str(package))


def main(argv: list[str]) -> None:
    """Converts a bundle, and prints the target's entry for the manifest as one JSON object."""
    if len(argv) != 4 or argv[3] != "coreml":
        sys.exit(f"{' '.join(argv[1:])}: expected BUNDLE FOLDER coreml")
    folder = Path(argv[2])
    warnings.simplefilter("ignore")
    logging.disable()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            convert(Path(argv[1]), folder / "model.mlpackage")
    except Exception as error:  # whatever the toolchain raises becomes one line
        sys.exit(" ".join(f"coreml: {type(error).__name__}: {error}".split()))
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    versions = {name: version(name) for name in ("coremltools", "stablehlo-coreml-experimental")}
    print(json.dumps({"target": "coreml", "files": files, "executed": False, "versions": versions}))


if __name__ == "__main__":
    main(sys.argv)
