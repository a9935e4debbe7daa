"""Layers quantized differently: runs of layers, in the model, in generation and in a checkpoint."""

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
from quant import LayerRuns, QTensor, dequantize, split_runs
from quant.kernels import Layout
from quant.recipe import Rule
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
RULES = (
    Rule(weights="*norm*", keep=True),
    Rule(weights="layers.*", layers=(0, -1), scheme="int8", group_size=32),
    Rule(weights="layers.*.ffn.down_FD", layers=(2,), keep=True),
    Rule(weights="*", scheme="uint4", group_size=32),
)
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))


@pytest.fixture(scope="module")
def runs() -> Llama:
    """Five layers in runs of 1, 1, 1, 1 and 1: 8 bits, 4, 4 with floats between, 4, 8."""
    return quantize(random_model(CONFIG), RULES)


def dense(model: Llama) -> Llama:
    """The model in float arrays."""

    def whole(weight):
        parts = weight.parts if isinstance(weight, LayerRuns) else [weight]
        floats = [dequantize(part) if isinstance(part, QTensor) else part for part in parts]
        return jnp.concatenate(floats) if isinstance(weight, LayerRuns) else floats[0]

    return jax.tree.map(whole, model, is_leaf=lambda node: isinstance(node, QTensor | LayerRuns))


def test_rules_of_layers_make_runs(runs: Llama) -> None:
    weight = named_weights(runs)["layers.*.ffn.down_FD"]
    assert isinstance(weight, LayerRuns) and weight.lengths == (1, 1, 1, 1, 1) and weight.shape == (5, 128, 64)
    assert [part.scheme.name if isinstance(part, QTensor) else str(part.dtype) for part in weight.parts] == [
        "int8", "uint4", "float32", "uint4", "int8",
    ]  # fmt: skip
    assert weight.size == 5 * 128 * 64 and weight.nbytes == sum(part.nbytes for part in weight.parts)
    two = quantize(random_model(CONFIG), (*RULES[:1], Rule(weights="*", layers=(0, 1), scheme="int8"), RULES[-1]))
    assert named_weights(two)["layers.*.attention.out_QD"].lengths == (2, 3)
    assert isinstance(two.embed_VD.get_value(), QTensor)


def test_logits_are_those_of_the_reference(runs: Llama) -> None:
    weights = weights_of(dense(runs))
    logits = forward_pass(runs, jnp.asarray(TOKENS))
    for row, tokens in enumerate(TOKENS):
        np.testing.assert_allclose(np.asarray(logits[row]), forward(CONFIG, weights, tokens), atol=1e-4)


def test_generation_and_gradients_do_not_notice(runs: Llama) -> None:
    floats = dense(runs)
    ours, theirs = (
        llamajax.generate(model, None, [5, 6], temperature=0, max_new_tokens=12) for model in (runs, floats)
    )
    assert ours.tokens == theirs.tokens

    def loss(scale, model):
        hidden, _ = model.trunk(jnp.asarray(TOKENS))
        return jnp.mean(model.logits(hidden * scale) ** 2)

    gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)
    gradients = [gradient(jnp.ones(64), model) for model in (runs, floats)]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_one_layer_by_its_number(runs: Llama) -> None:
    weight = named_weights(runs)["layers.*.ffn.up_DF"]
    assert [weight[layer].scheme.name for layer in range(5)] == ["int8", "uint4", "uint4", "uint4", "int8"]
    assert weight[3].shape == (64, 128)
    for layer in (-1, 5):
        with pytest.raises(IndexError, match=f"layer {layer}: expected 0 to 4"):
            weight[layer]


def test_a_stack_without_runs_is_one() -> None:
    layers = random_model(CONFIG).layers
    [(first, length, whole)] = split_runs(layers)
    assert (first, length) == (0, 5) and whole.ffn.up_DF.get_value() is layers.ffn.up_DF.get_value()


def test_weights_cut_at_different_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"runs of \[\(1, 4\), \(2, 3\)\] layers: expected the same cuts"):
        split_runs([LayerRuns((jnp.ones((1, 2)), jnp.ones((4, 2)))), LayerRuns((jnp.ones((2, 2)), jnp.ones((3, 2))))])


def test_checkpoint_round_trip(runs: Llama, tmp_path: Path, capsys) -> None:
    llamajax.save_checkpoint(runs, tmp_path / "q")
    again, _ = llamajax.load(tmp_path / "q")
    assert jax.tree.structure(again) == jax.tree.structure(runs)
    for before, after in zip(jax.tree.leaves(runs), jax.tree.leaves(again), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
    converted, _ = llamajax.load(tmp_path / "q", dtype=jnp.bfloat16)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(named_weights(converted)["layers.*.ffn_norm.weight_D"])} == {
        "bfloat16"
    }
    from llamajax.cli import main

    assert main(["inspect", f"--model={tmp_path / 'q'}", "--backend=cpu"]) == 0
    out = capsys.readouterr().out
    assert "int8-g32, uint4-g32, float32, uint4-g32, int8-g32" in out and "cpu layout, float" in out


def test_runs_are_prepared_one_by_one(runs: Llama) -> None:
    tokens_BT = jnp.asarray([[1, 5, 9]])
    prepared = llamajax.prepare(runs, "cpu")
    for name, weight in named_weights(runs).items():
        parts = zip(weight.parts, named_weights(prepared)[name].parts, strict=True) if "layers" in name else ()
        assert all(isinstance(after, Layout) == isinstance(before, QTensor) for before, after in parts)
    np.testing.assert_allclose(forward_pass(prepared, tokens_BT), forward_pass(runs, tokens_BT), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w["layers.*.ffn.up_DF"]["runs"].pop(), "shape"),
        (lambda w: w["layers.*.ffn.up_DF"].update(runs=[]), "expected runs of layers"),
        (lambda w: w["layers.*.ffn.up_DF"].update(scheme="int4"), "expected runs of layers"),
        (lambda w: w["layers.*.ffn.up_DF"].update(runs=[dict(w["layers.*.ffn.up_DF"])]), "expected runs of layers"),
        (lambda w: w["layers.*.ffn.up_DF"].update(runs=[3]), "expected runs of layers"),
        (lambda w: w["layers.*.ffn.up_DF"]["runs"][1].update(axis=-1), "plane of shape|different shapes"),
        (lambda w: w.update({"layers.*.ffn_norm.weight_D": {"shape": [5, 64], "dtype": "float32"}}), "the same cuts"),
    ],
)
def test_damaged_manifests_are_named(runs: Llama, tmp_path: Path, change, message: str) -> None:
    llamajax.save_checkpoint(runs, tmp_path / "q")
    file = tmp_path / "q" / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest["weights"])
    del manifest["sha256"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(LlamaJaxError, match=f"({message}).*damaged"):
        llamajax.load(tmp_path / "q")
