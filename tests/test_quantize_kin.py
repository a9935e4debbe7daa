"""Quantization of all families: the weights that scales are folded into, recipes, stacks of several kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax import Config, Llama, LlamaJaxError
from llamajax.parameters import Place, inputs, specs
from llamajax.parameters import weights_of as single_weights
from llamajax.quantization import calibrate
from llamajax.quantization.quantize import assigned, quantize, read_recipe, recipe_names
from quant import Recipe, Rule, quantized, values
from tests import reference
from tests.kin import BIASES, KIN, NORMS_AFTER, WINDOWS
from tests.programs import forward
from tests.reference import random_model, switched_weights_of

TOKENS = np.random.default_rng(0).integers(0, 96, 16 * 32).astype(np.int32)
UNSEEN = np.random.default_rng(1).integers(0, 96, (4, 24)).astype(np.int32)
KEEP_NORMS = Rule(weights="*norm*", keep=True)


def layers_rule(**options) -> tuple[Rule, ...]:
    return (KEEP_NORMS, Rule(weights="layers.*", **{"scheme": "int4", "group_size": 16, **options}),
            Rule(weights="*", scheme="int8", group_size=16))  # fmt: skip


# ---- Folding ---------------------------------------------------------------------------------------------------------


def of_layer(model: Llama, layer: int) -> dict[str, jax.Array]:
    return {place.name: weight for place, weight in single_weights(model).items() if place.layer == layer}


@pytest.mark.parametrize("name", KIN)
def test_folded_scales_change_nothing(name: str) -> None:
    """Scales fold into whatever makes an input: norms with offsets, projections with biases, norms inside a layer."""
    config, layer = KIN[name], 1
    before = of_layer(random_model(config), layer)
    of = {place.name: spec for place, spec in specs(config).items() if place.layer == layer}
    x_BTD = jnp.asarray(np.random.default_rng(3).standard_normal((1, 12, config.width)), jnp.float32)
    expected = run(before, config, layer, x_BTD)
    for group, names in inputs(config, layer).items():
        if not of[names[0]].maker:
            continue
        scale_K = np.random.default_rng(2).uniform(0.3, 3, before[names[0]].shape[0]).astype(np.float32)
        if of[names[0]].maker == "attention.value_DM":  # heads that share a value head share its scales
            heads = (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_size)
            scale_K = np.broadcast_to(scale_K.reshape(heads)[:, :1], heads).reshape(-1)
        after = dict(before)
        calibrate.fold(after, of, group, jnp.asarray(scale_K), config, jnp.float32)
        assert not np.allclose(after[names[0]], before[names[0]])
        np.testing.assert_allclose(run(after, config, layer, x_BTD), expected, atol=2e-5 * abs(expected).max())


def run(weights: dict[str, jax.Array], config: Config, layer: int, x_BTD: jax.Array) -> np.ndarray:
    return np.asarray(calibrate.run_block(calibrate.block_of(weights, config, layer), x_BTD, config.numbers(layer)))


# ---- Recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KIN)
def test_every_recipe_is_for_every_family(name: str) -> None:
    """Every recipe keeps vectors and packs matrices; BitNet's packs only those of layers."""
    config = KIN[name]
    for recipe in recipe_names():
        for place, rule in assigned(read_recipe(recipe).rules, config).items():
            packed = specs(config)[place].is_matrix and (recipe != "bitnet" or place.layer is not None)
            assert rule.keep != packed, f"{recipe}: {place}"


def test_rules_for_biases() -> None:
    biases = Rule(weights="*bias*", keep=True)
    assert assigned((KEEP_NORMS, biases, Rule(weights="*", scheme="int8")), BIASES)[BIAS] is biases
    with pytest.raises(LlamaJaxError, match=r"layers.0.attention.key_bias_M: the rule for '\*bias\*' would quantize"):
        assigned((KEEP_NORMS, Rule(weights="*bias*", scheme="int8"), Rule(weights="*", scheme="int8")), BIASES)


BIAS = Place("attention.value_bias_M", 1)


def test_scaling_is_left_out_where_nothing_could_undo_it() -> None:
    """OLMo 2 has no norm before a layer's halves: their inputs are the residual stream. Other inputs are scaled."""
    model, notes = random_model(NORMS_AFTER), []
    made = quantize(model, layers_rule(scaling="awq"), calibration=TOKENS, window=32, on_note=notes.append)
    (note,) = notes
    assert note.startswith(
        "attention.key_DM, attention.query_DQ, attention.value_DM, ffn.gate_DF, ffn.up_DF: quantized"
    )
    assert "residual stream" in note
    plain = quantize(model, layers_rule(), calibration=TOKENS, window=32)
    ours, theirs, floats = (single_weights(each) for each in (made, plain, model))
    assert_same(values(ours[Place("attention.query_DQ", 0)]), values(theirs[Place("attention.query_DQ", 0)]))
    scale_K = np.asarray(values(ours[Place("ffn.down_FD", 0)])) / np.asarray(floats[Place("ffn.down_FD", 0)])
    assert np.median(abs(np.median(scale_K, axis=1) - 1)) > 0.05
    with pytest.raises(LlamaJaxError, match="embed_VD: scaling of its inputs is not supported, as no weight before"):
        quantize(model, (KEEP_NORMS, Rule(weights="*", scheme="int8", scaling="awq")), calibration=TOKENS, window=32)


def assert_same(ours, theirs) -> None:
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


# ---- Whole models ----------------------------------------------------------------------------------------------------


METHODS = {
    "biases": layers_rule(scaling="awq", clip="mse", importance=True),
    "head norms": layers_rule(method="gptq"),
    "windows": layers_rule(method="gptq", scaling="smoothquant"),
    "norms after": layers_rule(importance=True, clip="mse"),
    "sub-norms": layers_rule(scaling="awq", clip="mse"),
    "rest": layers_rule(method="hqq", scheme="uint4"),
}


@pytest.mark.matrix
@pytest.mark.parametrize("name", METHODS)
def test_a_quantized_model_is_that_of_its_values(name: str) -> None:
    """A packed model equals the reference on its dequantized weights, and is nearer to the floats than by rounding."""
    config = KIN[name]
    model = random_model(config)
    scheme = METHODS[name][1].scheme
    plain = quantize(model, layers_rule(scheme=scheme))
    made = quantize(model, METHODS[name], calibration=TOKENS, window=32)
    logits, ours, theirs = (np.asarray(forward(each, UNSEEN)) for each in (model, made, plain))
    expected_TV = reference.forward(config, switched_weights_of(made), UNSEEN[0])
    np.testing.assert_allclose(ours[0], expected_TV, atol=2e-3 * abs(expected_TV).max())
    assert np.mean((ours - logits) ** 2) < np.mean((theirs - logits) ** 2)


@pytest.mark.exhaustive
def test_bits_are_searched_for_in_stacks_of_several_kinds() -> None:
    """Layers of different kinds may get different bits; the model is made as the search chose."""
    model = random_model(WINDOWS)
    rules = (KEEP_NORMS, Rule(weights="*", scheme="int4", group_size=16, clip="mse", scale_dtype="float16"))
    made = quantize(model, Recipe(rules, 5.5), calibration=TOKENS, window=32)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
    assert 5.2 < 8 * size / WINDOWS.num_parameters <= 5.5
    assert len({each.scheme.name for each in quantized(made)}) > 1
    expected_TV = reference.forward(WINDOWS, switched_weights_of(made), UNSEEN[0])
    np.testing.assert_allclose(forward(made, UNSEEN)[0], expected_TV, atol=2e-3 * abs(expected_TV).max())
