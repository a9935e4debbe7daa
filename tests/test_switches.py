"""Every switch of `Config` against the NumPy reference, which has them from papers and transformers."""

import dataclasses
import functools
import random
import re
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest

from llamajax import Config, KVCache, abstract_model
from llamajax.config import Temperature
from llamajax.evaluation.evaluate import next_token_losses
from llamajax.model import model_from
from llamajax.parameters import named_arrays
from llamajax.rope import Rope, RopeScaling
from tests import reference
from tests.programs import QUICK, forward
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

# Each switch by itself, or with the switch that it needs.
SWITCHES: dict[str, dict[str, Any]] = {
    "window": {"layer_kinds": ("window",), "window": 5},
    "window and full": WINDOW,
    "a pattern and a rest": {"layer_kinds": ("window", "window", "full"), "window": 2},
    "chunk": {"layer_kinds": ("chunk", "full"), "chunk": 4},
    "nope": NOPE,
    "partial RoPE": {"rope_fraction": 0.5},
    "RoPE of windows": WINDOW | {"window_rope": Rope(theta=100.0, scaling=RopeScaling(kind="linear", factor=2.0))},
    "YaRN": {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_context_length=8)},
    "longrope": {
        "rope_fraction": 0.5,
        "rope_scaling": RopeScaling(
            kind="longrope", factor=4.0, original_context_length=8, short_factors=(1.0, 1.0), long_factors=(2.0, 3.0)
        ),
    },
    "dynamic NTK": {"rope_scaling": RopeScaling(kind="dynamic", factor=4.0, original_context_length=8)},
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
    """Draws a config with values of all switches."""
    draw = random.Random(seed)
    kinds = tuple(draw.choices(["full", "window", "chunk", "nope"], k=draw.choice([1, 2, 4])))
    lengths = {name: draw.randint(2, 6) for name in ("window", "chunk") if name in kinds}
    drawn = {name: draw.choice(values) for name, values in CHOICES.items()}
    return dataclasses.replace(BASE, layer_kinds=kinds, **lengths, **drawn)


def assert_close(logits_TV: Any, expected_TV: np.ndarray) -> None:
    np.testing.assert_allclose(logits_TV, expected_TV, atol=1e-4 * max(1, abs(expected_TV).max()))


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    """Logits of a plain LLaMA with the same matrices as every other model here."""
    return reference.forward(BASE, switched_weights_of(random_model(BASE)), TOKENS[0])


@pytest.mark.matrix
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_the_references(name: str, plain: np.ndarray) -> None:
    config = dataclasses.replace(BASE, **SWITCHES[name])
    model = random_model(config)
    expected = reference.forward(config, switched_weights_of(model), TOKENS[0])
    with jax.disable_jit():  # operation by operation: all models share these, compiled once
        assert_close(model(TOKENS)[0][0], expected)
    assert abs(expected - plain).max() > 0.05, "the switch must change the reference's logits"


@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(20))
def test_switches_together_are_the_references(seed: int) -> None:
    config = combined(seed)
    model = random_model(config)
    assert_close(forward(model, TOKENS)[0], reference.forward(config, switched_weights_of(model), TOKENS[0]))


EVERYTHING = dataclasses.replace(
    BASE,
    layer_kinds=("window", "nope", "chunk", "full"),
    window=5,
    chunk=4,
    **{name: values[-1] for name, values in CHOICES.items() if name not in ("query_key_norm", "tied_embeddings")},
    query_key_norm="head",
)


