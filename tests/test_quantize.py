"""Quantized models: the same tree with `QTensor` leaves, made by a recipe, saved and loaded."""

import dataclasses
import functools
import json
import math
import tomllib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamajax
from llamajax import Config, Llama, LlamaJaxError, next_token_losses
from llamajax.box.stories import corpus
from llamajax.evaluation.evaluate import compare, cross_entropy, encode_documents
from llamajax.parameters import Place, Spec, leaves
from llamajax.quantization.quantize import quantize, read_recipe, recipe_names
from llamajax.quantization.quantize_weight import quantize_weight
from llamajax.train import heldout_stories
from quant import QTensor, quantize_rtn
from quant.recipe import KEYS, Recipe, Rule, assign, recipe_from
from tests.programs import forward as forward_pass
from tests.reference import forward, random_model, weights_of

CONFIG = Config(
    vocab_size=96,
    width=64,
    ffn_width=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    context_length=64,
)
WEIGHTS = {name: leaf.layers for name, leaf in leaves(CONFIG).items()}
KEEP_NORMS = Rule(weights="*norm*", keep=True)
MIXED = (
    KEEP_NORMS,
    Rule(weights="layers.*.ffn.*", scheme="uint3", group_size=32),
    Rule(weights="layers.*.attention.*", scheme="nf4", group_size=64, clip="mse"),
    Rule(weights="*", scheme="int8", group_size=16, scale_dtype="float16"),
)
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))


@pytest.fixture(scope="module")
def mixed() -> Llama:
    """A model quantized in three schemes, including head and embedding."""
    return quantize(random_model(CONFIG), MIXED)


def numpy_dequantized(model: Llama) -> Llama:
    """Dequantizes every QTensor of a model by FORMAT.md's formula, in NumPy, unpacked bit by bit."""

    def dense(weight):
        if not isinstance(weight, QTensor):
            return weight
        axis, bits = weight.axis, weight.scheme.bits
        planes = [np.moveaxis(np.asarray(plane), axis, -1) for plane in weight.planes]
        scale = np.moveaxis(np.asarray(weight.scale, np.float64), axis, -1)
        groups = scale.shape[-1]
        codes, shift = 0, 0
        for plane, width in zip(planes, {8: [8], 4: [4], 3: [2, 1]}[bits], strict=True):
            run = plane.reshape(*plane.shape[:-1], groups, -1)
            parts = [(run >> slot) & (2**width - 1) for slot in range(0, 8, width)]
            codes = codes + (np.concatenate(parts, axis=-1).astype(int) << shift)
            shift += width
        if weight.scheme.kind == "nf4":
            from quant.scheme import NF4

            value = np.asarray(NF4)[codes]
        else:
            value = codes - (2 ** (bits - 1) if weight.scheme.kind == "int" else 0.0)
        if weight.zero is not None:
            value = value - np.moveaxis(np.asarray(weight.zero, np.float64), axis, -1)[..., None]
        value = (value * scale[..., None]).reshape(*planes[0].shape[:-1], -1)
        return jnp.asarray(np.moveaxis(value, -1, axis), jnp.float32)

    return jax.tree.map(dense, model, is_leaf=lambda node: isinstance(node, QTensor))


def test_logits_are_those_of_the_reference_with_dequantized_weights(mixed: Llama) -> None:
    weights = weights_of(numpy_dequantized(mixed))
    logits = forward_pass(mixed, jnp.asarray(TOKENS))
    for row, tokens in enumerate(TOKENS):
        np.testing.assert_allclose(np.asarray(logits[row]), forward(CONFIG, weights, tokens), atol=1e-4)
    plain = forward_pass(random_model(CONFIG), jnp.asarray(TOKENS))
    assert np.abs(np.asarray(logits - plain)).max() > 1e-2, "3 bits must change logits, or nothing was quantized"


def test_generation_with_a_cache_equals_without(mixed: Llama) -> None:
    completion = llamajax.generate(mixed, None, [5, 6, 7], temperature=0, max_new_tokens=10)
    tokens = [5, 6, 7, *completion.tokens]
    likeliest = np.argmax(forward_pass(mixed, jnp.asarray([tokens]))[0], axis=-1)
    assert len(completion.tokens) == 10 and completion.tokens == likeliest[2:-1].tolist()


