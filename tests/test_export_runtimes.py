"""The box and stories260K in 4 bits, exported once: every installed runtime gives the tokens of `generate`."""

import importlib.util

import pytest

import llamajax
from export.bundle import write
from export.profiles import PROFILES, Spec
from export.targets import add_target
from export.verification import RUNTIMES, verify
from llamajax.quantization.quantize import quantize

TARGETS = {"iree-cpu": ("iree.compiler", "iree.runtime"), "onnx": ("onnx", "onnxruntime")}


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


@pytest.mark.extras
@pytest.mark.skipif(
    not any(all(map(installed, modules)) for modules in TARGETS.values()),
    reason="needs IREE or ONNX Runtime: pip install 'llamajax[iree,onnx]'",
)
@pytest.mark.parametrize("name", [pytest.param("box", marks=pytest.mark.exhaustive), "stories260k"])
def test_the_same_tokens_everywhere(name: str, request: pytest.FixtureRequest, tmp_path) -> None:
    # Exported in float32, as the command does on a machine without an accelerator; IREE takes no bfloat16 model.
    model, tokenizer = llamajax.load("box", dtype="float32") if name == "box" else request.getfixturevalue(name)
    # One bucket: IREE compiles each program for half a minute. Prompts longer than it take several steps.
    spec = Spec(buckets=(16,), profile=PROFILES["unrolled"])
    bundle = write(quantize(model, "int4-g32"), tokenizer, tmp_path / name, spec)
    for target, modules in TARGETS.items():
        if all(installed(module) for module in modules):
            bundle = add_target(bundle, target)
    results = {result.runtime: result for result in verify(bundle, ("jax", "jax_export", "iree", "onnx"))}
    for runtime, result in results.items():
        missing = not installed(RUNTIMES[runtime].module) or not installed(TARGETS.get(f"{runtime}-cpu", ("jax",))[0])
        assert result.held or (result.skipped and missing), result
        assert result.skipped or result.tokens == 128
    assert results["jax"].held and results["jax_export"].held
