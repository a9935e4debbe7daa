"""Cross-entropy against NumPy: windows, padding of the last batch, weights as they run, and errors."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import llamajax
from llamajax import Llama, LlamaJaxError, Tokenizer
from llamajax.cli import main
from llamajax.evaluation.evaluate import (
    compare,
    compare_each,
    cross_entropy,
    encode_documents,
    next_token_losses,
    read_documents,
    standard_error,
    token_losses,
)
from llamajax.evaluation.windows import document_windows, llama_cpp_windows
from quant import QTensor, dequantize
from tests.reference import forward, softmax, weights_of


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """56 random ids: 11 windows of 5 and one id more, so that the last target is the very last id."""
    return np.random.default_rng(0).integers(0, 320, 56)


_logits = jax.jit(lambda model, tokens_BT: model(tokens_BT)[0])


def _losses(model: Llama, rows: np.ndarray) -> np.ndarray:
    """Returns the loss of every token after the first of its row, in float64, from logits."""
    logits = np.asarray(_logits(model, jnp.asarray(rows[:, :-1])), np.float64)
    probability = np.exp(logits - logits.max(-1, keepdims=True))
    probability /= probability.sum(-1, keepdims=True)
    return -np.log(np.take_along_axis(probability, rows[:, 1:, None], -1)[..., 0])


def test_next_token_losses_are_numpys(tiny_model: Llama, tokens: np.ndarray) -> None:
    rows = tokens.reshape(4, 14)
    losses = jax.jit(next_token_losses)(tiny_model, jnp.asarray(rows))
    assert losses.shape == (4, 13) and losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, _losses(tiny_model, rows), rtol=1e-5, atol=1e-5)


def test_next_token_losses_are_differentiable(tiny_model: Llama, tokens: np.ndarray) -> None:
    """A head's gradient for one hidden state is softmax minus one-hot, times that state."""
    row = jnp.asarray(tokens[None, :2])

    def mean(head_VD: jax.Array) -> jax.Array:
        model = jax.tree.map(lambda leaf: leaf, tiny_model)
        model.head_VD.set_value(head_VD)
        return next_token_losses(model, row).mean()

    gradient = jax.jit(jax.grad(mean))(tiny_model.head_VD[...])
    x_BTD, _ = tiny_model.blocks(tiny_model.embed(row[:, :1]))
    hidden_D = np.asarray(tiny_model.norm(x_BTD))[0, 0]
    error_V = np.array(jax.nn.softmax(tiny_model(row[:, :1])[0][0, 0]))
    error_V[tokens[1]] -= 1
    np.testing.assert_allclose(gradient, np.outer(error_V, hidden_D), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_windows_and_batches(batch: int, tiny_model: Llama, tokens: np.ndarray) -> None:
    """11 windows fill no batch of 4 or 16: padding rows do not count, and tokens that fill no window are dropped."""
    rows = np.stack([tokens[i : i + 6] for i in range(0, 55, 5)])
    expected = _losses(tiny_model, rows).mean()
    losses = token_losses(tiny_model, tokens, window=5, batch=batch)
    assert losses.dtype == np.float32
    np.testing.assert_allclose(losses, _losses(tiny_model, rows).ravel(), rtol=1e-4, atol=1e-5)
    for text in (tokens, list(map(int, tokens)), np.concatenate([tokens, [1, 2, 3]])):
        assert cross_entropy(tiny_model, text, window=5, batch=batch) == pytest.approx(expected, rel=1e-5)


def test_longest_window_sees_everything(tiny_model: Llama, tokens: np.ndarray) -> None:
    expected = _losses(tiny_model, tokens[None]).mean()
    assert cross_entropy(tiny_model, tokens, window=55, batch=1) == pytest.approx(expected, rel=1e-5)


def test_a_uniform_model_gives_log_v(tiny_model: Llama, tokens: np.ndarray) -> None:
    model = jax.tree.map(lambda leaf: leaf, tiny_model)
    model.head_VD.set_value(jnp.zeros_like(tiny_model.head_VD[...]))
    assert cross_entropy(model, tokens, window=5, batch=4) == pytest.approx(math.log(320), rel=1e-6)


def test_progress(tiny_model: Llama, tokens: np.ndarray) -> None:
    calls: list[tuple[int, int]] = []
    cross_entropy(tiny_model, tokens, window=5, batch=4, on_batch=lambda done, total: calls.append((done, total)))
    assert calls == [(4, 11), (8, 11), (11, 11)]


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (5, {"window": 5}, "the text has 5 tokens: expected at least 6, one window of 5"),
        (0, {"window": 5}, "the text has 0 tokens: expected at least 6"),
        (9, {"window": 0}, "window is 0: expected"),
        (9, {"window": -3}, "window is -3: expected"),
        (9, {"window": 5, "batch": 0}, "batch is 0: expected"),
    ],
)
def test_refused(count: int, options: dict[str, int], message: str, tiny_model: Llama) -> None:
    with pytest.raises(LlamaJaxError, match=message):
        cross_entropy(tiny_model, np.ones(count, np.int32), **options)


