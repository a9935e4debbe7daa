"""GGUF files that we write: what the gguf package, our own reader and llama.cpp find in them."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamajax
import quant
from llamajax import Config, Llama, LlamaJaxError, open_checkpoint, save_checkpoint
from llamajax.checkpoint import read_tokenizer
from llamajax.checkpoint.gguf.encode import Entry, header
from llamajax.cli import main
from llamajax.parameters import named_arrays, weights_of
from llamajax.quantization.quantize import quantize
from quant import Rule
from tests.reference import random_model

gguf = pytest.importorskip("gguf", reason="compares with the gguf package: pip install gguf")

# Grouped queries, a head size other than width / heads, an untied head; rows of whole 256 for the K types.
CONFIG = Config(
    vocab_size=512,
    width=256,
    ffn_width=512,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_size=64,
    context_length=128,
    rope_theta=50000.0,
)
KEEP_NORMS = Rule(weights="*norm*", keep=True)
SCALING = {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def write(model: Llama, folder: Path, **options: Any) -> Path:
    path = folder / f"{len(list(folder.iterdir()))}.gguf"
    save_checkpoint(model, path, form="gguf", **options)
    assert list(folder.glob(".*")) == []
    return path


def tensors_of(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values_of(path: Path) -> dict[str, np.ndarray]:
    """Returns the values that the gguf package reads, float32, by its names."""
    return {
        name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].tolist())
        for name, tensor in tensors_of(path).items()
    }


def permuted(matrix: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of convert_hf_to_gguf.py: reorders a Hugging Face model's rows of q or k for llama.cpp."""
    return matrix.reshape(heads, 2, len(matrix) // heads // 2, -1).swapaxes(1, 2).reshape(matrix.shape)


def expected_values(model: Llama) -> dict[str, np.ndarray]:
    """Returns the model's values in the names and orientation of llama.cpp's converter."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_layers)
    theirs = {"attention.query_DQ": "q_proj", "attention.key_DM": "k_proj", "attention.value_DM": "v_proj"}
    theirs |= {"attention.out_QD": "o_proj", "ffn.gate_DF": "gate_proj", "ffn.up_DF": "up_proj"}
    theirs |= {"ffn.down_FD": "down_proj", "embed_VD": "embed_tokens", "norm.weight_D": "norm", "head_VD": "lm_head"}
    theirs |= {"attention_norm.weight_D": "input_layernorm", "ffn_norm.weight_D": "post_attention_layernorm"}
    found = {}
    for place, weight in weights_of(model).items():
        part, value = theirs[place.name], np.asarray(quant.values(weight), np.float32)
        inside = {"q": "self_attn.", "k": "self_attn.", "v": "self_attn.", "o": "self_attn."} | dict.fromkeys(
            "gud", "mlp."
        )
        if place.layer is None:
            name = part if part == "lm_head" else f"model.{part}"
        else:
            name = f"model.layers.{place.layer}.{inside[part[0]] if part.endswith('_proj') else ''}{part}"
            value = value.T if part.endswith("_proj") else value
        if part in ("q_proj", "k_proj"):
            value = permuted(value, model.config.num_heads if part == "q_proj" else model.config.num_kv_heads)
        found[names.get_name(name) + ".weight"] = value
    return found


# ---- Floats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dtype", "name"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_floats(dtype: str, name: str, tied: bool, tmp_path: Path) -> None:
    """Every tensor is where llama.cpp's converter puts it, norms in F32; reading gives the same model."""
    config = Config.from_dict(CONFIG.to_dict() | {"tied_embeddings": tied})
    model = random_model(config)
    path = write(model, tmp_path, dtype=dtype)
    tensors, values, expected = tensors_of(path), values_of(path), expected_values(model)
    assert sorted(tensors) == sorted(expected)
    for tensor, value in expected.items():
        stored = "F32" if value.ndim == 1 else name
        assert tensors[tensor].tensor_type.name == stored
        rounded = value.astype(jnp.dtype(dtype)) if value.ndim == 2 else value
        np.testing.assert_array_equal(values[tensor], rounded.astype(np.float32), err_msg=tensor)
    back = open_checkpoint(path).read(shardings="host")
    assert dataclasses.replace(back.config, norm_eps=config.norm_eps) == config  # norm_eps is float32 in the file
    for leaf, array in named_arrays(back).items():
        other = np.asarray(named_arrays(model)[leaf])
        rounded = other if "norm" in leaf else other.astype(jnp.dtype(dtype))
        np.testing.assert_array_equal(np.asarray(array, np.float32), rounded.astype(np.float32), err_msg=leaf)


def test_dtypes_are_as_they_are_unless_given(tmp_path: Path) -> None:
    path = write(random_model(CONFIG, dtype=jnp.bfloat16), tmp_path)
    types = {name: tensor.tensor_type.name for name, tensor in tensors_of(path).items()}
    assert {kind for name, kind in types.items() if "norm" not in name} == {"BF16"}
    assert {kind for name, kind in types.items() if "norm" in name} == {"F32"}


def test_a_dtype_that_does_not_hold_the_numbers(tmp_path: Path) -> None:
    model = random_model(CONFIG)
    model.embed_VD.set_value(model.embed_VD.get_value().at[0, 0].set(1e6))
    with pytest.raises(LlamaJaxError, match=r"embed_VD holds 1e\+06: the largest float16 number is 65504"):
        write(model, tmp_path, dtype="float16")
    assert not list(tmp_path.iterdir())


# ---- Packed weights -------------------------------------------------------------------------------------------------

RULES = {
    "Q4_0": {"scheme": "int4"},
    "Q4_1": {"scheme": "uint4"},
    "Q5_0": {"scheme": "int5"},
    "Q5_1": {"scheme": "uint5"},
    "Q8_0": {"scheme": "int8"},
    "IQ4_NL": {"scheme": "iq4_nl"},
    "MXFP4": {"scheme": "mxfp4"},
    "TQ2_0": {"scheme": "ternary", "group_size": 256},
    "Q2_K": {"scheme": "uint2", "group_size": 16, "scale_scheme": "uint4"},
    "Q3_K": {"scheme": "int3", "group_size": 16, "scale_scheme": "int6"},
    "Q4_K": {"scheme": "uint4", "scale_scheme": "uint6"},
    "Q5_K": {"scheme": "uint5", "scale_scheme": "uint6", "clip": "mse"},
    "Q6_K": {"scheme": "int6", "group_size": 16, "scale_scheme": "int8", "clip": "mse"},
}


def assert_same_arrays(one: Any, other: Any) -> None:
    assert quant.kind_of(one) == quant.kind_of(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.matrix
@pytest.mark.parametrize("name", RULES)
def test_packed_weights_are_written_as_they_are(name: str, tmp_path: Path) -> None:
    """Codes and scales are the same after writing and reading, and the gguf package reads our values."""
    rules = (KEEP_NORMS, Rule(weights="layers.*.attention.out_QD", keep=True), Rule(weights="*", **RULES[name]))
    model = quantize(random_model(CONFIG), rules, types="ggml")
    path = write(model, tmp_path)
    types = {tensor: found.tensor_type.name for tensor, found in tensors_of(path).items()}
    kept = {tensor for tensor, kind in types.items() if kind == "F32"}
    assert all("norm" in tensor or "attn_output" in tensor for tensor in kept)
    assert {kind for tensor, kind in types.items() if tensor not in kept} == {name}
    for tensor, value in expected_values(model).items():
        np.testing.assert_array_equal(values_of(path)[tensor] + np.float32(0), value + np.float32(0), err_msg=tensor)
    back = weights_of(open_checkpoint(path).read(shardings="host"))
    for place, weight in weights_of(model).items():
        assert_same_arrays(quant.map_quantized(_as_read, weight), back[place])


def _as_read(weight: quant.QTensor) -> quant.QTensor:
    """Returns the weight without what a file does not hold: the dtype before, and the activations."""
    return dataclasses.replace(weight, dtype=np.dtype("float32"), activations=None)


@pytest.mark.parametrize("name", "Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_XS NVFP4".split())
def test_what_was_read_is_written_again(name: str, tmp_path: Path) -> None:
    """Types with two levels of scales, of random bytes: tensors come back byte for byte, also rows of q and k."""
    kind = quant.ggml.named(name)
    source = write(random_model(CONFIG), tmp_path)
    rng, blocks = np.random.default_rng(4), {}
    writer = gguf.GGUFWriter(tmp_path / "packed.gguf", "llama")
    for field in gguf.GGUFReader(source).fields.values():
        if field.name.startswith("llama.") or field.name == "tokenizer.ggml.model":
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor, found in tensors_of(source).items():
        if len(found.shape) == 1:
            writer.add_tensor(tensor, found.data)
            continue
        rows, length = int(found.shape[1]), int(found.shape[0])
        data = rng.integers(
            2, 60, (rows, kind.row_bytes(length)), np.uint8
        )  # no byte begins a float16 that is not finite
        blocks[tensor] = data
        writer.add_tensor(tensor, data, raw_dtype=gguf.GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = open_checkpoint(tmp_path / "packed.gguf").read(shardings="host")
    again = tensors_of(write(model, tmp_path))
    for tensor, data in blocks.items():
        assert again[tensor].tensor_type.name == name
        np.testing.assert_array_equal(again[tensor].data, data, err_msg=tensor)


def test_a_file_of_others_comes_back(smollm2: Path, tmp_path: Path) -> None:
    """Every tensor of SmolLM2 comes back byte for byte, and every key, except keys about how the file was made."""
    opened = open_checkpoint(smollm2)
    path = write(opened.read(shardings="host"), tmp_path, tokenizer=read_tokenizer(opened))
    readers = [gguf.GGUFReader(file) for file in (smollm2, path)]
    before, after = ({tensor.name: tensor for tensor in reader.tensors} for reader in readers)
    assert sorted(before) == sorted(after)
    for name, tensor in before.items():
        assert tensor.tensor_type == after[name].tensor_type
        np.testing.assert_array_equal(tensor.data, after[name].data, err_msg=name)
    keys = [{name: field.contents() for name, field in reader.fields.items()} for reader in readers]
    left_out = ("GGUF.", "general.", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.unknown_token_id")
    for name, value in keys[0].items():  # the two keys belong to sentencepiece vocabularies, and this is none
        assert name.startswith(left_out) or keys[1].get(name) == value, name
    assert keys[1]["general.file_type"] == keys[0]["general.file_type"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"scheme": "int4", "group_size": 128, "scale_dtype": "float16"},
            r"embed_VD is int4, groups of 128, scales in float16: no ggml type holds it, the nearest is Q4_0 \(int4, "
            "groups of 32, scales in float16",
        ),
        ({"scheme": "nf4", "group_size": 64}, r"embed_VD is nf4, .* the nearest is IQ4_NL"),
        ({"scheme": "uint4", "scale_dtype": "float32"}, r"zero points: no ggml type holds it, the nearest is Q4_1"),
        ({"scheme": "int6"}, "the nearest is Q6_K .*quantize the model again with --types=ggml, or give --dtype"),
    ],
)
def test_what_no_type_holds_is_an_error_unless_floats_are_asked_for(rule: Any, message: str, tmp_path: Path) -> None:
    model = quantize(random_model(CONFIG), (KEEP_NORMS, Rule(weights="*", **rule)))
    with pytest.raises(LlamaJaxError, match=message):
        write(model, tmp_path)
    assert not list(tmp_path.iterdir())
    path = write(model, tmp_path, dtype="float32")
    for tensor, value in expected_values(model).items():
        np.testing.assert_array_equal(values_of(path)[tensor], value, err_msg=tensor)


def test_layers_of_several_types(tmp_path: Path) -> None:
    rules = (
        KEEP_NORMS,
        Rule(weights="*.down_FD", layers=(0,), scheme="int8"),
        Rule(weights="*.down_FD", layers=(1,), scheme="uint5"),
        Rule(weights="*", scheme="int4"),
    )
    model = quantize(random_model(CONFIG), rules, types="ggml")
    types = {name: tensor.tensor_type.name for name, tensor in tensors_of(write(model, tmp_path)).items()}
    assert (types["blk.0.ffn_down.weight"], types["blk.1.ffn_down.weight"]) == ("Q8_0", "Q5_1")
    assert types["blk.1.ffn_up.weight"] == "Q4_0"


# ---- Metadata -------------------------------------------------------------------------------------------------------


def test_metadata(tmp_path: Path, tiny_tokenizer: llamajax.Tokenizer) -> None:
    words = llamajax.Words(sampling={"temperature": 0.25, "top_k": 5})
    path = write(random_model(CONFIG), tmp_path, tokenizer=tiny_tokenizer.model_bytes, words=words)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["GGUF.version"] == 3
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "0",
        "general.file_type": int(gguf.LlamaFileType.ALL_F32),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "llama.vocab_size": 512,
        "llama.context_length": 128,
        "llama.embedding_length": 256,
        "llama.block_count": 2,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 4,
        "llama.attention.key_length": 64,
        "llama.attention.value_length": 64,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 50000.0,
        "general.sampling.temp": 0.25,
        "general.sampling.top_k": 5,
    }
    assert {key: fields[key] for key in expected} == expected
    others = {key for key in fields if not key.startswith(("GGUF.", "tokenizer."))} - set(expected)
    assert others == set() and fields["tokenizer.ggml.model"] == "llama"
    assert len(fields["tokenizer.ggml.tokens"]) == 512
    opened = open_checkpoint(path)
    assert opened.words.sampling == {"temperature": 0.25, "top_k": 5} and opened.notes == ()
    _, tokenizer = llamajax.load(path)
    text = "Once upon a time, café 12!"
    assert tokenizer.encode(text) == tiny_tokenizer.encode(text)


