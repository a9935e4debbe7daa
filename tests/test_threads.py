"""The number of threads that XLA computes with: in its pool, in compiled code, and in cached programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamajax.cli import COMMANDS, main
from llamajax.errors import LlamaJaxError
from llamajax.generation import compilation
from llamajax.threads import processors, thread_count, use_threads

ROOT = Path(__file__).parents[1]
several = pytest.mark.skipif(processors() < 2, reason="needs two processors")

# Runs a command that applies its flags and finds no model, then reports how XLA compiles a loop over 16M numbers.
_PROCESS = """
import json, sys, threading
from llamajax.cli import main
code = main([*sys.argv[1:], "--model=nowhere"])
import jax, jax.numpy as jnp
abstract = jax.ShapeDtypeStruct((1 << 24,), jnp.float32)
program = jax.jit(lambda x: jnp.exp(jnp.sin(x))).lower(abstract).compile().as_text()
with open("/proc/self/status") as status:
    threads = next(int(line.split()[1]) for line in status if line.startswith("Threads"))
print(json.dumps({"code": code, "threads": threads, "parts": "outer_dimension_partitions" in program}))
"""


def of_process(*arguments: str, **environment: str) -> dict:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NPROC", "PJRT_NPROC", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    }
    environment = {**inherited, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, "-c", _PROCESS, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    return json.loads(done.stdout)


@several
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc for a process's threads")
def test_the_flag_makes_the_pool_and_the_code(tmp_path: Path) -> None:
    """Programs that JAX caches for one number of threads are not used for another."""
    caches = {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    one = of_process("generate", "--threads=1", NPROC="2", **caches)  # the flag wins over the environment
    two = of_process("eval", "--threads=2", **caches)
    assert one["code"] == two["code"] == 1
    assert not one["parts"] and two["parts"]
    assert one["threads"] < two["threads"]


def test_commands_that_compute_have_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    having = set()
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        if "--threads=N " in capsys.readouterr().out:
            having.add(name)
    assert having == {"generate", "chat", "eval", "bench", "quantize", "train", "export"}


def test_more_than_there_are_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    number = processors() + 1
    assert main(["generate", f"--threads={number}"]) == 1
    message = f"threads is {number}: expected 1 to {processors()}, the processors that this process may use"
    assert message in capsys.readouterr().err
    assert main(["generate", "--threads=0"]) == 2
    assert "--threads=0" in capsys.readouterr().err
    with pytest.raises(LlamaJaxError, match="threads is 0: expected 1 to"):
        use_threads(0)


@several
def test_a_backend_that_runs_keeps_its_threads(monkeypatch: pytest.MonkeyPatch, tiny_model: object) -> None:
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    monkeypatch.setenv("NPROC", "2")
    with pytest.raises(LlamaJaxError, match="threads is 1, but JAX already computes with 2 in this process"):
        use_threads(1)
    use_threads(2)  # the number already in use


def test_the_environment_is_read_as_xla_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    monkeypatch.setenv("NPROC", "many")
    assert thread_count() == processors()
    monkeypatch.setenv("NPROC", "7")
    assert thread_count() == 7
    monkeypatch.setenv("PJRT_NPROC", "3")
    assert thread_count() == 3


def test_programs_are_kept_for_each_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compilation.jax.config.values, "jax_compilation_cache_dir", str(tmp_path / "programs"))
    files = set()
    for number in ("1", "2", "2"):
        monkeypatch.setenv("PJRT_NPROC", number)
        files.add(compilation._program_file("a program"))
    assert len(files) == 2 and None not in files
