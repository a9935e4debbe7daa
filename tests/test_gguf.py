"""GGUF files written by the `gguf` package, against its dequantizers: values, sizes, keys, refusals."""

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamajax
from llamajax import LlamaJaxError, RopeScaling, named_arrays, open_checkpoint
from llamajax.checkpoint import checks
from llamajax.checkpoint.gguf.container import open_gguf
from llamajax.cli import main
from llamajax.parameters import Place, specs
from quant import ggml, kind_of, quantized, values
from tests import reference
from tests.gguf_files import CONFIG, Kind, Made, write

PACKED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)
FLOATS = ("F32", "F16", "BF16")
EXPANDED = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "Q1_0")


def _in_halves(array: np.ndarray, config: llamajax.Config) -> np.ndarray:
    """Returns rows of q or k in Hugging Face's order: undoes `permute` of llama.cpp's convert_hf_to_gguf.py."""
    heads = len(array) // config.head_size
    return array.reshape(heads, config.head_size // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)


def _expected(made: Made) -> dict[Place, np.ndarray]:
    """Returns each weight by the gguf package, in our orientation and RoPE layout."""
    theirs, found = made.weights(), {}
    for place, spec in specs(made.config).items():
        name = spec.foreign["gguf"].format(place.layer)
        array = theirs[name]
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            array = _in_halves(array, made.config)
        found[place] = array.T if spec.transposed else array
    return found


# A table, a matrix with reordered rows, one that is not square, a norm: each compiles one program per type.
_SOME = (Place("embed_VD"), Place("attention.key_DM", 0), Place("ffn.down_FD", 1), Place("ffn_norm.weight_D", 1))


def _check_values(made: Made) -> llamajax.Opened:
    """Checks that weights are those of the gguf package, and that their structure was predicted."""
    opened = open_checkpoint(made.path)
    for place, expected in _expected(made).items():
        if place not in _SOME and not _all():
            continue
        weight = opened.read_weight(place)
        np.testing.assert_array_equal(np.asarray(values(weight), np.float32), expected, str(place))
        foreseen = opened.source.abstract[place]
        if quantized(foreseen):
            assert kind_of(weight) == kind_of(foreseen)
    return opened


# ---- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PACKED)
def test_packed_types_stay_packed_and_keep_their_values(kind: str, tmp_path: Path) -> None:
    made = write(tmp_path / "m.gguf", Kind[kind])
    opened = _check_values(made)
    weights = [opened.source.abstract[place] for place, spec in specs(CONFIG).items() if spec.is_matrix]
    assert len(quantized(weights)) >= len(weights) and opened.notes == ()
    stored = sum(len(data.reshape(-1)) for _, data in made.blocks.values())
    # TQ1_0's five digits per byte become 2 bits each.
    most = 1.3 if kind == "TQ1_0" else 1.0
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(opened.source.abstract)) <= most * stored
    assert f"15 {kind}, 5 F32" in opened.description


@pytest.mark.parametrize("kind", [*FLOATS, *EXPANDED])
def test_other_types_are_floats(kind: str, tmp_path: Path) -> None:
    opened = _check_values(write(tmp_path / "m.gguf", Kind[kind]))
    assert not quantized(opened.source.abstract)
    if kind in EXPANDED:
        (note,) = opened.notes
        assert f"15 weights of type {kind} are read as floats: llamajax quantize packs them" in note


def test_filling_stacks_gives_what_single_reads_give(tmp_path: Path) -> None:
    kinds = {"attn_v": Kind.Q6_K, "ffn_down": Kind.Q4_1, "token_embd": Kind.F16}
    made = write(tmp_path / "m.gguf", lambda name: next((k for n, k in kinds.items() if n in name), Kind.Q4_K))
    opened = open_checkpoint(made.path)
    model = opened.read(shardings="host")
    for place, weight in llamajax.weights_of(model).items():
        jax.tree.map(np.testing.assert_array_equal, weight, _like(weight, opened.read_weight(place)))


def _like(weight: Any, other: Any) -> Any:
    """Returns `other` with the structure and dtypes of `weight`."""
    return jax.tree.map(lambda a, b: np.asarray(b, a.dtype), weight, other)


