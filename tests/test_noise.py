"""Signal-to-noise ratios, compared with those of the float64 NumPy model, run layer by layer."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax import Config, Llama, LlamaJaxError, model_from, named_weights, prepare
from llamajax.evaluation.noise import layer_noise, same_weights, weight_noise
from llamajax.evaluation.windows import llama_cpp_windows
from quant import Mixed, dequantize, is_weight, quantize_rtn
from tests.reference import Weights, attention, feed_forward, random_model, rms_norm, weights_of

WINDOW = 12


def quantized(model: Llama) -> Llama:
    """Quantizes all matrices to int4 in groups of 8."""

    def convert(path, leaf):
        axis = -1 if "_VD" in jax.tree_util.keystr(path) else -2
        return leaf if "norm" in jax.tree_util.keystr(path) else quantize_rtn(leaf, "int4", group_size=8, axis=axis)

    return jax.tree_util.tree_map_with_path(convert, model)


def mixed(model: Llama) -> Llama:
    """Returns the same model with its two layers' matrices in two stacks of one layer each."""

    def cut(weight):
        return Mixed((weight[:1], weight[1:]), types=(0, 1)) if is_weight(weight) else weight

    named = named_weights(model)
    layers = {name: cut(weight) for name, weight in named.items() if name.startswith("layers.")}
    return model_from(named | layers, model.config)


# Ways in which a model can hold its weights; its noise is the same in all of them.
HELD: dict[str, Callable[[Llama], Llama]] = {
    "at rest": lambda model: model,
    "laid out": lambda model: prepare(model, "cpu"),
    "laid out, mixed": lambda model: prepare(mixed(model), "cpu"),
}


def floats(model: Llama) -> Llama:
    """Returns the model with its quantized weights as arrays of floats."""
    is_quantized = lambda node: hasattr(node, "planes")  # noqa: E731
    return jax.tree.map(lambda leaf: dequantize(leaf) if is_quantized(leaf) else leaf, model, is_leaf=is_quantized)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 320, 5 * WINDOW + 1)


def streams(config: Config, weights: Weights, tokens: np.ndarray) -> list[np.ndarray]:
    """Returns the input of the first layer, the output of each layer, and the logits."""
    x = weights["model.embed_tokens.weight"][tokens]
    result = [x]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        normed = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], config.norm_eps)
        x = x + attention(config, weights, f"{prefix}.self_attn", normed, False)[0]
        normed = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], config.norm_eps)
        x = x + feed_forward(weights, f"{prefix}.mlp", normed)
        result.append(x)
    return [*result, rms_norm(x, weights["model.norm.weight"], config.norm_eps) @ weights["lm_head.weight"].T]


def decibels(reference: np.ndarray, model: np.ndarray) -> float:
    return 10 * math.log10(np.sum(reference**2) / np.sum((reference - model) ** 2))


@pytest.mark.parametrize("held", HELD)
def test_layers(held: str, tiny_model: Llama, tokens: np.ndarray) -> None:
    """5 windows run in batches of 2: the padding of the last batch does not count."""
    model = quantized(tiny_model)
    ours, theirs = weights_of(floats(model)), weights_of(tiny_model)
    rows = tokens[:-1].reshape(5, WINDOW)
    pairs = [[streams(tiny_model.config, weights, row) for row in rows] for weights in (theirs, ours)]
    expected = [
        decibels(*map(np.stack, pair)) for pair in zip(*(zip(*each, strict=True) for each in pairs), strict=True)
    ]
    calls: list[tuple[int, int]] = []
    model = HELD[held](model)
    assert same_weights(model, tiny_model)
    noise = layer_noise(model, tiny_model, tokens, window=WINDOW, batch=2, on_batch=lambda *done: calls.append(done))
    np.testing.assert_allclose([noise.embedding, *noise.layers, noise.logits], expected, atol=1e-3)
    assert len(noise.layers) == 2 and 0 < noise.logits < noise.embedding < 40 and calls == [(2, 5), (4, 5), (5, 5)]


