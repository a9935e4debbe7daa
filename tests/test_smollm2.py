"""SmolLM2-135M-Instruct from a GGUF file that others made: codes and scales are kept; results are llama.cpp's."""

import math
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest

import llamajax
import quant
from llamajax.checkpoint import need_tokenizer
from llamajax.checkpoint.source import halves_order
from llamajax.families import tensors

_EXTRA = "compares with llama.cpp: install the extra: pip install -e '.[parity]'"
WINDOW = 512
_logits = jax.jit(lambda model, tokens_BT: model(tokens_BT)[0])


def test_every_code_and_scale_is_kept(smollm2: Path) -> None:
    opened = llamajax.open_checkpoint(smollm2)
    config, held = opened.config, {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2).tensors}
    places = {name: place for name, (place,) in tensors(config, "gguf").items()}
    assert places.keys() == held.keys()
    packed = 0
    for name, place in places.items():
        weight, blocks = opened.read_weight(place), held[name].data
        for part, heads in (("attn_q.", config.num_heads), ("attn_k.", config.num_kv_heads)):
            if part in name:
                blocks = blocks[halves_order(heads * config.head_size, config.head_size)]
        if len(blocks.shape) == 1:
            np.testing.assert_array_equal(weight, blocks)
            continue
        rows = weight if weight.axis == -1 else quant.ggml.transposed(weight)
        kind, ours = quant.ggml.pack(rows)
        assert kind.name == held[name].tensor_type.name
        np.testing.assert_array_equal(ours, blocks, err_msg=name)
        values = gguf.dequantize(blocks, held[name].tensor_type)
        np.testing.assert_array_equal(quant.dequantize(rows, "float32"), values, err_msg=name)
        packed += 1
    assert packed == 1 + 7 * config.num_layers


def _loss(logits_TV: np.ndarray, target_T: np.ndarray) -> float:
    """Returns the mean cross-entropy in nats."""
    logits_TV = logits_TV.astype(np.float64)
    highest = logits_TV.max(axis=-1, keepdims=True)
    normalizer = np.log(np.exp(logits_TV - highest).sum(axis=-1, keepdims=True)) + highest
    return float((normalizer - np.take_along_axis(logits_TV, target_T[:, None], axis=-1)).mean())


@pytest.mark.extras
@pytest.mark.optimized
def test_says_of_wikitext_what_llamacpp_says(smollm2: Path, shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason=_EXTRA)
    from tests import llamacpp

    text = (shared / "data" / "wikitext2" / "wiki.test.raw").read_text()
    row = np.asarray(llamacpp.tokenize(smollm2, text[:4000]), np.int32)[: WINDOW + 1]
    llamacpp.dequantize(smollm2, tmp_path / "floats.gguf")
    theirs = llamacpp.logits(tmp_path / "floats.gguf", row[:-1].tolist())
    model = llamajax.open_checkpoint(smollm2).read("float32", backend="cpu")
    ours = np.asarray(_logits(model, row[None, :-1])[0])
    assert np.abs(ours - theirs).max() < 2e-3
    assert math.exp(_loss(ours, row[1:]) - _loss(theirs, row[1:])) == pytest.approx(1, abs=2e-4)


@pytest.mark.extras
def test_ids_of_wikitext_are_llamacpps(smollm2: Path, shared: Path) -> None:
    pytest.importorskip("xllamacpp", reason=_EXTRA)
    from tests import llamacpp

    text = (shared / "data" / "wikitext2" / "wiki.test.raw").read_text()
    tokenizer = need_tokenizer(llamajax.open_checkpoint(smollm2))
    assert tokenizer.encode(text, bos=False) == llamacpp.tokenize(smollm2, text)