def test_logits_are_those_of_the_reference_in_pairs(tmp_path: Path) -> None:
    """The float64 LLaMA rotates neighbouring pairs, with the gguf package's floats in the file's order."""
    kinds = {"attn_v": Kind.Q6_K, "blk.1.ffn_down": Kind.Q5_1, "ffn_down": Kind.Q8_0, "token_embd": Kind.Q4_1}
    made = write(tmp_path / "m.gguf", lambda name: next((k for n, k in kinds.items() if n in name), Kind.Q4_K))
    theirs = made.weights()
    weights = {
        spec.foreign["huggingface"].format(place.layer): theirs[spec.foreign["gguf"].format(place.layer)]
        for place, spec in specs(CONFIG).items()
    }
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 12)
    expected = reference.forward(CONFIG, weights, tokens, neighbours=True)
    model = open_checkpoint(made.path).read()
    logits, _ = jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens)[None])
    np.testing.assert_allclose(np.asarray(logits[0]), expected, atol=2e-3 * np.abs(expected).max())


def test_stories260k_tells_its_story(shared: Path) -> None:
    """The text is the 464 bytes of llama2.c's test_all.py; the weights equal the llama2.c file's, bit for bit."""
    folder = shared / "data" / "stories260K"
    model, tokenizer = llamajax.load(folder / "stories260K.gguf")
    completion = llamajax.generate(model, tokenizer, "", max_new_tokens=200, temperature=0)
    assert completion.text.encode() == (folder / "expected_greedy_200.txt").read_bytes()
    theirs = named_arrays(open_checkpoint(folder / "stories260K.bin").read())
    for name, array in theirs.items():
        np.testing.assert_array_equal(named_arrays(model)[name], array)
    np.testing.assert_array_equal(model.head_VD[...], model.embed_VD[...])  # the file holds the head twice


def test_smollm2_keeps_every_value(smollm2: Path) -> None:
    """Compares all of a file that others made with the gguf package."""
    opened = open_checkpoint(smollm2)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2).tensors}
    assert len(opened.source.order) == len(tensors) == 272
    for place in opened.source.order[:: 1 if _all() else 9]:
        spec = specs(opened.config)[place]
        tensor = tensors[spec.foreign["gguf"].format(place.layer)]
        expected = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if place.name in ("attention.query_DQ", "attention.key_DM"):
            expected = _in_halves(expected, opened.config)
        found = np.asarray(values(opened.read_weight(place)))
        np.testing.assert_array_equal(found, expected.T if spec.transposed else expected, str(place))


def _all() -> bool:
    import os

    return bool(os.environ.get("LLAMAJAX_TEST_ALL"))


# ---- Dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
def test_a_file_of_16_bits_computes_in_them_where_its_norms_do_without_loss(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    made = write(tmp_path / "m.gguf", Kind[kind])
    assert kind == "F32" or _dtypes(made.path) == {"float32"}, "norms of 24 bits need float32"
    file = bytearray(made.path.read_bytes())
    for name, tensor in open_gguf(made.path).tensors.items():
        if len(tensor.shape) == 1:
            norm = np.linspace(0.5, 1.5, tensor.shape[0]).astype(jnp.bfloat16).astype("<f4").tobytes()
            file[tensor.start : tensor.start + len(norm)] = norm
        assert name
    (tmp_path / "rounded.gguf").write_bytes(file)
    assert _dtypes(tmp_path / "rounded.gguf") == {dtype}


def test_a_table_that_is_only_looked_up_keeps_its_dtype(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, tied_embeddings=False)
    kinds = {"token_embd": Kind.F16, "output": Kind.F16}
    made = write(tmp_path / "m.gguf", lambda name: kinds.get(name.removesuffix(".weight"), Kind.Q8_0), config)
    opened = open_checkpoint(made.path)
    abstract = {str(place): weight.dtype for place, weight in opened.source.abstract.items() if place.layer is None}
    assert (str(abstract["embed_VD"]), str(abstract["head_VD"])) == ("float16", "float32")
    assert opened.read().dtype == jnp.float32 and not opened.config.tied_embeddings


def _dtypes(path: Path) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(open_checkpoint(path).abstract)}


# ---- Containers ------------------------------------------------------------------------------------------------------


