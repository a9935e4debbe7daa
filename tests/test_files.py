"""Reading refuses files that are not regular or too large; writing leaves a whole file or folder, or nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamajax import LlamaJaxError
from llamajax.files import (
    check_absent,
    new_file,
    new_folder,
    read_bytes,
    read_json,
    read_text,
    read_toml,
    remove_unfinished,
    shortened,
)

ROOT = Path(__file__).parents[1]


def test_only_bounded_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    assert read_bytes(tmp_path / "link", limit=5) == b"12345"
    for name, message in [
        ("fifo", "a FIFO: expected a regular file"),
        ("zero", "a device: expected a regular file"),
        (".", "a folder: expected a regular file"),
        ("sparse", "1099511627776 bytes: expected at most"),
    ]:
        with pytest.raises(LlamaJaxError, match=message):
            read_bytes(tmp_path / name)
    with pytest.raises(LlamaJaxError, match="file: 5 bytes: expected at most 4"):
        read_bytes(tmp_path / "file", limit=4)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none")


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_json, b"[" * 200_000, "not JSON"),
        (read_json, b"9" * 5000, "not JSON"),
        (read_json, b"{", "not JSON"),
        (read_toml, b"a = " + b"[" * 100_000, "not TOML"),
        (read_toml, b"a = " + b"9" * 5000, "not TOML"),
        (read_toml, b"a", "not TOML"),
        (read_text, b"ab\xff", "not UTF-8 text .* at byte 2"),
    ],
)
def test_what_is_nested_too_deeply_or_no_text(tmp_path: Path, read, text: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(text)
    with pytest.raises(LlamaJaxError, match=f"file: {message}"):
        read(tmp_path / "file")


def test_values_in_messages_are_short_and_printable() -> None:
    assert shortened("a\x1b[31m\n\u202e") == r"'a\x1b[31m\n\u202e'"
    assert len(shortened("a" * 1000)) == 100
    assert shortened(10**5000) == "a int too large to show"


def test_a_file_or_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with new_file(tmp_path / "a.svg") as partial:
        assert partial.suffix == ".svg"
        partial.write_text("new")
        assert not (tmp_path / "a.svg").exists()
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / "a.svg") as partial:
        partial.write_text("other")
        raise ZeroDivisionError
    assert (tmp_path / "a.svg").read_text() == "new"
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "deep" / "folder") as partial:
        (partial / "part").write_text("half")
        raise ZeroDivisionError
    with new_folder(tmp_path / "deep" / "folder") as partial:
        (partial / "part").write_text("all")
    with pytest.raises(LlamaJaxError, match="folder: exists already"), new_folder(tmp_path / "deep" / "folder"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["a.svg", "deep"]
    assert os.listdir(tmp_path / "deep") == ["folder"] and os.listdir(tmp_path / "deep" / "folder") == ["part"]


def test_leftovers_of_killed_processes_are_removed_and_those_of_living_ones_are_not(tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path\n"
        "from llamajax.files import new_folder\n"
        f"with new_folder(Path({str(tmp_path / 'target')!r})) as partial:\n"
        "    (partial / 'part').write_text('x'); print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True) as living:
        assert living.stdout is not None and living.stdout.readline() == "ready\n"
        (owned,) = tmp_path.iterdir()
        (tmp_path / ".target.partial-1").mkdir()  # as a process of an earlier release left it
        (tmp_path / ".other.partial-1").mkdir()
        with new_file(tmp_path / "target") as partial:
            partial.write_text("once")
        assert sorted(os.listdir(tmp_path)) == sorted([".other.partial-1", owned.name, "target"])
        living.kill()
    with new_file(tmp_path / "target") as partial:
        partial.write_text("again")
    assert sorted(os.listdir(tmp_path)) == [".other.partial-1", "target"]
    assert (tmp_path / "target").read_text() == "again"


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """The file is named whichever library reports the full disk, in its own words."""
    for error in (OSError(28, "No space left on device"), ValueError("write failed: No space left on device [28]")):
        for new in (new_file, new_folder):
            with pytest.raises(
                LlamaJaxError, match=r"target: cannot be written \(No space left on device\): make room"
            ):
                with new(tmp_path / "target"):
                    try:
                        raise error
                    except Exception as cause:
                        raise RuntimeError("saving failed") from cause
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / "target"):
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_inside_a_folder_that_is_not_finished_names_that_folder(tmp_path: Path) -> None:
    """The error does not name `.folder.partial-…`, which the user has not chosen and which is deleted."""
    message = rf"^{tmp_path / 'folder'}: cannot be written \({os.strerror(28)}\)"
    with pytest.raises(LlamaJaxError, match=message), new_folder(tmp_path / "folder") as partial:
        with new_file(partial / "part"):
            raise OSError(28, os.strerror(28))
    assert not os.listdir(tmp_path)


def test_a_process_that_ends_removes_what_it_was_writing(tmp_path: Path) -> None:
    with new_folder(tmp_path / "target") as partial:
        (partial / "part").write_bytes(b"data")
        remove_unfinished()
        assert list(tmp_path.iterdir()) == []
        partial.mkdir(parents=True)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_an_existing_target_does_not_keep_its_leftovers(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / ".target.partial-1").mkdir()
    with pytest.raises(LlamaJaxError, match="exists already"):
        check_absent(tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
