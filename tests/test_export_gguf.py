"""Bundles from GGUF files: weights stay packed, and other runtimes give the tokens that we give."""

import dataclasses
import importlib.util
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy

import llamajax
import quant
from export.bundle import Bundle, open_bundle, write
from export.profiles import PROFILES, Spec
from export.targets import add_target
from export.targets.onnx_packed import PackedWeight, bits_of, digits_of, raw_digits, values_of
from export.verification import verify
from export.weights import ExportedWeight
from quant import ggml
from tests import gguf_files, reference
from tests.gguf_files import Kind
from tests.isolated import run_isolated

NEEDS = {"onnx": ("onnx", "onnxruntime"), "iree": ("iree.compiler", "iree.runtime")}
# Types of the table and of the seven matrices of the one layer. Together: all types that stay packed, except TQ1_0 and
# TQ2_0.
NAMES = ("token_embd", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
TYPES = {
    "small": ("Q8_0", "Q4_1", "Q4_1", "Q4_K", "Q6_K", "Q4_1", "Q4_K", "Q6_K"),
    "usual": ("Q6_K", "Q4_1", "Q4_K", "Q6_K", "Q5_K", "Q8_0", "Q4_0", "Q5_1"),
    "others": ("Q4_1", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "Q2_K", "Q3_K", "Q5_0"),
}
CONFIG = dataclasses.replace(gguf_files.CONFIG, num_layers=1)
PROMPTS = [[1, 5, 9, 300, 17, 42, 8], [3]]


def _missing(runtime: str) -> str:
    """Returns a module of a runtime or its toolchain that is not installed, or ""."""
    try:
        return next((name for name in NEEDS[runtime] if importlib.util.find_spec(name) is None), "")
    except ModuleNotFoundError as error:  # the package of a module
        return str(error.name)


def made_of(types: str, folder: Path, profile: str) -> tuple[gguf_files.Made, Bundle]:
    """Writes a GGUF file by the gguf package, and the bundle of the model that is read from it."""
    of = dict(zip(NAMES, TYPES[types], strict=True))
    made = gguf_files.write(folder / "tiny.gguf", lambda name: Kind[of[name.split(".")[-2]]], CONFIG)
    model = llamajax.open_checkpoint(made.path).read(None)
    spec = Spec(slots=96, buckets=(16,), profile=PROFILES[profile])
    return made, write(model, None, folder / "tiny.bundle", spec, prompts=PROMPTS)


def check_against_the_reference(made: gguf_files.Made, bundle: Bundle) -> None:
    """Checks each golden token against the float64 LLaMA with the gguf package's floats."""
    theirs, golden = made.weights(), safetensors.numpy.load_file(bundle.file("golden.safetensors"))
    weights = {
        spec.foreign["huggingface"].format(place.layer): theirs[spec.foreign["gguf"].format(place.layer)]
        for place, spec in llamajax.parameters.specs(CONFIG).items()
    }
    for index, prompt in enumerate(PROMPTS):
        tokens = golden[f"tokens_{index}"]
        text = np.concatenate([prompt, tokens[:-1]])
        logits = reference.forward(CONFIG, weights, text, neighbours=True)[len(prompt) - 1 :]
        np.testing.assert_array_equal(np.argmax(logits, axis=-1), tokens)
        np.testing.assert_allclose(golden[f"logits_{index}"], logits[0], atol=2e-5 * np.abs(logits[0]).max())


@pytest.fixture(scope="module", params=["usual", pytest.param("others", marks=pytest.mark.exhaustive)])
def bundle(request, tmp_path_factory) -> Bundle:
    if all(map(_missing, NEEDS)):
        pytest.skip("neither ONNX Runtime nor IREE is installed")
    made, bundle = made_of(request.param, tmp_path_factory.mktemp("gguf"), "unrolled")
    check_against_the_reference(made, bundle)
    return bundle


# ---- Packed weights for ONNX, in NumPy ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [kind.name for kind in ggml.TYPES.values() if kind.packed is not None])
@pytest.mark.parametrize("axis", [2, 1])
def test_digits_times_scales_plus_offsets_are_the_weight(name: str, axis: int) -> None:
    """In float64, compared with the gguf package: splitting codes into 4-bit digits is exact for every type."""
    blocks = gguf_files.blocks(Kind[name], 24, 512)
    expected_MK = gguf.quants.dequantize(blocks, Kind[name])
    made = ggml.unpack(name, blocks)
    weight = made if axis == 1 else ggml.transposed(made)
    arrays = {part[1:]: np.asarray(array) for part, array in llamajax.parts_of(weight).items()}
    assert PackedWeight.known(arrays)
    of_planes = {part: getattr(getattr(weight, part), "scheme", None) for part in ("scale", "offset")}
    of_planes = {part: scheme and scheme.name for part, scheme in of_planes.items()}
    packed = PackedWeight(arrays, weight.scheme.name, weight.group_size, axis, of_planes)
    assert packed.shape == (512, 24) and packed.zero is None
    values, unit = values_of(weight.scheme.name)
    shift, digits = digits_of(values)
    codes_KM, group = packed.codes(), weight.group_size
    spread = lambda plane_CM: np.repeat(plane_CM.astype(np.float64), group, axis=0)  # noqa: E731
    numbers = shift + sum(factor * (table[codes_KM].astype(int) - zero) for factor, table, zero in digits)
    assert all(table.max() <= 15 for _, table, _ in digits)
    made_KM = numbers * unit * spread(packed.scale()) + (spread(packed.offset()) if packed.has_offset else 0)
    np.testing.assert_array_equal(made_KM.astype(np.float32), expected_MK.T)


@pytest.mark.parametrize(
    "scheme", ["int8", "uint8", "int7", "int6", "uint5", "uint4", "int3", "uint2", "ternary", "iq4_nl"]
)
def test_digits_are_the_numbers(scheme: str) -> None:
    values, _ = values_of(scheme)
    shift, digits = digits_of(values)
    for factor, table, zero in digits:
        assert table.dtype == np.uint8 and factor in (1, 16) and zero in (0, 8)
    made = shift + sum(factor * (table.astype(int) - zero) for factor, table, zero in digits)
    np.testing.assert_array_equal(made, values)
    # A zero point of the weight itself is in the same digits.
    raw = sum(factor * table.astype(int) for factor, table, _ in raw_digits(bits_of(scheme)))
    np.testing.assert_array_equal(raw, np.arange(1 << bits_of(scheme)))


def test_second_levels_are_unpacked_in_the_arithmetic_that_is_asked_for() -> None:
    weight = ggml.transposed(ggml.unpack("Q4_K", gguf_files.blocks(Kind.Q4_K, 8, 256)))
    x = np.ones((1, 256), np.float32)
    for arithmetic, shifts in (("integer", True), ("float", False)):
        multiply = jax.jit(
            lambda weight, x, arithmetic=arithmetic: ExportedWeight(weight, arithmetic=arithmetic).matmul(x)
        )
        text = multiply.lower(weight, x).as_text()
        assert "matmul_uint4_g32_axis2_scale_uint6_offset_uint6(" in text
        assert ("stablehlo.shift_right_logical" in text or "stablehlo.and" in text) is shifts


@pytest.mark.parametrize(("scheme", "axis"), [("int4", -2), ("int3", -1)])
def test_scales_under_one_float_for_an_output(scheme: str, axis: int) -> None:
    """For recipes rather than GGUF: the parts that ONNX gets, and the products and rows of the other programs."""
    rng = np.random.default_rng(0)
    floats = rng.normal(size=(96, 24) if axis == -2 else (24, 96)).astype(np.float32)
    weight = quant.quantize_two_levels(floats, scheme, "int8", group_size=32, scale_group="channel", axis=axis)
    values = np.asarray(quant.dequantize(weight), np.float64)
    expected_KM = values if axis == -2 else values.T
    arrays = {part[1:]: np.asarray(array) for part, array in llamajax.parts_of(weight).items()}
    assert PackedWeight.known(arrays)
    packed = PackedWeight(arrays, scheme, 32, -axis, {"scale": "int8", "offset": None})
    made_KM = (packed.codes().astype(float) - weight.scheme.bias) * np.repeat(packed.scale().astype(float), 32, axis=0)
    np.testing.assert_allclose(made_KM, expected_KM, rtol=1e-6)
    x_RK = rng.normal(size=(2, 96)).astype(np.float32)
    for arithmetic in ("integer", "float"):
        exported = ExportedWeight(weight, arithmetic=arithmetic)
        np.testing.assert_allclose(jax.jit(lambda x, w: w.matmul(x))(x_RK, exported), x_RK @ expected_KM, atol=1e-4)
        if axis == -1:
            np.testing.assert_allclose(exported.rows(np.asarray([5, 23])), values[[5, 23]], rtol=1e-6)


# ---- Bundles --------------------------------------------------------------------------------------------------------


def test_weights_stay_packed_and_give_the_reference_tokens(tmp_path: Path) -> None:
    made, bundle = made_of("small", tmp_path, "scanned")
    assert sum(array.nbytes for array in bundle.weights().values()) == sum(
        data.nbytes for _, data in made.blocks.values()
    )
    check_against_the_reference(made, bundle)


def need(*runtimes: str) -> None:
    """Skips a test where one of the runtimes is not installed."""
    if missing := next(filter(None, map(_missing, runtimes)), ""):
        pytest.skip(f"{missing} is not installed")


def check(bundle: Bundle, runtime: str) -> None:
    """Adds a runtime's target, and checks that the runtime gives the golden tokens."""
    target = {"onnx": "onnx", "iree": "iree-cpu"}[runtime]
    bundle = open_bundle(bundle.path)
    (result,) = verify(bundle if target in bundle.manifest["targets"] else add_target(bundle, target), [runtime])
    assert result.held and result.exact and result.tokens == bundle.manifest["golden"]["prompts"] * 64, result


@pytest.mark.extras
@pytest.mark.parametrize("runtime", NEEDS)
def test_the_same_tokens(runtime: str, bundle: Bundle) -> None:
    need(runtime)
    check(bundle, runtime)


@pytest.mark.extras
def test_weights_are_not_dequantized_in_onnx(bundle: Bundle) -> None:
    """All matrices are multiplied as 4-bit codes; the remaining plain products are attention and offsets."""
    onnx = pytest.importorskip("onnx")
    bundle = open_bundle(bundle.path)
    bundle = bundle if "onnx" in bundle.manifest["targets"] else add_target(bundle, "onnx")
    graph = onnx.load(bundle.file("targets/onnx/decode.onnx"), load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    inputs = {name for node in graph.node for name in node.input if name in tensors}
    assert not [name for name in inputs if ".planes." in name], "the decode graph must not read planes"
    products = [node.input[1] for node in graph.node if node.op_type == "MatMul" and node.input[1] in tensors]
    assert all(name.endswith(".offsets") for name in products)
    assert {node.input[1].partition(".codes")[0] for node in graph.node if node.op_type == "MatMulNBits"} == {
        weight["name"].removesuffix(".planes.0")
        for weight in bundle.manifest["weights"]
        if weight["name"].endswith(".planes.0") and not weight["name"].endswith((".scale.planes.0", ".offset.planes.0"))
    }


# ---- A file that others made ----------------------------------------------------------------------------------------


@pytest.mark.extras
@pytest.mark.optimized
@pytest.mark.parametrize("runtimes", [["onnx"], pytest.param(list(NEEDS), marks=pytest.mark.exhaustive)])
def test_smollm2_says_the_same_everywhere(runtimes: list[str], smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct in Q4_1 and Q8_0 from its GGUF: 64 greedy tokens, which begin with an answer."""
    need(*runtimes)
    opened = llamajax.open_checkpoint(smollm2)
    tokenizer, model = llamajax.Tokenizer(opened.tokenizer_bytes, words=opened.words), opened.read(None)
    asked = "What is the capital of France?"
    ids = llamajax.Template.of(tokenizer).encode(tokenizer, [llamajax.Message("user", asked)])
    spec = Spec(slots=128, buckets=(64,), profile=PROFILES["unrolled"])
    bundle = write(model, tokenizer, tmp_path / "smollm2", spec, prompts=[ids])
    tokens = safetensors.numpy.load_file(bundle.file("golden.safetensors"))["tokens_0"].tolist()
    answer = tokens[: tokens.index(tokenizer.id_of("<|im_end|>"))]
    assert tokenizer.decode(answer) == "The capital of France is Paris."
    (result,) = verify(bundle, ["jax"])
    assert result.held and result.exact, result
    assert result.conversations == len(bundle.manifest["golden"]["conversations"]) > 0
    for runtime in runtimes:
        check(bundle, runtime)
    # The same in a conversation, without Jinja; text that looks like the end of a turn does not end it.
    lines = f"{asked}\nSay <|im_end|> please."
    done = run_isolated(bundle.path, "--chat", "--max_new_tokens=16", runner="run_onnx.py", hidden=("jax",), said=lines)
    assert done.returncode == 0 and done.stdout.startswith("The capital of France is Paris.\n"), done.stderr
    read = [int(line.split()[0]) for line in done.stderr.splitlines() if " tokens read" in line]
    spelt = tokenizer.encode("user\nSay <|im_end|> please.")
    around = tokenizer.encode("<|im_end|>\n<|im_start|><|im_end|>\n<|im_start|>assistant\n", special=True)
    assert read == [len(ids), len(spelt) + len(around)] and tokenizer.id_of("<|im_end|>") not in spelt
