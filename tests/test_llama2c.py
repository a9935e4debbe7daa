"""llama2.c files: the published stories260K in all three versions, and files that an independent writer makes here.

The writer and the forward pass below follow karpathy/llama2.c's `export.py` and `model.py`, in Meta's layout (RoPE
pairs are neighbours), and use nothing from llamajax: a result that agrees with them has undone the permutation
correctly.
"""

import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import llamajax
from llamajax import LlamaJaxError, open_checkpoint, save_checkpoint
from llamajax.evaluation.evaluate import cross_entropy, encode_documents
from llamajax.parameters import named_arrays, named_weights

# dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len
SIZES = (16, 24, 2, 4, 2, 40, 32)
GROUP = 8

Weights = dict[str, list[np.ndarray]]


def _meta_weights(rng: np.random.Generator) -> Weights:
    """Returns one array per layer, [out, in], by `export.py`'s names. Writers of tied files leave `output` out."""
    dim, hidden, layers, heads, kv_heads, vocab, _ = SIZES
    shared = dim // heads * kv_heads
    shapes = {"wq": (dim, dim), "wk": (shared, dim), "wv": (shared, dim), "wo": (dim, dim)}
    shapes |= {"w1": (hidden, dim), "w2": (dim, hidden), "w3": (hidden, dim)}
    shapes |= {"attention_norm": (dim,), "ffn_norm": (dim,)}
    weights = {name: [rng.normal(0, 0.3, shape) for _ in range(layers)] for name, shape in shapes.items()}
    weights |= {"norm": [rng.normal(1, 0.3, dim)], "embed": [rng.normal(0, 1, (vocab, dim))]}
    weights["output"] = [rng.normal(0, 0.3, (vocab, dim))]
    return {name: [array.astype(np.float32) for array in arrays] for name, arrays in weights.items()}


