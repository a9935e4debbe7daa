"""The predictions that each convention scores, against float64 loops written after the published programs."""

import math
from pathlib import Path

import numpy as np
import pytest

from llamajax import Llama, LlamaJaxError, Tokenizer
from llamajax.evaluation.evaluate import cross_entropy, dataset_text, text_windows
from llamajax.evaluation.windows import Windows, document_windows, gptq_windows, llama_cpp_windows
from tests.reference import Weights, forward, softmax, weights_of

BOS = 1


@pytest.fixture(scope="module")
def weights(tiny_model: Llama) -> Weights:
    return weights_of(tiny_model)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """Returns a BOS and 61 random ids: no window below divides 61."""
    return np.concatenate([[BOS], np.random.default_rng(5).integers(3, 320, 61)])


def test_documents(tiny_model: Llama, weights: Weights, tokens: np.ndarray) -> None:
    """Every token but the first is scored once, from the tokens of its own window; an incomplete window is left out."""
    window, losses = 12, []
    for target in range(1, len(tokens) - (len(tokens) - 1) % window):
        start = (target - 1) // window * window
        losses.append(-math.log(softmax(forward(tiny_model.config, weights, tokens[start:target]))[-1, tokens[target]]))
    windows = document_windows(tokens, window)
    assert windows.predictions == len(losses) == 60
    assert cross_entropy(tiny_model, windows, batch=2) == pytest.approx(np.mean(losses), rel=1e-5)
    assert cross_entropy(tiny_model, tokens, window=window, batch=2) == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("n_ctx", [16, 15, 3])
def test_llama_cpp(n_ctx: int, tiny_model: Llama, weights: Weights, tokens: np.ndarray) -> None:
    """The loop goes through a text index by index, as `perplexity` in llama.cpp's tools/perplexity/perplexity.cpp."""
    text, nll, count = [int(token) for token in tokens], 0.0, 0
    first = n_ctx // 2
    for chunk in range(len(text) // n_ctx):
        start = chunk * n_ctx
        replaced, text[start] = text[start], BOS
        logits = forward(tiny_model.config, weights, np.array(text[start : start + n_ctx]))
        text[start] = replaced
        for i in range(n_ctx - 1 - first):
            nll -= math.log(softmax(logits[first + i])[text[start + first + i + 1]])
        count += n_ctx - first - 1
    windows = llama_cpp_windows(tokens, n_ctx, BOS)
    assert windows.predictions == count
    assert cross_entropy(tiny_model, windows, batch=3) == pytest.approx(nll / count, rel=1e-5)
    assert tokens[n_ctx] != BOS, "the caller's ids must not change"


def test_llama_cpp_without_bos(tokens: np.ndarray) -> None:
    """Where the vocabulary wants no BOS, llama.cpp replaces nothing."""
    np.testing.assert_array_equal(llama_cpp_windows(tokens, 20, None).rows, tokens[:60].reshape(3, 20))


@pytest.mark.parametrize("seqlen", [16, 2])
def test_gptq(seqlen: int, tiny_model: Llama, weights: Weights, tokens: np.ndarray) -> None:
    """The loop is `llama_eval` of IST-DASLab/gptq's llama.py, with its detour over sums of seqlen times a mean."""
    nsamples, nlls = len(tokens) // seqlen, []
    for i in range(nsamples):
        batch = tokens[i * seqlen : (i + 1) * seqlen]
        shift_logits, shift_labels = forward(tiny_model.config, weights, batch)[:-1], batch[1:]
        losses = [-math.log(softmax(row)[label]) for row, label in zip(shift_logits, shift_labels, strict=True)]
        nlls.append(np.mean(losses) * seqlen)
    perplexity = math.exp(sum(nlls) / (nsamples * seqlen))
    windows = gptq_windows(tokens, seqlen)
    assert windows.rows.shape == (nsamples, seqlen) and windows.predictions == nsamples * (seqlen - 1)
    assert math.exp(cross_entropy(tiny_model, windows, batch=3)) == pytest.approx(perplexity, rel=1e-5)


def test_batches() -> None:
    windows, calls = Windows(np.arange(15).reshape(5, 3)), []
    batches = list(windows.batches(2, lambda done, total: calls.append((done, total))))
    assert [rows[:used].tolist() for rows, used in batches] == [
        [[0, 1, 2], [3, 4, 5]],
        [[6, 7, 8], [9, 10, 11]],
        [[12, 13, 14]],
    ]
    assert all(rows.shape == (2, 3) for rows, _ in batches) and calls == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("cut", "count", "window", "message"),
    [
        (document_windows, 12, 12, "the text has 12 tokens: expected at least 13, one window of 12"),
        (gptq_windows, 11, 12, "the text has 11 tokens: expected at least 12, one window of 12"),
        (gptq_windows, 11, 1, "window is 1: expected at least 2"),
        (lambda tokens, window: llama_cpp_windows(tokens, window, BOS), 11, 12, "the text has 11 tokens: expected"),
        (lambda tokens, window: llama_cpp_windows(tokens, window, BOS), 11, 2, "window is 2: expected at least 3"),
    ],
)
def test_refused(cut, count: int, window: int, message: str) -> None:
    with pytest.raises(LlamaJaxError, match=message):
        cut(np.ones(count, np.int32), window)