def test_an_id_outside_the_vocabulary_is_nan(mixed: Llama) -> None:
    logits = forward_pass(mixed, jnp.asarray([[96], [-1], [95]]))
    assert np.isnan(np.asarray(logits[:2])).all() and np.isfinite(np.asarray(logits[2])).all()


def test_gradients_of_lora_beside_quantized_weights(mixed: Llama) -> None:
    """Gradients of a low-rank addition to the hidden state, beside frozen packed weights, equal finite differences."""
    tokens = jnp.asarray(TOKENS)

    def loss(lora):
        hidden, _ = mixed.blocks(mixed.embed(tokens))
        logits = mixed.head(hidden + hidden @ lora["down"] @ lora["up"])
        return -jnp.mean(jax.nn.log_softmax(logits)[:, :, 3])

    keys = jax.random.split(jax.random.key(1), 2)
    lora = {"down": jax.random.normal(keys[0], (64, 4)) * 0.3, "up": jax.random.normal(keys[1], (4, 64)) * 0.3}
    gradient = jax.jit(jax.grad(loss))(lora)
    for name, step in (("down", jnp.zeros((64, 4)).at[7, 2].set(1e-2)), ("up", jnp.zeros((4, 64)).at[1, 40].set(1e-2))):
        above, below = ({**lora, name: lora[name] + sign * step} for sign in (1, -1))
        expected = (loss(above) - loss(below)) / 2e-2
        actual = jnp.sum(jnp.where(step != 0, gradient[name], 0))
        np.testing.assert_allclose(actual, expected, rtol=2e-2, atol=1e-5)


def test_checkpoint_round_trip_bit_for_bit(mixed: Llama, tmp_path: Path) -> None:
    llamajax.save_checkpoint(mixed, tmp_path / "q")
    again, _ = llamajax.load(tmp_path / "q")
    assert jax.tree.structure(again) == jax.tree.structure(mixed)
    for before, after in zip(jax.tree.leaves(mixed), jax.tree.leaves(again), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
    chunks = [file.stat().st_size for file in (tmp_path / "q" / "weights").rglob("c/**/*") if file.is_file()]
    # Files hold the bytes that the format promises, and in each chunk Zarr's index of 20 bytes.
    assert sum(chunks) - 20 * len(chunks) == sum(leaf.nbytes for leaf in jax.tree.leaves(mixed))
    converted, _ = llamajax.load(tmp_path / "q", dtype=jnp.bfloat16)
    assert converted.dtype == jnp.bfloat16 and converted.head_VD.get_value().scheme.name == "int8"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w["layers.*.ffn.up_DF"].update(scheme="int9"), "no scheme 'int9'"),
        (lambda w: w["layers.*.ffn.up_DF"].update(axis=0), "axis 0"),
        (lambda w: w["layers.*.ffn.up_DF"].update(extra=1), "expected a scheme"),
        (lambda w: w["layers.*.ffn.up_DF"].pop("scale"), "scale"),
        (lambda w: w["layers.*.ffn.up_DF"]["planes"].pop(), "planes"),
        (lambda w: w["layers.*.ffn.up_DF"]["planes"][0].update(dtype="int4"), "dtype 'int4'"),
        (lambda w: w["layers.*.ffn.up_DF"]["scale"].update(shape=[1, 128]), "plane"),
        (lambda w: w["layers.*.ffn.up_DF"].update(scale=dict(w["layers.*.ffn.up_DF"])), "does not fill whole bytes"),
    ],
)
def test_damaged_manifests_are_named(mixed: Llama, tmp_path: Path, change, message: str) -> None:
    llamajax.save_checkpoint(mixed, tmp_path / "q")
    file = tmp_path / "q" / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest["weights"])
    del manifest["sha256"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(LlamaJaxError, match=f"layers.0.ffn.up_DF: .*{message}.*damaged"):
        llamajax.load(tmp_path / "q")


def test_what_a_quantized_model_cannot_do_is_said(mixed: Llama, tmp_path: Path) -> None:
    with pytest.raises(LlamaJaxError, match="quantized already"):
        quantize(mixed, MIXED)
    with pytest.raises(LlamaJaxError, match="transformers cannot read"):
        llamajax.save_checkpoint(mixed, tmp_path / "hf", form="huggingface")
    with pytest.raises(LlamaJaxError, match=r"layers.0.ffn.down_FD of shape \(128, 64\).*groups of 48"):
        quantize(random_model(CONFIG), (KEEP_NORMS, Rule(weights="*down*", scheme="int4", group_size=48), MIXED[-1]))


# Name -> (bits per packed weight, the factor by which perplexity on unseen stories may grow).
READY = {
    "int8": (8.5, 1.001),
    "int4-g32": (4.5, 1.02),
    "int4-g128": (4.125, 1.02),
    "int4-g128-gptq": (4.125, 1.01),
    "int4-g128-awq": (4.125, 1.02),
    "nf4-g64": (4.25, 1.02),
    "int3-g64": (3.25, 1.06),
    "int3-g64-gptq": (3.25, 1.05),
    "mixed-4.5bpw": (4.5, 1.01),
    "calibrated": (4.5, 1.005),
    "uncalibrated": (4.5, 1.02),
    "ternary": (2.93, math.inf),
    "bitnet": (2.0, math.inf),
}


# These try every number of bits for all layers of the box, which takes as long as 100 other tests.
BITS_ARE_SEARCHED = ("mixed-4.5bpw", "calibrated", "uncalibrated")


@pytest.fixture(scope="module")
def stories() -> tuple[Llama, np.ndarray, np.ndarray]:
    """Returns the box in float32, tokens that it was trained on, and tokens that it was not trained on.

    One row of its embedding table is nearly zero, for an id that no text has, as for Llama 3's reserved tokens.
    """
    model, tokenizer = llamajax.load("box", dtype=jnp.float32)
    assert tokenizer is not None
    model.embed_VD.set_value(model.embed_VD.get_value().at[0].multiply(1e-9))
    seen = encode_documents(tokenizer, list(corpus(0, 60)))[: 16 * 512]
    return model, seen, encode_documents(tokenizer, heldout_stories()[:24])


@pytest.fixture(scope="module")
def made(stories) -> Callable[[str], Llama]:
    """Returns a function that quantizes the box by a ready recipe, each recipe once."""
    model, seen, _ = stories
    return functools.cache(lambda name: quantize(model, name, calibration=seen))


def packed_bits(model: Llama) -> float:
    packed = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, QTensor))
    packed = [weight for weight in packed if isinstance(weight, QTensor)]
    return sum(weight.nbytes for weight in packed) * 8 / sum(weight.size for weight in packed)