def _write_v0(path: Path, weights: Weights, tied: bool) -> None:
    dim, _, _, heads, _, vocab, context = SIZES
    sizes = [*SIZES[:5], vocab if tied else -vocab, context]
    order = "embed attention_norm wq wk wv wo ffn_norm w1 w2 w3 norm".split()
    parts = [array for name in order for array in weights[name]]
    parts.append(np.full((2, context, dim // heads // 2), 1e30, np.float32))  # freqs_cos, freqs_sin: must not be used
    parts += [] if tied else weights["output"]
    path.write_bytes(struct.pack("<7i", *sizes) + b"".join(part.astype("<f4").tobytes() for part in parts))


_MATRICES = ["embed", "wq", "wk", "wv", "wo", "w1", "w2", "w3"]


def _write_v1(path: Path, weights: Weights, tied: bool) -> None:
    header = struct.pack("<Ii7iB", 0x616B3432, 1, *SIZES, tied).ljust(256, b"\0")
    order = ["attention_norm", "ffn_norm", "norm", *_MATRICES, *([] if tied else ["output"])]
    path.write_bytes(header + b"".join(array.astype("<f4").tobytes() for name in order for array in weights[name]))


def _write_v2(path: Path, weights: Weights, tied: bool) -> Weights:
    """Quantizes as `quantize_q80` does; returns the weights as a reader should see them."""
    header = struct.pack("<Ii7iBi", 0x616B3432, 2, *SIZES, tied, GROUP).ljust(256, b"\0")
    norms = [array for name in ("attention_norm", "ffn_norm", "norm") for array in weights[name]]
    data, read = header + b"".join(array.tobytes() for array in norms), dict(weights)
    for name in [*_MATRICES, *([] if tied else ["output"])]:
        read[name] = []
        for array in weights[name]:
            groups = array.reshape(-1, GROUP)
            scale = (np.abs(groups).max(axis=1) / 127).astype("<f4")
            codes = np.round(groups / scale[:, None]).astype(np.int8)
            data += codes.tobytes() + scale.tobytes()
            read[name].append((codes.astype(np.float32) * scale[:, None]).reshape(array.shape))
    path.write_bytes(data)
    return read


def _meta_logits(weights: Weights, tokens: list[int], tied: bool) -> np.ndarray:
    """llama2.c's forward pass in float64, one position at a time; RoPE rotates neighbours as complex numbers."""
    dim, _, layers, heads, kv_heads, _, _ = SIZES
    size = dim // heads

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x) + 1e-5) * weight

    def rotated(x: np.ndarray, position: int) -> np.ndarray:
        pairs = x.reshape(-1, size // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(
            1j * position * 10000.0 ** (-np.arange(0, size, 2) / size)
        )
        return np.stack([turned.real, turned.imag], axis=-1).reshape(-1, size)

    keys, values = [[[] for _ in range(layers)] for _ in range(2)]
    rows = []
    for position, token in enumerate(tokens):
        x = weights["embed"][0][token].astype(np.float64)
        for i in range(layers):
            h = norm(x, weights["attention_norm"][i])
            query = rotated(weights["wq"][i] @ h, position)
            keys[i].append(rotated(weights["wk"][i] @ h, position))
            values[i].append((weights["wv"][i] @ h).reshape(kv_heads, size))
            mixed = []
            for head in range(heads):
                at = head // (heads // kv_heads)
                scores = np.array([query[head] @ key[at] for key in keys[i]]) / np.sqrt(size)
                part = np.exp(scores - scores.max())
                mixed.append(sum(p * v[at] for p, v in zip(part / part.sum(), values[i], strict=True)))
            x = x + weights["wo"][i] @ np.concatenate(mixed)
            h = norm(x, weights["ffn_norm"][i])
            gate = weights["w1"][i] @ h
            x = x + weights["w2"][i] @ (gate / (1 + np.exp(-gate)) * (weights["w3"][i] @ h))
        rows.append(weights["embed" if tied else "output"][0] @ norm(x, weights["norm"][0]))
    return np.array(rows)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_logits_of_a_written_file(version: int, tied: bool, tmp_path: Path) -> None:
    weights = _meta_weights(np.random.default_rng(version))
    path = tmp_path / "weights"
    read = {0: _write_v0, 1: _write_v1, 2: _write_v2}[version](path, weights, tied) or weights
    opened = open_checkpoint(path)
    assert f"version {version}" in opened.description
    assert opened.config.tied_embeddings is tied
    model = opened.read()
    tokens = [1, 39, 7, 7, 0, 22]
    logits_BTV, _ = model(np.array([tokens]))
    np.testing.assert_allclose(logits_BTV[0], _meta_logits(read, tokens, tied), rtol=2e-4, atol=2e-4)


def test_version_2_is_exactly_code_times_scale(tmp_path: Path) -> None:
    read = _write_v2(tmp_path / "q8", _meta_weights(np.random.default_rng(3)), True)
    model = open_checkpoint(tmp_path / "q8").read()
    np.testing.assert_array_equal(model.embed_VD[...], read["embed"][0])
    np.testing.assert_array_equal(
        named_weights(model)["layers.*.ffn.down_FD"][...], np.stack(read["w2"]).swapaxes(1, 2)
    )


def _damaged(tmp_path: Path, version: int, edit: Any) -> Path:
    path = tmp_path / "weights.bin"
    {0: _write_v0, 1: _write_v1, 2: _write_v2}[version](path, _meta_weights(np.random.default_rng(0)), False)
    data = bytearray(path.read_bytes())
    path.write_bytes(edit(data) or data)
    return path


def _put(offset: int, value: int) -> Any:
    return lambda data: struct.pack_into("<i", data, offset, value)


# Header offsets: sizes begin at 0 in version 0, at 8 in versions 1 and 2; the group size is at 37.
@pytest.mark.parametrize(
    ("version", "edit", "message"),
    [
        (0, lambda data: data[:-1], r"bytes, truncated: expected \d+ for the sizes in its header"),
        (1, lambda data: data[:-1], r"bytes, truncated: expected \d+ for the sizes in its header"),
        (2, lambda data: data[:-1], r"bytes, truncated: expected \d+ for the sizes in its header"),
        (1, lambda data: data[:255], "255 bytes, truncated: expected a header of 256"),
        (0, lambda data: data + b"\0", r"bytes, damaged: expected \d+ for the sizes"),
        (2, lambda data: data + b"\0", r"bytes, damaged: expected \d+ for the sizes"),
        (1, _put(4, 3), "llama2.c version 3 is not supported: expected 0, 1 or 2"),
        (1, _put(8, -16), "width is -16: expected a whole number from 1"),
        (1, _put(16, 0), "num_layers is 0: expected a whole number from 1"),
        (1, _put(16, 2**31 - 1), "num_layers is 2147483647: expected a whole number from 1"),
        (1, _put(24, 3), "num_heads is 4: expected a multiple of num_kv_heads, 3"),
        (1, _put(28, -40), "vocab_size is -40: expected a whole number from 1"),
        (0, _put(8, 4000), r"bytes, truncated: expected \d+ for the sizes"),
        (2, _put(37, 7), "group size 7: expected a divisor of embed_VD's 640 weights"),
        (2, _put(37, 0), "group size 0: expected a divisor"),
        (2, _put(37, -8), "group size -8: expected a divisor"),
    ],
)
def test_damaged_files(version: int, edit: Any, message: str, tmp_path: Path) -> None:
    path = _damaged(tmp_path, version, edit)
    with pytest.raises(LlamaJaxError, match=message) as caught:
        open_checkpoint(path).read()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path: Path) -> None:
    """llama2.c's matrices are dim x dim: 4 heads of size 18 // 4 would misread them, even if the length fits."""
    dim, hidden, layers, heads, kv_heads, vocab, _ = 18, 24, 1, 4, 4, 40, 32
    size = dim // heads
    floats = 2 * layers * dim + dim + vocab * dim + layers * (4 * heads * size * dim + 3 * hidden * dim)
    header = struct.pack("<Ii7iB", 0x616B3432, 1, dim, hidden, layers, heads, kv_heads, vocab, 32, 1).ljust(256, b"\0")
    (tmp_path / "odd").write_bytes(header + bytes(4 * floats))
    with pytest.raises(LlamaJaxError, match=r"18.*4|4.*18"):
        open_checkpoint(tmp_path / "odd")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    path = _damaged(tmp_path, 1, lambda data: data[:-4] + struct.pack("<f", value))
    with pytest.raises(LlamaJaxError, match="head_VD holds NaN or infinity: the weights are damaged"):
        open_checkpoint(path).read()


