"""Programs kept on disk: found by what they are made from, as good as new, and never trusted to be whole."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax.compilation import CompiledFunction

_traces = 0


def step(state: dict[str, jax.Array], weight: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    """Something that compiles to several functions, and gives the memory of `state` back."""
    global _traces
    _traces += 1
    y = jax.lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ weight), state["y"])
    return {"y": y}, jnp.sum(y**2.5)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where programs are kept, for this test alone."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "llamajax"
    jax.config.update("jax_compilation_cache_dir", before)


def _arguments(size: int = 8) -> tuple[dict[str, jax.Array], jax.Array]:
    rng = np.random.default_rng(0)
    return {"y": jnp.asarray(rng.random((4, size)), jnp.float32)}, jnp.asarray(rng.random((size, size)), jnp.float32)


def _run(size: int = 8) -> tuple[int, float]:
    """What a new process would do: how often it traced, and what came out."""
    global _traces
    _traces = 0
    program = CompiledFunction(step, donate_argnames=("state",))
    state, weight = _arguments(size)
    given = state["y"]
    made, total = program(state, weight)
    again, _ = program(made, weight)
    assert given.is_deleted() and made["y"].is_deleted() and again["y"].shape == (4, size)
    assert program.compilations == 1 and program.compile_seconds > 0
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
    # JAX has kept nothing of it: what it loads could not be written again.
    assert [file.name for file in folder.parent.iterdir() if "step" in file.name] == []


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
    assert _run() == (1, pytest.approx(_expected(), rel=1e-5))
    assert _run()[0] == 0


def test_what_a_program_is_made_from_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another shape, setting, source or function is another program."""
    monkeypatch.setattr("llamajax.compilation._source_hash", lambda: "another source")
    changes = [contextlib.nullcontext(), jax.default_matmul_precision("float32"), jax.enable_x64(True)]
    for count, change in enumerate(changes, 1):
        with change:
            assert _run()[0] == 1
            assert len(list(folder.iterdir())) == count
    assert _run(size=16) == (1, pytest.approx(_expected(16), rel=1e-5))
    monkeypatch.undo()
    assert _run()[0] == 1
    other = lambda state, weight: ({"y": state["y"]}, jnp.sum(weight))  # noqa: E731
    assert float(CompiledFunction(other)(*_arguments())[1]) == pytest.approx(float(_arguments()[1].sum()), rel=1e-6)


def test_compiled_for_shapes_it_serves_arrays(folder: Path) -> None:
    program = CompiledFunction(step)
    program.compile(*jax.eval_shape(_arguments))
    assert float(program(*_arguments())[1]) == pytest.approx(_expected(), rel=1e-5)
    assert program.compilations == 1


def test_nothing_is_kept_where_the_user_wants_or_allows_nothing(folder: Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert _run()[1] == pytest.approx(_expected(), rel=1e-5)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not folder.exists()
    folder.write_text("no folder can be made here")
    assert _run() == (1, pytest.approx(_expected(), rel=1e-5))
    assert folder.is_file()


def test_a_folder_of_another_kind_is_left_to_jax(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX understands addresses; as a path one would become a folder of that name, wherever the user is."""
    monkeypatch.chdir(tmp_path)
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/programs")
    assert _run()[1] == pytest.approx(_expected(), rel=1e-5)
    assert list(tmp_path.iterdir()) == []
