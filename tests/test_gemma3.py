"""Gemma 3 270M, a GGUF file by others in five ggml types, gives what llama.cpp gives of its weights in F32."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamajax
from llamajax.caches import KVCache
from llamajax.checkpoint import need_tokenizer
from tests.programs import forward

_EXTRA = "compares with llama.cpp: install the extra: pip install -e '.[parity]'"
WINDOW = 512


def test_the_file_is_read_whole(gemma3_270m: Path) -> None:
    """Checks what the metadata say, and what llama.cpp assumes of the architecture."""
    opened = llamajax.open_checkpoint(gemma3_270m)
    assert opened.description == "GGUF version 3 (109 F32, 81 Q5_0, 27 Q4_K, 10 Q8_0, 9 Q6_K)"
    assert opened.notes == () and opened.tokenizer_problem is None
    config = opened.config
    assert (config.family, config.num_layers, config.vocab_size) == ("gemma3", 18, 262144)
    assert (config.layer_kinds, config.window) == (("window",) * 5 + ("full",), WINDOW)
    assert config.rope("window") == llamajax.Rope(theta=1e4) and config.rope("full") == llamajax.Rope(theta=1e6)


def test_windows_keep_what_they_see(gemma3_270m: Path) -> None:
    """Beyond the window, only the three layers without one grow with the context."""
    config = llamajax.open_checkpoint(gemma3_270m).config
    caches = [jax.eval_shape(lambda n=n: KVCache.empty(config, 1, n, jnp.float16)) for n in (4096, 8192, 16384)]
    nbytes = [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) for cache in caches]
    per_slot = 3 * 2 * config.num_kv_heads * config.head_size * 2  # keys and values of layers 5, 11 and 17
    assert nbytes[1] - nbytes[0] == pytest.approx(4096 * per_slot, rel=1e-3)
    assert nbytes[2] - nbytes[1] == pytest.approx(8192 * per_slot, rel=1e-3)


def _loss(logits_TV: np.ndarray, target_T: np.ndarray) -> float:
    logits_TV = logits_TV.astype(np.float64)
    highest = logits_TV.max(axis=-1, keepdims=True)
    normalizer = np.log(np.exp(logits_TV - highest).sum(axis=-1, keepdims=True)) + highest
    return float((normalizer - np.take_along_axis(logits_TV, target_T[:, None], axis=-1)).mean())


@pytest.mark.extras
def test_ids_of_wikitext_are_llamacpps(gemma3_270m: Path, shared: Path) -> None:
    pytest.importorskip("xllamacpp", reason=_EXTRA)
    from tests import llamacpp

    text = (shared / "data" / "wikitext2" / "wiki.test.raw").read_text()
    tokenizer = need_tokenizer(llamajax.open_checkpoint(gemma3_270m))
    assert tokenizer.encode(text) == llamacpp.tokenize(gemma3_270m, text, bos=True)


@pytest.mark.extras
@pytest.mark.optimized
@pytest.mark.exhaustive  # writes 1 GB of floats, which llama.cpp reads on one core
def test_says_of_wikitext_what_llamacpp_says(gemma3_270m: Path, shared: Path, tmp_path: Path) -> None:
    """Inside the window and beyond; ggml's GELU is a table of float16 numbers, which moves logits of 45."""
    pytest.importorskip("xllamacpp", reason=_EXTRA)
    from tests import llamacpp

    text = (shared / "data" / "wikitext2" / "wiki.test.raw").read_text()[:6000]
    row = np.asarray(llamacpp.tokenize(gemma3_270m, text, bos=True), np.int32)[: WINDOW + 129]
    llamacpp.dequantize(gemma3_270m, tmp_path / "floats.gguf")
    model = llamajax.open_checkpoint(gemma3_270m).read("float32", backend="cpu")
    with llamacpp.Model(tmp_path / "floats.gguf") as theirs:
        logits_TV, continued = theirs.logits(row[:-1].tolist()), theirs.greedy(row[:40].tolist(), 48)
    ours_TV = np.asarray(forward(model, row[None, :-1]))[0]
    assert np.abs(ours_TV - logits_TV).max() < 0.2
    for part in (slice(0, WINDOW), slice(WINDOW, None)):
        difference = _loss(ours_TV[part], row[1:][part]) - _loss(logits_TV[part], row[1:][part])
        assert math.exp(difference) == pytest.approx(1, abs=5e-4)
    ours = llamajax.generate(model, None, row[:40].tolist(), max_new_tokens=48, temperature=0, cache_dtype="float32")
    assert list(ours.tokens) == continued[: len(ours.tokens)]
