"""Ternary weights with int8 activations, in bundles that other runtimes execute."""

import dataclasses
import importlib.util

import pytest

from export.bundle import Bundle, write
from export.profiles import PROFILES, Spec
from export.targets import add_target
from export.verification import verify
from llamajax.quantization.quantize import quantize
from tests.kin import SUB_NORMS
from tests.reference import random_model

pytestmark = pytest.mark.extras
NEEDS = {"jax": (), "onnx": ("onnx", "onnxruntime"), "iree": ("iree.compiler", "iree.runtime")}
TARGETS = {"onnx": "onnx", "iree": "iree-cpu"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = quantize(random_model(dataclasses.replace(SUB_NORMS, family="bitnet", num_layers=1)), "bitnet")
    spec = Spec(slots=96, buckets=(16,), profile=PROFILES["unrolled"])
    return write(model, None, tmp_path_factory.mktemp("bundles") / "bitnet", spec)


@pytest.mark.parametrize("runtime", NEEDS)
def test_other_runtimes_say_the_same(bundle: Bundle, runtime: str) -> None:
    """Every token is the same, and so are the logits, except where another order of sums moves a code near a tie."""
    for module in NEEDS[runtime]:
        if importlib.util.find_spec(module.partition(".")[0]) is None or importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[runtimes]'")
    (result,) = verify(add_target(bundle, TARGETS[runtime]) if runtime in TARGETS else bundle, [runtime])
    assert result.held and result.exact, result
