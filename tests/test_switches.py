"""Every switch of `Config` against the NumPy reference, which has them from papers and transformers."""

import dataclasses
import random
from typing import Any

import jax
import numpy as np
import pytest

from llamajax import Config
from llamajax.config import Temperature
from llamajax.rope import Rope, RopeScaling
from tests import reference
from tests.programs import forward
from tests.reference import random_model, switched_weights_of

BASE = Config(
    vocab_size=40,
    width=24,
    ffn_width=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    context_length=64,
)
TOKENS = np.random.default_rng(5).integers(0, BASE.vocab_size, (1, 14)).astype(np.int32)
WINDOW = {"layer_kinds": ("window", "full"), "window": 3}
NOPE = {"layer_kinds": ("full", "full", "full", "nope")}

# Each switch by itself, or with the one that it needs.
SWITCHES: dict[str, dict[str, Any]] = {
    "window": {"layer_kinds": ("window",), "window": 5},
    "window and full": WINDOW,
    "a pattern and a rest": {"layer_kinds": ("window", "window", "full"), "window": 2},
    "chunk": {"layer_kinds": ("chunk", "full"), "chunk": 4},
    "nope": NOPE,
    "partial RoPE": {"rope_fraction": 0.5},
    "RoPE of windows": WINDOW | {"window_rope": Rope(theta=100.0, scaling=RopeScaling(kind="linear", factor=2.0))},
    "biases of q, k, v": {"qkv_bias": True},
    "bias of the output": {"out_bias": True},
    "biases of the feed-forward": {"ffn_bias": True},
    "norms of heads": {"query_key_norm": "head"},
    "norms of heads with an offset": {"query_key_norm": "head", "norm_offset": 1.0},
    "norms of the full width": {"query_key_norm": "width"},
    "L2 norms": NOPE | {"query_key_norm": "l2"},
    "sinks": {"sinks": True},
    "cap of scores": {"score_cap": 0.5},
    "cap of logits": {"logit_cap": 2.0},
    "scale of queries": {"query_scale": 0.7},
    "temperature": {"query_temperature": Temperature(beta=0.7, length=3)},
    "temperature without RoPE": NOPE
    | {"query_temperature": Temperature(beta=0.9, length=4, offset=1, only_nope=True), "query_key_norm": "l2"},
    "norms behind": {"norms": "after"},
    "norms before and behind": {"norms": "both"},
    "offset of norms": {"norms": "both", "norm_offset": 1.0},
    "sub-norms": {"sub_norms": True},
    "GELU": {"activation": "gelu_tanh"},
    "squared ReLU": {"activation": "relu_squared"},
    "scale of embeddings": {"embedding_scale": 4.5},
    "scale of residuals": {"residual_scale": 0.22},
    "scale of logits": {"logit_scale": 0.125},
}
# Values to combine.
CHOICES: dict[str, list[Any]] = {
    "qkv_bias": [False, True],
    "out_bias": [False, True],
    "ffn_bias": [False, True],
    "sinks": [False, True],
    "sub_norms": [False, True],
    "tied_embeddings": [False, True],
    "query_key_norm": ["none", "head", "width", "l2"],
    "norms": ["before", "after", "both"],
    "activation": ["silu", "gelu_tanh", "relu_squared"],
    "norm_offset": [0.0, 1.0],
    "score_cap": [None, 1.5],
    "logit_cap": [None, 3.0],
    "query_scale": [None, 0.4],
    "query_temperature": [None, Temperature(beta=0.3, length=5), Temperature(beta=1.0, length=2, only_nope=True)],
    "rope_fraction": [1.0, 0.25],
    "embedding_scale": [1.0, 3.0],
    "residual_scale": [1.0, 0.5],
    "logit_scale": [1.0, 2.0],
}


def combined(seed: int) -> Config:
    """A config of values drawn from all switches."""
    draw = random.Random(seed)
    kinds = tuple(draw.choices(["full", "window", "chunk", "nope"], k=draw.choice([1, 2, 4])))
    lengths = {name: draw.randint(2, 6) for name in ("window", "chunk") if name in kinds}
    drawn = {name: draw.choice(values) for name, values in CHOICES.items()}
    return dataclasses.replace(BASE, layer_kinds=kinds, **lengths, **drawn)


def assert_close(logits_TV: Any, expected_TV: np.ndarray) -> None:
    np.testing.assert_allclose(logits_TV, expected_TV, atol=1e-4 * max(1, abs(expected_TV).max()))


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    """Logits of a LLaMA whose matrices are those of every other model here."""
    return reference.forward(BASE, switched_weights_of(random_model(BASE)), TOKENS[0])


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_the_references(name: str, plain: np.ndarray) -> None:
    config = dataclasses.replace(BASE, **SWITCHES[name])
    model = random_model(config)
    expected = reference.forward(config, switched_weights_of(model), TOKENS[0])
    with jax.disable_jit():  # operation by operation: they are those of all the models, compiled once
        assert_close(model(TOKENS)[0][0], expected)
    assert abs(expected - plain).max() > 0.05, "a switch that did nothing on either side would pass"


@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(20))
def test_switches_together_are_the_references(seed: int) -> None:
    config = combined(seed)
    model = random_model(config)
    assert_close(forward(model, TOKENS)[0], reference.forward(config, switched_weights_of(model), TOKENS[0]))
