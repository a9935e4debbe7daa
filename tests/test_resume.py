"""Parts on disk: damaged parts and parts of other work are refused; leftovers of killed processes do no harm."""

import os
import random
from pathlib import Path

import numpy as np
import pytest

from llamajax import Llama, LlamaJaxError
from llamajax.cli import main
from llamajax.quantization.resume import PartsOnDisk, remove_parts
from quant import QTensor, dequantize, quantize_rtn

WORK = {"config": {"width": 4, "rope_theta": 1e4}, "seed": 3, "text": "ab"}


def _weights() -> dict[str, object]:
    weight = np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32)
    return {"up": quantize_rtn(weight, "int4", group_size=16), "norm": np.arange(4, dtype=np.float32)}


def test_what_was_stored_comes_back(tmp_path: Path) -> None:
    stored = _weights()
    PartsOnDisk(tmp_path / "w", WORK).store("a", stored)
    parts = PartsOnDisk(tmp_path / "w", WORK)
    loaded = parts.load("a")
    assert loaded is not None and parts.load("b") is None and parts.names() == ["a"]
    assert isinstance(loaded["up"], QTensor)
    np.testing.assert_array_equal(dequantize(loaded["up"]), dequantize(stored["up"]))
    np.testing.assert_array_equal(loaded["norm"], stored["norm"])
    parts.store_arrays("b", {"count": np.int32(3)}, "three")
    arrays, description = parts.load_arrays("b") or ({}, "")
    assert arrays["count"].shape == () and arrays["count"].dtype == np.int32 and description == "three"


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (WORK | {"seed": 4}, "seed is 3 there, 4 here"),
        (WORK | {"config": {"width": 4, "rope_theta": 5e5}}, "rope_theta is 10000.0 there, 500000.0 here"),
        (WORK | {"text": "ac", "seed": 4}, "seed is 3 there, 4 here"),
        (WORK | {"more": 1}, "more is None there, 1 here"),
        ({"seed": 3, "text": "ab"}, "config is {.* there, None here"),
    ],
)
def test_other_work_is_refused_by_the_first_thing_that_differs(tmp_path: Path, work: dict, message: str) -> None:
    PartsOnDisk(tmp_path, WORK).store("a", _weights())
    with pytest.raises(LlamaJaxError, match=f"holds parts of other work: {message}: use the value"):
        PartsOnDisk(tmp_path, work)


def test_a_folder_without_parts_is_for_any_work(tmp_path: Path) -> None:
    PartsOnDisk(tmp_path, WORK)
    PartsOnDisk(tmp_path, WORK | {"seed": 4}).store("a", _weights())
    with pytest.raises(LlamaJaxError, match="seed is 4 there, 3 here"):
        PartsOnDisk(tmp_path, WORK)


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    """Leftovers of a finished part are cleared as well, as no part of that name will be written again."""
    PartsOnDisk(tmp_path / "w", WORK).store("a", _weights())
    for name in (".a.safetensors.partial-00000000", ".b.safetensors.partial-00000001", ".work.json.partial-00000002"):
        (tmp_path / "w" / name).mkdir()
        (tmp_path / "w" / name / "file.safetensors").write_bytes(b"half")
    parts = PartsOnDisk(tmp_path / "w", WORK)
    assert sorted(os.listdir(tmp_path / "w")) == ["a.safetensors", "work.json"] and parts.load("a") is not None
    (tmp_path / "w" / ".a.safetensors.partial-00000003").mkdir()
    remove_parts(tmp_path / "w")
    assert not (tmp_path / "w").exists()
    remove_parts(tmp_path / "w")


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(LlamaJaxError, match=r"is not empty, and no work.json in it says"):
        PartsOnDisk(tmp_path, WORK)
    PartsOnDisk(tmp_path / "w", WORK).store("a", _weights())
    (tmp_path / "w" / "notes.txt").write_text("mine")
    remove_parts(tmp_path / "w")
    assert os.listdir(tmp_path / "w") == ["notes.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_path_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LlamaJaxError, match="cannot be created"):
        PartsOnDisk(tmp_path / "file", WORK)


def test_a_part_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = PartsOnDisk(tmp_path, WORK)
    parts.store("a", _weights())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llamajax.quantization.resume.save_file", full)
    for name in ("a", "b"):
        message = f"{name}.safetensors: cannot be written .*make room .*the same command continues"
        with pytest.raises(LlamaJaxError, match=message):
            parts.store(name, _weights())
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "work.json"] and parts.load("a") is not None


def test_damage_is_one_error_or_none(tmp_path: Path) -> None:
    """With random damage to either file, loading returns what was written or raises a one-line error."""
    parts, rng = PartsOnDisk(tmp_path, WORK), random.Random(0)
    parts.store("a", _weights())
    part, key = tmp_path / "a.safetensors", tmp_path / "work.json"
    good = {file: file.read_bytes() for file in (part, key)}
    refused = 0
    for round_ in range(150):
        file = part if round_ % 3 else key
        data = bytearray(good[file])
        match rng.randrange(4):
            case 0:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                del data[rng.randrange(len(data)) :]
            case 2:
                start = rng.randrange(len(data))
                data[start : start + 20] = rng.randbytes(20)
            case 3:
                data = bytearray(rng.choice([b"", b"[" * 100_000, b"\xff", b"[1]", b'{"a": 1}', b"1" * 6000]))
        file.write_bytes(data)
        try:
            loaded = PartsOnDisk(tmp_path, WORK).load("a")
            assert loaded is not None
            np.testing.assert_array_equal(loaded["norm"], np.arange(4))
            assert file == key or data == good[file]
        except LlamaJaxError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000 and "remove" in str(error)
        file.write_bytes(good[file])
    assert refused > 120


def test_quantize_keeps_its_parts_until_the_result_is_saved(
    tmp_path: Path, tiny_model: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk at the last step costs that step only."""

    def quantize(opened: object, recipe: object, *, work: Path, **_: object) -> Llama:
        PartsOnDisk(work, WORK).store("a", _weights())
        return tiny_model

    def full(*_: object, **__: object) -> None:
        raise LlamaJaxError("no room")

    argv = ["quantize", "--model=box", f"--output={tmp_path / 'q'}"]
    monkeypatch.setattr("llamajax.cli.quantize.quantize", quantize)
    with monkeypatch.context() as patched:
        patched.setattr("llamajax.cli.quantize.save_checkpoint", full)
        assert main(argv) == 1
    assert PartsOnDisk(tmp_path / "q.work", WORK).names() == ["a"]
    assert main(argv) == 0
    assert os.listdir(tmp_path) == ["q"]


@pytest.mark.parametrize("name", ["a.safetensors", "work.json"])
def test_what_is_no_regular_file_is_refused(tmp_path: Path, name: str) -> None:
    PartsOnDisk(tmp_path, WORK).store("a", _weights())
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(LlamaJaxError, match="FIFO.*remove"):
        PartsOnDisk(tmp_path, WORK).load("a")
