"""Bundles of models with the switches of families: each runtime gives the tokens that the library gives."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from export.bundle import write
from export.profiles import PROFILES, Spec
from export.targets import add_target
from export.verification import verify
from llamajax import Config, generate
from llamajax.quantization.quantize import quantize
from quant import Rule
from tests import reference
from tests.isolated import run_isolated
from tests.kin import BIASES, HEAD_NORMS, REST, WINDOWS
from tests.reference import random_model, switched_weights_of

KINDS = {"biases": BIASES, "head norms": HEAD_NORMS, "windows": WINDOWS, "rest": REST}
# Runtime -> the module that it needs, and the target that it runs.
RUNTIMES = {"onnx": ("onnxruntime", "onnx"), "iree": ("iree.runtime", "iree-cpu")}
RULES = (Rule(weights="*norm*", keep=True), Rule(weights="*", scheme="int4", group_size=16, scale_dtype="float16"))
IDS = [5, 17, 80, 3, 44, 9, 12, 61, 30, 2]  # longer than a window


def check_reference(config: Config, model, tokens: list[int]) -> None:
    """Checks that greedy tokens are those of the NumPy reference on the dequantized weights."""
    logits_TV = reference.forward(config, switched_weights_of(model), [*IDS, *tokens])[len(IDS) - 1 : -1]
    assert tokens == np.argmax(logits_TV, axis=-1).tolist()


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("profile", ["scanned", "unrolled"])
def test_jax_runs_the_bundle(kind: str, profile: str, tmp_path: Path) -> None:
    model = quantize(random_model(KINDS[kind]), RULES)
    spec = Spec(slots=32, buckets=(4, 16), profile=PROFILES[profile])
    bundle = write(model, None, tmp_path / "kin", spec)
    expected = generate(model, None, IDS, temperature=0, max_new_tokens=12)
    check_reference(KINDS[kind], model, expected.tokens)
    done = run_isolated(bundle.path, f"--ids={','.join(map(str, IDS))}", "--max_new_tokens=12", runner="run_jax.py")
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.split()] == expected.tokens


@pytest.mark.extras
@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_other_runtimes_give_the_golden_tokens(kind: str, runtime: str, tmp_path: Path) -> None:
    module, target = RUNTIMES[runtime]
    if importlib.util.find_spec(module.partition(".")[0]) is None or importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    model = quantize(random_model(KINDS[kind]), RULES)
    spec = Spec(slots=32, buckets=(4,), profile=PROFILES["unrolled"])
    (result,) = verify(add_target(write(model, None, tmp_path / "kin", spec), target), [runtime])
    assert result.held and result.exact and result.tokens > 20, result
