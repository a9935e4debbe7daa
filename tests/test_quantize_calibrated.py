"""Quantization with a calibration text: every method lowers the errors of a whole model, and can be resumed."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamajax
from llamajax import Config, Llama, LlamaJaxError
from llamajax.checkpoint import open_checkpoint
from llamajax.model import model_from
from llamajax.parameters import Place, named_weights
from llamajax.parameters import weights_of as single_weights
from llamajax.quantization import bit_search
from llamajax.quantization.own_tokens import own_tokens
from llamajax.quantization.quantize import quantize
from quant import Mixed, QTensor, kinds, quantize_rtn, unpack, values
from quant.recipe import Recipe, Rule
from tests.programs import forward
from tests.reference import random_model, weights_of
from tests.test_gptq import plain_gptq

CONFIG = Config(
    vocab_size=96,
    width=64,
    ffn_width=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    context_length=64,
)
TOKENS = np.random.default_rng(0).integers(0, 96, 64 * 32).astype(np.int32)
UNSEEN = np.random.default_rng(1).integers(0, 96, (4, 32)).astype(np.int32)
KEEP_NORMS = Rule(weights="*norm*", keep=True)
KEEP = Rule(weights="*", keep=True)


def layers_rule(**options) -> tuple[Rule, ...]:
    return (KEEP_NORMS, Rule(weights="layers.*", **{"scheme": "int4", "group_size": 32, **options}), KEEP)


@pytest.fixture(scope="module")
def skewed() -> Llama:
    """A random model whose activations have channels tens of times larger than others, as trained ones have."""
    model = random_model(CONFIG)
    boost = np.where(np.random.default_rng(3).random(64) < 0.06, 30.0, 1.0).astype(np.float32)
    boosted = {name: weight * boost for name, weight in named_weights(model).items() if name.endswith("_norm.weight_D")}
    return model_from(named_weights(model) | boosted, CONFIG)


def error(model: Llama, quantized: Llama) -> float:
    """Returns the mean squared change of the logits on tokens that were not used for calibration."""
    return float(np.mean((np.asarray(forward(model, UNSEEN)) - np.asarray(forward(quantized, UNSEEN))) ** 2))


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("options", "plain", "most"),
    [
        ({"method": "gptq"}, {}, 0.8),
        ({"method": "gptq", "act_order": True}, {}, 0.8),
        ({"method": "gptq", "clip": "mse", "scheme": "uint3"}, {"clip": "mse", "scheme": "uint3"}, 0.7),
        ({"scaling": "awq", "clip": "mse"}, {"clip": "mse"}, 0.8),
        ({"importance": True, "clip": "mse"}, {"clip": "mse"}, 0.8),
        ({"outliers": 4}, {}, 0.75),
        ({"outliers": 4, "method": "gptq"}, {"method": "gptq"}, 0.75),
        ({"scheme": "int8", "outliers": 4, "activations": "int8-token"},
         {"scheme": "int8", "activations": "int8-token"}, 0.4),
        ({"scheme": "int8", "scaling": "smoothquant", "activations": "int8-token"},
         {"scheme": "int8", "activations": "int8-token"}, 0.6),
    ],
)  # fmt: skip
def test_methods_do_better_than_round_to_nearest(skewed: Llama, options: dict, plain: dict, most: float) -> None:
    ours = quantize(skewed, layers_rule(**options), calibration=TOKENS, window=32)
    theirs = quantize(skewed, layers_rule(**plain), calibration=TOKENS, window=32)
    assert error(skewed, ours) < most * error(skewed, theirs)
    weight = named_weights(ours)["layers.*.ffn.down_FD"]
    assert isinstance(weight, QTensor) and weight.scheme.name == options.get("scheme", "int4")
    assert weight.activations == options.get("activations") and (weight.outlier is not None) == ("outliers" in options)
    completion = llamajax.generate(ours, None, [5, 6], temperature=0, max_new_tokens=4)
    assert len(completion.tokens) == 4


def test_gptq_of_a_first_layer_is_the_papers(skewed: Llama) -> None:
    """The first product's inputs are normed embeddings, known without a model; codes equal those of float64 NumPy."""
    made = quantize(skewed, layers_rule(method="gptq", scale_dtype="float32"), calibration=TOKENS, window=32)
    weights = weights_of(skewed)
    x_TD = weights["model.embed_tokens.weight"][TOKENS]
    x_TD = x_TD / np.sqrt(np.mean(x_TD**2, -1, keepdims=True) + CONFIG.norm_eps)
    x_TD = x_TD * weights["model.layers.0.input_layernorm.weight"]
    hessian = x_TD.T @ x_TD / len(x_TD)
    weight = weights["model.layers.0.self_attn.q_proj.weight"].T
    codes, scale, _ = plain_gptq(weight, hessian, 4, True, 32, False, 0.01)
    made = named_weights(made)["layers.*.attention.query_DQ"][0]
    same_M = (np.asarray(unpack(made.planes, 4, 32)) == codes).all(0)
    assert same_M.mean() > 0.8, "only outputs where float32 rounding decides a code may differ"
    np.testing.assert_allclose(np.asarray(made.scale)[:, same_M], scale[:, same_M], rtol=1e-4)