# ---- What is measured is what runs ----------------------------------------------------------------------------------


class Bfloat16Product:
    """A weight [out, in] for `tests.reference` whose products round one or both factors to bfloat16."""

    __array_ufunc__ = None  # NumPy then leaves `x @ weight.T` to this class

    def __init__(self, weight: np.ndarray, round_weight: bool):
        bits = weight.astype(np.float32).view(np.uint32)
        # To nearest, halves away from zero, as the layout's docstring says.
        rounded = (bits + np.uint32(1 << 15) & np.uint32(0xFFFF0000)).view(np.float32)
        self.weight = (rounded if round_weight else weight).astype(np.float64)
        self.T = self

    def __rmatmul__(self, x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64) @ self.weight.T


def bfloat16_losses(model: Llama, rows: np.ndarray, round_weights: bool) -> np.ndarray:
    """Returns a packed model's losses with bfloat16 activations, for all tokens but the first of a row, in float64."""
    is_packed = lambda node: isinstance(node, QTensor)  # noqa: E731
    values = jax.tree.map(lambda leaf: dequantize(leaf) if is_packed(leaf) else leaf, model, is_leaf=is_packed)
    weights = {
        name: Bfloat16Product(weight, round_weights) if "proj" in name or "lm_head" in name else weight
        for name, weight in weights_of(values).items()
    }
    losses = []
    for row in rows:
        probability = softmax(forward(model.config, weights, row[:-1]))
        losses += [-math.log(probability[t, token]) for t, token in enumerate(row[1:])]
    return np.array(losses)


def test_prepared_weights_are_measured_with_the_rounding_of_their_layout(tiny_int4: Llama, tokens: np.ndarray) -> None:
    """On a CPU, weights are rounded with the activations; the reference product rounds activations only.

    One activation in 30,000 is so near the middle of two bfloat16 numbers that NumPy may round it the other way, which
    changes the losses of its row from there on. Hence the test compares medians.
    """
    model = llamajax.with_activations(tiny_int4, "bfloat16")
    as_it_runs = token_losses(llamajax.prepare(model, "cpu"), tokens, window=11, batch=5)
    reference = token_losses(model, tokens, window=11, batch=5)
    rows = document_windows(tokens, 11).rows
    both, activations = (bfloat16_losses(model, rows, round_weights) for round_weights in (True, False))
    assert np.median(np.abs(as_it_runs - both)) < 1e-4 < 1e-3 < np.median(np.abs(as_it_runs - activations))
    assert np.median(np.abs(reference - activations)) < 1e-4


def test_eval_measures_prepared_weights_and_says_so(
    tiny_int4: Llama, tiny_tokenizer: Tokenizer, tmp_path: Path, capsys
) -> None:
    text = "A little fox had a red apple. He ate it by the river.\n" * 4
    (tmp_path / "text").write_text(text, encoding="utf-8")
    model = llamajax.with_activations(tiny_int4, "bfloat16")
    llamajax.save_checkpoint(model, tmp_path / "packed", tokenizer=tiny_tokenizer)
    argv = ["eval", f"--model={tmp_path}/packed", f"--text={tmp_path}/text", "--context=32"]
    rows = document_windows(tiny_tokenizer.encode(text.strip()), 32).rows
    measured = {}
    for flags, products in (([], f"prepared for {jax.default_backend()}"), (["--reference_products"], "reference")):
        assert main([*argv, *flags, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["products"] == products
        expected = np.mean(bfloat16_losses(model, rows, round_weights=not flags))
        assert result["cross_entropy_nats"] == pytest.approx(expected, abs=2e-4)
        measured[products] = result["cross_entropy_nats"]
    assert abs(np.subtract(*measured.values())) > 1e-3
    assert main([*argv, f"--reference={tmp_path}/packed"]) == 0
    assert f"products: prepared for {jax.default_backend()}" in " ".join(capsys.readouterr().out.split())


# ---- Texts ----------------------------------------------------------------------------------------------------------


def test_documents(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    (tmp_path / "text").write_text("  one\n<|endoftext|>\n\n<|endoftext|>two\nlines<|endoftext|>", encoding="utf-8")
    documents = read_documents(tmp_path / "text")
    assert documents == ["one", "two\nlines"]
    ids = encode_documents(tiny_tokenizer, documents)
    assert ids.dtype == np.int32
    assert ids.tolist() == tiny_tokenizer.encode("one") + tiny_tokenizer.encode("two\nlines")
    assert np.flatnonzero(ids == 1).tolist() == [0, len(tiny_tokenizer.encode("one"))]
    assert encode_documents(tiny_tokenizer, []).shape == (0,)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "text: no such file: expected a UTF-8 text, documents separated by <|endoftext|>"),
        (b"caf\xe9 noir", "text: not UTF-8 at byte 3: expected a UTF-8 text"),
        (b" \n<|endoftext|>\n", "text: no text in it: expected at least one document"),
    ],
)
def test_refused_texts(data: bytes | None, message: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "text").write_bytes(data)
    with pytest.raises(LlamaJaxError) as caught:
        read_documents(tmp_path / "text")
    assert str(caught.value).endswith(message)