def test_layers_of_other_windows(tiny_model: Llama, tokens: np.ndarray) -> None:
    """All inputs of a window count, also those of the half that is not scored."""
    model = jax.tree.map(lambda leaf: leaf * 1.01, tiny_model)
    noise = layer_noise(model, tiny_model, llama_cpp_windows(tokens, WINDOW, 1), batch=4)
    assert noise.embedding == pytest.approx(40, abs=1e-3)


def test_a_model_has_no_noise_against_itself(tiny_model: Llama, tokens: np.ndarray) -> None:
    noise = layer_noise(tiny_model, tiny_model, tokens, window=WINDOW)
    assert {noise.embedding, *noise.layers, noise.logits} == {math.inf}
    assert set(np.concatenate(list(weight_noise(tiny_model, tiny_model).values()))) == {math.inf}


@pytest.mark.parametrize("held", HELD)
def test_weights(held: str, tiny_model: Llama) -> None:
    model = quantized(tiny_model)
    noise = weight_noise(HELD[held](model), tiny_model)
    ours, theirs = floats(model), tiny_model
    pairs = {
        "embed_VD": (ours.embed_VD, theirs.embed_VD),
        "head_VD": (ours.head_VD, theirs.head_VD),
        "layers.*.ffn.down_FD": (ours.stacks[0][0].ffn.down_FD, theirs.stacks[0][0].ffn.down_FD),
        "layers.*.attention.key_DM": (ours.stacks[0][0].attention.key_DM, theirs.stacks[0][0].attention.key_DM),
    }
    for name, pair in pairs.items():
        weight, original = (np.asarray(param[...], np.float64) for param in pair)
        stacked = name.startswith("layers.")
        expected = [decibels(*both) for both in zip(original, weight, strict=True)] if stacked else None
        np.testing.assert_allclose(noise[name], expected or [decibels(original, weight)], atol=1e-3)
    assert noise["layers.*.ffn_norm.weight_D"] == [math.inf] * 2 and noise["norm.weight_D"] == [math.inf]
    assert weight_noise(jax.tree.map(jnp.zeros_like, tiny_model), tiny_model)["norm.weight_D"] == [0.0]


def test_layers_of_mixed_stacks(tiny_model: Llama, tokens: np.ndarray) -> None:
    """A model with `Mixed` stacks counts as the same model as the plain one, with the same weights in each layer."""
    whole = quantized(tiny_model)
    cut = mixed(whole)
    assert same_weights(cut, whole)
    assert layer_noise(cut, whole, tokens, window=WINDOW).logits > 100
    assert weight_noise(cut, whole)["layers.*.ffn.up_DF"] == [math.inf] * 2


def test_refused(tiny_model: Llama, tokens: np.ndarray) -> None:
    def other(**change: int) -> Llama:
        return random_model(Config.from_dict(tiny_model.config.to_dict() | change))

    with pytest.raises(LlamaJaxError, match="num_layers is 3 in the model, 2 in the reference: expected the same"):
        layer_noise(other(num_layers=3), tiny_model, tokens, window=WINDOW)
    with pytest.raises(LlamaJaxError, match="width is 32 in the model, 24 in the reference"):
        layer_noise(other(width=32), tiny_model, tokens, window=WINDOW)
    with pytest.raises(LlamaJaxError, match="the model has 32 tokens, the reference 320"):
        layer_noise(other(vocab_size=32), tiny_model, tokens, window=WINDOW)
    with pytest.raises(LlamaJaxError, match="is .* in the model, .* in the reference: expected one shape"):
        weight_noise(other(ffn_width=48), tiny_model)
    assert not same_weights(other(ffn_width=48), tiny_model)


def test_what_is_not_finite_is_named(tiny_model: Llama) -> None:
    large = jax.tree.map(lambda leaf: leaf * 1e30, tiny_model)
    with pytest.raises(LlamaJaxError, match=r"embed_VD of the reference is not finite, or its square"):
        weight_noise(tiny_model, large)
    ids = np.arange(40) % tiny_model.config.vocab_size
    with pytest.raises(LlamaJaxError, match="the embedding of the model is not finite, or its square is not"):
        layer_noise(large, tiny_model, ids, window=8)