def _same(path: Path, made: Made) -> None:
    """Checks that a file holds the same arrays as another."""
    theirs, ours = (named_arrays(open_checkpoint(each).read(shardings="host")) for each in (made.path, path))
    for name, array in theirs.items():
        assert array.tobytes() == ours[name].tobytes(), name


def test_version_2_is_read_and_1_is_not(tmp_path: Path) -> None:
    made = write(tmp_path / "m.gguf", Kind.Q4_0)
    file = made.path.read_bytes()
    (tmp_path / "two").write_bytes(file[:4] + struct.pack("<I", 2) + file[8:])
    assert "GGUF version 2" in open_checkpoint(tmp_path / "two").description
    _same(tmp_path / "two", made)
    for version in (0, 1, 4, 1 << 15):
        (tmp_path / "other").write_bytes(file[:4] + struct.pack("<I", version) + file[8:])
        with pytest.raises(LlamaJaxError, match=f"GGUF version {version}, which is not supported: expected version"):
            open_checkpoint(tmp_path / "other")


# Numbers of several bytes in a block, from ggml-common.h: (offset, size).
_NUMBERS = {
    **{Kind.F32: [(0, 4)], Kind.F16: [(0, 2)], Kind.BF16: [(0, 2)]},
    **{Kind.Q4_0: [(0, 2)], Kind.Q5_0: [(0, 2), (2, 4)], Kind.Q5_1: [(0, 2), (2, 2), (4, 4)]},
    **{Kind.Q2_K: [(80, 2), (82, 2)], Kind.Q3_K: [(108, 2)], Kind.Q4_K: [(0, 2), (2, 2)], Kind.Q6_K: [(208, 2)]},
    **{Kind.TQ2_0: [(64, 2)], Kind.MXFP4: []},
}


def _big_endian(data: np.ndarray, kind: Kind) -> np.ndarray:
    """Returns blocks as a big-endian machine has them: the bytes of each number in reverse order."""
    weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
    turned = data.reshape(-1, nbytes).copy()
    for offset, size in _NUMBERS[kind]:
        turned[:, offset : offset + size] = turned[:, offset : offset + size][:, ::-1]
    return turned.reshape(data.shape)


@pytest.mark.parametrize("magic", [b"GGUF", b"FUGG"])
@pytest.mark.parametrize("kind", _NUMBERS)
def test_big_endian_files(kind: Kind, magic: bytes, tmp_path: Path) -> None:
    """gguf's writer leaves blocks little-endian; gguf-py's converter reverses them, and so does this test."""
    made = write(tmp_path / "little.gguf", kind)
    big = write(tmp_path / "big.gguf", kind, endianess=gguf.GGUFEndian.BIG)
    file = bytearray(magic + big.path.read_bytes()[4:])
    for name, tensor in open_gguf(big.path).tensors.items():
        of_this, data = made.blocks[name]
        file[tensor.start : tensor.start + tensor.nbytes] = _big_endian(data, of_this).tobytes()
    big.path.write_bytes(file)
    assert "GGUF version 3, big-endian" in open_checkpoint(big.path).description
    _same(big.path, made)


