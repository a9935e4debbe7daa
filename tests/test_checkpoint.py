"""Our own checkpoints: what is saved comes back, damage is refused, a save is whole or absent; format recognition."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llamajax
from llamajax import LlamaJaxError, Tokenizer, open_checkpoint, save_checkpoint
from llamajax.checkpoint import home, huggingface_write
from llamajax.cli import main
from llamajax.model import model_from
from llamajax.parameters import Place, named_arrays, named_weights
from llamajax.quantization.quantize import Rule, quantize
from quant import kinds, schemes
from quant.kernels.cpu import TiledWeight

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def saved(tiny_model: llamajax.Llama, tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in our form; tests that damage it copy it first."""
    path = tmp_path_factory.mktemp("home") / "saved"
    save_checkpoint(tiny_model, path, tokenizer=tiny_tokenizer, source="a test")
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def _same_bits(first: Any, second: Any) -> bool:
    a, b = named_arrays(first), named_arrays(second)
    same = [
        a[name].dtype == b[name].dtype and np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes() for name in a
    ]
    return a.keys() == b.keys() and all(same)


def _edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


# ---- Round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["llamajax", "huggingface"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_bit_for_bit(
    form: Any, dtype: str, tiny_model: llamajax.Llama, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = jax.tree.map(lambda leaf: leaf.astype(dtype), tiny_model)
    save_checkpoint(model, tmp_path / "saved", tokenizer=tiny_tokenizer, form=form)
    loaded, tokenizer = llamajax.load(tmp_path / "saved")
    assert loaded.config == model.config
    assert _same_bits(loaded, model)
    assert tokenizer.model_bytes == tiny_tokenizer.model_bytes


def test_round_trip_of_scales_in_codes(tiny_model: llamajax.Llama, tmp_path: Path) -> None:
    """Each output has one float over its scale codes; the description names both."""
    codes: dict[str, Any] = {"scheme": "int4", "group_size": 8, "scale_scheme": "int8", "scale_group": "channel"}
    model = quantize(tiny_model, (Rule(weights="*norm*", keep=True), Rule(weights="*", clip="mse", **codes)))
    save_checkpoint(model, tmp_path / "saved")
    loaded, _ = llamajax.load(tmp_path / "saved")
    assert _same_bits(loaded, model)
    up = named_weights(loaded)["layers.*.ffn.up_DF"]
    assert kinds(up) == ["int4-g8-int8"] and schemes(up) == ["int4, groups of 8, scales in int8"]
    assert up.scale.scale.shape[-2] == 1 and up.scale.scale.dtype == "bfloat16"


def test_header_says_what_is_inside(saved: Path, tiny_model: llamajax.Llama, tiny_tokenizer: Tokenizer) -> None:
    opened = open_checkpoint(saved)
    assert opened.description == "llamajax version 2 (Orbax), from a test"
    assert opened.config == tiny_model.config
    assert opened.tokenizer_bytes == tiny_tokenizer.model_bytes
    described = {name: (leaf.shape, leaf.dtype) for name, leaf in named_arrays(opened.abstract).items()}
    assert described == {name: (leaf.shape, leaf.dtype) for name, leaf in named_arrays(tiny_model).items()}


def test_dtype_and_host_while_reading(saved: Path, tiny_model: llamajax.Llama) -> None:
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_model)
    assert _same_bits(llamajax.load(saved, dtype=jnp.bfloat16)[0], rounded)
    host = open_checkpoint(saved).read(shardings="host")
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(host))
    assert _same_bits(host, tiny_model)


def test_reading_into_a_backends_layout(tiny_int4: llamajax.Llama, tmp_path: Path) -> None:
    """Reading for a backend equals reading, then preparing; `outcome` gives the shapes without reading."""
    save_checkpoint(tiny_int4, tmp_path / "packed")
    opened = open_checkpoint(tmp_path / "packed")
    prepared = llamajax.prepare(opened.read(), "cpu")
    direct, _ = llamajax.load(tmp_path / "packed", backend="cpu")
    assert isinstance(named_weights(direct)["layers.*.ffn.up_DF"], TiledWeight)
    assert not isinstance(direct.embed_VD.get_value(), TiledWeight)  # looked up, not multiplied with
    assert jax.tree.structure(direct) == jax.tree.structure(prepared) and _same_bits(direct, prepared)
    for dtype in (None, "bfloat16"):
        expected = opened.read(dtype, backend="cpu")
        outcome = opened.outcome(dtype, "cpu")
        assert jax.tree.structure(outcome) == jax.tree.structure(expected)
        for shape, array in zip(jax.tree.leaves(outcome), jax.tree.leaves(expected), strict=True):
            assert (shape.shape, shape.dtype) == (array.shape, array.dtype)