def test_compare_equals_numpy(tiny_model: Llama) -> None:
    """Compares KL, agreement and both losses at every position, from the logits, in float64."""
    other = jax.tree.map(lambda leaf: leaf * 0.9, tiny_model)
    tokens = np.random.default_rng(3).integers(0, tiny_model.config.vocab_size, 3 * 16 + 1)
    result = compare(other, tiny_model, tokens, window=16, batch=2)
    divergence, agreement, losses = [], [], []
    for first in range(0, 48, 16):
        inputs, targets = tokens[first : first + 16], tokens[first + 1 : first + 17]
        logs = []
        for model in (other, tiny_model):
            logits = np.asarray(model(jnp.asarray([inputs]))[0][0], np.float64)
            logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        divergence.append((np.exp(logs[1]) * (logs[1] - logs[0])).sum(-1))
        agreement.append(logs[0].argmax(-1) == logs[1].argmax(-1))
        losses.append([-log[np.arange(16), targets] for log in logs])
    np.testing.assert_allclose(result.kl_divergence, np.mean(divergence), rtol=1e-4)
    assert result.kl_divergence > 1e-3 and result.top1_agreement == np.mean(agreement) < 1
    np.testing.assert_allclose(result.cross_entropy, np.mean([pair[0] for pair in losses]), rtol=1e-5)
    np.testing.assert_allclose(result.reference_cross_entropy, np.mean([pair[1] for pair in losses]), rtol=1e-5)


def test_compare_each_holds_the_positions_that_count(tiny_model: Llama, tokens: np.ndarray) -> None:
    """The second half of llama.cpp's chunks counts, the last token only as a target, as in the losses."""
    other = jax.tree.map(lambda leaf: leaf * 0.9, tiny_model)
    windows = llama_cpp_windows(tokens, 10, 1)
    each = compare_each(other, tiny_model, windows, batch=2)
    assert each.shape == (4, windows.predictions) == (4, 5 * 4)
    np.testing.assert_allclose(each[2], token_losses(other, windows, batch=3), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(each[3], token_losses(tiny_model, windows, batch=3), rtol=1e-4, atol=1e-5)
    assert set(each[1]) <= {0, 1} and each[0].min() > 0
    np.testing.assert_allclose(compare(other, tiny_model, windows), each.mean(axis=1), rtol=1e-5)


def test_standard_error() -> None:
    """The sample's standard deviation over the root of its size, as llama.cpp prints it after ±."""
    values = np.random.default_rng(0).exponential(size=100).astype(np.float32)
    assert standard_error(values) == pytest.approx(np.std(values.astype(np.float64), ddof=1) / 10, rel=1e-6)
    assert standard_error(values[:1]) == 0


def test_compare_refuses_another_vocabulary(tiny_model: Llama) -> None:
    config = llamajax.Config.from_dict(tiny_model.config.to_dict() | {"vocab_size": 32})
    other = llamajax.Llama(config, key=jax.random.key(0))
    with pytest.raises(LlamaJaxError, match="the model has 32 tokens, the reference 320: expected one vocabulary"):
        compare(other, tiny_model, [1] * 100)


# Each case has its own window size, so that no other test uses a program compiled with the broken model.
@pytest.mark.parametrize(("value", "window"), [(np.nan, 9), (np.inf, 10), (-np.inf, 11)])
def test_logits_that_are_not_finite_are_an_error(tiny_model: Llama, value: float, window: int, monkeypatch) -> None:
    """The error names the first place; a logit of minus infinity shows only in the loss of its own token."""
    honest = Llama.head
    monkeypatch.setattr(Llama, "head", lambda self, x_BTD: honest(self, x_BTD).at[1, 3, 5].set(value))
    ids = np.arange(100) % 300
    count = 99 // window
    with pytest.raises(LlamaJaxError, match=f"the model's logits are not finite at token 4 of window 2 of {count}"):
        token_losses(tiny_model, ids, window=window, batch=3)
    with pytest.raises(LlamaJaxError, match=f"logits are not finite at token 4 of window 2 of {count}"):
        compare_each(tiny_model, tiny_model, ids, window=window, batch=3)
