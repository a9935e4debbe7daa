"""Hugging Face folders: errors name what is wrong, nothing is skipped, nothing is taken on trust."""

import importlib
import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from absl import flags
from safetensors.numpy import load_file, save_file

import llamajax
from llamajax import Llama, LlamaJaxError, open_checkpoint, save_checkpoint
from llamajax.checkpoint import huggingface_write
from llamajax.cli import COMMANDS, main
from llamajax.parameters import named_arrays, named_weights

Tensors = dict[str, np.ndarray]

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tiny_model: llamajax.Llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in Hugging Face's form; tests that damage it copy it first."""
    path = tmp_path_factory.mktemp("hf") / "saved"
    save_checkpoint(tiny_model, path, form="huggingface")
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A folder to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def _edit_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def _shard(folder: Path) -> dict[str, Any]:
    """Splits the one file into two (the head and the first layer are apart) and an index; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ["a.safetensors", "b.safetensors"]
    index = {"metadata": {}, "weight_map": {name: names[name == HEAD or ".0." in name] for name in tensors}}
    for file in names:
        save_file({name: tensors[name] for name in tensors if index["weight_map"][name] == file}, folder / file)
    _write_index(folder, index)
    return index


def _write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _refused(folder: Path, message: str) -> None:
    with pytest.raises(LlamaJaxError, match=message) as caught:
        open_checkpoint(folder).read()
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def _assert_equal(first: Any, second: Any) -> None:
    a, b = named_arrays(first), named_arrays(second)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], name)


# ---- What is read ---------------------------------------------------------------------------------------------------


def test_sharded_is_the_same_as_single(copy: Path, tiny_model: llamajax.Llama) -> None:
    _shard(copy)
    opened = open_checkpoint(copy)
    assert opened.description == "Hugging Face safetensors (2 files)"
    _assert_equal(opened.read(), tiny_model)


def test_rope_tables_of_old_conversions_are_ignored(copy: Path, tiny_model: llamajax.Llama) -> None:
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.full(4, np.nan, np.float32) for i in range(2)}
    _edit_tensors(copy, lambda t: t.update(tables))
    _assert_equal(open_checkpoint(copy).read(), tiny_model)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_mixed_dtypes_are_widened(dtype: Any, copy: Path, tiny_model: llamajax.Llama) -> None:
    """Some published files have float32 norms among 16-bit matrices; float32 holds both exactly."""
    _edit_tensors(copy, lambda t: t.update({QUERY: t[QUERY].astype(dtype)}))
    model = open_checkpoint(copy).read()
    assert {str(leaf.dtype) for leaf in named_arrays(model).values()} == {"float32"}
    expected = np.asarray(named_weights(tiny_model)["layers.*.attention.query_DQ"][0]).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(named_weights(model)["layers.*.attention.query_DQ"][0], expected)
    np.testing.assert_array_equal(
        named_weights(model)["layers.*.attention.query_DQ"][1],
        named_weights(tiny_model)["layers.*.attention.query_DQ"][1],
    )


def test_tied_with_a_copy_of_the_embedding_as_head(copy: Path) -> None:
    _edit_config(copy, tie_word_embeddings=True)
    _edit_tensors(copy, lambda t: t.update({HEAD: t[EMBED]}))
    model = open_checkpoint(copy).read()
    assert model.head_VD is None and "head_VD" not in named_arrays(model)


def test_tied_with_another_head_is_refused(copy: Path) -> None:
    _edit_config(copy, tie_word_embeddings=True)
    _refused(copy, "lm_head.weight differs from the embedding: set tie_word_embeddings to false in config.json")


def test_rope_spellings_of_transformers_4_and_5(copy: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    expected = llamajax.RopeScaling(kind="llama3", factor=8.0, original_context_length=128)
    _edit_config(copy, rope_theta=5e5, rope_scaling=scaling | {"rope_type": "llama3"})
    first = open_checkpoint(copy).config
    assert (first.rope_theta, first.rope_scaling) == (5e5, expected)
    _edit_config(copy, rope_theta=None, rope_scaling=None)
    _edit_config(copy, rope_parameters=scaling | {"rope_type": "llama3", "rope_theta": 5e5})
    assert open_checkpoint(copy).config == first


# ---- Tensors that are not the model's -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"model.extra": np.ones(2)}),
            "tensor 'model.extra' does not belong to the model .1 such",
        ),
        (lambda t: t.pop(QUERY), "tensor '" + QUERY.replace(".", "[.]") + "' is missing .1 such"),
        (lambda t: t.pop(HEAD), "'lm_head.weight' is missing .1 such.: is tie_word_embeddings missing in config.json"),
        (
            lambda t: t.update({QUERY: t[QUERY][:-1]}),
            r"q_proj.weight has shape \(31, 24\): expected \(32, 24\) by config.json",
        ),
        (
            lambda t: t.update({QUERY: t[QUERY].ravel()}),
            r"q_proj.weight has shape \(768,\): expected \(32, 24\) by config.json",
        ),
        (
            lambda t: t.update({EMBED: t[EMBED].T.copy()}),
            r"embed_tokens.weight has shape \(24, 320\): expected \(320, 24\) by config.json",
        ),
        (lambda t: t.update({QUERY: np.ones((32, 24), np.int64)}), "q_proj.weight has dtype I64: expected one of F32"),
        (lambda t: t.update({QUERY: t[QUERY] * np.nan}), "layers.0.attention.query_DQ holds NaN or infinity"),
        (
            lambda t: t.update({QUERY: np.full((32, 24), np.inf, np.float16)}),
            "layers.0.attention.query_DQ holds NaN or infinity",
        ),
    ],
)
def test_wrong_tensors(change: Callable[[Tensors], Any], message: str, copy: Path) -> None:
    _edit_tensors(copy, change)
    _refused(copy, message)


# ---- Files and index ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.safetensors", "'../secret.safetensors' leaves the folder: expected file names"),
        ("/etc/passwd", "'/etc/passwd' leaves the folder: expected file names"),
        ("..", "leaves the folder|no such file"),
        ("", "no such file|expected file names"),
        ("c.safetensors", "c.safetensors: no such file, though the index names it"),
        ("b.safetensors", "tensor 'model.norm.weight' is missing, though the index lists it in this file"),
        (7, "expected a weight_map from tensor names to file names"),
    ],
)
def test_index_that_points_elsewhere(name: Any, message: str, copy: Path) -> None:
    index = _shard(copy)
    index["weight_map"]["model.norm.weight"] = name
    _write_index(copy, index)
    _refused(copy, message)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": 3}, {"weight_map": None}])
def test_index_without_a_map(index: Any, copy: Path) -> None:
    _write_index(copy, index)
    _refused(copy, "index.json: expected a (JSON object|weight_map)")


def test_several_files_without_index(copy: Path) -> None:
    shutil.copy(copy / "model.safetensors", copy / "more.safetensors")
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    _refused(copy, "2 .safetensors files and no model.safetensors.index.json: expected model.safetensors, or shards")


@pytest.mark.parametrize("sharded", [False, True])
def test_files_of_another_kind_beside_the_weights(sharded: bool, copy: Path, tiny_model: Llama) -> None:
    """macOS's files of attributes are no weights and are passed over; other files are named, once."""
    if sharded:
        _shard(copy)
    for file in list(copy.glob("*.safetensors")):
        (copy / f"._{file.name}").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    opened = open_checkpoint(copy)
    assert opened.notes == ()
    save_file({"lora_A": np.ones(3, np.float32)}, copy / "adapter_model.safetensors")
    (copy / "consolidated.safetensors").write_bytes(b"")
    (note,) = open_checkpoint(copy).notes
    assert note.endswith("'adapter_model.safetensors', 'consolidated.safetensors': not part of the model, not read")
    for ours, theirs in zip(jax.tree.leaves(open_checkpoint(copy).read()), jax.tree.leaves(tiny_model), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_unknown_keys_of_the_config_can_be_ignored(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _edit_config(copy, colour="red")
    with pytest.raises(LlamaJaxError, match="config.json: unknown key 'colour': .*give --ignore_key=colour"):
        open_checkpoint(copy)
    assert open_checkpoint(copy, ignore_keys=["colour"]).config == llamajax.load(copy, ignore_keys=["colour"])[0].config
    assert main(["inspect", f"--model={copy}", "--ignore_key=colour"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("command", ["generate", "inspect", "convert", "quantize", "eval", "bench", "export"])
def test_every_command_that_opens_a_model_can_ignore_keys(command: str) -> None:
    values = flags.FlagValues()
    importlib.import_module(COMMANDS[command].module).define(values)
    assert "ignore_key" in values


def test_no_weights_or_pickled_ones(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    _refused(copy, "no weights: expected model.safetensors, or shards with their index$")
    (copy / "pytorch_model.bin").write_bytes(b"\x80")
    _refused(copy, "no weights: .*; pickled .bin/.pth weights are not read$")


def _header(data: bytes) -> dict[str, Any]:
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def _with_header(data: bytes, header: Any) -> bytes:
    """Returns the same file with another header; `header` is bytes, or a value to write as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + struct.unpack("<Q", data[:8])[0] :]


def _moved(data: bytes, offsets: list[int]) -> bytes:
    header = _header(data)
    header[QUERY]["data_offsets"] = offsets
    return _with_header(data, header)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: struct.pack("<Q", 2**63) + data[8:],
        lambda data: struct.pack("<Q", 90_000_000) + data[8:],
        lambda data: _with_header(data, b"not JSON at all"),
        lambda data: _with_header(data, b"[" * 100_000),
        lambda data: _with_header(data, []),
        lambda data: _with_header(data, _header(data) | {QUERY: 5}),
        lambda data: _with_header(data, _header(data) | {QUERY: _header(data)[EMBED]}),  # two tensors, same bytes
        lambda data: _moved(data, [0, 2**62]),
        lambda data: _moved(data, [100, 50]),
        lambda data: _moved(data, [-4, 4]),
    ],
)
def test_damaged_safetensors(damage: Callable[[bytes], bytes], copy: Path) -> None:
    file = copy / "model.safetensors"
    data = damage(file.read_bytes())
    file.write_bytes(data)
    _refused(copy, "model.safetensors: truncated or damaged safetensors file")


# ---- config.json ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "nope", '{"model_type": ' + "[" * 100_000, '{"model_type": 1' + "0" * 9999])
def test_config_that_is_not_json(text: str, copy: Path) -> None:
    (copy / "config.json").write_text(text)
    _refused(copy, r"config.json: not JSON \(.*\): expected a JSON value")


def test_config_that_is_no_object(copy: Path) -> None:
    (copy / "config.json").write_text("[1]")
    _refused(copy, "config.json: expected a JSON object, got list")


def test_config_that_is_not_a_models(copy: Path) -> None:
    (copy / "config.json").write_text('{"name": "a web page"}')
    _refused(copy, "unknown format .a folder with config.json, model.safetensors")


def test_a_huge_number_of_layers_costs_nothing(copy: Path) -> None:
    """The files alone show the error; a list of tensors takes 50 MiB for 50,000 layers, all memory for 2**27."""
    _edit_config(copy, num_hidden_layers=50_000)
    tracemalloc.start()
    try:
        _refused(copy, "missing|layers")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_large_models_are_written_in_shards(tiny_model: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit there are several files and an index, each within the limit, with the same weights when read."""
    monkeypatch.setattr(huggingface_write, "_SHARD_BYTES", 4096)
    llamajax.save_checkpoint(tiny_model, tmp_path / "sharded", form="huggingface")
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files == sorted(file.name for file in (tmp_path / "sharded").glob("*.safetensors"))
    for file in files:
        tensors = load_file(tmp_path / "sharded" / file)
        assert sum(array.nbytes for array in tensors.values()) <= 4096 or len(tensors) == 1
        assert all(index["weight_map"][name] == file for name in tensors)
    again, _ = llamajax.load(tmp_path / "sharded")
    jax.tree.map(np.testing.assert_array_equal, again, tiny_model)


def test_files_are_as_the_library_writes_them(tiny_model: Llama, tmp_path: Path) -> None:
    """Header and bytes equal the library's, tensor by tensor, with float32 norms among bfloat16; all are aligned."""
    model = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), tiny_model)
    model.norm.weight_D.set_value(tiny_model.norm.weight_D.get_value())
    save_checkpoint(model, tmp_path / "saved", form="huggingface")
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = _header(file.read_bytes()), _header((tmp_path / "theirs").read_bytes())
    without = lambda header: {name: {**entry, "data_offsets": 0} for name, entry in header.items()}  # noqa: E731
    assert without(ours) == without(theirs) and file.stat().st_size % 2 == 0
    assert struct.unpack("<Q", file.read_bytes()[:8])[0] % 8 == 0
    for name, array in tensors.items():
        assert ours[name]["data_offsets"][0] % array.itemsize == 0
    np.testing.assert_array_equal(tensors["model.norm.weight"], tiny_model.norm.weight_D.get_value())
    np.testing.assert_array_equal(tensors[QUERY], np.asarray(named_weights(model)["layers.*.attention.query_DQ"][0]).T)
