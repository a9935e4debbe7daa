"""Kills, interrupts and full disks at random moments of every command that writes or runs long.

    python -m tests.kills --kills=100 --interrupts=100 --disks=20 --seed=0

This process imports the libraries once and forks, so that a case costs what its command costs. It starts no backend of
its own, which would not survive a fork. It prints each problem and a summary, and exits with 1 if there was a problem.
"""

import argparse
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 400
CONFIG = """
vocab_size = 300
width = 32
ffn_width = 64
num_layers = 2
num_heads = 2
num_kv_heads = 1
head_size = 16
context_length = 64
tied_embeddings = true
"""
RECIPE = """
[[rules]]
weights = "*norm*"
keep = true
[[rules]]
weights = "embed_VD"
scheme = "int4"
group_size = 16
[[rules]]
weights = "*"
scheme = "int4"
group_size = 16
method = "gptq"
"""
WRITING = {
    "convert": ["convert", "--model=source", "--output=run/out"],
    "convert to Hugging Face": ["convert", "--model=source", "--output=run/out", "--to=huggingface"],
    "quantize": "quantize --model=source --recipe=recipe.toml --calibration=text --calibration_tokens=256 "
    "--context=32 --output=run/out".split(),
    "export": "export --model=source --output=run/out --slots=16 --buckets=4".split(),
    "train": "train --config=config.toml --data=text --steps=6 --batch=2 --sequence_length=16 --eval_every=2 "
    "--output=run/out".split(),
}
COMMANDS = WRITING | {
    "generate": ["generate", "--model=source", "--prompt=A little fox", "--max_new_tokens=40", "--temperature=0"],
}
# Relative frequency of commands among the cases of a kind (default 1); export takes three times as long as the others.
WEIGHTS = {"export": 0.3}