def test_ready_recipes_are_those_that_are_measured() -> None:
    assert set(recipe_names()) == set(READY)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name in BITS_ARE_SEARCHED)) for name in READY]
)
def test_every_ready_recipe_on_the_box(stories, made, name: str) -> None:
    """Sizes are as promised; on unseen stories, perplexity grows by under 2% at int8 and 4 bits, under 6% at 3 bits."""
    model, _, unseen = stories
    bits, limit = READY[name]
    assert packed_bits(made(name)) == pytest.approx(bits, abs=0.03 if name in (*BITS_ARE_SEARCHED, "ternary") else 0)
    assert np.exp(cross_entropy(made(name), unseen) - cross_entropy(model, unseen)) < limit


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("better", "plain", "most"),
    [
        ("int4-g128-gptq", "int4-g128", 0.95),
        ("int4-g128-awq", "int4-g128", 1.0),
        ("int3-g64-gptq", "int3-g64", 0.85),
        ("mixed-4.5bpw", "int4-g32", 0.7),
        ("calibrated", "mixed-4.5bpw", 0.8),
        ("uncalibrated", "int4-g32", 0.9),
        ("int4-g32", "int4-channel", 0.7),
    ],
)
def test_which_recipe_is_nearer_to_the_floats(stories, made, better: str, plain: str, most: float) -> None:
    """Compares the KL divergence on unseen stories: GPTQ and AWQ with plain rounding, blocks with channels."""
    model, _, unseen = stories
    channels = Rule(weights="*", scheme="int4", group_size="channel", clip="mse", scale_dtype="float16")

    def divergence_of(name: str) -> float:
        quantized = quantize(model, (KEEP_NORMS, channels)) if name == "int4-channel" else made(name)
        return compare(quantized, model, unseen).kl_divergence

    divergence = {name: divergence_of(name) for name in (better, plain)}
    assert divergence[better] <= most * divergence[plain], divergence