def test_tokenizer_beside_the_file_comes_with_it(tmp_path: Path, tiny_tokenizer: llamajax.Tokenizer) -> None:
    path = tmp_path / "weights.bin"
    _write_v1(path, _meta_weights(np.random.default_rng(0)), True)
    assert open_checkpoint(path).tokenizer_bytes is None
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer.model_bytes)
    assert open_checkpoint(path).tokenizer_bytes == tiny_tokenizer.model_bytes
    with pytest.warns(UserWarning, match="the tokenizer has 320 ids, the model 40 embeddings"):
        assert llamajax.load(path)[1] is None
    with pytest.raises(LlamaJaxError, match="the tokenizer has 320 ids, the model 40 embeddings"):
        llamajax.load(path, tokenizer=tmp_path / "tokenizer.model")


# ---- stories260K ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(shared: Path) -> dict[int, Path]:
    """Files of the same weights, by version of the format."""
    names = {0: "stories260K.bin", 1: "stories260K_v1.bin", 2: "stories260K-q8.bin"}
    return {version: shared / "data" / "stories260K" / name for version, name in names.items()}


@pytest.fixture(scope="module")
def text_ids(shared: Path, stories260k: Any) -> np.ndarray:
    """The first 256 KiB of the TinyStories sample as data/README.md encodes it; the cut may split a character."""
    data = (shared / "data" / "tinystories" / "tinystories_sample_2MiB.txt").read_bytes()[: 256 << 10]
    documents = [text.strip() for text in data.decode("utf-8", errors="ignore").split("<|endoftext|>")]
    return encode_documents(stories260k.tokenizer, [text for text in documents if text])