def test_without_a_tokenizer_there_is_none(tmp_path: Path) -> None:
    path = write(random_model(CONFIG), tmp_path)
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.model"].contents() == "none"
    assert llamajax.load(path)[1] is None


def test_rope_scaling_of_llama_3_is_a_tensor(tmp_path: Path) -> None:
    """Expected values follow the loop of `generate_extra_tensors` in convert_hf_to_gguf.py."""
    scaling = SCALING | {"original_context_length": 64}
    config = Config.from_dict(CONFIG.to_dict() | {"rope_scaling": scaling})
    path = write(random_model(config), tmp_path)
    factors = []
    for freq in 1 / config.rope_theta ** (np.arange(0, 64, 2, dtype=np.float32) / 64):
        length = 2 * math.pi / freq
        if length < 64 / 4:
            factors.append(1.0)
        elif length > 64 / 1:
            factors.append(8.0)
        else:
            smooth = (64 / length - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    assert 1 < len(set(factors)) - 1
    np.testing.assert_allclose(values_of(path)["rope_freqs.weight"], factors, rtol=1e-6)
    assert open_checkpoint(path).config.rope_scaling == config.rope_scaling


def test_linear_rope_scaling_is_metadata(tmp_path: Path) -> None:
    config = Config.from_dict(CONFIG.to_dict() | {"rope_scaling": {"kind": "linear", "factor": 2.0}})
    path = write(random_model(config), tmp_path)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert (fields["llama.rope.scaling.type"], fields["llama.rope.scaling.factor"]) == ("linear", 2.0)
    assert open_checkpoint(path).config.rope_scaling == config.rope_scaling


def test_every_kind_of_value() -> None:
    """Types are those that llama.cpp asks for: UINT32, FLOAT32, BOOL, STRING, and arrays of INT32, FLOAT32, STRING."""
    metadata: dict[str, Any] = {
        **{"whole": 7, "negative": -7, "large": 1 << 40, "number": 0.5, "yes": True, "text": "é\n", "empty": ""},
        **{"texts": ["a", "", "ü"], "ids": [1, -1], "numbers": [0.5], "flags": [True, False], "none": []},
        **{"scores": np.array([-1000.0], np.float32), "types": np.array([1, 6], np.int32)},
        **{"bytes": np.array([255], np.uint8), "one": np.uint16(3)},
    }
    entries = [Entry("a", 0, (2, 3), 24), Entry("b", 2, (1, 32), 18)]
    data = header(metadata, entries)
    assert len(data) % 32 == 0
    types = {"whole": "UINT32", "negative": "INT32", "large": "UINT64", "number": "FLOAT32", "yes": "BOOL"}
    types |= {"text": "STRING", "empty": "STRING", "one": "UINT16"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "memmap", lambda *_, **__: np.frombuffer(data + bytes(24 + 8 + 18 + 14), np.uint8).copy())
        reader = gguf.GGUFReader("none")
    for key, value in metadata.items():
        found = reader.fields[key]
        if key in types:
            assert found.types[0].name == types[key] and found.contents() == value
        else:
            assert found.types[0].name == "ARRAY" and list(found.contents() or []) == list(value)
    assert [t.name for t in reader.tensors] == ["a", "b"]
    assert [t.data_offset - reader.data_offset for t in reader.tensors] == [0, 32]
    assert [t.shape.tolist() for t in reader.tensors] == [[3, 2], [32, 1]]


@pytest.mark.parametrize("value", [None, {"a": 1}, [1, "a"], [[1]], 1 << 70, 1e300, "\ud800", np.complex64(1)])
def test_values_that_gguf_does_not_have(value: Any) -> None:
    with pytest.raises(ValueError, match="^key: .*: expected a value that GGUF can hold"):
        header({"key": value}, [])


# ---- Refusals -------------------------------------------------------------------------------------------------------


def test_targets(tmp_path: Path) -> None:
    model = random_model(CONFIG)
    with pytest.raises(LlamaJaxError, match=r"model: GGUF is one file: expected a name that ends in .gguf"):
        save_checkpoint(model, tmp_path / "model", form="gguf")
    (tmp_path / "there.gguf").write_text("kept")
    with pytest.raises(LlamaJaxError, match=r"there.gguf: exists already"):
        save_checkpoint(model, tmp_path / "there.gguf", form="gguf")
    with pytest.raises(LlamaJaxError, match="the tokenizer cannot be read, so it cannot be written to GGUF"):
        save_checkpoint(model, tmp_path / "model.gguf", form="gguf", tokenizer=b"no tokenizer")
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]
    assert (tmp_path / "there.gguf").read_text() == "kept"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_that_was_not_finished_is_not_there(failure: BaseException, tmp_path: Path, monkeypatch) -> None:
    count = 0

    def fail(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > 5:
            raise failure
        return packed(*arguments)

    packed = quant.ggml.pack
    monkeypatch.setattr(quant.ggml, "pack", fail)
    with pytest.raises((LlamaJaxError, KeyboardInterrupt)):
        write(random_model(CONFIG), tmp_path)
    assert count == 6 and not list(tmp_path.iterdir())


# ---- The command line -----------------------------------------------------------------------------------------------


def command(*argv: str) -> None:
    assert main(argv) == 0


def test_quantize_for_ggml_and_convert(tmp_path: Path, capsys) -> None:
    """From the box to a file of Q4_0, by commands; then on to floats, which somebody may want."""
    packed, file, floats = tmp_path / "packed", tmp_path / "packed.gguf", tmp_path / "floats.gguf"
    command("quantize", "--model=box", "--recipe=int4-g32", "--types=ggml", f"--output={packed}")
    command("convert", f"--model={packed}", "--to=gguf", f"--output={file}")
    command("convert", f"--model={file}", "--to=gguf", "--dtype=float16", f"--output={floats}")
    assert {t.tensor_type.name for t in tensors_of(file).values()} == {"Q4_0", "F32"}
    assert {t.tensor_type.name for t in tensors_of(floats).values()} == {"F16", "F32"}
    assert "gguf, from llamajax version 2" in capsys.readouterr().err
    for name, values in values_of(file).items():
        np.testing.assert_allclose(values_of(floats)[name], values, rtol=1e-3, atol=1e-7)
    again = tmp_path / "again"
    command("convert", f"--model={file}", f"--output={again}")
    one, other = (open_checkpoint(path).read(shardings="host") for path in (packed, again))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["quantize", "--types=ggml", "--recipe=int4-g128"], "embed_VD, by the rule for '*': int4, groups of 128"),
        (
            ["quantize", "--types=ggml", "--recipe=ternary"],
            "one scale, in float16: no ggml type holds it, the nearest is",
        ),
        (
            ["quantize", "--types=ggml", "--recipe=mixed-4.5bpw"],
            "recipe mixed-4.5bpw needs a text to run the model on",
        ),
        (["convert", "--to=gguf"], "out: GGUF is one file: expected a name that ends in .gguf"),
    ],
)
def test_commands_say_what_does_not_go(argv: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert main([*argv, "--model=box", f"--output={tmp_path / 'out'}"]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---- Quantizing to ggml's types only --------------------------------------------------------------------------------


# Small, one layer, and all matrices of one shape: only the rules matter here.
SMALL = Config(
    vocab_size=64,
    width=64,
    ffn_width=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_size=32,
    context_length=64,
    tied_embeddings=True,
)
TOKENS = np.random.default_rng(0).integers(0, 64, 256)


def wide(width: int) -> Config:
    """The same with another width."""
    heads = {"num_heads": width // 32, "num_kv_heads": width // 32}
    return Config.from_dict(SMALL.to_dict() | {"width": width, "ffn_width": width, **heads})


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("width", "target", "expected"),
    [(64, 5.2, {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}), (256, 3.9, {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"})],
)
def test_the_search_for_bits_chooses_among_ggml_types(width: int, target: float, expected: Any, tmp_path: Path) -> None:
    """Whatever groups the rules have, the search takes types of two levels for rows of whole 256, else the others."""
    config = wide(width)
    recipe = quant.Recipe((KEEP_NORMS, Rule(weights="*", scheme="int4", group_size=64, clip="mse")), target_bpw=target)
    model = quantize(random_model(config), recipe, calibration=TOKENS, window=64, types="ggml")
    types = [tensor.tensor_type.name for tensor in tensors_of(write(model, tmp_path)).values() if len(tensor.shape) > 1]
    assert len(set(types)) > 1 and set(types) <= expected
    assert 8 * quant.nbytes(model) / config.num_parameters <= target


@pytest.mark.matrix
@pytest.mark.parametrize(
    "rule",
    [
        {"scheme": "int4", "method": "gptq", "clip": "mse"},
        {"scheme": "uint4", "method": "gptq"},
        {"scheme": "int4", "scaling": "awq", "clip": "mse", "importance": True},
        {"scheme": "uint5", "method": "hqq"},
        {"scheme": "uint4", "scale_scheme": "uint6", "method": "gptq", "clip": "mse"},
        {"scheme": "int3", "group_size": 16, "scale_scheme": "int6", "method": "gptq"},
    ],
)
def test_what_other_methods_make_is_held_too(rule: dict[str, Any], tmp_path: Path) -> None:
    rules = (KEEP_NORMS, Rule(weights="layers.*", **rule), Rule(weights="*", scheme="uint4"))
    config = wide(256) if "scale_scheme" in rule else SMALL
    model = quantize(random_model(config), rules, calibration=TOKENS, window=64, types="ggml")
    values = values_of(write(model, tmp_path))
    for tensor, value in expected_values(model).items():
        np.testing.assert_array_equal(values[tensor], value, err_msg=tensor)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"scheme": "int4", "outliers": 3}, "layers.0.attention.key_DM, by the rule for .*3 outliers"),
        ({"scheme": "int4", "method": "gptq", "act_order": True}, "act_order: no ggml type holds it"),
        ({"scheme": "int4", "scale_dtype": "float32"}, "scales in float32: .* Q4_0 .*leave the weight unquantized"),
        ({"scheme": "int6"}, r"the nearest is Q8_0 \(int8, groups of 32"),
        ({"scheme": "int6", "group_size": 16, "scale_scheme": "int8"}, "two levels of scales .* multiple of 256"),
        ({"scheme": "int4", "group_size": 24}, "groups of 24 do not divide an axis of 64"),
    ],
)
def test_rules_that_ask_for_something_else(rule: dict[str, Any], message: str) -> None:
    rules = (KEEP_NORMS, Rule(weights="layers.*", **rule), Rule(weights="*", scheme="int4"))
    with pytest.raises(LlamaJaxError, match=message):
        quantize(random_model(SMALL), rules, calibration=TOKENS, window=64, types="ggml")


def test_types_of_another_library() -> None:
    with pytest.raises(LlamaJaxError, match="types is 'exl2': expected None or 'ggml'"):
        quantize(random_model(SMALL), (Rule(weights="*", keep=True),), types="exl2")  # type: ignore[arg-type]


# ---- llama.cpp ------------------------------------------------------------------------------------------------------

_logits = jax.jit(lambda model, tokens_BT: model(tokens_BT)[0])


@pytest.fixture(scope="module")
def llamacpp():
    pytest.importorskip("xllamacpp", reason="compares with llama.cpp: install the extra: pip install -e '.[parity]'")
    from tests import llamacpp

    return llamacpp


@pytest.mark.extras
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["box", "stories260K"])
def test_llamacpp_goes_on_with_the_same_text(name: str, dtype: str, request, tmp_path: Path, llamacpp) -> None:
    """Greedy texts agree.

    With matrices of 16 bits llama.cpp rounds activations to them, so that near ties may fall otherwise. With the first
    prompt none does; with the others each of its tokens has a logit at most 0.02 below our largest.
    """
    model, tokenizer = llamajax.load("box") if name == "box" else request.getfixturevalue("stories260k")
    path = write(model, tmp_path, dtype=dtype, tokenizer=tokenizer)
    ours = open_checkpoint(path).read()
    for number, prompt in enumerate(("Once upon a time", "One day, a girl who liked cafés", "At night the", "Tim ran")):
        with llamacpp.Model(path) as theirs:
            ids = theirs.tokenize(prompt, add_special=True)
            continued = theirs.greedy(ids, 120)
        assert ids == tokenizer.encode(prompt)
        row = np.zeros((1, 160), np.int32)
        row[0, : len(ids) + 120] = ids + continued
        logits = np.asarray(_logits(ours, row)[0, len(ids) - 1 : len(ids) + 119], np.float32)
        behind = logits.max(-1) - logits[np.arange(120), continued]
        assert behind.max() <= (0 if dtype == "float32" or number == 0 else 0.02), prompt