def test_scan_over_quantized_layers_compiles_flat_in_depth() -> None:
    def lines(layers: int) -> int:
        config = Config.from_dict(CONFIG.to_dict() | {"num_layers": layers})
        model = quantize(random_model(config), MIXED)
        return jax.jit(next_token_losses).lower(model, jnp.asarray(TOKENS)).as_text().count("\n")

    assert lines(2) == lines(6)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([KEEP_NORMS], "no rule matches the weight 'embed_VD'"),
        ([Rule(weights="*", keep=True), KEEP_NORMS], "rule for '.norm.' decides for no weight"),
        ([Rule(weights="*moe*", keep=True), Rule(weights="*", keep=True)], "rule for '.moe.' decides for no weight"),
    ],
)
def test_rules_and_weights_must_cover_each_other(rules, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assign(rules, WEIGHTS, 3)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ((Rule(weights="*", scheme="int4"),), r"layers.0.attention_norm.weight_D"),
        ((Rule(weights="layers.*norm*", keep=True), Rule(weights="*", scheme="int8")), r"norm.weight_D"),
        (Recipe((Rule(weights="*", scheme="int4", method="gptq"),)), r"layers.0.attention_norm.weight_D"),
        (Recipe((Rule(weights="*", scheme="int4"),), target_bpw=4.5), r"layers.0.attention_norm.weight_D"),
    ],
)
def test_a_recipe_that_quantizes_norms_is_named(recipe, name: str) -> None:
    """The error is raised before any work is done."""
    with pytest.raises(
        LlamaJaxError, match=rf"^{name}: the rule for '\*' would quantize a weight that is no matrix.* keeps norms"
    ):
        quantize(random_model(CONFIG), recipe, calibration=np.arange(64) % CONFIG.vocab_size)


def test_the_first_matching_rule_decides() -> None:
    schemes = {key: rule.scheme for key, rule in assign(MIXED, WEIGHTS, 3).items()}
    assert len(schemes) == 9 * 3 + 3
    assert schemes["layers.*.ffn.up_DF", 2] == "uint3" and schemes["layers.*.attention.key_DM", 0] == "nf4"
    assert schemes["embed_VD", None] == schemes["head_VD", None] == "int8"
    assert schemes["layers.*.ffn_norm.weight_D", 1] is None


def test_rules_for_some_layers() -> None:
    rules = (
        KEEP_NORMS,
        Rule(weights="layers.*", layers=(0, -1), scheme="int8"),
        Rule(weights="*", scheme="int4"),
    )
    chosen = assign(rules, WEIGHTS, 3)
    assert [chosen["layers.*.ffn.up_DF", layer].scheme for layer in range(3)] == ["int8", "int4", "int8"]
    assert chosen["embed_VD", None].scheme == "int4"
    with pytest.raises(ValueError, match="names layer 3: the model has 3"):
        assign((Rule(weights="layers.*", layers=(3,), keep=True), *rules), WEIGHTS, 3)
    with pytest.raises(ValueError, match="rule for 'embed.*' decides for no weight"):
        assign((Rule(weights="embed*", layers=(0,), keep=True), *rules), WEIGHTS, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected \\[\\[rules\\]\\]"),
        ("rules = []", "expected \\[\\[rules\\]\\]"),
        ("x = 1\n[[rules]]\nweights = '*'\nkeep = true", "found rules, x"),
        ("target_bpw = 99\n[[rules]]\nweights = '*'\nscheme = 'int4'", "target_bpw is 99: expected bits per weight"),
        ("target_bpw = 'x'\n[[rules]]\nweights = '*'\nscheme = 'int4'", "target_bpw is 'x': expected bits per weight"),
        (
            "[[rules]]\nweights = '*'\nscheme = 'int4'\nmethod = 'awq'",
            "method is 'awq': expected one of rtn, gptq, hqq",
        ),
        ("[[rules]]\nweights = '*'\nscheme = 'int4'\nscaling = 'x'", "scaling is 'x': expected one of awq, smoothq"),
        ("[[rules]]\nweights = '*'\nscheme = 'int4'\nimportance = true", "importance needs method rtn and clip"),
        ("[[rules]]\nweights = '*'\nscheme = 'int4'\nact_order = true", "act_order needs method gptq"),
        ("[[rules]]\nweights = '*'\nscheme = 'int4'\ndamping = 0.1", "damping needs method gptq"),
        ("[[rules]]\nweights = '*'\nscheme = 'int4'\ndescent = 2", "descent needs method gptq"),
        ("[[rules]]\nweights = '*'\nscheme = 'int4'\noffset = true", "offset needs a uint scheme"),
        ("[[rules]]\nweights = '*'\nscheme = 'uint4'\nmethod = 'hqq'\nclip = 'mse'", "leave clip out"),
        ("[[rules]]\nweights = '*'\nscheme = 'int4'\noutliers = -1", "outliers is -1"),
        ("[[rules]]\nweights = '*'\nscheme = 'int4'\nlayers = []", "expected numbers, as .0, -1."),
        ("[[rules]]\nweights = '*'\nscheme = 'int4'\nindivisible = 'int9'", "indivisible is 'int9'"),
        ("[[rules]]\nweights = '*'\nkeep = true\nbits = 4", "'bits'.*expected keys"),
        ("[[rules]]\nkeep = true", "no weights"),
        ("[[rules]]\nweights = '*'", "either keep = true or a scheme"),
        ("[[rules]]\nweights = '*'\nscheme = 'int9'", "scheme is 'int9': expected one of int8, int7"),
        ("[[rules]]\nweights = '*'\nkeep = true\nmethod = 'gptq'", "method beside keep = true"),
        ("[[rules", "not TOML"),
    ],
)
def test_bad_recipes_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(LlamaJaxError, match=f"mine.toml.*{message}"):
        read_recipe(file)
    with pytest.raises(
        LlamaJaxError, match="recipe is 'int5': expected a .toml file or one of bitnet, calibrated, int3-g64, int3"
    ):
        read_recipe("int5")


