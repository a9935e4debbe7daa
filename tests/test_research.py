"""The examples of docs/research.md run, are short, and give NumPy's results."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llamajax
from quant import quantized
from tests.reference import head, softmax, trace, weights_of

PAGE = (Path(__file__).parents[1] / "docs" / "research.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NAMES = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """Runs the examples one after the other; returns the names that are defined after each."""
    scope: dict[str, Any] = {}
    behind = {}
    for name, code in zip(["", *NAMES], CODE, strict=True):
        exec(compile(code, f"docs/research.md, {name}", "exec"), scope)
        behind[name] = dict(scope)
    return behind


@pytest.fixture(scope="module")
def box(found: dict) -> tuple[Any, dict[str, np.ndarray], np.ndarray]:
    model = found[""]["model"]
    return model.config, weights_of(model), np.asarray(found[""]["tokens_BT"])[0]


def loss_of(logits_TV: np.ndarray, tokens: np.ndarray) -> float:
    chance_TV = softmax(logits_TV[:-1])
    return float(-np.mean([np.log(chance_TV[t, token]) for t, token in enumerate(tokens[1:])]))


def test_each_is_short() -> None:
    assert len(NAMES) == 7
    for name, code in zip(NAMES, CODE[1:], strict=True):
        assert len([line for line in code.splitlines() if line.strip()]) <= 15, name


def test_logit_lens_and_attention_maps(found: dict, box: tuple) -> None:
    config, weights, tokens = box
    expected = trace(config, weights, tokens)
    lens_LTV = np.stack([head(config, weights, hidden) for hidden in expected.hidden])
    np.testing.assert_allclose(found["Logit lens"]["lens_LBTV"][:, 0], lens_LTV, atol=2e-3)
    np.testing.assert_allclose(found["Attention maps"]["map_LNTS"], expected.attention, atol=1e-4)
    entropy_LN = -np.sum(expected.attention * np.log(expected.attention + 1e-9), axis=-1).mean(-1)
    np.testing.assert_allclose(found["Attention maps"]["entropy_LN"], entropy_LN, atol=1e-3)


def test_patching_the_last_layer_gives_the_other_text(found: dict, box: tuple) -> None:
    """Patching all hidden states, after the first or the last layer, leaves nothing of the first text."""
    config, weights, _ = box
    scope = found["Activation patching"]
    other = np.asarray(scope["other_BT"])[0]
    expected_V = trace(config, weights, other).logits[-1]
    for number in (0, config.num_layers - 1):
        np.testing.assert_allclose(
            scope["patched"]({("hidden", number): scope["captured"]["hidden"][number]}), expected_V, atol=2e-3
        )
    assert not np.allclose(scope["patched"]({}), expected_V, atol=0.1)


def test_swapped_layers_cost_what_numpy_says(found: dict, box: tuple) -> None:
    config, weights, tokens = box

    def renamed(name: str) -> str:
        return re.sub(r"layers\.([12])\.", lambda match: f"layers.{3 - int(match[1])}.", name)

    swapped = {renamed(name): weight for name, weight in weights.items()}
    before, after = (loss_of(trace(config, each, tokens).logits, tokens) for each in (weights, swapped))
    assert float(found["Layer swaps"]["cost"]) == pytest.approx(after - before, rel=1e-3)


def test_sensitivity_is_that_of_one_layer(found: dict, box: tuple) -> None:
    config, weights, tokens = box
    scope = found["Sensitivity of each layer"]
    packed = weights_of_floats(scope["packed"])
    before = loss_of(trace(config, weights, tokens).logits, tokens)
    for number, cost in enumerate(scope["costs"]):
        mark = f"layers.{number}."
        one = {name: packed[name] if mark in name else weight for name, weight in weights.items()}
        assert cost == pytest.approx(loss_of(trace(config, one, tokens).logits, tokens) - before, abs=1e-4)


def weights_of_floats(packed: llamajax.Llama) -> dict[str, np.ndarray]:
    from llamajax.model import model_from
    from llamajax.parameters import named_weights
    from quant import values

    return weights_of(model_from({name: values(w) for name, w in named_weights(packed).items()}, packed.config))


def test_training_norms_lowers_the_loss_and_leaves_the_bytes(found: dict) -> None:
    scope = found["Training the norms of a packed model"]
    assert scope["losses"][-1] < scope["losses"][0]
    trained = scope["merge"](scope["norms"], scope["rest"])
    for one, other in zip(quantized(trained), quantized(scope["packed"]), strict=True):
        np.testing.assert_array_equal(one.planes[0], other.planes[0])
    assert all("norm" in name for name in scope["norms"]) and len(scope["norms"]) == 3


def test_beams_are_the_likeliest_texts(found: dict, box: tuple) -> None:
    """Every beam has NumPy's log-probability, and the best is at least as likely as the greedy text."""
    config, weights, tokens = box
    scope = found["Beam search"]
    for row, total in zip(np.asarray(scope["beams"]), np.asarray(scope["total_B"]), strict=True):
        log_TV = np.log(softmax(trace(config, weights, row).logits))
        expected = sum(log_TV[t, row[t + 1]] for t in range(len(tokens) - 1, len(row) - 1))
        assert total == pytest.approx(expected, abs=5e-3)
    greedy = llamajax.generate(scope["model"], None, [int(t) for t in tokens], temperature=0, max_new_tokens=8)
    assert float(scope["total_B"][0]) >= sum(greedy.log_probabilities) - 1e-3


def test_nothing_to_train_is_an_error(found: dict) -> None:
    with pytest.raises(
        llamajax.LlamaJaxError, match=r"trainable 'bias' selects no weight with floats: expected one of"
    ):
        llamajax.trainable(found[""]["model"], "bias")