def test_a_head_of_its_own_is_calibrated_too(skewed: Llama) -> None:
    rules = (KEEP_NORMS, Rule(weights="head_VD", scheme="int3", group_size=32, method="gptq"), KEEP)
    plain = (KEEP_NORMS, Rule(weights="head_VD", scheme="int3", group_size=32), KEEP)
    ours, theirs = quantize(skewed, rules, calibration=TOKENS, window=32), quantize(skewed, plain)
    assert error(skewed, ours) < 0.9 * error(skewed, theirs)


@pytest.mark.exhaustive
def test_bits_are_spent_where_they_help(skewed: Llama) -> None:
    rules = (KEEP_NORMS, Rule(weights="*", scheme="int4", group_size=32, clip="mse", scale_dtype="float16"))
    made = quantize(skewed, Recipe(rules, 4.6), calibration=TOKENS, window=32)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
    even = quantize(skewed, rules)
    assert 4.45 < 8 * size / CONFIG.num_parameters <= 4.6
    assert error(skewed, made) < 0.9 * error(skewed, even)
    schemes = {scheme for layer in range(3) for scheme in kinds(single_weights(made)[Place("ffn.up_DF", layer)])}
    assert len(schemes | set(kinds(made.head_VD.get_value()))) > 1, "all weights got the same scheme"
    with pytest.raises(LlamaJaxError, match="no rule has an int, uint or iq4_nl scheme"):
        quantize(skewed, Recipe(layers_rule(scheme="nf4"), 5), calibration=TOKENS, window=32)


@pytest.mark.exhaustive
def test_groups_may_be_half_as_large_above_6_bits(skewed: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """They use what is left of a budget; smaller targets keep the recipe's groups."""
    rules = (KEEP_NORMS, Rule(weights="*", scheme="int4", group_size=32, scale_dtype="float16", clip="mse"))

    def made(target: float) -> tuple[Llama, set[str]]:
        model = quantize(skewed, Recipe(rules, target, bits_by="own_tokens"))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        assert 8 * size / CONFIG.num_parameters <= target
        return model, {kind for weight in single_weights(model).values() for kind in kinds(weight)}

    assert {"int6-g32", "int7-g32"} <= made(6.2)[1] <= {"float32", *(f"int{bits}-g32" for bits in range(2, 9))}
    finer, found = made(8.9)
    assert found == {"float32", "int8-g32", "int8-g16"}
    monkeypatch.setattr(bit_search, "_HALVED_ABOVE", 99)
    assert error(skewed, finer) < error(skewed, made(8.9)[0])


@pytest.mark.exhaustive
def test_codes_of_4_bits_may_be_of_a_code_book(skewed: Llama) -> None:
    """With iq4_nl in the rule, the candidates of other numbers of bits are int's; scales of two levels are kept."""
    names = "iq4_nl", "int5", "int6", "int7", "int8"
    form = {"scheme": "iq4_nl", "group_size": 8, "scale_scheme": "int8", "scale_group": "channel"}
    rules = (
        *(KEEP_NORMS, Rule(weights="embed_VD", scheme="int8", group_size=8)),
        Rule(weights="*", method="gptq", scale_dtype="float16", **form),  # type: ignore[arg-type]
    )
    made = quantize(skewed, Recipe(rules, 5.5, least_bits=4), calibration=TOKENS, window=32)
    of_layers = [weight for place, weight in single_weights(made).items() if place.layer is not None]
    found = {kind for weight in of_layers for kind in kinds(weight)}
    assert {"iq4_nl-g8-int8", "int5-g8-int8"} <= found <= {f"{name}-g8-int8" for name in names} | {"float32"}
    rounded = (KEEP_NORMS, Rule(weights="*", scheme="iq4_nl", group_size=8))
    assert error(skewed, made) < 0.7 * error(skewed, quantize(skewed, rounded))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("target", "message"), [(1.2, "over the budget of"), (99, "target_bpw is 99")])