def test_versions_0_and_1_hold_the_same_bits(files: dict[int, Path]) -> None:
    first, second = (named_arrays(open_checkpoint(files[version]).read(shardings="host")) for version in (0, 1))
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name


def test_greedy_text_is_what_run_c_prints(
    files: dict[int, Path], stories260k: Any, shared: Path, tmp_path: Path
) -> None:
    """Every form of the weights gives the 464 bytes published in llama2.c's test_all.py."""
    expected = (shared / "data" / "stories260K" / "expected_greedy_200.txt").read_bytes()
    model, tokenizer = stories260k
    models = {"version 0": model, "version 1": open_checkpoint(files[1]).read()}
    for form in ("llamajax", "huggingface"):
        save_checkpoint(model, tmp_path / form, tokenizer=tokenizer, form=form)
        models[form], _ = llamajax.load(tmp_path / form)
        assert jax.tree.structure(models[form]) == jax.tree.structure(model)
    for name, each in models.items():
        completion = llamajax.generate(each, tokenizer, "", max_new_tokens=200, temperature=0)
        assert completion.text.encode() == expected, name
        assert (len(completion.tokens), completion.finish_reason) == (200, "length")


@pytest.mark.matrix
@pytest.mark.parametrize(("window", "anchor"), [(512, 1.5375), (256, 1.5721)])
def test_cross_entropy_anchor(window: int, anchor: float, stories260k: Any, text_ids: np.ndarray) -> None:
    """The anchors are in data/README.md, measured with a NumPy LLaMA that is not ours."""
    assert cross_entropy(stories260k.model, text_ids, window=window, batch=8) == pytest.approx(anchor, abs=1e-3)


def _q8_from_layout(path: Path) -> dict[str, np.ndarray]:
    """Reads embedding and gate (w1) of a version 2 file by the layout in llama2.c's `export.py` and `runq.c`."""
    data = path.read_bytes()
    magic, version, dim, hidden, layers, heads, kv_heads, vocab, _ = struct.unpack_from("<Ii7i", data)
    (group,) = struct.unpack_from("<i", data, 37)
    assert (magic, version) == (0x616B3432, 2)
    shared, offset, found = dim // heads * kv_heads, 256 + 4 * dim * (2 * layers + 1), {}
    matrices = [("embed", vocab * dim), *[("wq", dim * dim)] * layers, *[("wk", shared * dim)] * layers]
    matrices += [*[("wv", shared * dim)] * layers, *[("wo", dim * dim)] * layers, *[("w1", hidden * dim)] * layers]
    for name, count in matrices:
        codes = np.frombuffer(data, np.int8, count, offset).astype(np.float32)
        scales = np.frombuffer(data, "<f4", count // group, offset + count)
        found.setdefault(name, []).append((codes * np.repeat(scales, group)).reshape(-1, dim))
        offset += count + count // group * 4
    return {name: np.stack(arrays) for name, arrays in found.items()}


def test_q8_file(files: dict[int, Path], stories260k: Any, text_ids: np.ndarray) -> None:
    model, expected = open_checkpoint(files[2]).read(), _q8_from_layout(files[2])
    np.testing.assert_array_equal(model.embed_VD[...], expected["embed"][0])
    np.testing.assert_array_equal(named_weights(model)["layers.*.ffn.gate_DF"][...], expected["w1"].swapaxes(1, 2))
    np.testing.assert_array_equal(
        named_weights(model)["layers.*.attention.value_DM"][...], expected["wv"].swapaxes(1, 2)
    )
    assert 0 < np.abs(model.embed_VD[...] - stories260k.model.embed_VD[...]).max() < 0.02
    # 8 bits in groups of 8 cost next to nothing: twice the tolerance of the anchors.
    part = text_ids[: 64 * 256 + 1]
    losses = [cross_entropy(each, part, window=256, batch=8) for each in (model, stories260k.model)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert losses[0] != losses[1]