def test_reading_for_rounded_activations(
    saved: Path, tiny_int4: llamajax.Llama, tiny_model: llamajax.Llama, tmp_path: Path
) -> None:
    save_checkpoint(tiny_int4, tmp_path / "packed")
    opened = open_checkpoint(tmp_path / "packed")
    kinds = {"bfloat16": "bfloat16", "int8": "int8-group", "float32": None}
    for kind, stored in kinds.items():
        model, _ = llamajax.load(tmp_path / "packed", activations=kind, backend="cpu")
        assert named_weights(model)["layers.*.ffn.up_DF"].activations == stored
        assert jax.tree.structure(model) == jax.tree.structure(opened.outcome(None, "cpu", kind))
        again = llamajax.with_activations(llamajax.with_activations(tiny_int4, "int8"), kind)
        assert jax.tree.structure(llamajax.prepare(again, "cpu")) == jax.tree.structure(model)
    weight = named_weights(tiny_int4)["layers.*.ffn.up_DF"]
    order = jnp.arange(24, dtype=jnp.int32)[None, :, None].repeat(2, 0)
    ordered = llamajax.with_activations(dataclasses.replace(weight, order=order), "int8")
    assert ordered.validate().activations == "int8-token"
    with pytest.raises(LlamaJaxError, match="activations 'int4': expected one of float32, bfloat16, int8"):
        llamajax.load(tmp_path / "packed", activations="int4")
    with pytest.raises(LlamaJaxError, match="laid out for a backend: change them before `prepare`"):
        llamajax.with_activations(llamajax.prepare(tiny_int4, "cpu"), "int8")
    with pytest.raises(LlamaJaxError, match="'int8' for a model without quantized weights: nothing would be rounded"):
        llamajax.load(saved, activations="int8")
    save_checkpoint(tiny_model, tmp_path / "other", form="huggingface")
    with pytest.raises(LlamaJaxError, match="without quantized weights"):
        llamajax.load(tmp_path / "other", activations="int8")


def test_tokenizer_option(saved: Path, tmp_path: Path, tiny_model: llamajax.Llama, tiny_tokenizer: Tokenizer) -> None:
    save_checkpoint(tiny_model, tmp_path / "bare")
    assert llamajax.load(tmp_path / "bare")[1] is None
    (tmp_path / "named").write_bytes(tiny_tokenizer.model_bytes)
    assert llamajax.load(tmp_path / "bare", tokenizer=tmp_path / "named")[1].model_bytes == tiny_tokenizer.model_bytes
    with pytest.raises(LlamaJaxError, match="nowhere: no such file: expected a tokenizer.model or tokenizer.json"):
        llamajax.load(saved, tokenizer=tmp_path / "nowhere")


_DEVICES = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import llamajax
from llamajax.parameters import named_arrays
from quant import kinds, schemes
from quant.kernels.cpu import TiledWeight
assert len(jax.devices()) == 4
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
opened = llamajax.open_checkpoint(sys.argv[1])
# The last axis of every matrix over 4 devices; vectors on all of them.
spread = lambda leaf: NamedSharding(mesh, P(*[None] * (len(leaf.shape) - 1), "x"))
model = opened.read(shardings=jax.tree.map(spread, opened.abstract))
for name, leaf in named_arrays(model).items():
    assert len(leaf.sharding.device_set) == 4 and leaf.addressable_shards[0].data.shape[-1] * 4 == leaf.shape[-1], name
np.savez(sys.argv[2], **{name: np.asarray(leaf) for name, leaf in named_arrays(model).items()})
llamajax.save_checkpoint(model, sys.argv[3])
"""


def test_another_number_of_devices(saved: Path, tiny_model: llamajax.Llama, tmp_path: Path) -> None:
    """Saved on 1 device, restored on 4 and saved there, restored on 1."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    arguments = [str(saved), str(tmp_path / "values.npz"), str(tmp_path / "from4")]
    done = subprocess.run(
        [sys.executable, "-c", _DEVICES, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "values.npz") as values:
        for name, leaf in named_arrays(tiny_model).items():
            np.testing.assert_array_equal(values[name], leaf, name)
    loaded, _ = llamajax.load(tmp_path / "from4")
    assert _same_bits(loaded, tiny_model)
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(loaded))


