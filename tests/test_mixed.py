"""Layers of different types as one weight, `Mixed`: in the model, in generation, in training and in a checkpoint."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamajax
from llamajax import Config, Llama, LlamaJaxError
from llamajax.parameters import named_weights
from llamajax.quantization.quantize import quantize
from quant import Mixed, QTensor, dequantize, kinds, product, quantize_rtn, scan_layers, values
from quant.kernels import Layout
from quant.recipe import Recipe, Rule
from tests.programs import QUICK
from tests.programs import forward as forward_pass
from tests.reference import forward, random_model, weights_of

CONFIG = Config(
    vocab_size=96,
    width=64,
    ffn_width=128,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    context_length=64,
)
KEEP_NORMS = Rule(weights="*norm*", keep=True)
RULES = (
    KEEP_NORMS,
    Rule(weights="layers.*", layers=(0, -1), scheme="int8", group_size=32),
    Rule(weights="layers.*.ffn.down_FD", layers=(2,), keep=True),
    Rule(weights="*", scheme="uint4", group_size=32),
)
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))


@pytest.fixture(scope="module")
def mixed() -> Llama:
    """A model whose five layers have 8, 4, 4, 4 and 8 bits; `ffn.down_FD` of the middle layer stays in floats."""
    return quantize(random_model(CONFIG), RULES)


def dense(model: Llama) -> Llama:
    """Returns the model with every weight as an array of floats."""

    def floats(weight):
        return dequantize(weight) if isinstance(weight, QTensor) else weight

    def whole(weight):
        if not isinstance(weight, Mixed):
            return floats(weight)
        places = [weight.types[:layer].count(kind) for layer, kind in enumerate(weight.types)]
        return jnp.stack([floats(weight.stacks[kind])[place] for kind, place in zip(weight.types, places, strict=True)])

    return jax.tree.map(whole, model, is_leaf=lambda node: isinstance(node, QTensor | Mixed))


def test_rules_of_layers_make_types(mixed: Llama) -> None:
    weight = named_weights(mixed)["layers.*.ffn.down_FD"]
    assert isinstance(weight, Mixed) and weight.types == (0, 1, 2, 1, 0) and weight.shape == (5, 128, 64)
    assert kinds(weight) == ["int8-g32", "uint4-g32", "float32"]
    assert [stack.shape[0] for stack in weight.stacks] == [2, 2, 1]
    assert weight.size == 5 * 128 * 64 and weight.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
    assert isinstance(named_weights(mixed)["embed_VD"], QTensor)
    alike = quantize(
        random_model(CONFIG),
        (*RULES[:1], *(Rule(weights="*", layers=(i,), scheme="int4") for i in range(5)), RULES[-1]),
    )
    assert isinstance(named_weights(alike)["layers.*.ffn.up_DF"], QTensor), "rules differ, but types agree"


def test_logits_are_those_of_the_reference(mixed: Llama) -> None:
    weights = weights_of(dense(mixed))
    logits = forward_pass(mixed, jnp.asarray(TOKENS))
    for row, tokens in enumerate(TOKENS):
        np.testing.assert_allclose(np.asarray(logits[row]), forward(CONFIG, weights, tokens), atol=1e-4)


def test_generation_and_gradients_do_not_notice(mixed: Llama) -> None:
    floats = dense(mixed)
    ours, theirs = (
        llamajax.generate(model, None, [5, 6], temperature=0, max_new_tokens=12) for model in (mixed, floats)
    )
    assert ours.tokens == theirs.tokens

    def loss(scale, model):
        hidden, _ = model.blocks(model.embed(jnp.asarray(TOKENS)))
        return jnp.mean(model.head(hidden * scale) ** 2)

    gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)
    gradients = [gradient(jnp.ones(64), model) for model in (mixed, floats)]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_gradients_of_scales_are_those_of_the_dense_model() -> None:
    """Every float of a packed model has the dense model's gradient: scales of all types, norms, layers kept in floats.

    One entry is compared with a finite difference as well.
    """
    rules = tuple(rule if rule.keep else dataclasses.replace(rule, scale_dtype="float32") for rule in RULES)
    train, rest, merge = llamajax.trainable(quantize(random_model(CONFIG), rules), "layers.*")
    tokens = jnp.asarray(TOKENS)

    def loss(train, rest, through):
        logits, _ = through(merge(train, rest))(tokens)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, :, 3])

    of = jax.jit(jax.value_and_grad(loss), static_argnums=2, compiler_options=QUICK)
    (value, ours), (same, theirs) = of(train, rest, lambda model: model), of(train, rest, dense)
    np.testing.assert_allclose(value, same, rtol=1e-5)
    scale = "layers.*.ffn.up_DF.stacks.1.scale"
    assert {scale, "layers.*.ffn.down_FD.stacks.2", "layers.*.ffn_norm.weight_D"} < set(ours)
    for name, gradient in ours.items():
        most = float(jnp.abs(theirs[name]).max())
        assert most > 0, name
        np.testing.assert_allclose(gradient, theirs[name], atol=1e-3 * most, err_msg=name)
    step = jnp.zeros_like(train[scale]).at[2, 1, 7].set(0.02)
    above, below = (of(train | {scale: train[scale] + sign * step}, rest, dense)[0] for sign in (1, -1))
    np.testing.assert_allclose(ours[scale][2, 1, 7] * 0.04, above - below, rtol=0.05, atol=1e-6)


def test_one_layer_by_its_number(mixed: Llama) -> None:
    weight = named_weights(mixed)["layers.*.ffn.up_DF"]
    assert [weight.take(layer).scheme.name for layer in range(5)] == ["int8", "uint4", "uint4", "uint4", "int8"]
    assert weight.take(3).shape == (64, 128)
    np.testing.assert_array_equal(values(weight)[3], dequantize(weight.take(3)))
    with pytest.raises(ValueError, match=r"weight of shape \(5, 64, 128\) without an index: expected one"):
        product(jnp.ones((2, 64)), weight)


def test_layers_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers of shapes \[\(2, 4\), \(4, 2\)\]: expected one shape"):
        Mixed.of([jnp.ones((4, 2)), jnp.ones((2, 4))])
    with pytest.raises(ValueError, match=r"weights of one stack have \[2, 3\] layers: expected the same number"):
        scan_layers(lambda carry, *_: (carry, None), 0, [jnp.ones((2, 4, 4)), jnp.ones((3, 4, 4))])


@pytest.mark.parametrize("axis", [-2, -1])
def test_a_stack_of_alternate_types_is_each_by_itself(axis: int) -> None:
    draw = np.random.default_rng(0)
    floats = draw.standard_normal((6, 32, 32)).astype(np.float32)
    layers = [
        quantize_rtn(jnp.asarray(w), ("int4", "nf4", "int8")[i % 3], group_size=16, axis=axis)
        for i, w in enumerate(floats)
    ]
    x = jnp.asarray(draw.standard_normal((3, 32)), jnp.float32)
    stack = Mixed.of(layers, axis)
    _, found = scan_layers(lambda carry, weight, *_: (carry, product(x, weight, axis=axis)), 0, stack)
    equation = "bk,km->bm" if axis == -2 else "bk,mk->bm"
    expected = [
        np.einsum(equation, np.asarray(x, np.float64), np.asarray(dequantize(layer), np.float64)) for layer in layers
    ]
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-4)
    assert stack.types == (0, 1, 2, 0, 1, 2) and stack.shape == (6, 32, 32)


def test_programs_do_not_grow_with_depth() -> None:
    """Types that alternate over 4 layers and over 16 give programs of the same size, for gradients and for decoding."""

    def sizes(layers: int) -> list[int]:
        config = dataclasses.replace(CONFIG, num_layers=layers)
        rules = (
            KEEP_NORMS,
            Rule(weights="layers.*", layers=tuple(range(0, layers, 2)), scheme="int8"),
            Rule(weights="*", scheme="int4"),
        )
        train, rest, merge = llamajax.trainable(quantize(random_model(config), rules), "norm")
        loss = lambda train, rest: llamajax.next_token_losses(merge(train, rest), jnp.asarray(TOKENS)).mean()  # noqa: E731
        cache = llamajax.KVCache.empty(config, 2, 16, jnp.float32)
        step = lambda model, cache: model(jnp.asarray(TOKENS[:, :1]), cache)  # noqa: E731
        texts = [jax.jit(jax.grad(loss)).lower(train, rest), jax.jit(step).lower(merge(train, rest), cache)]
        return [text.as_text().count("\n") for text in texts]

    assert sizes(4) == sizes(16)


@pytest.mark.parametrize("target", [None, 14.85])
def test_calibrated_layers_of_different_types(target: float | None) -> None:
    """GPTQ quantizes layers whose bits alternate by rule, and layers whose bits a search chose one by one."""
    model = random_model(CONFIG, dtype=jnp.bfloat16 if target else jnp.float32)
    free = Rule(weights="layers.*query*", scheme="int4", group_size=32, method="gptq", scale_dtype="float16")
    alternate = Rule(weights="layers.*query*", layers=(0, 2, 4), scheme="int8", group_size=32, method="gptq")
    rules = (KEEP_NORMS, *([] if target else [alternate]), free, Rule(weights="*", keep=True))
    text = np.random.default_rng(1).integers(0, 96, 16 * 32).astype(np.int32)
    made = quantize(model, Recipe(rules, target), calibration=text, window=32)
    weight = named_weights(made)["layers.*.attention.query_DQ"]
    assert isinstance(weight, Mixed) and weight.shape == (5, 64, 64)
    if target is None:
        assert [weight.take(layer).scheme.name for layer in range(5)] == ["int8", "int4", "int8", "int4", "int8"]
    else:
        bits = sum(leaf.nbytes for leaf in jax.tree.leaves(made)) * 8 / CONFIG.num_parameters
        assert target - 0.2 < bits <= target and len(weight.stacks) > 1
    floats = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), dense(made))
    for row, tokens in zip(forward_pass(made, jnp.asarray(TOKENS)), TOKENS, strict=True):
        expected = forward(CONFIG, weights_of(floats), tokens)
        np.testing.assert_allclose(np.asarray(row, np.float32), expected, atol=0.2 if target else 1e-4)


def test_checkpoint_round_trip(mixed: Llama, tmp_path: Path, capsys) -> None:
    llamajax.save_checkpoint(mixed, tmp_path / "q")
    again, _ = llamajax.load(tmp_path / "q")
    assert jax.tree.structure(again) == jax.tree.structure(mixed)
    for before, after in zip(jax.tree.leaves(mixed), jax.tree.leaves(again), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
    converted, _ = llamajax.load(tmp_path / "q", dtype=jnp.bfloat16)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(named_weights(converted)["layers.*.ffn_norm.weight_D"])} == {
        "bfloat16"
    }
    assert kinds(named_weights(converted)["layers.*.ffn.down_FD"]) == ["int8-g32", "uint4-g32", "bfloat16"]
    listed = json.loads((tmp_path / "q" / "manifest.json").read_text())["weights"]
    schemes = [listed[f"layers.{layer}.ffn.down_FD"].get("scheme", "none") for layer in range(5)]
    assert schemes == ["int8", "uint4", "none", "uint4", "int8"] and "layers.*.ffn.down_FD" not in listed
    assert listed["layers.*.ffn_norm.weight_D"] == {"shape": [64], "dtype": "float32"}
    from llamajax.cli import main

    assert main(["inspect", f"--model={tmp_path / 'q'}", "--backend=cpu"]) == 0
    out = capsys.readouterr().out
    assert "int8-g32, uint4-g32, float32" in out and "cpu layout, float" in out


def test_types_are_prepared_one_by_one(mixed: Llama) -> None:
    tokens_BT = jnp.asarray([[1, 5, 9]])
    prepared = llamajax.prepare(mixed, "cpu")
    for name, weight in named_weights(mixed).items():
        if isinstance(weight, Mixed):
            stacks = zip(weight.stacks, named_weights(prepared)[name].stacks, strict=True)
            assert all(isinstance(after, Layout) == isinstance(before, QTensor) for before, after in stacks)
    np.testing.assert_allclose(forward_pass(prepared, tokens_BT), forward_pass(mixed, tokens_BT), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layers.2.ffn.up_DF"), "the weights listed are not those of its config"),
        (lambda w: w.update({"layers.5.ffn.up_DF": w["layers.4.ffn.up_DF"]}), "the weights listed are not those"),
        (lambda w: w.update({"layers.*.ffn.up_DF": w["layers.4.ffn.up_DF"]}), "the weights listed are not those"),
        (lambda w: w["layers.3.ffn.up_DF"].update(axis=-1), r"layers.3.ffn.up_DF: .*"),
        (lambda w: w["layers.3.ffn.up_DF"]["scale"].update(shape=[3, 128]), r"layers.3.ffn.up_DF: .*"),
        (lambda w: w.update({"layers.3.ffn.up_DF": [3]}), r"layers.3.ffn.up_DF: .*"),
        (lambda w: w.update({"layers.3.ffn.up_DF": {"runs": []}}), r"layers.3.ffn.up_DF: .*"),
        (
            lambda w: w.update({"layers.3.ffn.down_FD": w["layers.3.ffn.up_DF"]}),
            r"shape \(64, 128\): expected \(128, 64\)",
        ),
    ],
)
def test_damaged_manifests_are_named(mixed: Llama, tmp_path: Path, change, message: str) -> None:
    llamajax.save_checkpoint(mixed, tmp_path / "q")
    file = tmp_path / "q" / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest["weights"])
    del manifest["sha256"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(LlamaJaxError, match=f"({message}).*damaged"):
        llamajax.load(tmp_path / "q")