def test_budgets_that_cannot_be(skewed: Llama, target: float, message: str) -> None:
    rules = (KEEP_NORMS, Rule(weights="*", scheme="int4", group_size=32, clip="mse", scale_dtype="float16"))
    with pytest.raises((LlamaJaxError, ValueError), match=message):
        quantize(skewed, Recipe(rules, target), calibration=TOKENS, window=32)


def test_a_layer_with_rules_of_its_own_keeps_them() -> None:
    """Bits are chosen for each layer on its own, except for a layer to which the recipe gives another rule."""
    deep = random_model(dataclasses.replace(CONFIG, num_layers=9), dtype=jnp.bfloat16)
    free = {"scheme": "int4", "group_size": 32, "scale_dtype": "float16"}
    rules = (KEEP_NORMS, Rule(weights="layers.*", layers=(0,), keep=True), Rule(weights="*query*", **free), KEEP)
    made = quantize(deep, Recipe(rules, 14.7), calibration=TOKENS, window=32)
    weight = named_weights(made)["layers.*.attention.query_DQ"]
    assert isinstance(weight, Mixed) and weight.shape == (9, 64, 64)
    assert [isinstance(weight.take(layer), QTensor) for layer in range(9)] == [False, *[True] * 8]


def test_an_opened_checkpoint_gives_what_the_loaded_model_gives(skewed: Llama, tmp_path: Path) -> None:
    rules = layers_rule(method="gptq", scaling="awq")
    expected = quantize(skewed, rules, calibration=TOKENS, window=32)
    for form in ("llamajax", "huggingface"):
        llamajax.save_checkpoint(skewed, tmp_path / form, form=form)
        made = quantize(open_checkpoint(tmp_path / form), rules, calibration=TOKENS, window=32)
        assert jax.tree.structure(made) == jax.tree.structure(expected)
        for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


class Stop(Exception):
    """Ends a call as if the machine were switched off."""


def stop(done: int, total: int) -> None:
    """Stops in the second layer."""
    if done > 15:
        raise Stop


