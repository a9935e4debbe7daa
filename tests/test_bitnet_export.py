"""Ternary weights with activations in int8, in bundles that other runtimes execute."""

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
NEEDS = {"jax": (), "onnx": ("onnx", "onnxruntime"), "iree-cpu": ("iree.compiler", "iree.runtime")}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = quantize(random_model(dataclasses.replace(SUB_NORMS, family="bitnet")), "bitnet")
    spec = Spec(slots=96, buckets=(16,), profile=PROFILES["unrolled"])
    return write(model, None, tmp_path_factory.mktemp("bundles") / "bitnet", spec)


@pytest.mark.parametrize("target", NEEDS)
def test_other_runtimes_say_the_same(bundle: Bundle, target: str) -> None:
    for module in NEEDS[target]:
        if importlib.util.find_spec(module.partition(".")[0]) is None or importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[runtimes]'")
    made = bundle if target == "jax" else add_target(bundle, target)
    (result,) = verify(made, [target])
    assert result.held and result.exact, result