# ---- Damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=3), "format 'llamajax' version 3: this release reads 'llamajax' versions 1, 2"),
        (lambda m: m.update(format="other"), "format 'other' version 2: this release reads 'llamajax' versions 1, 2"),
        (lambda m: m.pop("version"), "damaged: expected a checkpoint manifest, with format and version"),
        (lambda m: m.pop("config"), "'config' is missing: the manifest is damaged"),
        (lambda m: m.pop("tokenizer_sha256"), "'tokenizer_sha256' is missing: the manifest is damaged"),
        (lambda m: m.update(config=5), "Config is 5: expected a table of fields"),
        (lambda m: m.update(config=[1, 2]), r"Config is \[1, 2\]: expected a table of fields"),
        (lambda m: m["config"].update(colour="red"), "unknown key 'colour': Config has vocab_size"),
        (lambda m: m["config"].pop("width"), "missing key 'width': Config needs vocab_size"),
        (lambda m: m["config"].update(norm_eps=10**400), "norm_eps is"),
        (lambda m: m["config"].update(ffn_width=48), r"layers.0.ffn.down_FD: shape \(40, 24\): expected \(48, 24\)"),
        (
            lambda m: m["config"].update(num_layers=3),
            "layers.2.attention.key_DM: expected a checksum of every array of its",
        ),
        (
            lambda m: m["config"].update(num_layers=1),
            "layers.1.attention.key_DM: expected .* and of no other: it is damaged",
        ),
        (lambda m: m["checksums"].pop("embed_VD"), "embed_VD: expected a checksum of every array"),
        (lambda m: m["config"].update(tied_embeddings=True), "the weights listed are not those of its config"),
        (lambda m: m.update(weights=[]), "the weights listed are not those of its config"),
        (lambda m: m["weights"].update(embed_VD=7), "embed_VD|the weights listed are not those of its config"),
        (lambda m: m["weights"].pop("embed_VD"), "the weights listed are not those of its config"),
        (lambda m: m["weights"]["embed_VD"].update(dtype="int64"), "embed_VD: dtype 'int64': expected one of float32"),
        (
            lambda m: m["weights"]["embed_VD"].update(shape=[24, 320]),
            r"embed_VD: shape \(24, 320\): expected \(320, 24\)",
        ),
        (lambda m: m.update(checksums="none"), "checksums 'none': expected a table"),
        (lambda m: m.update(tokenizer_sha256="0" * 64), "not the file that the manifest names .sha256 differs"),
    ],
)
def test_damaged_manifest(change: Callable[[dict[str, Any]], Any], message: str, copy: Path) -> None:
    _edit(copy / "manifest.json", lambda m: m.pop("sha256"))
    _edit(copy / "manifest.json", change)
    with pytest.raises(LlamaJaxError, match=message) as caught:
        open_checkpoint(copy)
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ['{"format": "llamajax", "ver', '["format"]', '"format"', '{"format": ' + "[" * 100_000]
)
def test_manifest_that_is_no_object(text: str, copy: Path) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(LlamaJaxError, match="manifest.json: (not JSON .*: expected a JSON|damaged: expected a)"):
        open_checkpoint(copy)


def test_tampered_or_missing_tokenizer(copy: Path, tiny_tokenizer: Tokenizer) -> None:
    (copy / "tokenizer.model").write_bytes(tiny_tokenizer.model_bytes + b"\0")
    with pytest.raises(LlamaJaxError, match="tokenizer.model: not the file that the manifest names"):
        open_checkpoint(copy)
    (copy / "tokenizer.model").unlink()
    with pytest.raises(LlamaJaxError, match="tokenizer.model: no such file, though the manifest names it"):
        open_checkpoint(copy)


def test_missing_weights_folder(copy: Path) -> None:
    shutil.rmtree(copy / "weights")
    with pytest.raises(LlamaJaxError, match=r"copy/weights: cannot be restored, damaged or incomplete \(.+\)"):
        open_checkpoint(copy).read()


