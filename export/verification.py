"""Runs a bundle's golden prompts on every installed runtime, each in a separate process without llamajax.

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
    """A runtime that runs bundles.

    Attributes:
        module: a module that a Python with this runtime can import.
        target: the kind of target that it needs in a bundle, or None.
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
    """The comparison of one runtime with the golden prompts.

    Attributes:
        runtime: a key of `RUNTIMES`.
        version: the name and version that the runtime reports; "" if it did not run.
        skipped: the reason if it did not run, or "".
        error: the reason if it failed, or "".
        held: whether it ran and agreed with the bundle: logits after the prompts within the tolerance, and tokens equal
            to the golden ones up to the first, if any, at which both are within twice the tolerance of each other.
        exact: whether every token was the golden one.
        tokens: number of generated tokens.
        largest_logit_error: largest error of the logits after the prompts.
        tolerance: limit of this error, for the bundle's dtypes and the device (`export.runners.runner.tolerance`).
        load_seconds: time from opening the bundle, hashes included, until each program compiled at load has run once.
        tokens_per_second: speed of decoding one row.
        resident_bytes: memory of the runner's process, at the end.
        texts: number of golden texts that were encoded to the expected ids.
        conversations: number of golden conversations that were encoded to the expected ids.
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
        bundle: the opened bundle.
        runtimes: keys of `RUNTIMES`.
        pythons: the Python to use for a runtime, by the runtime's name; this Python unless given.

    Yields:
        One result for each runtime. A runtime that is not installed, or has no target in the bundle, is skipped.

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
        # A runner reports wrong results too, with exit code 1.
        report = done.stdout.strip().rpartition("\n")[2]
        if done.returncode in (0, 1) and report.startswith("{"):
            yield _result(name, json.loads(report))
        else:
            yield Result(name, error=_last_line(done.stderr, done.returncode))


def unavailable(bundle: Bundle, name: str, python: str) -> str:
    """The reason why a runtime cannot run this bundle here, or "".

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
    """Continues a prompt, or chats, on one runtime; returns the runner's standard error.

    Args:
        bundle: the opened bundle.
        name: the name of the runtime.
        python: a Python with the runtime.
        arguments: the runner's arguments.
        on_output: called with the runner's standard output while it is written.
        shows_notes: whether the runner's standard error goes to that of this process, instead of being returned.

    Raises:
        LlamaJaxError: if the runtime is not installed, the bundle has no target for it, or the runner fails.
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
    """The last line that a failed runner wrote, or its exit code."""
    return (text.strip().splitlines() or [f"exit code {code}"])[-1][:300]


def _result(name: str, report: Mapping) -> Result:
    """Makes a `Result` from a runner's report."""
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
