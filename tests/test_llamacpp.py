"""Files in llama.cpp's types: what ours says of the packed weights is what llama.cpp says of the same weights in floats.

llama.cpp rounds activations to 8 bits where it multiplies by packed weights, so that it is asked about the same file
dequantized to F32 (by gguf's own dequantizers), where it rounds nothing.
"""

import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamajax
from benchmarks.gguf_files import read_model, write_gguf
from llamajax.evaluation.evaluate import encode_documents
from llamajax.evaluation.windows import document_windows
from llamajax.train import heldout_stories

pytest.importorskip("xllamacpp", reason="compares with llama.cpp: install the extra: pip install -e '.[parity]'")
from tests import llamacpp  # noqa: E402

pytestmark = pytest.mark.extras

WINDOW = 256
_logits = jax.jit(lambda model, tokens_BT: model(tokens_BT)[0])


class Box(NamedTuple):
    """The model in the box as a GGUF file of floats; windows of stories that it was not trained on, int32 [n, T+1]."""

    path: Path
    config: llamajax.Config
    rows: np.ndarray


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    path = tmp_path_factory.mktemp("box") / "float32.gguf"
    model, tokenizer = llamajax.load("box", dtype=jnp.float32)
    write_gguf(path, model.config, read_model(model))
    return Box(path, model.config, document_windows(encode_documents(tokenizer, heldout_stories()), WINDOW).rows[:4])


def _perplexity(logits_BTV: np.ndarray, rows: np.ndarray) -> float:
    logits_BTV = logits_BTV.astype(np.float64)
    highest = logits_BTV.max(axis=-1, keepdims=True)
    normalizer = np.log(np.exp(logits_BTV - highest).sum(axis=-1, keepdims=True)) + highest
    losses = normalizer - np.take_along_axis(logits_BTV, rows[:, 1:, None], axis=-1)
    return math.exp(losses.mean())


def _theirs(path: Path, rows: np.ndarray) -> np.ndarray:
    with llamacpp.Model(path) as model:
        return np.stack(list(model.windows(rows[:, :-1].tolist())))


def _ours(path: Path, rows: np.ndarray, backend: str | None) -> np.ndarray:
    model = llamajax.open_checkpoint(path).read("float32", backend=backend)
    return np.asarray(_logits(model, rows[:, :-1]))


@pytest.mark.parametrize("backend", [None, "cpu"])
@pytest.mark.parametrize(
    "kind",
    "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K_M Q4_K_M Q5_K_M Q6_K IQ4_NL IQ4_XS TQ2_0 MXFP4".split(),
)
def test_a_packed_file_says_what_its_weights_say(kind: str, backend: str | None, box: Box, tmp_path: Path) -> None:
    packed, floats = tmp_path / f"{kind}.gguf", tmp_path / "dequantized.gguf"
    llamacpp.quantize(box.path, packed, kind)
    llamacpp.dequantize(packed, floats)
    theirs, ours = _theirs(floats, box.rows), _ours(packed, box.rows, backend)
    print(kind, backend, np.abs(ours - theirs).max(), _perplexity(ours, box.rows) / _perplexity(theirs, box.rows) - 1)
    assert np.abs(ours - theirs).max() < 2e-3
    assert _perplexity(ours, box.rows) == pytest.approx(_perplexity(theirs, box.rows), rel=2e-4)
