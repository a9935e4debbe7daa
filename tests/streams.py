"""Runs every command with standard streams that are closed, broken, full, narrow or not UTF-8.

    python -m tests.streams --sample=8 --seed=0

One process imports the libraries once and forks for each case. It prints each problem, and exits with 1 if any.
"""

import argparse
import io
import json
import os
import pty
import random
import struct
import sys
import tempfile
import termios
import threading
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path

from tests.kills import in_child, prepare

# Each command, and the kind of its standard output: "" for commands that only write files.
COMMANDS = {
    "generate": (["generate", "--model=source", "--prompt=café", "--max_new_tokens=3", "--json"], "json"),
    "generate text": (["generate", "--model=source", "--prompt=café", "--max_new_tokens=3"], "text"),
    "inspect": (["inspect", "--model=source"], "text"),
    "inspect --json": (["inspect", "--model=source", "--json"], "json"),
    "convert": (["convert", "--model=source", "--output=OUT"], ""),
    "quantize": (["quantize", "--model=source", "--recipe=plain.toml", "--output=OUT"], ""),
    "eval": (["eval", "--model=source", "--text=text", "--context=16", "--json"], "json"),
    "eval tables": (["eval", "--model=source", "--reference=source", "--text=text", "--context=16"], "text"),
    "bench": ("bench --model=source --prefill=4 --context= --repeats=1".split(), "text"),
    "train": ("train --config=config.toml --data=text --steps=1 --sequence_length=8 --output=OUT".split(), ""),
    "export": ("export --model=source --output=OUT --slots=8 --buckets=4".split(), "text"),
    "verify": (["verify", "bundle", "--runtime=jax"], "text"),
    "run": (["run", "bundle", "--prompt=A", "--max_new_tokens=2"], "text"),
    "help": (["--help"], "text"),
    "help of generate": (["generate", "--help"], "text"),
}
CONDITIONS = ("stdout closed", "stderr closed", "both closed", "reader left", "nobody reads stderr", "full", "ascii",
              "one column", "dumb terminal")  # fmt: skip


def run(argv: list[str], condition: str) -> tuple[int, str, str]:
    """Runs a command under a condition; returns exit code, standard output and standard error."""
    from llamajax import process
    from llamajax.__main__ import run

    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    broken_read, broken = os.pipe()
    os.close(broken_read)
    terminal, data = None, []

    def command() -> None:
        closed: set[int] = set()
        if condition in ("stdout closed", "both closed"):
            closed.add(1)
        if condition in ("stderr closed", "both closed"):
            closed.add(2)
        if condition == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        encoding = "ascii" if condition == "ascii" else "utf-8"
        for number in closed:
            os.close(number)
        # Makes the streams as Python does at its start.
        open_as = lambda number: io.TextIOWrapper(open(number, "wb", closefd=False), encoding)  # noqa: E731
        sys.stdout = None if 1 in closed else open_as(1)  # type: ignore[assignment]
        sys.stderr = None if 2 in closed else open_as(2)  # type: ignore[assignment]
        os.environ["TERM"] = "dumb" if condition == "dumb terminal" else "xterm"
        sys.argv = ["llamajax", *argv]
        process.begin()
        run()

    first, second = out.fileno(), err.fileno()
    if condition == "reader left":
        first = broken
    if condition == "nobody reads stderr":
        second = broken
    if condition in ("one column", "dumb terminal"):
        terminal, slave = pty.openpty()
        columns = 1 if condition == "one column" else 80
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        first = second = slave
        reader = threading.Thread(target=_drain, args=(terminal, data))
    child = in_child(command, first, second)
    os.close(broken)
    if terminal is not None:
        reader.start()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if terminal is not None:
        os.close(slave)
        reader.join()
        os.close(terminal)
        return status, b"".join(data).decode(errors="replace").replace("\r\n", "\n"), ""
    texts = []
    for file in (out, err):
        file.seek(0)
        texts.append(file.read().decode())
        file.close()
    return status, texts[0], texts[1]


def _drain(terminal: int, data: list[bytes]) -> None:
    try:
        while part := os.read(terminal, 1 << 16):
            data.append(part)
    except OSError:  # Linux reports so that the other end is closed
        pass


def problem(kind: str, condition: str, code: int, out: str, err: str) -> str:
    """Returns what is wrong with a result, or ""."""
    lost = condition in ("stdout closed", "both closed", "full") and kind
    if code != (1 if lost else 0):
        return f"exit code {code}"
    if "Traceback" in out + err or "rror:" in err or "Exception" in err:
        return "noise"
    if lost and condition != "both closed" and "standard output: " not in err:
        return "the error does not name standard output"
    if condition in ("stdout closed", "both closed", "full", "reader left") and out:
        return "output that nobody gets"
    if condition in ("one column", "dumb terminal"):
        return "something is left out" if "…" in out.replace("=value …", "").replace("awq, …", "") else ""
    if kind == "json" and condition in ("stderr closed", "ascii", "nobody reads stderr"):
        json.loads(out)
    if kind and condition in ("stderr closed", "ascii", "nobody reads stderr") and not out:
        return "no output"
    return ""


def main() -> int:
    """Runs all cases, or a sample."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cases = [(name, condition) for name in COMMANDS for condition in CONDITIONS]
    if options.sample:
        light = [each for each in cases if each[0] not in ("verify", "run", "export", "train")]
        cases = random.Random(options.seed).sample(light, options.sample)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/programs")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        import orbax.checkpoint  # noqa: F401

        import llamajax.cli  # noqa: F401

        setup: list[Callable[[], object]] = [prepare, _plain_recipe]
        for step in setup:
            os.waitpid(in_child(step), 0)
        if {"verify", "run"} & {name for name, _ in cases}:
            run("export --model=source --output=bundle --slots=8 --buckets=4".split(), "ascii")
        for i, (name, condition) in enumerate(cases):
            argv, kind = COMMANDS[name]
            code, out, err = run([each.replace("OUT", f"out-{i}") for each in argv], condition)
            if found := problem(kind, condition, code, out, err):
                wrong += 1
                print(f"{name}, {condition}: {found}\n  code {code}\n  out {out[-500:]!r}\n  err {err[-1500:]!r}")
    print(f"{len(cases)} cases, {wrong} wrong")
    return 1 if wrong else 0


def _plain_recipe() -> None:
    keep = '[[rules]]\nweights = "*norm*"\nkeep = true\n'
    Path("plain.toml").write_text(f'{keep}[[rules]]\nweights = "*"\nscheme = "int8"\ngroup_size = 16\n')


if __name__ == "__main__":
    sys.exit(main())
