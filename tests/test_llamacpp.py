"""Files in llama.cpp's types: our results with packed weights equal llama.cpp's with the same weights in floats.

llama.cpp rounds activations to 8 bits where it multiplies by packed weights. It therefore gets the same file
dequantized to F32 (by gguf's own dequantizers), where it rounds nothing.
"""

import math
from pathlib import Path
from typing import NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamajax
from benchmarks.gguf_files import quantize_gguf, read_model, read_random, write_gguf
from llamajax.evaluation.evaluate import encode_documents
from llamajax.evaluation.windows import document_windows
from llamajax.quantization.quantize import quantize
from llamajax.train import heldout_stories

pytest.importorskip("xllamacpp", reason="compares with llama.cpp: install the extra: pip install -e '.[parity]'")
from tests import llamacpp

pytestmark = [pytest.mark.extras, pytest.mark.optimized]

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


def _ours(path: Path, rows: np.ndarray) -> np.ndarray:
    """Computes logits with weights laid out for a CPU, as `load` gives them."""
    return _ours_of(llamajax.open_checkpoint(path).read("float32", backend="cpu"), rows)


def _ours_of(model: llamajax.Llama, rows: np.ndarray) -> np.ndarray:
    return np.asarray(_logits(model, rows[:, :-1]))


# Every run has one kind for each form of scales: none, one level of floats, two levels. `matrix` samples the others.
ALWAYS = ("F32", "Q4_0", "Q4_K_M")
KINDS = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K_M Q4_K_M Q5_K_M Q6_K IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4".split()


@pytest.fixture(params=[k if k in ALWAYS else pytest.param(k, marks=pytest.mark.matrix) for k in KINDS])
def files(request: pytest.FixtureRequest, box: Box, tmp_path: Path) -> tuple[Path, Path]:
    """The box in one of llama.cpp's types, and the same weights in F32."""
    packed, floats = tmp_path / f"{request.param}.gguf", tmp_path / "dequantized.gguf"
    llamacpp.quantize(box.path, packed, request.param)
    llamacpp.dequantize(packed, floats)
    return packed, floats


def test_a_packed_file_says_what_its_weights_say(files: tuple[Path, Path], box: Box) -> None:
    packed, floats = files
    theirs, ours = _theirs(floats, box.rows), _ours(packed, box.rows)
    assert np.abs(ours - theirs).max() < 2e-3
    assert _perplexity(ours, box.rows) == pytest.approx(_perplexity(theirs, box.rows), rel=2e-4)


@pytest.mark.matrix  # compiles a program of several seconds for each type
def test_a_packed_file_continues_as_its_weights_do(files: tuple[Path, Path], box: Box) -> None:
    packed, floats = files
    prompt = box.rows[0, :24].tolist()
    model = llamajax.open_checkpoint(packed).read("float32", backend="cpu")
    ours = llamajax.generate(model, None, prompt, max_new_tokens=48, temperature=0, cache_dtype="float32")
    assert list(ours.tokens) == llamacpp.greedy(floats, prompt, len(ours.tokens))


def test_stories260k_is_told_as_llamacpp_tells_it(shared: Path) -> None:
    path, text = shared / "data" / "stories260K" / "stories260K.gguf", "Once upon a time"
    model, tokenizer = llamajax.load(path, dtype="float32")
    with llamacpp.Model(path) as theirs:
        ids = theirs.tokenize(text, add_special=True)
        assert tokenizer.encode(text) == ids
        continued = theirs.greedy(ids, 100)
        pieces = b"".join(theirs.piece(token) for token in continued)
    ours = llamajax.generate(model, tokenizer, text, max_new_tokens=100, temperature=0)
    assert list(ours.tokens) == continued
    assert ours.text == pieces.decode()


# ---- Files that we write -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[llamajax.Llama, llamajax.Tokenizer]:
    """The model in the box, in floats, and its tokenizer."""
    return llamajax.load("box", dtype=jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_llamacpp_continues_floats_that_ours_writes(dtype: str, trained, tmp_path: Path) -> None:
    model, tokenizer = trained
    llamajax.save_checkpoint(model, tmp_path / "box.gguf", tokenizer=tokenizer, form="gguf", dtype=dtype)
    text = "Once upon a time, there was a"
    with llamacpp.Model(tmp_path / "box.gguf") as theirs:
        ids = theirs.tokenize(text, add_special=True)
        assert ids == tokenizer.encode(text)
        continued = theirs.greedy(ids, 64)
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype("float32") if leaf.ndim > 2 else leaf, model)
    ours = llamajax.generate(rounded, tokenizer, text, max_new_tokens=64, temperature=0, cache_dtype="float32")
    assert list(ours.tokens) == continued[: len(ours.tokens)]