# ---- Texts ----------------------------------------------------------------------------------------------------------

TEXT = " \n = A fox = \n \n One day . <|endoftext|> Two .\n\n"


def test_a_text_by_each_convention(tiny_tokenizer: Tokenizer) -> None:
    """Only "documents" splits the text into documents and strips them."""
    encode = tiny_tokenizer.encode
    expected = {
        "documents": encode("= A fox = \n \n One day .") + encode("Two ."),
        "llama.cpp": encode(TEXT[:-1]),
        "gptq": encode("\n\n = A fox = \n\n\n\n\n One day . <|endoftext|> Two .\n\n\n"),
    }
    for convention, tokens in expected.items():
        window = len(tokens) - (convention == "documents")
        windows = text_windows(TEXT, tiny_tokenizer, window, convention)
        assert windows.rows.tolist() == [tokens] and tokens[0] == BOS
        assert windows.first == (window // 2 if convention == "llama.cpp" else 0)
    with pytest.raises(LlamaJaxError, match="convention is 'ppl': expected one of documents, llama.cpp, gptq"):
        text_windows(TEXT, tiny_tokenizer, 4, "ppl")


def test_dataset_text_is_the_join_of_the_rows() -> None:
    """Rows are those that Hugging Face's loading script makes of the lines of wiki.test.raw."""
    rows = ["", " = Robert Boulter = \n", "", " Robert Boulter is an English film actor . \n", ""]
    assert dataset_text(" \n = Robert Boulter = \n \n Robert Boulter is an English film actor . \n \n") == "\n\n".join(
        rows
    )
    assert dataset_text("one\r\ntwo") == "one\n\n\ntwo"


def test_chunks_of_wikitext2_are_the_published_number(shared: Path) -> None:
    """LLaMA's tokenizer gives 655 chunks of 512 in llama.cpp (its issue 1003), and 166 windows of 2048."""
    tokenizer = Tokenizer.from_file(shared / "data" / "tokenizers" / "llama2_tokenizer.model")
    text = (shared / "data" / "wikitext2" / "wiki.test.raw").read_bytes().decode()
    windows = text_windows(text, tokenizer, 512, "llama.cpp")
    assert windows.rows.shape == (655, 512) and windows.predictions == 655 * 255
    assert np.all(windows.rows[:, 0] == tokenizer.bos_id)
    windows = text_windows(text, tokenizer, 2048, "gptq")
    assert windows.rows.shape == (166, 2048) and windows.predictions == 166 * 2047
    assert windows.rows[0, 0] == tokenizer.bos_id and np.count_nonzero(windows.rows == tokenizer.bos_id) == 1
