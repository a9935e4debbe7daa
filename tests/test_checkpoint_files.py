"""Files of checkpoints that are not what their names say: links to devices, FIFOs, sparse files of terabytes."""

import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file, save_file

import llamajax
from llamajax import LlamaJaxError, Tokenizer, open_checkpoint, save_checkpoint
from llamajax.cli import main
from llamajax.evaluation.evaluate import read_text

ROOT = Path(__file__).parents[1]

# Each file of a folder is replaced in turn: the folder is refused in one line, or loads as it did without that file.
_REPLACED = """
import os, resource, sys
from pathlib import Path
import llamajax
from llamajax.parameters import named_arrays
def read(path):
    opened = llamajax.open_checkpoint(path)
    arrays = {name: leaf.tobytes() for name, leaf in named_arrays(opened.read(shardings="host")).items()}
    return opened.config, arrays
def sparse(file):
    with file.open("wb") as opened:
        opened.truncate(1 << 41)
kinds = {"fifo": os.mkfifo, "device": lambda file: file.symlink_to("/dev/zero"), "sparse": sparse}
for folder in map(Path, sys.argv[1:]):
    files = [path for path in folder.rglob("*") if path.is_file()]
    whole, before = read(folder), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for file in sorted(files):
        for kind, make in kinds.items():
            file.rename(folder.with_name("aside"))
            make(file)
            print(folder.name, file.name, kind, end=" ", flush=True)
            try:
                print("equal" if read(folder) == whole else "wrong")
            except llamajax.LlamaJaxError as error:
                assert "\\n" not in str(error) and len(str(error)) < 1000, error
                print("refused")
            file.unlink()
            folder.with_name("aside").rename(file)
    print("MiB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.fixture
def small() -> llamajax.Llama:
    """One layer, ten kilobytes."""
    config = llamajax.Config(
        vocab_size=320,
        width=8,
        ffn_width=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_size=8,
        context_length=8,
        tied_embeddings=True,
    )
    return llamajax.Llama(config, key=jax.random.key(0))


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files of two terabytes")
def test_files_that_are_none(small: llamajax.Llama, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_checkpoint(small, tmp_path / "home", tokenizer=tiny_tokenizer)
    save_checkpoint(small, tmp_path / "single", tokenizer=tiny_tokenizer, form="huggingface")
    save_checkpoint(small, tmp_path / "sharded", form="huggingface")
    file = tmp_path / "sharded" / "model.safetensors"
    tensors = load_file(file)
    files = {name: f"{'norm' in name:d}.safetensors" for name in tensors}
    for shard in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == shard}, file.with_name(shard))
    file.unlink()
    file.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    arguments = [str(tmp_path / name) for name in ("home", "single", "sharded")]
    done = subprocess.run(
        [sys.executable, "-c", _REPLACED, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    results = [line for line in lines if line[0] != "MiB"]
    # Orbax's own descriptions are not read, and a tokenizer.model that is no file counts as absent.
    unread = {"_METADATA", "_sharding", "_CHECKPOINT_METADATA", "commit_success.txt", "process_0", "tokenizer.model"}
    for folder, name, kind, result in results:
        assert result == "refused" or (result == "equal" and name in unread), (folder, name, kind, result)
    assert len(results) >= 3 * 25 and all(int(line[1]) < 200 for line in lines if line[0] == "MiB"), lines


@pytest.mark.parametrize("command", ["inspect --model=", "eval --text=", "train --output=x --config="])
def test_commands_given_a_fifo(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    name, *rest = f"{command}fifo".split()
    assert main([name, *rest]) == 1
    assert "fifo" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_texts_are_regular_files_of_utf8(tmp_path: Path) -> None:
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(LlamaJaxError, match="zero: a device: expected a regular file"):
        read_text(tmp_path / "zero")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(LlamaJaxError, match="sparse: 8589934592 bytes: expected at most 4294967296"):
        read_text(tmp_path / "sparse")
    with pytest.raises(LlamaJaxError, match="none: no such file: expected a UTF-8 text"):
        read_text(tmp_path / "none")


def test_a_sparse_file_that_agrees_with_its_header(tmp_path: Path) -> None:
    """The file has four kilobytes on disk and terabytes by its header; opening must cost neither time nor memory."""

    def write(layers: int) -> Path:
        dim, hidden, vocab = 1 << 12, 1 << 14, 1 << 17
        header = struct.pack("<Ii7iB", 0x616B3432, 1, dim, hidden, layers, 32, 32, vocab, 4096, 1)
        floats = layers * (2 * dim + 4 * dim * dim + 3 * dim * hidden) + dim + vocab * dim
        with (tmp_path / "sparse").open("wb") as file:
            file.write(header)
            file.truncate(256 + 4 * floats)
        return tmp_path / "sparse"

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened = open_checkpoint(write(4096))
    assert opened.config.num_layers == 4096
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB
    with pytest.raises(LlamaJaxError, match="num_layers is 4097: expected a whole number from 1 to 4096"):
        open_checkpoint(write(4097))


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "\x1b[31m.safetensors"])
def test_odd_names_of_shards(name: str, small: llamajax.Llama, tmp_path: Path) -> None:
    save_checkpoint(small, tmp_path / "saved", form="huggingface")
    index = {"weight_map": dict.fromkeys(load_file(tmp_path / "saved" / "model.safetensors"), name)}
    (tmp_path / "saved" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LlamaJaxError, match="no such file|damaged safetensors file") as caught:
        open_checkpoint(tmp_path / "saved")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def _nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-1] + f',"attributes":{_nested(50_000)}}}', "expected at most 65536"),
        (lambda text: text[:-1] + f',"attributes":{_nested(200)}}}', "expected at most 100 arrays and objects"),
        (lambda text: text.replace('"bytes"', '"zstd"'), "codec 'zstd': expected bytes, crc32c, sharding_indexed"),
        (lambda text: text.replace("[320,8]", "[1,1]"), "2560 chunks for 10240 bytes: expected at most one"),
        (lambda text: text.replace('"chunk_shape":[320,8]', '"chunk_shape":[320,8000000]'), "expected none larger"),
        (lambda text: text.replace("[320,8]", "[320]"), r"chunks of \[320\] for an array of \(320, 8\)"),
        (lambda text: text.replace("[320,8]", "[320,8.5]"), r"chunks of \[320, 8.5\] for"),
        (lambda text: text.replace("[320,8]", "9" * 5000), "not JSON"),
        (lambda text: text.replace('"default"', '"v2"'), "chunk_key_encoding {'name': 'v2'}: expected the default"),
        (lambda text: "[]", "list indices must be integers"),
    ],
)
def test_headers_that_tensorstore_should_not_be_given(
    change, message: str, small: llamajax.Llama, tmp_path: Path
) -> None:
    """A header of 50,000 levels crashes TensorStore's parser; many chunks take up its memory."""
    save_checkpoint(small, tmp_path / "saved")
    file = tmp_path / "saved" / "weights" / "embed_VD" / "zarr.json"
    text = file.read_text()
    file.write_text(change(text))
    with pytest.raises(LlamaJaxError, match=f"saved/weights: cannot be restored, .*{message}"):
        open_checkpoint(tmp_path / "saved").read()