_DAMAGE = """
import sys
from pathlib import Path
import numpy as np
import llamajax
from llamajax.parameters import named_arrays
from quant import kinds, schemes
from quant.kernels.cpu import TiledWeight
read = lambda: named_arrays(llamajax.open_checkpoint(sys.argv[1]).read(shardings="host"))
whole = read()
for file in sorted(path for path in Path(sys.argv[1], "weights").rglob("*") if path.is_file()):
    data = file.read_bytes()
    for damage in (lambda: file.unlink(), lambda: file.write_bytes(data[: len(data) // 2])):
        damage()
        try:
            again = read()
            print("equal" if all(np.array_equal(again[name], whole[name]) for name in whole) else f"wrong {file}")
        except llamajax.LlamaJaxError as error:
            print("refused", str(error))
        file.write_bytes(data)
try:
    llamajax.open_checkpoint(sys.argv[2]).read()
except llamajax.LlamaJaxError as error:
    print("other", str(error))
"""


def test_damaged_weights(copy: Path) -> None:
    """Each file under weights/ is deleted or cut in half: our error names it, or the values do not need the file.

    Also, a manifest that agrees with itself but not with what Orbax stored is refused: nothing is cut or padded. The
    test uses a process of its own: where one array is damaged, TensorStore goes on reading the others, and writes
    complaints into whatever runs next.
    """

    def change(manifest: dict[str, Any]) -> None:
        manifest["config"]["ffn_width"] = 48
        for name in ("gate_DF", "up_DF", "down_FD"):
            shape = manifest["weights"][f"layers.*.ffn.{name}"]["shape"]
            shape[:] = [48 if size == 40 else size for size in shape]

    other = Path(shutil.copytree(copy, copy.with_name("other")))
    _edit(other / "manifest.json", change)
    _edit(other / "manifest.json", lambda m: m.pop("sha256"))
    arguments = [sys.executable, "-c", _DAMAGE, str(copy), str(other)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert last.startswith(f"other {other}/weights: cannot be restored, damaged or incomplete (")
    refused = [line for line in lines if line.startswith("refused")]
    assert len(refused) >= 4 and len(refused) + lines.count("equal") == len(lines), lines
    assert all(f"{copy}/weights: cannot be restored, damaged or incomplete (" in line for line in refused)


def test_manifest_edited(copy: Path) -> None:
    """An edited manifest is refused unless its own checksum is removed with the edit."""
    _edit(copy / "manifest.json", lambda m: m["config"].update(norm_eps=2e-5))
    with pytest.raises(LlamaJaxError, match=r"manifest.json: sha256 differs, .*: remove its key \"sha256\" if"):
        open_checkpoint(copy)
    _edit(copy / "manifest.json", lambda m: m.pop("sha256"))
    assert open_checkpoint(copy).config.norm_eps == 2e-5


def test_checkpoints_without_checksums(copy: Path, tiny_model: llamajax.Llama) -> None:
    """Earlier releases wrote no checksums: such checkpoints load; damage is not noticed, but NaN is."""
    _edit(copy / "manifest.json", lambda m: [m.pop(key) for key in ("sha256", "checksums")])
    assert _same_bits(llamajax.load(copy)[0], tiny_model)
    chunk = copy / "weights" / "embed_VD" / "c" / "0" / "0"
    chunk.write_bytes(np.float32(np.nan).tobytes() + chunk.read_bytes()[4:])
    with pytest.raises(LlamaJaxError, match=r"copy: embed_VD holds NaN or infinity: the weights are damaged"):
        llamajax.load(copy)


def test_one_weight_is_checked_as_all_are(copy: Path, tiny_model: llamajax.Llama) -> None:
    chunk = copy / "weights" / "layers.1.ffn.up_DF" / "c" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    opened = open_checkpoint(copy)
    up_DF = opened.read_weight(Place("ffn.up_DF", 0))
    np.testing.assert_array_equal(up_DF, np.asarray(named_weights(tiny_model)["layers.*.ffn.up_DF"])[0])
    with pytest.raises(LlamaJaxError, match="layers.1.ffn.up_DF has changed since it was written: its checksum"):
        opened.read_weight(Place("ffn.up_DF", 1))


_FLIPS = """
import random, sys
from pathlib import Path
import numpy as np
import llamajax
from llamajax.parameters import named_arrays
folder, seed, per_file = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
def read():
    opened = llamajax.open_checkpoint(folder)
    arrays = {name: leaf.tobytes() for name, leaf in named_arrays(opened.read(shardings="host")).items()}
    return opened.config, opened.tokenizer_bytes, arrays
whole, draw = read(), random.Random(seed)
for file in sorted(path for path in folder.rglob("*") if path.is_file()):
    data = file.read_bytes()
    for at in draw.sample(range(len(data)), min(per_file, len(data))):
        damaged = bytearray(data)
        damaged[at] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        try:
            print("equal" if read() == whole else f"wrong {file.name} {at} {data[at]} {damaged[at]}")
        except llamajax.LlamaJaxError as error:
            print("refused" if "\\n" not in str(error) and len(str(error)) < 1000 else f"wrong {error!r}")
    file.write_bytes(data)
"""


@pytest.mark.parametrize(
    "per_file", [1, pytest.param(20, marks=pytest.mark.exhaustive), pytest.param(300, marks=pytest.mark.exhaustive)]
)
def test_a_flipped_bit_anywhere(per_file: int, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A flipped bit is an error or changes nothing. This is a sample; larger ones use quantized weights or floats."""
    sizes = dict.fromkeys(("width", "ffn_width", "head_size"), 8) | dict.fromkeys(("num_heads", "num_kv_heads"), 1)
    config = llamajax.Config(vocab_size=320, num_layers=1, context_length=8, tied_embeddings=True, **sizes)
    model = llamajax.Llama(config, key=jax.random.key(0))
    if per_file != 300:
        model = quantize(model, (Rule(weights="*norm*", keep=True), Rule(weights="*", scheme="nf4", group_size=8)))
    tokenizer = tiny_tokenizer if per_file != 300 else None
    save_checkpoint(model, tmp_path / "saved", tokenizer=tokenizer)
    arguments = [sys.executable, "-c", _FLIPS, str(tmp_path / "saved"), "0", str(per_file)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) >= 20 and lines.count("refused") + lines.count("equal") == len(lines), lines
    assert lines.count("refused") >= len(lines) // 4


def test_weights_that_are_not_finite(tiny_model: llamajax.Llama, tmp_path: Path) -> None:
    """Weights that are not finite are not written, and not read where somebody else wrote them."""
    model = jax.tree.map(lambda leaf: leaf.at[..., 0].set(jnp.nan), tiny_model)
    for form in ("llamajax", "huggingface"):
        with pytest.raises(LlamaJaxError, match="nan: embed_VD holds NaN or infinity: expected finite weights"):
            save_checkpoint(model, tmp_path / "nan", form=form)
    assert not list(tmp_path.iterdir())
    save_checkpoint(tiny_model, tmp_path / "theirs", form="huggingface")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    tensors["model.norm.weight"][3] = np.inf
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(LlamaJaxError, match="theirs: norm.weight_D holds NaN or infinity: the weights are damaged"):
        llamajax.load(tmp_path / "theirs")


@pytest.mark.parametrize("form", ["llamajax", "huggingface"])
def test_numbers_that_the_asked_dtype_cannot_hold(form: Any, tiny_model: llamajax.Llama, tmp_path: Path) -> None:
    """The error is one line that names the tensor; a dtype of enough range reads the same numbers."""
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_model)
    weights = named_weights(model)
    weights["layers.*.ffn.up_DF"] = weights["layers.*.ffn.up_DF"].at[1, 2, 3].set(-1e5)
    model = model_from(weights, model.config)
    save_checkpoint(model, tmp_path / "large", form=form)
    message = r"large: layers.1.ffn.up_DF holds 99840: the largest float16 number is 65504: expected a dtype"
    for shardings in (None, "host"):
        with pytest.raises(LlamaJaxError, match=message):
            llamajax.load(tmp_path / "large", dtype="float16", shardings=shardings)
    assert _same_bits(llamajax.load(tmp_path / "large", dtype="bfloat16")[0], model)
    converted, _ = llamajax.load(tmp_path / "large", dtype="float32")
    assert float(named_weights(converted)["layers.*.ffn.up_DF"][1, 2, 3]) == -99840


def test_convert_to_a_dtype_that_is_too_narrow(
    tiny_model: llamajax.Llama, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = jax.tree.map(lambda leaf: leaf * 1e6, tiny_model)
    save_checkpoint(model, tmp_path / "large")
    command = ["convert", f"--model={tmp_path / 'large'}", f"--output={tmp_path / 'out'}", "--dtype=float16"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"llamajax: {tmp_path / 'large'}: embed_VD holds") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


# ---- Saving is atomic -----------------------------------------------------------------------------------------------


def test_existing_target_is_left_alone(tiny_model: llamajax.Llama, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "note").write_text("mine")
    with pytest.raises(LlamaJaxError, match="there: exists already: remove it or choose another path"):
        save_checkpoint(tiny_model, tmp_path / "there")
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "note"]


def test_target_that_cannot_be_created(tiny_model: llamajax.Llama, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LlamaJaxError, match=r"file/saved: cannot be created \(Not a directory\)"):
        save_checkpoint(tiny_model, tmp_path / "file" / "saved")


def test_unknown_form(tiny_model: llamajax.Llama, tmp_path: Path) -> None:
    with pytest.raises(LlamaJaxError, match="form is 'zip': expected 'llamajax', 'huggingface' or 'gguf'"):
        save_checkpoint(tiny_model, tmp_path / "saved", form="zip")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("form", ["llamajax", "huggingface"])
def test_a_save_that_fails_leaves_nothing(
    failure: BaseException, form: Any, tiny_model: llamajax.Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both writers write a JSON file last, when everything else is on the disk: this is where the save fails here."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise failure

    if form == "llamajax":
        monkeypatch.setattr(home, "json", SimpleNamespace(dumps=fail))
    else:
        monkeypatch.setattr(huggingface_write, "_write_json", fail)
    expected = LlamaJaxError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected, match="No space left on device.: make room|^$"):
        save_checkpoint(tiny_model, tmp_path / "saved", form=form)
    assert not list(tmp_path.iterdir())


_KILLED = """
import os, signal, sys
from types import SimpleNamespace
import jax, llamajax
import numpy as np
from llamajax.checkpoint import home
config = llamajax.Config(vocab_size=8, width=8, ffn_width=8, num_layers=1, num_heads=1, num_kv_heads=1, head_size=8,
                         context_length=8)
home.json = SimpleNamespace(dumps=lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
model = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), llamajax.abstract_model(config))
llamajax.save_checkpoint(model, sys.argv[1])
"""


def test_a_killed_save_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    """SIGKILL, which prevents all clean-up, comes after the weights and before the manifest."""
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path / "saved")], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "saved").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".saved.partial-") and (left / "folder" / "weights").is_dir()
    for folder in (left, left / "folder"):
        with pytest.raises(LlamaJaxError, match="unknown format"):
            open_checkpoint(folder)


# ---- Recognition ----------------------------------------------------------------------------------------------------


def test_recognised_by_content_not_by_name(tiny_model: llamajax.Llama, saved: Path, tmp_path: Path) -> None:
    save_checkpoint(tiny_model, tmp_path / "x.bin", form="huggingface")
    (tmp_path / "x.bin" / "model.safetensors").rename(tmp_path / "x.bin" / "odd name.safetensors")
    assert open_checkpoint(tmp_path / "x.bin").description == "Hugging Face safetensors (1 file)"
    shutil.copytree(saved, tmp_path / "weights.gguf")
    assert open_checkpoint(tmp_path / "weights.gguf").description.startswith("llamajax version 2")


class _Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _write_unknown(path: Path, kind: str) -> None:
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps(_Touch(path.with_name("executed"))))
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(_Touch(path.with_name("executed"))))
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "folder":
        path.mkdir()
        (path / "pytorch_model.bin").write_bytes(pickle.dumps(_Touch(path.with_name("executed"))))
    else:
        contents = {"ggml": b"tjgg\x03\0\0\0" + bytes(64), "empty": b"", "text": b"To whom it may concern:\n" * 9}
        path.write_bytes(contents[kind])


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("ggml", "ggml's format before GGUF, which is not read"),
        ("zip", "a zip or .pth file, which is not read"),
        ("pickle", "a pickle, which is not read"),
        ("empty", "an empty file"),
        ("empty folder", "an empty folder"),
        ("folder", "a folder with pytorch_model.bin"),
        ("text", "first bytes 54 6f 20 77 68 6f 6d 20"),
    ],
)
def test_unknown_formats(kind: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    _write_unknown(path, kind)
    with pytest.raises(LlamaJaxError) as caught:
        open_checkpoint(path)
    expected = (
        "a llamajax checkpoint (manifest.json), a Hugging Face folder (config.json and safetensors), a GGUF file or a "
        "llama2.c file (version 0, 1 or 2)"
    )
    assert str(caught.value) == f"{path}: unknown format ({found}): expected {expected}"
    assert not (tmp_path / "executed").exists()


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(LlamaJaxError, match="no such file or folder: expected a checkpoint's path or 'box'"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(LlamaJaxError, match="llama3.2-1b: a preset is an architecture without weights: give the path"):
        open_checkpoint("llama3.2-1b")
