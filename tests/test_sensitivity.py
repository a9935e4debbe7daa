"""The cost of a change of weights as the Fisher information predicts it, against the measured cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax import Config, Llama
from llamajax.model import model_from
from llamajax.parameters import Place, named_weights, specs, weights_of
from llamajax.quantization.bit_search import some_of
from llamajax.quantization.sensitivity import gradients
from tests.reference import forward, random_model
from tests.reference import weights_of as reference_weights

CONFIG = Config(
    vocab_size=24,
    width=16,
    ffn_width=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_size=8,
    context_length=16,
)
TIED = dataclasses.replace(CONFIG, tied_embeddings=True)


def _fisher(model: Llama, tokens_WT: np.ndarray, seed: int = 0) -> dict[Place, np.ndarray]:
    read = weights_of(model).__getitem__
    return {place: np.asarray(fisher) for place, _, fisher in gradients(read, model.config, tokens_WT, seed=seed)}


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["", "tied"])
def test_of_single_tokens_it_is_the_mean_square_of_the_gradient(config: Config) -> None:
    """For tokens without a context, a weight's gradient is x g', and the diagonal is exact: it equals autodiff's."""
    model = random_model(config)
    tokens_W1 = np.arange(24, dtype=np.int32)[:, None]
    drawn = [_fisher(model, tokens_W1, seed) for seed in range(40)]
    named = named_weights(model)

    def log_p_WV(named):
        return jax.nn.log_softmax(model_from(named, config)(jnp.asarray(tokens_W1))[0][:, 0])

    p_WV = np.exp(np.asarray(log_p_WV(named)))
    derivative = jax.jacrev(log_p_WV)(named)  # [W, V, ...] by name
    for place in ("ffn.down_FD", "attention.value_DM", "ffn.gate_DF"):
        exact_LKM = np.einsum("wv,wvlkm->lkm", p_WV, np.asarray(derivative[f"layers.*.{place}"]) ** 2) / 24
        for layer in range(2):
            mean = np.mean([fisher[Place(place, layer)] for fisher in drawn], axis=0)
            scale = exact_LKM[layer].mean()
            np.testing.assert_allclose(mean, exact_LKM[layer], rtol=0.6, atol=0.25 * scale)
            np.testing.assert_allclose(mean.mean(), scale, rtol=0.08)
    if not config.tied_embeddings:
        for name in ("head_VD", "embed_VD"):
            exact = np.einsum("wv,wvab->ab", p_WV, np.asarray(derivative[name]) ** 2) / 24
            mean = np.mean([fisher[Place(name)] for fisher in drawn], axis=0)
            np.testing.assert_allclose(mean.mean(), exact.mean(), rtol=0.08)


def test_it_foresees_the_divergence_of_changed_weights() -> None:
    """Half the squared changes times the diagonal predicts the KL divergence of the float64 NumPy model."""
    model = random_model(CONFIG)
    tokens_WT = np.random.default_rng(0).integers(0, 24, (8, 12)).astype(np.int32)
    fisher = {}
    for seed in range(4):
        for place, diagonal in _fisher(model, tokens_WT, seed).items():
            fisher[place] = fisher.get(place, 0) + diagonal / 4
    weights, draws = weights_of(model), np.random.default_rng(1)
    before = log_probabilities(model, tokens_WT)
    ratios = []
    for place in specs(CONFIG):
        if place not in fisher:
            continue
        change = draws.choice([-1, 1], weights[place].shape) * 0.05 * np.asarray(weights[place]).std()
        changed = dict(named_weights(model))
        name = place.name if place.layer is None else f"layers.*.{place.name}"
        moved = np.array(changed[name])
        moved[() if place.layer is None else place.layer] += change.astype(np.float32)
        after = log_probabilities(model_from(changed | {name: jnp.asarray(moved)}, CONFIG), tokens_WT)
        divergence = np.sum(np.exp(before) * (before - after), -1).mean()
        ratios.append(0.5 * np.sum(change**2 * fisher[place]) / divergence)
    assert len(ratios) == 16
    assert 0.75 < np.exp(np.mean(np.log(ratios))) < 1.3, ratios
    assert 0.4 < min(ratios) and max(ratios) < 2.5, ratios


def log_probabilities(model: Llama, tokens_WT: np.ndarray) -> np.ndarray:
    weights = reference_weights(model)
    logits = np.stack([forward(model.config, weights, row) for row in tokens_WT])
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    ("windows", "tokens", "chosen"), [(32, 512, [0, 10, 21, 31]), (3, 512, [0, 1, 2]), (5, 4096, [0])]
)
def test_windows_from_all_over_the_text_fill_2048_tokens(windows: int, tokens: int, chosen: list[int]) -> None:
    text_WT = np.repeat(np.arange(windows), tokens).reshape(windows, tokens)
    assert some_of(text_WT)[:, 0].tolist() == chosen
