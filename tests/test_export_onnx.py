"""ONNX: ONNX Runtime and OpenVINO give the golden tokens, from 4-bit weights that all programs share."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamajax
from export.bundle import Bundle, write
from export.profiles import PROFILES, Spec
from export.targets import add_target
from export.verification import verify
from llamajax.errors import LlamaJaxError
from llamajax.quantization.quantize import Rule, quantize
from tests.counters import write_counters
from tests.isolated import run_isolated

pytestmark = [
    pytest.mark.extras,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))),
        reason="ONNX is not installed: pip install onnx onnxruntime",
    ),
]
NORMS = Rule(weights="*norm*", keep=True)
# With widths of 24 and 40, groups are no powers of 2 and do not fill their blocks.
RULES = {
    "int4": (NORMS, Rule(weights="*", scheme="int4", group_size="channel")),
    "uint4": (NORMS, Rule(weights="*", scheme="uint4", group_size="channel")),
    "int3": (NORMS, Rule(weights="*", scheme="int3", group_size="channel")),
    "int8": (NORMS, Rule(weights="*", scheme="int8", group_size="channel")),
    "nf4, dequantized step by step": (NORMS, Rule(weights="*", scheme="nf4", group_size=8)),
    "float": (Rule(weights="*", keep=True),),
}
SPEC = Spec(slots=96, buckets=(4, 16), programs=("score", "embed", "verify"), profile=PROFILES["unrolled"])
IDS = [1, 5, 9, 300, 17, 42, 8]


@pytest.fixture(scope="module")
def tiny_int4(tiny_model) -> llamajax.Llama:
    return quantize(tiny_model, RULES["int4"])


@pytest.fixture(scope="module")
def bundle(tiny_int4, tiny_tokenizer, tmp_path_factory) -> Bundle:
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    return add_target(write(tiny_int4, tiny_tokenizer, path, SPEC), "onnx")


def run(bundle: Bundle, *arguments: str, runner: str = "run_onnx.py") -> str:
    done = run_isolated(bundle.path, *arguments, runner=runner, hidden=("jax",))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_state_of_other_names_shapes_and_dtypes(tmp_path: Path) -> None:
    (result,) = verify(add_target(write_counters(tmp_path / "counters"), "onnx"), ["onnx"])
    assert result.held and result.exact and result.tokens == 40, result


def check_golden(bundle: Bundle, runner: str = "run_onnx.py") -> None:
    made = json.loads(run(bundle, "--golden", runner=runner))
    assert len(made["prompts"]) == bundle.manifest["golden"]["prompts"]
    for prompt in made["prompts"]:
        assert prompt["exact"] and float(prompt["largest_logit_error"]) < 1e-4, prompt


def test_golden_prompts_are_exact(bundle: Bundle) -> None:
    check_golden(bundle)


def test_openvino_reads_the_same_files(bundle: Bundle) -> None:
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed: pip install openvino")
    check_golden(bundle, "run_openvino.py")


@pytest.mark.matrix
@pytest.mark.parametrize("scheme", [scheme for scheme in RULES if scheme != "int4"])
def test_other_schemes(scheme: str, tiny_model, tmp_path: Path) -> None:
    spec = Spec(slots=96, buckets=(16,), profile=PROFILES["unrolled"])
    bundle = add_target(write(quantize(tiny_model, RULES[scheme]), None, tmp_path / "tiny", spec), "onnx")
    check_golden(bundle)


def test_real_model(stories260k, tmp_path: Path) -> None:
    model = quantize(stories260k.model, "int4-g32")
    spec = Spec(slots=128, buckets=(16,), profile=PROFILES["unrolled"])
    check_golden(add_target(write(model, stories260k.tokenizer, tmp_path / "stories", spec), "onnx"))


def test_several_rows_and_a_float16_cache(tiny_int4, tmp_path: Path) -> None:
    spec = Spec(batch=2, slots=32, buckets=(4,), cache_dtype="float16", profile=PROFILES["unrolled"])
    bundle = add_target(write(tiny_int4, None, tmp_path / "tiny", spec), "onnx")
    expected = llamajax.generate(tiny_int4, None, IDS, temperature=0, max_new_tokens=20, cache_dtype="float16")
    made = run(bundle, f"--ids={','.join(map(str, IDS))}", "--max_new_tokens=20")
    assert [int(token) for token in made.split()] == expected.tokens


def test_weights_are_four_bits_and_shared(bundle: Bundle) -> None:
    onnx = pytest.importorskip("onnx")
    folder, offsets, products = bundle.file("targets/onnx"), {}, 0
    for file in sorted(folder.glob("*.onnx")):
        graph = onnx.load(file, load_external_data=False).graph
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "MatMulNBits":
                options = {attribute.name: attribute.i for attribute in node.attribute}
                codes = tensors[node.input[1]]
                assert options["bits"] == 4 and options["accuracy_level"] == 1
                assert codes.data_type == onnx.TensorProto.UINT8
                assert list(codes.dims) == [options["N"], 1, options["block_size"] // 2]
                products += 1
        # No graph contains a weight, and none is stored twice.
        assert all(np.prod(tensor.dims) < 4096 for tensor in graph.initializer if not tensor.external_data)
        for tensor in graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert offsets.setdefault(tensor.name, place) == place or not place
    assert products and len(list(folder.glob("*.bin"))) == 1
    stored = sum(int(place["length"]) for place in offsets.values() if place)
    assert stored <= folder.joinpath("weights.bin").stat().st_size < stored + 64 * len(offsets)


def test_score_and_embed(bundle: Bundle, tiny_int4) -> None:
    runtime = pytest.importorskip("onnxruntime")
    tokens = np.asarray([IDS + [0] * (16 - len(IDS))], np.int32)
    inputs = {"tokens": tokens, "count": np.asarray([len(IDS)], np.int32)}
    run = lambda name: runtime.InferenceSession(bundle.file(f"targets/onnx/{name}.onnx")).run(None, inputs)[0]  # noqa: E731
    logits, _ = tiny_int4(np.asarray([IDS], np.int32))
    expected = jax.nn.log_softmax(logits[0, :-1])[np.arange(len(IDS) - 1), np.asarray(IDS[1:])]
    np.testing.assert_allclose(run("score")[0, 1 : len(IDS)], expected, atol=1e-4)
    hidden = tiny_int4.norm(tiny_int4.blocks(tiny_int4.embed(jnp.asarray([IDS])))[0])
    np.testing.assert_allclose(run("embed"), hidden.mean(1), atol=1e-4)


def test_what_it_cannot_do_is_refused(tiny_int4, tmp_path: Path) -> None:
    bundle = write(tiny_int4, None, tmp_path / "tiny", Spec(slots=32, buckets=(4,)))
    with pytest.raises(LlamaJaxError, match="profile 'scanned': expected 'unrolled'"):
        add_target(bundle, "onnx")
    spec = Spec(slots=32, buckets=(4,), cache_dtype="bfloat16", profile=PROFILES["unrolled"])
    with pytest.raises(LlamaJaxError, match="program prefill_4: a cache in bfloat16: expected float32"):
        add_target(write(tiny_int4, None, tmp_path / "bfloat16", spec), "onnx")