@pytest.mark.parametrize("recipe", ["int4-g32", "int8", pytest.param("mixed-4.5bpw", marks=pytest.mark.exhaustive)])
def test_llamacpp_predicts_as_ours_from_what_ours_quantizes(recipe: str, trained, box: Box, tmp_path: Path) -> None:
    model, tokenizer = trained
    packed = quantize(model, recipe, types="ggml", calibration=box.rows[:, :-1].ravel())
    llamajax.save_checkpoint(packed, tmp_path / "box.gguf", tokenizer=tokenizer, form="gguf")
    _check_same_predictions(_ours_of(packed, box.rows), _theirs(tmp_path / "box.gguf", box.rows))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K_M", "Q5_K_M", "Q6_K"])
def test_a_packed_file_written_again_is_the_same(kind: str, box: Box, tmp_path: Path) -> None:
    first, again = tmp_path / "first.gguf", tmp_path / "again.gguf"
    llamacpp.quantize(box.path, first, kind)
    model = llamajax.open_checkpoint(first).read()
    llamajax.save_checkpoint(model, again, form="gguf")
    _check_same_tensors(first, again)
    if kind in ("Q4_1", "Q4_K_M"):
        _check_same_predictions(_ours_of(model, box.rows), _theirs(again, box.rows))


def _check_same_tensors(first: Path, second: Path) -> None:
    held = [{tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (first, second)]
    assert held[0].keys() == held[1].keys()
    for name, tensor in held[0].items():
        assert tensor.tensor_type == held[1][name].tensor_type, (second, name)
        np.testing.assert_array_equal(tensor.data, held[1][name].data, err_msg=f"{second} {name}")


def _check_same_predictions(ours_BTV: np.ndarray, theirs_BTV: np.ndarray) -> None:
    """Allows for llama.cpp's activations in 8 bits: the likeliest token agrees at 97% of places, KL is below 0.01."""
    ours_BTV, theirs_BTV = jax.nn.log_softmax(ours_BTV), jax.nn.log_softmax(theirs_BTV)
    divergence_BT = jnp.sum(jnp.exp(theirs_BTV) * (theirs_BTV - ours_BTV), axis=-1)
    agreement = float(jnp.mean(ours_BTV.argmax(-1) == theirs_BTV.argmax(-1)))
    assert agreement >= 0.97
    assert divergence_BT.mean() < 0.01


# ---- The helper itself ----------------------------------------------------------------------------------------------

# Grouped queries, an untied head, many layers; rows that do not fill blocks of 256 or 32.
_SHAPES = {
    "deep": {"width": 256, "ffn_width": 512, "num_layers": 17, "num_heads": 8, "num_kv_heads": 2, "head_size": 32},
    "narrow": {"width": 96, "ffn_width": 288, "num_layers": 9, "num_heads": 3, "num_kv_heads": 1, "head_size": 32},
}


@pytest.mark.matrix
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", _SHAPES)
def test_files_are_those_of_llamacpps_own_quantizer(shape: str, tied: bool, weighed: bool, tmp_path: Path) -> None:
    pytest.importorskip(
        "llama_cpp", reason="llama.cpp's own quantizer: install the extra: pip install -e '.[llamacpp]'"
    )
    config = llamajax.Config(vocab_size=64, context_length=64, tied_embeddings=tied, **_SHAPES[shape])
    source, theirs, ours = (tmp_path / f"{name}.gguf" for name in ("source", "theirs", "ours"))
    write_gguf(source, config, read_random(config), "F16")
    importance = _importance(source) if weighed else None
    for kind in KINDS:
        if kind in ("F32", "F16", "BF16"):
            continue
        name = "MOSTLY_MXFP4_MOE" if kind == "MXFP4" else f"MOSTLY_{kind}"
        quantize_gguf(source, theirs, name, importance, pure=kind == "MXFP4")
        llamacpp.quantize(source, ours, kind, importance)
        _check_same_tensors(theirs, ours)


def _importance(path: Path) -> dict[str, np.ndarray]:
    """Returns random mean squares of the inputs of the layers' matrices, a few of them large, as in real models."""
    rng = np.random.default_rng(0)
    widths = {tensor.name: int(tensor.shape[0]) for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1}
    return {name: rng.lognormal(0, 2, K).astype(np.float32) for name, K in widths.items() if name.startswith("blk.")}


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_an_importance_matrix_moves_errors_to_inputs_that_matter_less(kind: str) -> None:
    rng = np.random.default_rng(1)
    floats_MK, importance_K = rng.standard_normal((64, 512)).astype(np.float32), rng.lognormal(0, 2, 512)
    errors = []
    for importance in (None, importance_K):
        blocks = llamacpp.quantize_chunk(kind, floats_MK, importance)
        error_MK = gguf.dequantize(blocks, llamacpp.Kind[kind]).reshape(64, 512) - floats_MK
        errors.append(float((error_MK**2 @ importance_K).mean()))
    assert errors[1] < 0.95 * errors[0]