def test_gradients_are_the_slopes_of_the_reference() -> None:
    """The directional derivative over random directions of all weights is the reference's, and no gradient is 0."""
    model = random_model(EVERYTHING)
    step = 1e-5

    @functools.partial(jax.jit, compiler_options=QUICK)
    def gradient(model: Any) -> Any:
        return jax.grad(lambda model: next_token_losses(model, TOKENS).mean())(model)

    named, slopes = named_arrays(model), named_arrays(gradient(model))
    rng = np.random.default_rng(8)
    direction = {name: rng.standard_normal(array.shape).astype(np.float32) for name, array in named.items()}
    for name, slope in slopes.items():
        assert np.isfinite(slope).all() and np.abs(slope).max() > 0, name
    weights, way = (switched_weights_of(model_from(each, EVERYTHING)) for each in (named, direction))
    moved = [{name: weights[name] + sign * step * way[name] for name in weights} for sign in (1, -1)]
    above, below = (reference.loss(EVERYTHING, each, TOKENS) for each in moved)
    made = sum(float(np.sum(np.asarray(slopes[name], np.float64) * direction[name])) for name in slopes)
    assert made == pytest.approx((above - below) / (2 * step), rel=1e-3)


def test_bfloat16_is_near() -> None:
    """bfloat16's rounding to 8 bits changes logits by less than a tenth of their standard deviation."""
    model = random_model(EVERYTHING)
    halved = jax.tree.map(lambda array: array.astype("bfloat16"), model)
    expected = reference.forward(EVERYTHING, switched_weights_of(model), TOKENS[0])
    logits = np.asarray(forward(halved, TOKENS)[0])
    assert logits.dtype == np.float32
    assert np.sqrt(np.mean((logits - expected) ** 2)) < 0.1 * expected.std()


# ---- What switches that are off cost ---------------------------------------------------------------------------------

# Counts of operations in a LLaMA's programs from before there were switches, as jax 0.10 lowered them.
BEFORE = {
    "forward": {
        "add": 14,
        "subtract": 3,
        "multiply": 23,
        "divide": 6,
        "exponential": 2,
        "rsqrt": 3,
        "cosine": 2,
        "sine": 2,
        "maximum": 2,
        "select": 5,
        "compare": 9,
        "convert": 5,
        "concatenate": 2,
        "slice": 4,
        "dot_general": 10,
        "while": 1,
    },
    "step": {
        "add": 36,
        "subtract": 3,
        "multiply": 23,
        "divide": 6,
        "exponential": 2,
        "rsqrt": 3,
        "cosine": 2,
        "sine": 2,
        "maximum": 2,
        "select": 22,
        "compare": 27,
        "convert": 13,
        "concatenate": 2,
        "slice": 4,
        "dot_general": 10,
        "while": 3,
    },
}
# Operations that only switches need, each with a switch that needs it.
OPTIONAL = {
    "tanh": {"score_cap": 50.0},
    "log": {"query_temperature": Temperature(beta=0.1, length=8)},
    "floor": {"query_temperature": Temperature(beta=0.1, length=8)},
}


def operations(config: Config) -> dict[str, Counter[str]]:
    """Counts the operations of each kind in the lowered text of a forward pass and of a decode step."""
    model, tokens = abstract_model(config), lambda T: jax.ShapeDtypeStruct((2, T), "int32")
    cache = jax.eval_shape(lambda: KVCache.empty(config, 2, 64))
    forward = jax.jit(lambda model, tokens_BT: model(tokens_BT)[0]).lower(model, tokens(8))
    step = jax.jit(lambda model, tokens_BT, cache: model(tokens_BT, cache)).lower(model, tokens(1), cache)
    texts = {"forward": forward.as_text(), "step": step.as_text()}
    return {name: Counter(re.findall(r"stablehlo\.(\w+)", text)) for name, text in texts.items()}


def test_switches_that_are_off_cost_nothing() -> None:
    made = operations(dataclasses.replace(BASE, num_layers=3))
    for name, counts in made.items():
        assert not set(OPTIONAL) & set(counts), name
        if jax.__version__.startswith("0.10."):
            assert {kind: max(counts[kind], most) for kind, most in BEFORE[name].items()} == BEFORE[name]


@pytest.mark.matrix
@pytest.mark.parametrize("kind", OPTIONAL)
def test_a_switch_that_is_on_is_seen(kind: str) -> None:
    """With its switch on, each operation that the test above looks for occurs."""
    assert all(counts[kind] for counts in operations(dataclasses.replace(BASE, **OPTIONAL[kind])).values())
