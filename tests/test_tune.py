"""Tuned scales and norms: the model is nearer to the float model by an independent measure; nothing else changes."""

import jax
import numpy as np
import pytest

from llamajax.model import model_from
from llamajax.parameters import named_arrays, named_weights, weights_of
from llamajax.quantization.quantize import quantize
from llamajax.quantization.tune import tune
from quant import Rule, values
from tests.reference import random_model
from tests.test_sensitivity import CONFIG, log_probabilities

RULES = (
    Rule(weights="*norm*", keep=True),
    Rule(weights="*", scheme="int3", group_size=8, scale_dtype="float16", clip="mse"),
)


IN_CODES = (
    RULES[0],
    Rule(weights="*", scheme="int3", group_size=8, scale_scheme="int8", scale_group="channel", clip="mse"),
)


@pytest.mark.parametrize("rules", [RULES, IN_CODES], ids=["float scales", "scales in codes"])
def test_predictions_come_nearer_and_codes_stay(rules: tuple[Rule, ...]) -> None:
    model = random_model(CONFIG)
    tokens_WT = np.random.default_rng(0).integers(0, 24, (24, 12)).astype(np.int32)
    unseen_WT = np.random.default_rng(1).integers(0, 24, (6, 12)).astype(np.int32)
    packed = quantize(model, rules)
    steps: list[int] = []
    tuned = tune(packed, weights_of(model).__getitem__, tokens_WT, 2, learning_rate=1e-2, on_step=steps.append)
    assert sum(steps) == 48
    before, after = (_divergence(model, each, unseen_WT) for each in (packed, tuned))
    assert after < 0.9 * before, (before, after)
    assert jax.tree.structure(tuned) == jax.tree.structure(packed)
    old, new = named_arrays(packed), named_arrays(tuned)
    for name, array in new.items():
        assert array.dtype == old[name].dtype and array.shape == old[name].shape
        stays = name.endswith(".scale.scale") or (".planes." in name and ".scale." not in name)
        assert np.array_equal(array, old[name]) == stays, name


def _divergence(model, packed, tokens_WT: np.ndarray) -> float:
    floats = model_from({name: values(weight) for name, weight in named_weights(packed).items()}, CONFIG)
    log_p, log_q = (log_probabilities(each, tokens_WT) for each in (model, floats))
    return float(np.sum(np.exp(log_p) * (log_p - log_q), -1).mean())