def test_big_endian_files_of_types_without_an_order(tmp_path: Path) -> None:
    big = write(tmp_path / "big.gguf", Kind.IQ2_XS, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(LlamaJaxError, match="is of type IQ2_XS in a big-endian file, which ggml does not define"):
        open_checkpoint(big.path).read()


def _split(tmp_path: Path) -> tuple[Made, list[Path]]:
    made = write(tmp_path / "whole.gguf", Kind.Q4_1)
    write(tmp_path / "m.gguf", Kind.Q4_1, split_max_tensors=8)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert [path.name for path in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return made, parts


def test_any_part_of_a_split_file_opens_all(tmp_path: Path) -> None:
    made, parts = _split(tmp_path)
    for part in parts:
        assert ", 3 parts" in open_checkpoint(part).description
        _same(part, made)


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    _, parts = _split(tmp_path)
    whole = {path: path.read_bytes() for path in parts}
    other = tmp_path / "other"
    other.mkdir()
    write(other / "m.gguf", Kind.Q4_1, split_max_tensors=11)
    (tmp_path / "renamed.gguf").write_bytes(whole[parts[0]])
    changes: list[tuple[Callable[[], Any], Path, str]] = [
        (
            lambda: parts[1].unlink(),
            parts[0],
            "00002-of-00003.gguf: no such file: m-00001-of-00003.gguf is one of 3 parts",
        ),
        (lambda: parts[1].write_bytes(whole[parts[2]]), parts[0], r"metadata says part \(2, 3\): expected \(1, 3\)"),
        (lambda: parts[1].write_bytes(b"0" * 99), parts[0], "not a GGUF file: expected a part of a split GGUF file"),
        (lambda: None, tmp_path / "renamed.gguf", "one of 3 parts, .* a name such as model-00001-of-00003.gguf"),
    ]
    for change, path, message in changes:
        change()
        with pytest.raises(LlamaJaxError, match=message):
            open_checkpoint(path)
        for each, data in whole.items():
            each.write_bytes(data)


# ---- Metadata --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "clip"}, "is a multimodal projector .* not a language model"),
        ({"general.type": "mmproj"}, "is a multimodal projector"),
        ({"general.type": "adapter", "adapter.type": "lora"}, r"is an adapter \('lora'\) for a model"),
        ({"general.type": "imatrix"}, "is an importance matrix"),
        ({"general.type": "soup"}, "is of general.type 'soup', not a language model"),
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported: expected .* one of llama"),
        ({"llama.block_count": None}, "missing key 'llama.block_count'"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "missing key 'llama.attention.layer_norm_rms_epsilon'"),
        ({"llama.block_count": np.uint32(3)}, "tensor 'blk.2.attn_k.weight' is missing"),
        ({"llama.block_count": np.uint32(1)}, "tensor 'blk.1.attn_k.weight' does not belong to the model"),
        ({"llama.block_count": np.uint32(4000)}, "4000 layers by its metadata, but 20 tensors"),
        ({"llama.feed_forward_length": np.uint32(128)}, "expected .* by the metadata"),
        ({"llama.attention.head_count_kv": np.uint32(3)}, "num_heads is 4: expected a multiple of num_kv_heads, 3"),
        ({"llama.attention.head_count": np.uint32(8)}, "rope.dimension_count is 64, .*: expected 32"),
        ({"llama.attention.value_length": np.uint32(32)}, "value_length is 32, which is not supported: expected 64"),
        ({"llama.expert_count": np.uint32(8)}, "llama.expert_count is 8, which is not supported: expected 0"),
        ({"llama.attention.sliding_window": "64"}, "sliding_window is '64'"),
        ({"llama.attention.scale": np.float32(1.0)}, "attention.scale is 1.0"),
        ({"llama.rope.scaling.type": "su"}, "rope.scaling.type is 'su', which is not supported"),
        ({"llama.rope.scaling.factor": "2"}, "rope.scaling.factor is '2': expected a finite number"),
        ({"llama.use_magic": True}, "unknown key 'llama.use_magic': .* --ignore_key=llama.use_magic"),
        ({"llama.feed_forward_length": [512, 256]}, "feed_forward_length differs between layers"),
        ({"llama.context_length": "long"}, "context_length is 'long': expected a whole number"),
        ({"general.quantization_version": np.uint32(1)}, "general.quantization_version is 1, which is not supported"),
    ],
)
def test_keys_that_ask_for_something_else(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = write(tmp_path / "m.gguf", metadata=changes)
    with pytest.raises(LlamaJaxError, match=message):
        open_checkpoint(made.path)


def test_keys_that_change_nothing(tmp_path: Path) -> None:
    changes = {
        "llama.attention.key_length": np.uint32(64),
        "llama.attention.value_length": np.uint32(64),
        "llama.attention.head_count_kv": [2, 2],
        "llama.expert_count": np.uint32(0),
        "llama.attention.sliding_window": np.uint32(0),
        "llama.attention.scale": np.float32(64**-0.5),
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": np.float32(4),
        "llama.tensor_data_layout": "Meta AI original pth",
        "llama.use_magic": True,
        "quantize.imatrix.file": "some.dat",
    }
    opened = open_checkpoint(write(tmp_path / "m.gguf", metadata=changes).path, ignore_keys=["llama.use_magic"])
    assert opened.config == CONFIG and opened.notes == ()


def test_what_a_model_is_made_by_cannot_be_ignored(tmp_path: Path) -> None:
    made = write(tmp_path / "m.gguf")
    with pytest.raises(LlamaJaxError, match="'llama.block_count' cannot be ignored: the architecture depends on it"):
        open_checkpoint(made.path, ignore_keys=["llama.block_count"])


def test_linear_scaling_defaults_and_notes(tmp_path: Path) -> None:
    changes = {
        "llama.rope.scaling.factor": np.float32(4),
        "llama.attention.head_count_kv": None,
        "llama.vocab_size": np.uint32(300),
        "publisher.motto": "more",
        "llama.rope.freq_base": None,
    }
    config = dataclasses.replace(CONFIG, num_kv_heads=4, rope_scaling=RopeScaling(kind="linear", factor=4.0))
    opened = open_checkpoint(write(tmp_path / "m.gguf", config=config, metadata=changes).path)
    assert opened.config == config
    assert opened.notes == (
        f"{tmp_path}/m.gguf: llama.vocab_size is 300, but the embedding has 320 rows: the number of rows is used",
        f"{tmp_path}/m.gguf: unknown keys, not read: 'publisher.motto'",
    )


def test_sampling_defaults(tmp_path: Path) -> None:
    changes = {
        "general.sampling.temp": np.float32(0.6),
        "general.sampling.top_k": np.int32(40),
        "general.sampling.top_p": np.float32(0.9),
        "general.sampling.min_p": np.float32(0.05),
        "general.sampling.penalty_repeat": np.float32(1.1),
        "general.sampling.mirostat": np.int32(0),
    }
    opened = open_checkpoint(write(tmp_path / "m.gguf", metadata=changes).path)
    assert dict(opened.words.sampling) == {
        "temperature": 0.6,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
    }
    assert opened.notes == ()


def test_sampling_that_is_not_followed_is_said(tmp_path: Path) -> None:
    changes = {
        "general.sampling.temp": np.float32(-1),
        "general.sampling.top_k": np.int32(0),
        "general.sampling.top_p": "most",
        "general.sampling.penalty_repeat": np.float32(1.2),
        "general.sampling.penalty_last_n": np.int32(64),
        "general.sampling.mirostat": np.int32(2),
        "general.sampling.xtc_threshold": np.float32(0.1),
    }
    path = write(tmp_path / "m.gguf", metadata=changes).path
    opened = open_checkpoint(path)
    assert dict(opened.words.sampling) == {"temperature": 0, "repetition_penalty": 1.2}
    assert opened.notes == (
        f"{path}: general.sampling.top_p is 'most', which is invalid: ignored",
        f"{path}: general.sampling.mirostat is 2, which is not supported: ignored",
        f"{path}: general.sampling.penalty_last_n is 64, which is not supported: ignored",
    )


# ---- RoPE factors ----------------------------------------------------------------------------------------------------


def _divisors(theta: float, size: int, factor: float, low: float, high: float, length: float) -> np.ndarray:
    """Returns `rope_freqs.weight` as llama.cpp's convert_hf_to_gguf.py computes it in `generate_extra_tensors`."""
    made = []
    for i in range(0, size, 2):
        wavelength = 2 * np.pi * theta ** (i / size)
        if wavelength < length / high:
            made.append(1.0)
        elif wavelength > length / low:
            made.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            made.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(made, np.float32)


@pytest.mark.parametrize(
    ("factor", "low", "high", "length"),
    [
        (8.0, 1.0, 4.0, 8192),
        (32.0, 1.0, 4.0, 8192),
        (4.0, 1.0, 4.0, 2048),
        (8.0, 0.5, 3.5, 10000),
        (2.5, 2.0, 7.0, 777),
    ],
)
@pytest.mark.parametrize("size", [64, 128])
def test_rope_factors_are_llama_31s_scaling(
    factor: float, low: float, high: float, length: int, size: int, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, head_size=size, rope_theta=500000.0)
    keys = {"llama.attention.key_length": np.uint32(size), "llama.attention.value_length": np.uint32(size)}
    divisors = _divisors(500000.0, size, factor, low, high, length)
    made = write(tmp_path / "m.gguf", config=config, metadata=keys, extra={"rope_freqs.weight": divisors})
    found = open_checkpoint(made.path).config
    assert found.rope_scaling is not None and found.rope_scaling.kind == "llama3"
    if (low, high) == (1.0, 4.0):
        assert found.rope_scaling == RopeScaling(
            kind="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high, original_context_length=length
        )
    plain = reference.frequencies(dataclasses.replace(config, rope_scaling=None))
    np.testing.assert_allclose(plain / reference.frequencies(found), divisors, rtol=1e-5)


def test_rope_factors_that_are_none(tmp_path: Path) -> None:
    ones = {"rope_freqs.weight": np.ones(32, np.float32)}
    assert open_checkpoint(write(tmp_path / "m.gguf", extra=ones).path).config == CONFIG
    steps = {"rope_freqs.weight": np.linspace(1, 8, 32).astype(np.float32)}
    inverse = {"rope_freqs.weight": (1e4 ** (-np.arange(32) / 32)).astype(np.float32)}
    for extra in (steps, inverse):
        made = write(tmp_path / "m.gguf", extra=extra)
        with pytest.raises(LlamaJaxError, match="expected the divisors of Llama 3.1's RoPE scaling: another scaling"):
            open_checkpoint(made.path)
    made = write(tmp_path / "m.gguf", extra={"rope_freqs.weight": np.ones(16, np.float32)})
    with pytest.raises(LlamaJaxError, match=r"has shape \(16,\): expected \(32,\), half of a head's"):
        open_checkpoint(made.path)
    scaled = {"rope_freqs.weight": _divisors(1e4, 64, 8.0, 1.0, 4.0, 8192)}
    made = write(tmp_path / "m.gguf", metadata={"llama.rope.scaling.factor": np.float32(2)}, extra=scaled)
    with pytest.raises(LlamaJaxError, match="and RoPE scaling 'linear' are given: expected one of them"):
        open_checkpoint(made.path)


def test_tensors_of_no_effect_are_said(tmp_path: Path) -> None:
    extra = {f"blk.{i}.attn_rot_embd.weight": np.ones(32, np.float32) for i in range(2)}
    opened = open_checkpoint(write(tmp_path / "m.gguf", extra=extra).path)
    assert opened.notes == (
        f"{tmp_path}/m.gguf: tensors without effect, not read: blk.0.attn_rot_embd.weight, blk.1.attn_rot_embd.weight",
    )


# ---- Damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "value"), [(Kind.Q4_0, 0x7E00), (Kind.Q6_K, 0x7C00), (Kind.F16, 0x7C00)])
def test_scales_that_are_not_finite(kind: Kind, value: int, tmp_path: Path) -> None:
    made = write(tmp_path / "m.gguf", kind)
    _damage(made, "blk.1.ffn_up.weight", 208 if kind == Kind.Q6_K else 0, struct.pack("<H", value))
    with pytest.raises(LlamaJaxError, match="layers.1.ffn.up_DF holds NaN or infinity: the weights are damaged"):
        open_checkpoint(made.path).read()


@pytest.mark.parametrize(("kind", "at"), [(Kind.MXFP4, 17), (Kind.NVFP4, 2)])
def test_a_scale_in_a_byte_that_is_nan(kind: Kind, at: int, tmp_path: Path) -> None:
    made = write(tmp_path / "m.gguf", kind)
    _damage(made, "blk.0.attn_q.weight", at, b"\xff")
    with pytest.raises(LlamaJaxError, match="layers.0.attention.query_DQ holds NaN or infinity"):
        open_checkpoint(made.path).read()


def _damage(made: Made, name: str, at: int, data: bytes) -> None:
    file = bytearray(made.path.read_bytes())
    start = open_gguf(made.path).tensors[name].start + at
    file[start : start + len(data)] = data
    made.path.write_bytes(file)


def test_types_that_no_weight_is_of(tmp_path: Path) -> None:
    made = write(tmp_path / "m.gguf")
    file = made.path.read_bytes()
    info = b"blk.0.ffn_up.weight" + struct.pack("<IQQ", 2, 256, 512)
    at = file.index(info) + len(info)
    for number, message in (
        (26, "is of type I32: expected a type for weights"),
        (77, "tensor 'blk.0.ffn_up.weight': ggml type 77: expected one of F32"),
    ):
        (tmp_path / "other").write_bytes(file[:at] + struct.pack("<I", number) + file[at + 4 :])
        with pytest.raises(LlamaJaxError, match=message):
            open_checkpoint(tmp_path / "other")


# ---- Use of an opened file -------------------------------------------------------------------------------------------


def test_floats_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write(tmp_path / "m.gguf", Kind.IQ3_S)
    monkeypatch.setattr(checks, "available_memory", lambda: 1 << 20)
    with pytest.raises(
        LlamaJaxError, match="15 weights of type IQ3_S become floats in memory, .* llamajax quantize --model="
    ):
        open_checkpoint(made.path).read()
    assert isinstance(checks.available_memory(), int)
    packed = write(tmp_path / "packed.gguf", Kind.Q4_0)
    open_checkpoint(packed.path).read(shardings="host")  # as large as the file


def test_quantize_and_convert_read_every_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file like those that llama.cpp's quantizer makes for IQ2_S: packed tensors of other types stay as they are."""
    kinds = {"token_embd": Kind.Q2_K, "attn_v": Kind.Q4_K, "blk.1.ffn_down": Kind.Q3_K}
    made = write(tmp_path / "m.gguf", lambda name: next((k for n, k in kinds.items() if n in name), Kind.IQ2_S))
    assert main(["quantize", f"--model={made.path}", "--recipe=int4-g32", f"--output={tmp_path}/q"]) == 0
    assert main(["convert", f"--model={made.path}", f"--output={tmp_path}/c"]) == 0
    assert "11 weights of type IQ2_S are read as floats" in capsys.readouterr().err
    converted, requantized = open_checkpoint(tmp_path / "c"), open_checkpoint(tmp_path / "q")
    for place, expected in _expected(made).items():
        if place not in _SOME:
            continue
        np.testing.assert_array_equal(np.asarray(values(converted.read_weight(place))), expected, str(place))
        found = np.asarray(values(requantized.read_weight(place)))
        if place == Place("attention.key_DM", 0):  # quantized to 4 bits
            assert 0.01 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.15
        else:
            np.testing.assert_array_equal(found, expected, str(place))
    assert all(quantized(requantized.source.abstract[place]) for place, spec in specs(CONFIG).items() if spec.is_matrix)
    with pytest.raises(LlamaJaxError, match="some of its weights are packed already: expected a recipe that needs no"):
        llamajax.quantize(open_checkpoint(made.path), "int4-g128-gptq", calibration=np.zeros(600, np.int32))


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = {"general.description": "x" * 500, "publisher.list": [np.int32(7)] * 5}
    metadata = metadata | {"publisher.list": list(map(int, range(5))), "llama.rope.freq_base": np.float32(10000)}
    made = write(
        tmp_path / "m.gguf", lambda name: Kind.Q6_K if "blk.1.ffn_down" in name else Kind.Q4_K, metadata=metadata
    )
    assert main(["inspect", f"--model={made.path}", "--backend=cpu", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    down = next(tensor for tensor in summary["tensors"] if tensor["name"] == "layers.*.ffn.down_FD")
    assert down["file_types"] == {"Q4_K": 1, "Q6_K": 1}
    assert down["file_bytes"] == 256 * 2 * (144 + 210) and down["product"]
    assert summary["file_bytes"] == sum(data.size for _, data in made.blocks.values())
    assert (summary["packed"], summary["weights"]) == (15, 20)
    assert summary["metadata"]["general.description"] == "x" * 500
    assert summary["metadata"]["publisher.list"] == {"array": "int32", "count": 5, "first": [0, 1, 2]}
    assert main(["inspect", f"--model={made.path}"]) == 0
    out = capsys.readouterr().out
    assert "in the file" in out and "1 Q4_K, 1 Q6_K" in out and "5 int32: 0, 1, 2, …" in out and "x" * 100 not in out


def test_our_sizes_are_the_gguf_packages() -> None:
    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items() if kind != Kind.Q8_1}
    ours = {kind.number: (kind.block, kind.nbytes) for kind in ggml.TYPES.values() if kind.name != "Q8_1"}
    assert ours == sizes