def test_work_that_was_stopped_goes_on(skewed: Llama, tmp_path: Path) -> None:
    rules, work = layers_rule(method="gptq", scaling="awq", outliers=0), tmp_path / "q.work"
    expected = quantize(skewed, rules, calibration=TOKENS, window=32)

    with pytest.raises(Stop):
        quantize(skewed, rules, calibration=TOKENS, window=32, work=work, on_weight=stop)
    files = {file.name: file.stat().st_mtime_ns for file in work.glob("layer-*")}
    assert set(files) == {"layer-0.safetensors", "layer-1.safetensors"}

    with pytest.raises(LlamaJaxError, match="holds parts of other work: calibration text .sha256. is '"):
        quantize(skewed, rules, calibration=TOKENS[::-1], window=32, work=work)
    with pytest.raises(LlamaJaxError, match="holds parts of other work: recipe .sha256. is '"):
        quantize(skewed, layers_rule(method="gptq"), calibration=TOKENS, window=32, work=work)

    made = quantize(skewed, rules, calibration=TOKENS, window=32, work=work)
    assert {file.name for file in work.glob("layer-*")} > set(files), "parts stay until the model is saved"
    assert files == {name: (work / name).stat().st_mtime_ns for name in files}, "parts were made again"
    for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_search_for_bits_is_not_done_twice(skewed: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []

    def choose(read, rules, target_bpw, windows_WT, config, on_weights, candidates, least_bits):
        chosen.append(1)
        made = {
            key: rule if rule.keep else dataclasses.replace(rule, scheme="int8" if key.layer == 0 else "int3")
            for key, rule in rules.items()
        }
        return bit_search.Choice(made, {})

    monkeypatch.setattr("llamajax.quantization.quantize.choose_bits", choose)
    recipe = Recipe(layers_rule(), 5.0)
    first, second = (quantize(skewed, recipe, calibration=TOKENS, window=32, work=tmp_path) for _ in range(2))
    assert chosen == [1]
    jax.tree.map(np.testing.assert_array_equal, first, second)
    weight = named_weights(second)["layers.*.ffn.up_DF"]
    assert [weight.take(layer).scheme.name for layer in range(3)] == ["int8", "int3", "int3"]
    with pytest.raises(LlamaJaxError, match="target_bpw is 5.0 there, 6.0 here"):
        quantize(skewed, Recipe(layers_rule(), 6.0), calibration=TOKENS, window=32, work=tmp_path)


def test_a_damaged_part_is_named(skewed: Llama, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > 1:
            raise Stop

    rules = layers_rule(method="gptq")
    with pytest.raises(Stop):
        quantize(skewed, rules, calibration=TOKENS, window=32, work=tmp_path, on_weight=stop)
    file = tmp_path / "layer-0.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(LlamaJaxError, match="layer-0.safetensors: damaged.*remove it"):
        quantize(skewed, rules, calibration=TOKENS, window=32, work=tmp_path)


@pytest.mark.parametrize(
    ("rules", "calibration", "message"),
    [
        (layers_rule(method="gptq"), None, "needs a calibration text"),
        ((KEEP_NORMS, Rule(weights="*", scheme="int4", clip="mse", importance=True)), TOKENS, "embed_VD.*looked up"),
        (
            (KEEP_NORMS, Rule(weights="*query*", scheme="int4", scaling="awq"), KEEP),
            TOKENS,
            "query_DQ.*share their input",
        ),
        ((KEEP_NORMS, Rule(weights="*", scheme="int4", scaling="awq")), TOKENS, "embed_VD: scaling"),
        (layers_rule(group_size=48), None, r"layers.0.attention.key_DM of shape \(64, 32\): groups of 48"),
        (layers_rule(outliers=65), TOKENS, "count 65: expected 1 to 64"),
    ],
)
def test_what_cannot_be_is_said(skewed: Llama, rules, calibration, message: str) -> None:
    with pytest.raises(LlamaJaxError, match=message):
        quantize(skewed, rules, calibration=calibration, window=32)


def test_weights_that_are_no_whole_groups_get_what_the_recipe_says(skewed: Llama) -> None:
    model = random_model(dataclasses.replace(CONFIG, ffn_width=86))
    made = quantize(
        model, layers_rule(scheme="int3", indivisible="int8", clip="mse", method="gptq"), calibration=TOKENS, window=32
    )
    weight = named_weights(made)["layers.*.ffn.down_FD"]
    assert isinstance(weight, QTensor) and weight.scheme.name == "int8" and weight.group_size == 86
    assert named_weights(made)["layers.*.ffn.up_DF"].scheme.name == "int3"


def test_errors_of_inputs_are_made_up_for(skewed: Llama) -> None:
    """Propagation of input errors lowers the error on unseen tokens."""
    rules = layers_rule(scheme="int3", method="gptq")
    plain, ours = (
        quantize(skewed, Recipe(rules, propagation=part), calibration=TOKENS, window=32) for part in (0.0, 0.5)
    )
    assert error(skewed, ours) < 0.95 * error(skewed, plain)


def test_work_with_propagation_goes_on_where_it_was_stopped(skewed: Llama, tmp_path: Path) -> None:
    recipe = Recipe(layers_rule(method="gptq"), propagation=0.5)
    expected = quantize(skewed, recipe, calibration=TOKENS, window=32)

    with pytest.raises(Stop):
        quantize(skewed, recipe, calibration=TOKENS, window=32, work=tmp_path, on_weight=stop)
    made = quantize(skewed, recipe, calibration=TOKENS, window=32, work=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, made, expected)
    with pytest.raises(LlamaJaxError, match="bits_by is 'loss' there, 'own_tokens' here"):
        quantize(
            skewed, dataclasses.replace(recipe, bits_by="own_tokens"), calibration=TOKENS, window=32, work=tmp_path
        )
    with pytest.raises(LlamaJaxError, match="propagation is 0.5 there, 0.25 here"):
        again = dataclasses.replace(recipe, propagation=0.25)
        quantize(skewed, again, calibration=TOKENS, window=32, work=tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_gptq_of_all_weights_is_of_the_head_too(tied: bool) -> None:
    """A tied embedding is quantized by the head's inputs; a table that is only looked up is rounded, with a note."""
    model = random_model(dataclasses.replace(CONFIG, tied_embeddings=tied))
    notes: list[str] = []
    every = Rule(weights="*", scheme="int3", group_size=32, method="gptq")
    made = quantize(model, (KEEP_NORMS, every), calibration=TOKENS, window=32, on_note=notes.append)
    assert notes == ([] if tied else ["embed_VD: rounded to nearest: only looked up, never multiplied"])
    beside = quantize(model, (KEEP_NORMS, dataclasses.replace(every, method="rtn")))
    x_BTD = model(jnp.asarray(UNSEEN), capture=("hidden",))[2]["hidden"][-1]
    seen_TD = np.asarray(model.norm(x_BTD)).reshape(-1, 64)
    head = Place("embed_VD" if tied else "head_VD")
    wanted, ours, theirs = (np.asarray(values(single_weights(each)[head])) for each in (model, made, beside))
    assert np.mean((seen_TD @ (wanted - ours).T) ** 2) < 0.95 * np.mean((seen_TD @ (wanted - theirs).T) ** 2)
    with pytest.raises(LlamaJaxError, match="the rule needs calibration, but the weight is looked up"):
        alone = (KEEP_NORMS, dataclasses.replace(every, weights="embed_VD"), KEEP)
        quantize(random_model(CONFIG), alone, calibration=TOKENS, window=32)


def test_bits_without_a_text_are_those_of_tokens_that_the_model_draws(skewed: Llama) -> None:
    """They are better than 4 bits for all; the budget is kept, and the steps are counted to their end."""
    free = Rule(weights="*", scheme="int4", group_size=32, scale_dtype="float16", clip="mse")
    steps: list[tuple[int, int]] = []
    recipe = Recipe((KEEP_NORMS, free), 4.6, bits_by="own_tokens")
    made = quantize(skewed, recipe, on_weight=lambda *step: steps.append(step))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps) and steps[-1][0] == steps[-1][1]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
    assert 4.4 < 8 * size / CONFIG.num_parameters <= 4.6
    assert error(skewed, made) < 0.95 * error(skewed, quantize(skewed, (KEEP_NORMS, free)))
    weighed = dataclasses.replace(free, importance=True)
    assert not dataclasses.replace(recipe, rules=(KEEP_NORMS, weighed)).needs_calibration
    assert error(skewed, quantize(skewed, Recipe((KEEP_NORMS, weighed), 4.6, bits_by="own_tokens"))) < 0.8 * error(
        skewed, made
    )


def test_a_weight_that_is_not_finite_is_named_without_a_text(skewed: Llama) -> None:
    broken = named_weights(skewed)
    broken = broken | {"layers.*.ffn.up_DF": broken["layers.*.ffn.up_DF"].at[1, 3, 5].set(jnp.nan)}
    with pytest.raises(LlamaJaxError, match=r"^layers\.1\.ffn\.up_DF holds NaN or infinity: expected finite weights"):
        quantize(model_from(broken, CONFIG), "uncalibrated")
    with pytest.raises(LlamaJaxError, match="bos_id is 96: expected one of the model's ids, 0 to 95"):
        quantize(skewed, "uncalibrated", bos_id=96)


def test_tokens_are_drawn_from_what_the_model_predicts() -> None:
    """A model that counts moves random ids on by one place and one number."""
    silent = ("attention.out_QD", "ffn.down_FD")  # layers that add nothing
    weights = dict(named_weights(random_model(CONFIG)))
    weights |= {name: weight * 0 for name, weight in weights.items() if name.endswith(silent)}
    weights["head_VD"] = 50 * jnp.roll(weights["embed_VD"], 1, axis=0)  # after v comes v + 1
    counting = model_from(weights, CONFIG)
    tokens_WT = own_tokens(single_weights(counting).__getitem__, CONFIG, bos_id=7)
    random_WT = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, CONFIG.context_length), np.int32)
    random_WT[:, 0] = 7
    assert tokens_WT[:, :2].tolist() == [[7, 8]] * 2
    np.testing.assert_array_equal(tokens_WT[:, 1:], (random_WT[:, :-1] + 1) % CONFIG.vocab_size)


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_sample_costs_as_much_as_the_matrix(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a few tokens' rows have nearly all of the Fisher information."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(1200, 128)).astype(np.float32)
    fisher = rng.lognormal(sigma=2, size=weight.shape).astype(np.float32)
    fisher[rng.random(1200) > 0.005] *= 1e-4
    weight, fisher = (jnp.asarray(x if axis == -1 else x.T) for x in (weight, fisher))
    rounded = quantize_rtn(weight, "int4", group_size=32, axis=axis, scale_dtype="float16", clip="mse").values()
    expected = 0.5 * float(jnp.sum((rounded - weight) ** 2 * fisher))
    monkeypatch.setattr(bit_search, "_MEASURED_WEIGHTS", weight.size // 8)
    sample = bit_search.sampled(weight, fisher, axis, 64)
    assert sample[0].shape == sample[1].shape == (64, weight.size // 8 // 64)
    rule = Rule(weights="*", scheme="int4", group_size=32, scale_dtype="float16")
    assert bit_search.cost(Place("embed_VD"), rule, sample, weight.size) == pytest.approx(expected, rel=0.03)
    assert bit_search.sampled(weight, fisher * 0, axis, 64)[1].max() == 0
    for broken in ((weight.at[0, 0].set(jnp.inf), fisher), (weight, fisher.at[0, 0].set(jnp.nan))):
        with pytest.raises(LlamaJaxError, match="embed_VD as int4: the cost of its rounding errors is not finite"):
            bit_search.cost(Place("embed_VD"), rule, bit_search.sampled(*broken, axis, 64), weight.size)


def test_no_weight_gets_fewer_bits_than_the_least(skewed: Llama) -> None:
    free = Rule(weights="*", scheme="int4", group_size=32, scale_dtype="float16")
    recipe = Recipe((KEEP_NORMS, free), 5.2, least_bits=4, bits_by="own_tokens")
    for target, least in ((5.2, 4), (3.6, 2)):
        made = single_weights(quantize(skewed, recipe.with_target(target)))
        assert min(weight.scheme.bits for weight in made.values() if isinstance(weight, QTensor)) == least
    with pytest.raises(LlamaJaxError, match="over the budget"):
        quantize(skewed, dataclasses.replace(recipe, target_bpw=3.6))
