"""Files of every format, randomly damaged: they load, or our error says why, and they take little memory."""

import copy
import json
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import llamajax
from llamajax import LlamaJaxError, Tokenizer, open_checkpoint, save_checkpoint
from llamajax.cli.train import _config as config_at
from llamajax.config import preset_folder

ROOT = Path(__file__).parents[1]

# Deterministic, so that everybody sees the same failures; tracing the model once per example takes tens of
# milliseconds.
_EVERYTHING = "--all" in sys.argv
FUZZ = settings(
    max_examples=400 if _EVERYTHING else 20,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
FUZZ_MORE = settings(FUZZ, max_examples=1200 if _EVERYTHING else 60)
# The whole model has 10 KiB; tracing it takes about a MiB.
MOST_MEMORY = 8 << 20

CONFIG = llamajax.Config(
    vocab_size=320,
    width=4,
    ffn_width=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_size=2,
    context_length=8,
    rope_scaling=llamajax.RopeScaling(kind="llama3", factor=2.0),
    tied_embeddings=True,
)


@pytest.fixture(scope="module")
def model() -> llamajax.Llama:
    """All weights are one: their values do not matter here."""
    return jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), llamajax.abstract_model(CONFIG))


@pytest.fixture(scope="module")
def folders(
    model: llamajax.Llama, tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A valid folder of each kind; tests restore what they change."""
    root = tmp_path_factory.mktemp("fuzz")
    save_checkpoint(model, root / "home", tokenizer=tiny_tokenizer)
    for name in ("single", "sharded"):
        save_checkpoint(model, root / name, tokenizer=tiny_tokenizer, form="huggingface")
    tensors = load_file(root / "sharded" / "model.safetensors")
    (root / "sharded" / "model.safetensors").unlink()
    files = {name: f"{'.0.' in name:d}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, root / "sharded" / file)
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return {path.name: path for path in root.iterdir()}


def _check(path: Path, *, weights: bool = True) -> None:
    """Loads, or raises our error in one line of limited length; never takes memory for data that the files lack."""
    tracemalloc.start()
    try:
        opened = open_checkpoint(path)
        llamajax.checkpoint.read_tokenizer(opened)
        if weights:
            opened.read(shardings="host")
    except LlamaJaxError as error:
        assert str(error).isprintable() and 0 < len(str(error)) < 1000
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MOST_MEMORY


def _check_with(file: Path, data: bytes, path: Path, **options: Any) -> None:
    """Runs `_check(path)` while `file` holds `data`."""
    before = file.read_bytes()
    try:
        file.write_bytes(data)
        _check(path, **options)
    finally:
        file.write_bytes(before)


@st.composite
def _damage(draw: st.DrawFn, data: bytes, header: int) -> bytes:
    """Draws `data` with some bytes or 32-bit words of its first `header` bytes replaced, cut short, or continued."""
    damaged = bytearray(data)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, min(header, len(data)) - 4))
        if draw(st.booleans()):
            damaged[at] = draw(st.integers(0, 255))
        else:
            word = draw(st.sampled_from([0, 1, 2, 3, 7, 2**15, 2**27, 2**31 - 1, -1, -(2**31)]))
            struct.pack_into("<i", damaged, at // 4 * 4, word)
    if draw(st.integers(0, 3)) == 0:
        damaged = damaged[: draw(st.integers(0, len(data)))]
    if draw(st.integers(0, 7)) == 0:
        damaged += draw(st.binary(max_size=64))
    return bytes(damaged)


_HEAD = [b"", b"GGUF", b"PK\x03\x04", b"24ka", b"24ka\1\0\0\0", b"24ka\2\0\0\0", b"{", struct.pack("<7i", *[8] * 7)]


@FUZZ
@given(head=st.sampled_from(_HEAD), rest=st.binary(max_size=600))
def test_random_bytes(head: bytes, rest: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "random"
    path.write_bytes(head + rest)
    _check(path)


@pytest.mark.parametrize("version", [0, 1, 2])
@FUZZ
@given(data=st.data())
def test_llama2c(version: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    dim, hidden, layers, heads, kv_heads, vocab, context = sizes = 4, 8, 1, 2, 1, 8, 8
    matrices = vocab * dim + layers * (2 * dim * dim + 2 * dim * dim // 2 + 3 * hidden * dim)
    norms = (2 * layers + 1) * dim
    if version == 0:
        valid = struct.pack("<7i", *sizes) + np.ones(matrices + norms + context * dim // heads, "<f4").tobytes()
    else:
        valid = struct.pack("<Ii7iBi", 0x616B3432, version, *sizes, 1, 4 * (version == 2)).ljust(256, b"\0")
        valid += bytes(4 * (norms + matrices) if version == 1 else 4 * norms + matrices + matrices // 4 * 4)
    path = tmp_path_factory.getbasetemp() / "llama2c"
    path.write_bytes(valid)
    open_checkpoint(path)
    path.write_bytes(data.draw(_damage(valid, 48)))
    _check(path)


@FUZZ
@given(data=st.data())
def test_safetensors(data: st.DataObject, folders: dict[str, Path]) -> None:
    file = folders["single"] / "model.safetensors"
    _check_with(file, data.draw(_damage(file.read_bytes(), 2000)), folders["single"])


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (container, key) of every value inside a JSON document."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


_DEEP: Any = []
for _ in range(300):
    _DEEP = [_DEEP]

_ODD_VALUES = st.one_of(
    st.sampled_from(
        [None, True, False, 0, -1, 1, 3, 2**27, 2**27 + 1, 2**31, 2**63, 10**400, -(10**400), 1e-320, 1e308]
    ),
    st.sampled_from(
        [float("nan"), float("inf"), "", "llama", "../x", "/", "\0", "\ud800", [], {}, [[]], {"a": {}}, _DEEP]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.dictionaries(st.sampled_from(["type", "rope_type", "factor", "kind"]), st.sampled_from(["linear", 2.0, [], {}])),
).map(copy.deepcopy)  # a later change may modify the value in place


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("home", "manifest.json"),
        ("single", "config.json"),
        ("sharded", "model.safetensors.index.json"),
    ],
)
@FUZZ_MORE
@given(data=st.data())
def test_json(folder: str, name: str, data: st.DataObject, folders: dict[str, Path]) -> None:
    """Replaces, removes and adds values anywhere in the document."""
    file = folders[folder] / name
    document = json.loads(file.read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(list(_places(document))), label="place")
        action = data.draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "remove":
            del container[key]
        elif action == "add" and isinstance(container, dict):
            container[data.draw(st.text(max_size=3))] = data.draw(_ODD_VALUES)
        else:
            container[key] = data.draw(_ODD_VALUES)
        if not list(_places(document)):
            break
    if folder == "home":
        document.pop("sha256", None)  # otherwise any change would be refused for its checksum
    # TensorStore writes complaints about damaged arrays from its own threads (see test_checkpoint.py): only the header
    # is read.
    _check_with(file, json.dumps(document).encode(), folders[folder], weights=folder != "home")


@pytest.mark.parametrize(("folder", "name"), [("home", "manifest.json"), ("single", "config.json")])
@FUZZ
@given(data=st.data())
def test_json_bytes(folder: str, name: str, data: st.DataObject, folders: dict[str, Path]) -> None:
    file = folders[folder] / name
    _check_with(file, data.draw(_damage(file.read_bytes(), 1000)), folders[folder], weights=folder != "home")


@FUZZ_MORE
@given(data=st.data())
def test_tokenizer(data: st.DataObject, tiny_tokenizer: Tokenizer) -> None:
    """Any length in the protobuf may be wrong: it is refused, or it decodes and encodes with our errors at most."""
    damaged = data.draw(_damage(tiny_tokenizer.model_bytes, 1 << 20))
    try:
        tokenizer = Tokenizer(damaged)
        tokenizer.decode(range(tokenizer.vocab_size))
        tokenizer.encode("Once upon a time 🙂")
    except LlamaJaxError as error:
        assert str(error)


@FUZZ
@given(data=st.data())
def test_toml(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The TOML file of an architecture."""
    path = tmp_path_factory.getbasetemp() / "config.toml"
    path.write_bytes(data.draw(_damage((preset_folder() / "llama3.2-1b.toml").read_bytes(), 1 << 20)))
    try:
        config_at(str(path))
    except LlamaJaxError as error:
        assert str(error).isprintable() and 0 < len(str(error)) < 1000


# Headers and chunks of arrays, in a process of its own: TensorStore may crash it, and writes complaints from its own
# threads.
_STORED = """
import copy, json, random, resource, sys
from pathlib import Path
import llamajax
from llamajax.parameters import named_arrays
folder, examples = Path(sys.argv[1]), int(sys.argv[2])
odd = [None, True, 0, -1, 1, 3, 2**31, 2**63, 10**400, 1e308, float("nan"), "", "../x", "\\0", "\\ud800", "big", "zstd",
       "gzip", "transpose", "float32", "int8", [], {}, [[]], [1, 1], [2**40, 1], {"name": "crc32c"}, {"name": "blosc"}]
deep = []
for _ in range(3000):
    deep = [deep]
odd.append(deep)
def places(value):
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)
def mutated(data, draw, is_json):
    if not is_json or draw.random() < 0.3:
        data = bytearray(data)
        for _ in range(draw.randrange(1, 5)):
            at = draw.randrange(len(data))
            data[at:at + draw.choice([1, 1, 4])] = draw.randbytes(draw.choice([0, 1, 1, 4]))
            if not data:
                break
        return bytes(data[: draw.randrange(len(data) + 1)]) if draw.random() < 0.2 else bytes(data)
    document = json.loads(data)
    for _ in range(draw.randrange(1, 4)):
        if not document:
            break
        container, key = draw.choice(list(places(document)))
        if draw.random() < 0.2:
            del container[key]
        else:
            container[key] = draw.choice(odd)
            if container[key] is deep:
                return json.dumps(document).encode()
            container[key] = copy.deepcopy(container[key])
    return json.dumps(document).encode()
def read():
    arrays = named_arrays(llamajax.open_checkpoint(folder).read(shardings="host"))
    return {name: leaf.tobytes() for name, leaf in arrays.items()}
sys.setrecursionlimit(20000)
whole, draw, counts = read(), random.Random(0), {}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
headers = sorted(folder.glob("weights/*/zarr.json"))
chunks = sorted(path for path in folder.glob("weights/*/c/**/*") if path.is_file())
sound = sys.argv[3] == "checksums"
for _ in range(examples):
    file = draw.choice(headers if draw.random() < 0.7 else chunks)
    data = file.read_bytes()
    changed = mutated(data, draw, file.name == "zarr.json")
    file.write_bytes(changed)
    print(file, changed[:3000], file=sys.stderr, flush=True)
    try:
        outcome = "equal" if read() == whole else "other"
        assert outcome == "equal" or not sound
    except llamajax.LlamaJaxError as error:
        outcome = "refused"
        assert str(error).isprintable() and len(str(error)) < 1000, error
    counts[outcome] = counts.get(outcome, 0) + 1
    file.write_bytes(data)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10, "memory"
print(json.dumps(counts))
"""


@pytest.mark.parametrize("kind", ["checksums", "none"])
@pytest.mark.parametrize("examples", [40, pytest.param(2000, marks=pytest.mark.exhaustive)])
def test_stored_arrays(kind: str, examples: int, model: llamajax.Llama, tmp_path: Path) -> None:
    """With checksums no other weights are read; without them, the process at least lives and takes little memory."""
    rng = np.random.default_rng(0)
    save_checkpoint(jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), model), tmp_path / "saved")
    if kind == "none":
        file = tmp_path / "saved" / "manifest.json"
        manifest = json.loads(file.read_text())
        file.write_text(json.dumps({key: manifest[key] for key in manifest if key not in ("sha256", "checksums")}))
    arguments = [sys.executable, "-c", _STORED, str(tmp_path / "saved"), str(examples), kind]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-6000:]
    counts = json.loads(done.stdout)
    assert sum(counts.values()) == examples and counts["refused"] > examples // 2
