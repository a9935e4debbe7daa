"""Programs kept on disk: found by what they are made from, as good as new, and checked before use."""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax import clear_programs, fresh_programs
from llamajax.generation.compilation import CompiledFunction, drop_oldest

_traces = 0


def step(state: dict[str, jax.Array], weight: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    """Compiles to several functions, and donates the memory of `state`."""
    global _traces
    _traces += 1
    y = jax.lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ weight), state["y"])
    return {"y": y}, jnp.sum(y**2.5)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of kept programs, for this test alone."""
    before = jax.config.values["jax_compilation_cache_dir"]
    monkeypatch.setattr("llamajax.generation.compilation._said", set())
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "llamajax"
    jax.config.update("jax_compilation_cache_dir", before)


def _arguments(size: int = 8) -> tuple[dict[str, jax.Array], jax.Array]:
    rng = np.random.default_rng(0)
    return {"y": jnp.asarray(rng.random((4, size)), jnp.float32)}, jnp.asarray(rng.random((size, size)), jnp.float32)


def _run(size: int = 8) -> tuple[int, float]:
    """Does what a new process would do; returns how often it traced, and the result."""
    global _traces
    _traces = 0
    program = CompiledFunction(step, donate_argnames=("state",))
    state, weight = _arguments(size)
    given = state["y"]
    made, total = program(state, weight)
    again, _ = program(made, weight)
    assert given.is_deleted() and made["y"].is_deleted() and again["y"].shape == (4, size)
    assert (program.total.compilations, program.total.loads) == (
        _traces,
        1 - _traces,
    ) and program.total.compile_seconds > 0
    return _traces, float(total)


def _expected(size: int = 8) -> float:
    state, weight = _arguments(size)
    y, weight = np.asarray(state["y"], np.float64), np.asarray(weight, np.float64)
    for _ in range(3):
        y = np.tanh(y @ weight)
    return float(np.sum(y**2.5))


def test_a_program_is_loaded_instead_of_traced(folder: Path) -> None:
    first, second = _run(), _run()
    assert (first[0], second[0]) == (1, 0)
    assert first[1] == second[1] == pytest.approx(_expected(), rel=1e-5)
    assert len(list(folder.iterdir())) == 1
    # JAX has cached nothing: a program that JAX loads from its cache could not be written again.
    assert [file.name for file in folder.parent.iterdir() if "step" in file.name] == []


# ---- Owner of the folder ---------------------------------------------------------------------------------------------


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_folder_is_for_its_owner_alone(folder: Path) -> None:
    """The folder is created private, and made private again if others could read it."""
    _run()
    assert _mode(folder) == 0o700
    folder.chmod(0o755)
    assert _run()[0] == 0 and _mode(folder) == 0o700


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder, patch: folder.chmod(0o770), r"others can write to it \(mode 770, expected 700\)"),
        (lambda folder, patch: folder.chmod(0o702), r"others can write to it \(mode 702, expected 700\)"),
        (
            lambda folder, patch: patch.setattr("os.geteuid", lambda: folder.stat().st_uid + 1),
            r"it belongs to user \d+, not to you \(\d+\)",
        ),
        (lambda folder, patch: folder.symlink_to(folder.rename(folder.with_name("moved"))), "it is not a folder"),
    ],
    ids=["group", "others", "owner", "link"],
)
def test_programs_that_others_may_have_written_are_not_run(
    change: Callable[..., None], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No program is written among them either. The warning comes once."""
    _run()
    change(folder, monkeypatch)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    with pytest.warns(RuntimeWarning, match=f"programs are neither kept there nor loaded: {message}.*Remove it"):
        assert _run()[0] == 1
    assert _run(size=16)[0] == 1
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_what_is_no_file_is_not_read(folder: Path) -> None:
    _run()
    (file,) = folder.iterdir()
    file.unlink()
    os.mkfifo(file)
    with pytest.warns(RuntimeWarning, match="a FIFO: expected a regular file: this compiled program is not used"):
        assert _run()[0] == 1