@pytest.mark.extras
@pytest.mark.matrix
@pytest.mark.parametrize("name", RULES)
def test_llamacpp_agrees_with_packed_weights(name: str, tmp_path: Path, llamacpp) -> None:
    """With the same text as input: llama.cpp rounds activations to 8 bits, in groups as it rounds weights."""
    from llamajax.train import heldout_stories

    model, tokenizer = llamajax.load("box", dtype=jnp.float32)
    rule = Rule(weights="*", **({"clip": "mse"} | RULES[name]))
    packed = quantize(model, (KEEP_NORMS, rule), types="ggml")
    path = write(packed, tmp_path, tokenizer=tokenizer)
    rows = [ids[:160] for ids in map(tokenizer.encode, heldout_stories()[:24]) if len(ids) >= 160]
    assert len(rows) > 8
    with llamacpp.Model(path) as opened:
        theirs = jax.nn.log_softmax(np.stack(list(opened.windows(rows))).astype(np.float32))
    ours = jax.nn.log_softmax(_logits(packed, jnp.asarray(rows)))
    same = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    divergence = float((jnp.exp(ours) * (ours - theirs)).sum(-1).mean())
    print(f"{name}: the same likeliest token in {same:.2%}, KL divergence {divergence:.2g}")
    assert same >= 0.97 and divergence < 0.01