WRONG = {
    "weights": ("3", "true", "''", "['*']"),
    "layers": ("[]", "1", "'all'", "[0.5]", "[true]", "['0']", "{a = 1}"),
    "keep": ("'no'", "'yes'", "0", "1", "[]"),
    "scheme": ("'int9'", "4", "true", "['int4']", "{}", "''"),
    "group_size": ("0", "-32", "false", "true", "32.0", "'32'", "'row'", "{}", "[32]"),
    "scale_dtype": ("'float64'", "16", "true", "[]", "{}"),
    "scale_scheme": ("'int9'", "6", "true", "[]"),
    "scale_group": ("64", "'tensor'", "true", "256.0", "[]"),
    "offset": ("'no'", "1", "[]"),
    "method": ("'awq'", "1", "{}", "[]"),
    "clip": ("'max'", "true", "0.5", "{}"),
    "importance": ("'yes'", "1", "0.5", "[]"),
    "act_order": ("'no'", "1", "{}"),
    "damping": ("'0.1'", "-0.1", "nan", "true", "[]"),
    "descent": ("'1'", "-1", "1.5", "true", "{}"),
    "scaling": ("'x'", "true", "1.5", "[]"),
    "outliers": ("-1", "true", "4.0", "'4'", "[4]", "{}"),
    "activations": ("'int8'", "8", "true", "{}"),
    "indivisible": ("'int9'", "true", "8", "[]"),
}


@pytest.mark.parametrize("key", WRONG)
def test_every_key_has_a_type_and_a_range(key: str) -> None:
    assert set(WRONG) == {field.name for field in dataclasses.fields(Rule)} == set(KEYS) - set(OF_MODEL)
    for value in WRONG[key]:
        table = {"weights": "*", "scheme": "int4", **tomllib.loads(f"{key} = {value}")}
        with pytest.raises(ValueError, match=f"^here: rule for .*{key} is .*: expected "):
            recipe_from({"rules": [table]}, "here")


# Keys of a recipe other than its rules, values that are refused, and what the error expects.
OF_MODEL = {
    "target_bpw": ([True, "4", float("nan"), 1, 17, [4.5], {}], "bits per weight between 1 and 17"),
    "least_bits": ([True, 9, "4", 4.0], "bits of a code, 2 to 8"),
    "bits_by": ([True, "text", 1, []], "one of loss, own_tokens"),
    "propagation": ([True, "0.5", float("nan"), -0.1, 1.5, [], {}], "a number from 0 to 1"),
    "tuning": ([True, "1", 0.5, -1, 1000, []], "a whole number of passes, 0 or more"),
}


@pytest.mark.parametrize("key", OF_MODEL)
def test_keys_of_a_recipe_have_a_type_and_a_range(key: str) -> None:
    assert set(OF_MODEL) == {field.name for field in dataclasses.fields(Recipe)} - {"rules"}
    values, expected = OF_MODEL[key]
    for value in values:
        with pytest.raises(ValueError, match=f"^here: {key} is .*: expected {expected}"):
            recipe_from({"rules": [{"weights": "*", "scheme": "int4"}], key: value}, "here")