def test_the_oldest_programs_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs unused for longest are deleted; files with other names count by age as well."""
    for size in (2, 4, 8):
        _run(size)
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    for age, file in zip((300, 200, 100), files, strict=True):
        os.utime(file, (time.time() - age, time.time() - age))
    assert _run(2)[0] == 0, "a use must make the program the youngest"
    total = sum(file.stat().st_size for file in files)
    drop_oldest(folder, total)
    assert sorted(folder.iterdir()) == sorted(files)
    drop_oldest(folder, total - 1)
    assert set(files) - set(folder.iterdir()) == {files[1]}
    monkeypatch.setattr("llamajax.generation.compilation.drop_oldest", lambda folder: drop_oldest(folder, 0))
    _run(16)
    assert list(folder.iterdir()) == []


def test_programs_that_cannot_be_written_are_said_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(RuntimeWarning, match="compiled programs are not kept .*No space left on device.*the next start"):
        assert _run()[0] == 1
    assert _run()[0] == 1
    assert list(folder.iterdir()) == []


# ---- Damage ----------------------------------------------------------------------------------------------------------


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\0" * 99, _flip]
)
def test_a_damaged_program_is_made_again(folder: Path, damage) -> None:
    assert _run()[0] == 1
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(RuntimeWarning, match=r"a kept program cannot be loaded \(damaged\): it is compiled again"):
        assert _run() == (1, pytest.approx(_expected(), rel=1e-5))
    assert _run()[0] == 0
    file.write_bytes(b"")
    assert _run()[0] == 1, "the warning must come once"


def test_what_a_program_is_made_from_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another shape, setting, source or function is another program."""
    monkeypatch.setattr("llamajax.generation.compilation._source_hash", lambda: "another source")
    monkeypatch.setattr("llamajax.generation.compilation.processor_features", lambda: "another processor")
    changes = [contextlib.nullcontext(), jax.default_matmul_precision("float32"), jax.enable_x64(True)]
    for count, change in enumerate(changes, 1):
        with change:
            assert _run()[0] == 1
            assert len(list(folder.iterdir())) == count
    assert _run(size=16) == (1, pytest.approx(_expected(16), rel=1e-5))
    for changed in (
        "llamajax.generation.compilation._source_hash",
        "llamajax.generation.compilation.processor_features",
    ):
        monkeypatch.setattr(changed, lambda: "")
        assert _run()[0] == 1
    monkeypatch.setattr("flax.__version__", "another")
    assert _run()[0] == 1
    other = lambda state, weight: ({"y": state["y"]}, jnp.sum(weight))  # noqa: E731
    assert float(CompiledFunction(other)(*_arguments())[1]) == pytest.approx(float(_arguments()[1].sum()), rel=1e-6)


def test_compiled_for_shapes_it_serves_arrays(folder: Path) -> None:
    program = CompiledFunction(step)
    program.compile(*jax.eval_shape(_arguments))
    assert float(program(*_arguments())[1]) == pytest.approx(_expected(), rel=1e-5)
    assert program.total.compilations == 1


def test_nothing_is_kept_where_the_user_wants_or_allows_nothing(folder: Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert _run()[1] == pytest.approx(_expected(), rel=1e-5)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not folder.exists()
    folder.write_text("no folder can be made here")
    with pytest.warns(
        RuntimeWarning, match="compiled programs are neither kept there nor loaded: it is not a folder. Remove it"
    ):
        assert _run() == (1, pytest.approx(_expected(), rel=1e-5))
    assert _run()[0] == 1, "the warning must come once"
    assert folder.is_file()


def test_a_folder_of_another_kind_is_left_to_jax(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX understands URLs; as a path, a URL would become a folder of that name in the working folder."""
    monkeypatch.chdir(tmp_path)
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/programs")
    assert _run()[1] == pytest.approx(_expected(), rel=1e-5)
    assert list(tmp_path.iterdir()) == []


# ---- In memory -------------------------------------------------------------------------------------------------------


def test_settings_are_seen_by_programs_in_memory(folder: Path) -> None:
    program = CompiledFunction(lambda x: x + jnp.float32(np.arange(3).sum()))
    assert program(np.float32(1)) == 4.0
    with jax.enable_x64(True):
        assert program(np.float32(1)) == 4.0
    assert program(np.float32(1)) == 4.0
    assert program.total.compilations == 2


def test_the_programs_used_last_stay_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamajax.generation.compilation.MOST_PROGRAMS", 2)
    program = CompiledFunction(lambda x: 2 * x)
    made = []
    for size in (1, 2, 1, 3, 1, 2):
        program(np.ones(size, np.float32))
        made.append(program.total.compilations + program.total.loads)
    assert made == [1, 2, 2, 3, 3, 4], "size 3 must replace the program of size 2, not that of size 1"


def test_replaced_code_is_compiled_within_fresh_programs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = CompiledFunction(step)
    original = float(program(*_arguments())[1])
    (file,) = folder.iterdir()
    monkeypatch.setattr(jnp, "sum", lambda x: jnp.max(x))
    assert float(program(*_arguments())[1]) == original, "a program in memory must be found by shapes alone"
    with fresh_programs():
        assert float(program(*_arguments())[1]) != original
        assert float(CompiledFunction(step)(*_arguments())[1]) != original
        assert list(folder.iterdir()) == [file]
    assert float(program(*_arguments())[1]) == original
    assert (program.total.compilations, program.total.loads) == (2, 0)
    clear_programs()
    assert float(program(*_arguments())[1]) == original
    assert (program.total.compilations, program.total.loads) == (2, 1)
