"""Runs a bundle's golden prompts on every runtime that is here, each in a process of its own without our source.

    for result in verify(open_bundle("box.bundle")):
        print(result.runtime, result.exact, result.largest_logit_error)

The runners are those of this installation, not the copies in the bundle: a bundle may come from anywhere.
"""

import contextlib
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from export.bundle import Bundle, standalone_runner
from export.targets import kind_of
from llamajax import LlamaJaxError


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Something that runs bundles.

    Attributes:
        module: what a Python that has it can import.
        target: kind of target that a bundle must hold for it, or None.
    """

    module: str
    target: str | None = None


RUNTIMES = {
    "jax": Runtime("jax"),
    "jax_export": Runtime("jax.export"),
    "iree": Runtime("iree.runtime", "iree"),
    "onnx": Runtime("onnxruntime", "onnx"),
    "openvino": Runtime("openvino", "onnx"),
    "savedmodel": Runtime("tensorflow", "savedmodel"),
    "litert": Runtime("ai_edge_litert", "litert"),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What one runtime made of the golden prompts.

    Attributes:
        runtime: a key of `RUNTIMES`.
        version: what it calls itself; "" where it did not run.
        skipped: why it did not run, or "".
        error: why it failed, or "".
        held: whether it ran and did what the bundle promises: logits behind the prompts within the tolerance, tokens
            the golden ones up to the first, if any, where both are within twice the tolerance of each other.
        exact: whether every token was the golden one.
        tokens: how many there were.
        largest_logit_error: behind the prompts.
        tolerance: of it, for the dtypes of this bundle and the device (`export.runners.runner.tolerance`).
        load_seconds: from opening the bundle, hashes included, to having run each program once that is compiled then.
        tokens_per_second: of decoding one row.
        resident_bytes: of its process, at the end.
        texts: how many golden texts it encoded to their ids.
        conversations: how many golden conversations.
    """

    runtime: str
    version: str = ""
    skipped: str = ""
    error: str = ""
    held: bool = False
    exact: bool = False
    tokens: int = 0
    largest_logit_error: float = math.inf
    tolerance: float = 0.0
    load_seconds: float = 0.0
    tokens_per_second: float = 0.0
    resident_bytes: int = 0
    texts: int = 0
    conversations: int = 0


def verify(
    bundle: Bundle, runtimes: Sequence[str] = tuple(RUNTIMES), pythons: Mapping[str, str] | None = None
) -> Iterator[Result]:
    """Runs the golden prompts on each runtime in turn.

    Args:
        bundle: opened.
        runtimes: keys of `RUNTIMES`.
        pythons: the Python that has a runtime, by its name; this one unless given.

    Yields:
        One result a runtime. One that is not installed, or for which the bundle holds no target, is skipped.

    Raises:
        LlamaJaxError: for the name of a runtime that does not exist.
    """
    for name in runtimes:
        python = (pythons or {}).get(name, sys.executable)
        if reason := unavailable(bundle, name, python):
            yield Result(name, skipped=reason)
            continue
        with _runner(name) as file:
            command = [python, "-I", str(file), str(bundle.path), "--golden"]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        # What did not hold is reported too, with exit code 1.
        report = done.stdout.strip().rpartition("\n")[2]
        if done.returncode in (0, 1) and report.startswith("{"):
            yield _result(name, json.loads(report))
        else:
            yield Result(name, error=_last_line(done.stderr, done.returncode))


def unavailable(bundle: Bundle, name: str, python: str) -> str:
    """Why a runtime cannot run this bundle here, or "".

    Raises:
        LlamaJaxError: if there is no runtime of that name.
    """
    if name not in RUNTIMES:
        raise LlamaJaxError(f"runtime {name!r}: expected one of {', '.join(RUNTIMES)}")
    runtime = RUNTIMES[name]
    if runtime.target and all(kind_of(target) != runtime.target for target in bundle.manifest["targets"]):
        return f"the bundle has no target {runtime.target}"
    probe = f"import importlib.util as u, sys; sys.exit(u.find_spec({runtime.module!r}) is None)"
    try:
        found = subprocess.run([python, "-I", "-c", probe], capture_output=True, check=False).returncode == 0
    except OSError as error:
        return f"{python}: {error.strerror}"
    return "" if found else f"{python} has no {runtime.module}"


@contextlib.contextmanager
def _runner(name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"run_{name}.py"
        file.write_text(standalone_runner(file.name), encoding="utf-8")
        yield file


def run(
    bundle: Bundle,
    name: str,
    python: str,
    arguments: Sequence[str],
    on_output: Callable[[bytes], None],
    *,
    shows_notes: bool = False,
) -> str:
    """Continues a prompt, or chats, on one runtime; returns what the runner said to its standard error.

    Args:
        bundle: opened.
        name: of the runtime.
        python: that has it.
        arguments: of the runner.
        on_output: called with what the runner writes to its standard output, as it comes.
        shows_notes: whether what it says to its standard error is this process's, as it comes, and not returned.

    Raises:
        LlamaJaxError: if the runtime is not here, the bundle has nothing for it, or it fails.
    """
    if reason := unavailable(bundle, name, python):
        raise LlamaJaxError(f"{bundle.path}: runtime {name}: {reason}")
    with _runner(name) as file:
        command = [python, "-I", str(file), str(bundle.path), *arguments]
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=None if shows_notes else said, bufsize=0
            ) as process,
        ):
            assert process.stdout
            try:
                while data := process.stdout.read(1 << 16):
                    on_output(data)
            except BaseException:
                process.kill()
                raise
            process.wait()
            said.seek(0)
            text = said.read().decode("utf-8", "replace")
    if process.returncode:
        raise LlamaJaxError(f"{bundle.path}: runtime {name}: {_last_line(text, process.returncode)}")
    return text.strip()


def _last_line(text: str, code: int) -> str:
    """What a runner that failed said last."""
    return (text.strip().splitlines() or [f"exit code {code}"])[-1][:300]


def _result(name: str, report: Mapping) -> Result:
    """From what a runner printed."""
    prompts = report["prompts"]
    errors = [float(prompt["largest_logit_error"]) for prompt in prompts]
    held = all(prompt["held"] for prompt in prompts)
    return Result(
        name,
        version=report["runtime"],
        held=held,
        exact=all(prompt["exact"] for prompt in prompts),
        tokens=sum(len(prompt["tokens"]) for prompt in prompts),
        largest_logit_error=math.inf if any(math.isnan(error) for error in errors) else max(errors),
        tolerance=min(float(prompt["tolerance"]) for prompt in prompts),
        load_seconds=report["load_seconds"],
        tokens_per_second=report["decode_steps"] / report["decode_seconds"] if report["decode_seconds"] else 0.0,
        resident_bytes=report["resident_bytes"],
        texts=report["texts"],
        conversations=report["conversations"],
    )