@pytest.mark.parametrize(
    ("scheme", "group", "inputs", "expected"),
    [
        ("int4", 32, 64, ("int4", 32)),
        ("int4", 128, 64, ("int4", 64)),
        ("int4", 128, 172, ("int4", 86)),
        ("int4", 64, 172, ("int4", "channel")),  # 43 is odd, and two codes fill a byte
        ("int3", 64, 172, ("int8", "channel")),  # eight codes fill three bytes
        ("int3", 64, 96, ("int3", 48)),
        ("int4", "channel", 172, ("int4", "channel")),
    ],
)
def test_inputs_that_are_no_whole_groups(scheme: str, group, inputs: int, expected: tuple) -> None:
    rule = Rule(weights="*", scheme=scheme, group_size=group, method="gptq", indivisible="int8")
    made = rule.for_inputs(inputs)
    assert (made.scheme, made.group_size) == expected
    assert made.method == ("rtn" if made.scheme == "int8" else "gptq")
    plain = Rule(weights="*", scheme=scheme, group_size=group)
    assert plain.for_inputs(inputs) == plain


@pytest.mark.parametrize("name", recipe_names())
def test_ready_recipes_fit_inputs_of_any_number(name: str) -> None:
    """A search for bits tries int2 to int8, and codes of each fill bytes by another number."""
    recipe = read_recipe(name)
    for rule in (rule for rule in recipe.rules if rule.indivisible is not None):
        schemes = [rule.scheme] if recipe.target_bpw is None else [f"int{bits}" for bits in range(2, 9)]
        for scheme in schemes:
            for inputs in (64, 172, 100, 77, 7):
                made = dataclasses.replace(rule, scheme=scheme).for_inputs(inputs)
                assert made.group_size == "channel" or inputs % made.group_size == 0


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["calibrated", "uncalibrated"])
def test_the_defaults_take_widths_that_are_no_whole_groups(name: str) -> None:
    """172 inputs, as stories260K's: codes of 5 bits would not fill bytes, and such a weight gets 8 bits by rounding."""
    config = dataclasses.replace(CONFIG, ffn_width=172, tied_embeddings=True)
    model = random_model(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 256, np.int32)
    recipe = read_recipe(name).with_target(6.5)
    made = quantize(model, recipe, calibration=tokens if recipe.needs_calibration else None, window=32)
    assert 4.5 < packed_bits(made) <= 6.5
    assert made.layer(0).ffn.down_FD.get_value().shape == (172, config.width)


def test_recipe_from_reads_what_recipes_say() -> None:
    table = {"rules": [{"weights": "*norm*", "keep": True}, {"weights": "*", "scheme": "int4", "clip": "mse"}]}
    rules = (KEEP_NORMS, Rule(weights="*", scheme="int4", group_size=32, clip="mse"))
    assert recipe_from(table, "here") == Recipe(rules)
    assert not Recipe(rules).needs_calibration
    assert recipe_from(table | {"target_bpw": 4.25}, "here") == Recipe(rules, 4.25)
    assert Recipe(rules, 4.25).needs_calibration
    assert Recipe((Rule(weights="*", scheme="int4", method="gptq"),)).needs_calibration


@pytest.mark.parametrize(
    ("axes", "shape"),
    [("EDF", (4, 1024, 1024)), ("EFD", (4, 1024, 1024)), ("LEDF", (2, 3, 512, 1024)), ("LEFD", (2, 3, 512, 1024))],
)
def test_large_weights_of_several_matrices_are_packed_in_parts(axes: str, shape: tuple[int, ...]) -> None:
    """Parts of the outputs, put together, equal the weight quantized at once, along axis -2 and along axis -1."""
    spec = Spec(axes=axes, over="D", roles=("product",))
    assert spec.axis == (-2 if axes.endswith("DF") else -1)
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    made = quantize_weight(Place("w", 0), weight, Rule(weights="*", scheme="int4", group_size=32), spec)
    whole = quantize_rtn(jnp.asarray(weight), "int4", group_size=32, axis=spec.axis)
    assert made.shape == shape and made.axis == spec.axis
    assert made.planes[0].shape == whole.planes[0].shape and made.scale.shape == whole.scale.shape
    np.testing.assert_array_equal(made.planes[0], whole.planes[0])
    np.testing.assert_array_equal(np.asarray(made.scale), np.asarray(whole.scale))