class Outcome(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str
    seconds: float


def in_child(function: Callable[[], object], out: int | None = None, err: int | None = None) -> int:
    """Runs a function in a forked process; returns the process id."""
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads: they are NumPy's, which handles forks
        child = os.fork()
    if child:
        return child
    try:
        for descriptor, number in ((out, 1), (err, 2)):
            if descriptor is not None:
                os.dup2(descriptor, number)
        function()
        os._exit(0)
    except SystemExit as error:  # raised by `run`, with a number or none
        sys.stdout.flush()
        os._exit(int(error.code or 0))
    except BaseException:
        traceback.print_exc()
        os._exit(99)


def ready(process_id: int) -> bool:
    """Returns whether our SIGTERM handler is installed (Python has none), or the process has ended."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:
        return True
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")), 0)
    return bool(caught >> (signal.SIGTERM - 1) & 1) or any(line.startswith("State:\tZ") for line in lines)


def run_command(
    argv: Sequence[str], *, delay: float = 0, number: int | None = None, largest_file: int | None = None, fork=True
) -> Outcome:
    """Runs a command, and sends it a signal `delay` seconds after its start."""
    from llamajax import process
    from llamajax.__main__ import run

    def command() -> None:
        sys.argv = ["llamajax", *argv]
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        process.begin()
        run()

    start = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if fork:
            child = in_child(command, out.fileno(), err.fileno())
        else:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            popen = [sys.executable, "-m", "llamajax", *argv]
            child = subprocess.Popen(popen, stdout=out, stderr=err, env=environment).pid
        while number is not None and not ready(child):
            time.sleep(0.001)
        if number is not None:
            time.sleep(delay)
            os.kill(child, number)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (done := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return Outcome(-100, "", f"hung for {TIMEOUT_SECONDS} s", TIMEOUT_SECONDS)
            time.sleep(0.002)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Outcome(os.waitstatus_to_exitcode(done[1]), *texts, time.monotonic() - start)


def prepare() -> None:
    """Writes a model, a text, a recipe and a config into the working folder."""
    import jax

    import llamajax
    from llamajax.tokenizer import train_tokenizer

    words = ["fox", "river", "apple", "moon", "house", "tree", "bear", "soup"]
    draw = random.Random(3)
    texts = [
        f"A little {draw.choice(words)} saw a {draw.choice(words)} by the {draw.choice(words)}." for _ in range(300)
    ]
    Path("text").write_text("<|endoftext|>".join(texts))
    Path("config.toml").write_text(CONFIG)
    Path("recipe.toml").write_text(RECIPE)
    tokenizer = train_tokenizer(texts, 300)
    import tomllib

    config = llamajax.Config.from_dict(tomllib.loads(CONFIG))
    model = llamajax.Llama(config, key=jax.random.key(0))
    llamajax.save_checkpoint(model, "source", tokenizer=tokenizer)


def contents(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file below a folder, and every folder, by name.

    For checkpoints of a training run, only the name counts: Orbax names the files in them at random.
    """
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")))
    return {
        str(path): hashlib.sha256((folder / path).read_bytes()).hexdigest() if (folder / path).is_file() else "folder"
        for path in paths
        if "checkpoints" not in path.parts or path.parts.index("checkpoints") >= len(path.parts) - 2
    }


class Reference(NamedTuple):
    """What an undisturbed run produces.

    Attributes:
        files: name and hash of each file that it writes; "" where two runs differ.
        out: its standard output.
        seconds: how long it takes.
        largest: bytes of its largest file.
    """

    files: dict[str, str]
    out: str
    seconds: float
    largest: int


def reference(name: str) -> Reference:
    """Runs a command three times: the first run compiles; the other two show which files are the same each time."""
    runs = []
    for _ in range(3):
        fresh()
        outcome = run_command(COMMANDS[name])
        if outcome.code:
            raise SystemExit(f"{name}: exit code {outcome.code}: {outcome.err}")
        runs.append((contents(Path("run")), outcome))
    (_, (first, outcome), (second, _)) = runs
    files = {key: value if second.get(key) == value else "" for key, value in first.items()}
    largest = max((path.stat().st_size for path in Path("run").rglob("*") if path.is_file()), default=0)
    return Reference(files, outcome.out, outcome.seconds, largest)


def fresh() -> None:
    """Makes an empty folder for the next case."""
    shutil.rmtree("run", ignore_errors=True)
    Path("run").mkdir()


def compare(expected: dict[str, str], found: dict[str, str], what: str) -> list[str]:
    """Returns how the files that are there differ from the expected ones."""
    wrong = [f"{what}: {name} is missing" for name in expected if name not in found]
    wrong += [f"{what}: {name} is left over" for name in found if name not in expected]
    wrong += [
        f"{what}: {name} differs" for name, value in expected.items() if value and found.get(name, value) != value
    ]
    return wrong


def after(name: str, expected: Reference) -> list[str]:
    """Runs the command again, undisturbed: it must finish, give what is expected, and leave nothing else."""
    if name != "train" and Path("run/out").exists():  # it had finished
        inner = {key: value for key, value in expected.files.items() if key.split("/")[0] == "out"}
        found = {f"out/{key}": value for key, value in contents(Path("run/out")).items()} | {"out": "folder"}
        wrong = compare(inner, found, "finished")
        again = run_command(COMMANDS[name])
        if again.code != 1 or "exists already" not in again.err:
            wrong.append(f"the target exists, but the next run: {again.code} {again.err}")
        return wrong + compare(expected.files, contents(Path("run")), "after it")
    again = run_command(COMMANDS[name])
    if name == "train" and again.code == 1 and "exists already" in again.err:
        return compare(expected.files, contents(Path("run")), "finished")
    if again.code:
        return [f"the next run fails: {again.code}: {again.err[-600:]}"]
    wrong = compare(expected.files, contents(Path("run")), "after the next run")
    if again.out != expected.out:
        wrong.append(f"the next run prints {again.out[:100]!r}")
    return wrong


def interrupted_well(outcome: Outcome, number: int, expected: Reference) -> list[str]:
    """Checks that an interrupted command ended with one line and the right exit code, or had finished before."""
    line = {signal.SIGINT: "llamajax: interrupted", signal.SIGTERM: "llamajax: terminated"}[signal.Signals(number)]
    wrong = []
    if outcome.code != 128 + number and not (outcome.code == 0 and outcome.out == expected.out):
        wrong.append(f"exit code {outcome.code}: {outcome.err[-1500:]}")
    elif outcome.code and (outcome.err.splitlines() or [""])[-1] != line:
        wrong.append(f"last line: {outcome.err[-600:]!r}")
    if "Traceback" in outcome.err or "rror" in outcome.err or "xception" in outcome.err:
        wrong.append(f"noise: {outcome.err[-1500:]}")
    return wrong


def case(kind: str, name: str, draw: random.Random, expected: Reference) -> list[str]:
    """Runs one case; returns its problems."""
    fresh()
    delay = draw.uniform(0, expected.seconds * 1.05)
    wrong: list[str] = []
    if kind == "kill":
        run_command(COMMANDS[name], delay=delay, number=signal.SIGKILL)
    elif kind == "start-up":
        number = draw.choice([signal.SIGINT, signal.SIGTERM])
        outcome = run_command(COMMANDS[name], delay=draw.uniform(0, 1.2), number=number, fork=False)
        # Before our code runs, the system ends the process, or Python does with a message of its own.
        if outcome.code != -number:
            wrong = interrupted_well(outcome, number, expected)
    elif kind == "interrupt":
        number = draw.choice([signal.SIGINT, signal.SIGTERM])
        outcome = run_command(COMMANDS[name], delay=delay, number=number)
        wrong = interrupted_well(outcome, number, expected)
    else:
        outcome = run_command(COMMANDS[name], largest_file=draw.randrange(64, expected.largest))
        if outcome.code == 0:
            wrong = [f"a full disk, and exit code 0: {outcome.err}"]
        elif outcome.code != 1 or "Traceback" in outcome.err or "out" not in outcome.err.splitlines()[-1]:
            wrong = [f"exit code {outcome.code}: {outcome.err[-2500:]}"]
    return [f"{kind} of {name}: {problem}" for problem in wrong + after(name, expected)]


def cases(counts: dict[str, int], draw: random.Random) -> list[tuple[str, str]]:
    """Draws kinds and commands; one interrupt in ten hits the start-up of a process of its own."""
    chosen = []
    for kind, count in counts.items():
        names = list(WRITING if kind == "disk" else COMMANDS)
        weights = [WEIGHTS.get(name, 1) for name in names]
        for i, name in enumerate(draw.choices(names, weights, k=count)):
            chosen.append(("start-up" if kind == "interrupt" and i % 10 == 9 else kind, name))
    return chosen


def main() -> int:
    """Runs all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("kills", "interrupts", "disks"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="commands, commas between")
    options = parser.parse_args()
    if options.only:
        for name in set(COMMANDS) - set(options.only.split(",")):
            COMMANDS.pop(name)
            WRITING.pop(name, None)
    start, draw = time.monotonic(), random.Random(options.seed)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/programs"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        # Modules that a command imports only while it runs would be imported again by every child.
        import orbax.checkpoint  # noqa: F401

        import export.cli.export  # noqa: F401
        import llamajax.cli.convert
        import llamajax.cli.generate
        import llamajax.cli.quantize
        import llamajax.cli.train  # noqa: F401

        os.waitpid(in_child(prepare), 0)
        chosen = cases({"kill": options.kills, "interrupt": options.interrupts, "disk": options.disks}, draw)
        references = {name: reference(name) for name in dict.fromkeys(name for _, name in chosen)}
        for i, (kind, name) in enumerate(chosen):
            problems = case(kind, name, draw, references[name])
            wrong += problems
            for problem in problems:
                print(f"case {i}: {problem}", flush=True)
        left = [path.name for path in Path("programs").rglob("*") if "partial" in path.name]
        if left:
            wrong.append(f"left among kept programs: {left[:5]}")
            print(wrong[-1])
    counts = Counter(kind for kind, _ in chosen)
    summary = ", ".join(f"{count} {kind}s" for kind, count in counts.items())
    seconds = time.monotonic() - start
    print(f"{summary}, of {len(references)} commands, seed {options.seed}: {len(wrong)} problems, {seconds:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
