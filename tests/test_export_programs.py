"""Exported programs: results against the float64 LLaMA, operations that they must not contain, names and order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import backend
from jax.interpreters import mlir
from jaxlib import _jax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

import llamajax
import quant
from export.lint import check
from export.lowering import Program, lower
from export.profiles import PROFILES, Spec
from export.weights import parameters
from llamajax.errors import LlamaJaxError
from llamajax.generation.sampling import make_sampler, sample
from llamajax.quantization.quantize import Rule, quantize
from tests.reference import forward, random_model, softmax, weights_of

CONFIG = llamajax.Config(
    vocab_size=48,
    width=32,
    ffn_width=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    context_length=64,
)
NORMS = Rule(weights="*norm*", keep=True)
TOKENS = np.random.default_rng(3).integers(0, 48, 12).astype(np.int32)


def packed(scheme: str = "int4", group_size: int = 16, **options) -> llamajax.Llama:
    rule = Rule(weights="*", scheme=scheme, group_size=group_size, scale_dtype="float16", **options)
    return quantize(random_model(CONFIG), (NORMS, rule))


def expected_logits(model: llamajax.Llama, tokens: np.ndarray) -> np.ndarray:
    """Returns logits of the float64 LLaMA with the dequantized weights."""
    floats = {name: quant.values(weight) for name, weight in llamajax.named_weights(model).items()}
    return forward(model.config, weights_of(llamajax.model_from(floats, model.config)), tokens)


def execute(program: Program, weights: dict, inputs: dict) -> dict[str, np.ndarray]:
    """Compiles the portable artifact with XLA, without tracing by JAX, and runs it."""
    module = stablehlo.deserialize_portable_artifact_str(program.artifact)
    device = jax.devices()[0]
    compiled = backend.get_backend().compile_and_load(module, _jax.DeviceList((device,)), _jax.CompileOptions())
    arguments = [
        *(weights.values() if program.weights != "none" else ()),
        *(inputs[value.name] for value in program.inputs),
    ]
    for value, array in zip(program.inputs, arguments[len(arguments) - len(program.inputs) :], strict=True):
        assert (value.shape, value.dtype) == (np.shape(array), str(np.asarray(array).dtype)), value
    results = compiled.execute_sharded([jax.device_put(np.asarray(array), device) for array in arguments])
    arrays = [np.asarray(result[0]) for result in results.disassemble_into_single_device_arrays()]
    return dict(zip((value.name for value in program.outputs), arrays, strict=True))


def empty_state(program: Program) -> dict[str, np.ndarray]:
    return {
        value.name: np.zeros(value.shape, value.dtype) for value in program.inputs if value.name in ("key", "value")
    }


def row(value: int) -> np.ndarray:
    return np.asarray([value], np.int32)


# Every scheme in one profile, every profile with one scheme; test_packing.py tests the arithmetic itself.
CASES = [(scheme, "scanned") for scheme in ("int4", "uint4", "int3", "int8", "nf4", "ternary")]
CASES += [("int3", "unrolled"), ("int4", "unrolled"), ("int4", "float"), ("int4", "cpu")]
CASES += [("mxfp4", "unrolled"), ("iq4_nl", "float"), ("nvfp4", "cpu"), ("iq4_nl", "cpu")]


@pytest.mark.matrix
@pytest.mark.parametrize(("scheme", "profile"), CASES)
def test_prefill_and_decode_equal_the_float64_model(scheme: str, profile: str) -> None:
    model = packed(scheme)
    spec = Spec(slots=32, buckets=(4, 8), profile=PROFILES[profile])
    programs, weights = lower(model, spec), parameters(model, spec.profile)
    if "prepare" in programs:
        assert {programs["prepare"].weights, programs["decode"].weights} == {"packed", "prepared"}
        weights = execute(programs["prepare"], weights, {})
    expected = expected_logits(model, TOKENS)
    inputs = {"tokens": TOKENS[None, :8], "count": row(8), "length": row(0), **empty_state(programs["decode"])}
    results = execute(programs["prefill_8"], weights, inputs)
    np.testing.assert_allclose(results["logits"][0], expected[7], atol=1e-4)
    # A chunk with padding at its end, which later tokens must not see.
    padded = np.asarray([[*TOKENS[8:10], 5, 6]], np.int32)
    results = execute(programs["prefill_4"], weights, {**results, "tokens": padded, "count": row(2), "length": row(8)})
    np.testing.assert_allclose(results["logits"][0], expected[9], atol=1e-4)
    for position in (10, 11):
        inputs = {**results, "token": TOKENS[position : position + 1], "length": row(position)}
        results = execute(programs["decode"], weights, inputs)
        np.testing.assert_allclose(results["logits"][0], expected[position], atol=1e-4)


def test_layers_of_different_schemes(tmp_path) -> None:
    rules = (NORMS, Rule(weights="layers.ffn.*", layers=(0,), scheme="int8", group_size=16))
    model = quantize(random_model(CONFIG), (*rules, Rule(weights="*", scheme="int4", group_size=16)))
    for profile in ("scanned", "unrolled"):
        spec = Spec(slots=16, buckets=(12,), profile=PROFILES[profile])
        programs = lower(model, spec)
        inputs = {"tokens": TOKENS[None], "count": row(12), "length": row(0), **empty_state(programs["decode"])}
        results = execute(programs["prefill_12"], parameters(model, spec.profile), inputs)
        np.testing.assert_allclose(results["logits"][0], expected_logits(model, TOKENS)[-1], atol=1e-4)


@pytest.mark.parametrize("profile", ["unrolled", "cpu"])
def test_tables_made_of_a_bfloat16_weight_are_looked_up_in_float32(profile: str) -> None:
    """Such a model was quantized in bfloat16 and loaded as float32; tested in-process and exported."""
    model = packed()
    model.embed_VD.set_value(dataclasses.replace(model.embed_VD.get_value(), dtype=np.dtype(jnp.bfloat16)))
    spec = Spec(slots=16, buckets=(12,), profile=PROFILES[profile])
    programs, weights = lower(model, spec), parameters(model, spec.profile)
    expected = expected_logits(model, TOKENS)
    np.testing.assert_allclose(model(TOKENS[None])[0][0], expected, atol=1e-4)
    if "prepare" in programs:
        weights = execute(programs["prepare"], weights, {})
    inputs = {"tokens": TOKENS[None], "count": row(12), "length": row(0), **empty_state(programs["decode"])}
    results = execute(programs["prefill_12"], weights, inputs)
    np.testing.assert_allclose(results["logits"][0], expected[-1], atol=1e-4)


@pytest.mark.parametrize("profile", ["scanned", "unrolled"])
def test_rows_of_different_length(profile: str) -> None:
    model = packed()
    spec = Spec(batch=2, slots=32, buckets=(8,), profile=PROFILES[profile])
    programs, weights = lower(model, spec), parameters(model, spec.profile)
    rows = np.stack([TOKENS[:8], TOKENS[4:12]])
    inputs = {"tokens": rows, "count": np.asarray([8, 3], np.int32), "length": np.zeros(2, np.int32)}
    results = execute(programs["prefill_8"], weights, {**inputs, **empty_state(programs["decode"])})
    np.testing.assert_allclose(results["logits"][0], expected_logits(model, TOKENS[:8])[7], atol=1e-4)
    np.testing.assert_allclose(results["logits"][1], expected_logits(model, TOKENS[4:12])[2], atol=1e-4)
    inputs = {"token": TOKENS[[8, 7]], "length": np.asarray([8, 3], np.int32), **results}
    results = execute(programs["decode"], weights, inputs)
    np.testing.assert_allclose(results["logits"][0], expected_logits(model, TOKENS[:9])[8], atol=1e-4)
    np.testing.assert_allclose(results["logits"][1], expected_logits(model, TOKENS[4:8])[3], atol=1e-4)


def test_verify_score_and_embed() -> None:
    model = packed()
    spec = Spec(slots=32, buckets=(8, 12), drafts=3, programs=("verify", "score", "embed"))
    programs, weights = lower(model, spec), parameters(model, spec.profile)
    expected = expected_logits(model, TOKENS)
    inputs = {"tokens": TOKENS[None, :8], "count": row(8), "length": row(0), **empty_state(programs["decode"])}
    results = execute(programs["prefill_8"], weights, inputs)
    results = execute(programs["verify"], weights, {**results, "tokens": TOKENS[None, 8:], "length": row(8)})
    np.testing.assert_allclose(results["logits"][0], expected[8:], atol=1e-4)
    text = {"tokens": TOKENS[None], "count": row(10)}
    scores = execute(programs["score"], weights, text)["log_probability"][0]
    probability = softmax(expected)
    np.testing.assert_allclose(scores[1:10], [np.log(probability[t, TOKENS[t + 1]]) for t in range(9)], atol=1e-4)
    assert scores[0] == 0 and not scores[10:].any()
    hidden_BTD = model.norm(model.blocks(model.embed(jnp.asarray(TOKENS[None, :10])))[0])
    embedding = execute(programs["embed"], weights, text)["embedding"]
    np.testing.assert_allclose(embedding, np.mean(hidden_BTD, axis=1), atol=1e-5)


def test_sample_draws_what_generate_draws() -> None:
    program = lower(packed(), Spec(batch=3, slots=16, buckets=(4,), programs=("sample",)))["sample"]
    logits_BV = np.random.default_rng(0).normal(size=(3, 48)).astype(np.float32) * 3
    key_B = jax.vmap(jax.random.key)(jnp.arange(3, dtype=jnp.uint32))
    knobs = {"temperature": [0.7, 1.0, 1.3], "top_k": [5, 48, 20], "top_p": [0.9, 0.5, 1.0]}
    length_B = np.asarray([3, 4, 5], np.int32)
    folded = jax.vmap(jax.random.fold_in)(key_B, length_B)
    expected_B, log_probability_B = sample(jnp.asarray(logits_BV), folded, make_sampler(**knobs))
    arrays = {name: np.asarray(value, np.int32 if name == "top_k" else np.float32) for name, value in knobs.items()}
    inputs = {"logits": logits_BV, "key": np.asarray(jax.random.key_data(key_B)), "length": length_B, **arrays}
    results = execute(program, {}, inputs)
    np.testing.assert_array_equal(results["token"], expected_B)
    np.testing.assert_allclose(results["log_probability"], log_probability_B, atol=1e-6)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_rows_of_temperature_0_get_the_likeliest_token(top_p: float) -> None:
    program = lower(packed(), Spec(batch=5, slots=16, buckets=(4,), programs=("sample",)))["sample"]
    logits_BV = np.random.default_rng(0).normal(size=(5, 48)).astype(np.float32)
    logits_BV[1] -= 100  # all negative, and temperatures so low that dividing by them overflows float32
    key_B2 = np.asarray(jax.random.key_data(jax.vmap(jax.random.key)(jnp.arange(5, dtype=jnp.uint32))))
    knobs = {"temperature": np.asarray([0, 0, 1e-40, 1e-6, 50], np.float32), "top_p": np.full(5, top_p, np.float32)}
    inputs = {"logits": logits_BV, "key": key_B2, "length": np.arange(5, dtype=np.int32), **knobs}
    results = execute(program, {}, {**inputs, "top_k": np.full(5, 48, np.int32)})
    likeliest_B = logits_BV.argmax(axis=1)
    np.testing.assert_array_equal(results["token"][:4], likeliest_B[:4])
    assert results["token"][4] != likeliest_B[4]  # drawn by its key: nearly uniform
    probability_BV = softmax(logits_BV.astype(np.float64))
    expected = np.log(probability_BV[np.arange(5), results["token"]])
    np.testing.assert_allclose(results["log_probability"], expected, atol=1e-5)


def test_every_profile_is_tried() -> None:
    assert {profile for _, profile in CASES} == set(PROFILES)


def test_the_reference_interpreter_of_stablehlo_agrees() -> None:
    model = packed()
    spec = Spec(slots=8, buckets=(4,), profile=PROFILES["unrolled"])
    program = lower(model, spec)["prefill_4"]
    inputs = {"tokens": TOKENS[None, :4], "count": row(4), "length": row(0), **empty_state(program)}
    arrays = [*parameters(model, spec.profile).values(), *(inputs[value.name] for value in program.inputs)]
    with mlir.make_ir_context() as context:
        stablehlo.register_interpreter_dialect(context)
        module = ir.Module.parse(stablehlo.deserialize_portable_artifact_str(program.artifact))
        attributes = [_dense(np.asarray(array)) for array in arrays]
        logits = np.asarray(stablehlo.eval_module(module, attributes)[0]).reshape(-1)
    np.testing.assert_allclose(logits, expected_logits(model, TOKENS[:4])[3], atol=1e-4)


def _dense(array: np.ndarray) -> ir.DenseElementsAttr:
    kinds = {
        "uint8": ir.IntegerType.get_unsigned(8),
        "int32": ir.IntegerType.get_signless(32),
        "float16": ir.F16Type.get(),
        "float32": ir.F32Type.get(),
    }
    return ir.DenseElementsAttr.get(np.ascontiguousarray(array), type=kinds[str(array.dtype)], shape=array.shape)


def test_weights_are_arguments_in_the_order_of_their_names() -> None:
    model = packed()
    names = list(parameters(model, PROFILES["scanned"]))
    assert names[:4] == ["embed_VD.planes.0", "embed_VD.scale", "head_VD.planes.0", "head_VD.scale"]
    assert "layers.*.ffn.up_DF.planes.0" in names and names[-1] == "norm.weight_D"
    unrolled = list(parameters(model, PROFILES["unrolled"]))
    layers = [int(name.split(".")[1]) for name in unrolled if name.startswith("layers.")]
    assert layers == sorted(layers) and set(layers) == {0, 1}
    assert "layers.1.ffn.up_DF.planes.0" in unrolled


def test_state_may_be_updated_in_place_and_source_is_not_named() -> None:
    program = lower(packed(), Spec(slots=16, buckets=(4,)))["decode"]
    with mlir.make_ir_context():
        text = str(ir.Module.parse(stablehlo.deserialize_portable_artifact_str(program.artifact)))
    main = text[: text.index("->")]
    assert main.count("tf.aliasing_output") == 2
    assert b".py" not in program.artifact and b"loc(" not in text.encode()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda x: x.at[jnp.asarray([0, 2])].set(1.0), "operation stablehlo.scatter is not in the list"),
        (lambda x: jax.lax.linalg.cholesky(jnp.outer(x, x)), "custom_call is not in the list"),
        (lambda x: x + np.arange(8000, dtype=np.float32)[:4] * np.random.rand(8000)[0], None),
        (lambda x: x @ np.random.default_rng(0).normal(size=(4, 4000)).astype(np.float32), "a constant of shape"),
    ],
    ids=["scatter", "custom_call", "small constant", "weight closed over"],
)
def test_planted_faults(fault, message: str | None) -> None:
    module = jax.jit(fault).lower(jax.ShapeDtypeStruct((4,), jnp.float32)).compiler_ir("stablehlo")
    with module.context:
        if message is None:
            assert check(module, PROFILES["scanned"], "planted")
        else:
            with pytest.raises(LlamaJaxError, match=message):
                check(module, PROFILES["scanned"], "planted")


@pytest.mark.parametrize("dtype", ["i64", "i4", "f64"])
def test_arguments_of_types_that_runtimes_lack(dtype: str) -> None:
    with mlir.make_ir_context():
        module = ir.Module.parse(
            f"func.func public @main(%a: tensor<4xf32>, %b: tensor<4x{dtype}>) -> tensor<4xf32> "
            "{ return %a : tensor<4xf32> }"
        )
        with pytest.raises(LlamaJaxError, match=rf"argument 1 is tensor<4x{dtype}>: expected one of f32"):
            check(module, PROFILES["scanned"], "planted")


def test_a_profile_without_loops_refuses_one() -> None:
    module = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x * 2, x)).lower(1.0).compiler_ir("stablehlo")
    with module.context:
        assert check(module, PROFILES["scanned"], "loop")["while"] == 1
        with pytest.raises(LlamaJaxError, match="stablehlo.while is not in the list of profile 'unrolled'"):
            check(module, PROFILES["unrolled"], "loop")


def test_float_programs_have_no_arithmetic_on_bytes() -> None:
    for name, program in lower(packed(), Spec(slots=16, buckets=(4,), profile=PROFILES["float"])).items():
        assert not {"shift_right_logical", "shift_left", "while", "case"} & set(program.operations), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "expected at least 1"),
        ({"buckets": (16, 4)}, "expected increasing numbers of tokens"),
        ({"buckets": (16, 64), "slots": 32}, "expected no more than the 32 slots"),
        ({"programs": ("translate",)}, "program 'translate': expected one of sample"),
        ({"cache_dtype": "int8"}, "expected float32, bfloat16 or float16 to export"),
    ],
)
def test_a_spec_that_makes_no_sense(options: dict, message: str) -> None:
    with pytest.raises(LlamaJaxError, match=message):
        Spec(**options)


def test_a_prepared_model_is_refused() -> None:
    with pytest.raises(LlamaJaxError, match="prepared for a backend: export the model from before"):
        lower(llamajax.prepare(packed(), "cpu"), Spec(slots=16, buckets=(4,)))


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_rounded_activations_are_refused(kind: str) -> None:
    """bfloat16 and int8 groups cannot be exported; int8 per token can (BitNet)."""
    rounded = llamajax.with_activations(packed(), kind)
    with pytest.raises(LlamaJaxError, match=f"round their activations .{kind}.*: .* --activations=float32"):
        lower(rounded, Spec(slots=16, buckets=(4,)))


def test_arguments_that_make_no_sense_give_nan() -> None:
    model = packed()
    spec = Spec(batch=10, slots=32, buckets=(4,), drafts=3, programs=("verify", "score", "embed"))
    programs, weights = lower(model, spec), parameters(model, spec.profile)
    tokens, count = np.tile(TOKENS[:4], (10, 1)), np.full(10, 4, np.int32)
    tokens[:3, 2] = -1, 48, 2**31 - 1  # outside the vocabulary
    count[3:6] = 0, -1, 5
    for name, program in programs.items():
        T = 1 if name == "decode" else 4
        length = np.zeros(10, np.int32)
        length[6:10] = -1, 33 - T, 2**31 - 1, 32 - T
        inputs = {"tokens": tokens, "token": tokens[:, 2], "count": count, "length": length, **empty_state(program)}
        result = next(iter(execute(program, weights, inputs).values()))
        wrong = {0, 1, 2}
        wrong |= {3, 4, 5} if "count" in {value.name for value in program.inputs} else set()
        wrong |= {6, 7, 8} if "length" in {value.name for value in program.inputs} else set()
        assert {row for row in range(10) if np.isnan(result[row]).any()} == wrong, name
        assert np.isfinite(result[9]).all(), name
