"""Compares the predictions of `llamajax plan` with the memory of a process, for random weights of preset shapes.

    python benchmarks/plan.py --scratch=/tmp/plan box,int4-g32,512,1,auto tinyllama-1.1b,int4-g32,2048,8,int8

A case is: shape (of a preset, or a checkpoint's path), recipe ("" for a checkpoint as it is), context, rows, cache. The
weights of a case are written once into `--scratch`, as GGUF if ggml has their types. A separate process then reads them
as `generate` does and generates 16 greedy tokens after a prompt that fills the context. It measures resident memory
beyond that before reading: the peak while reading, the peak while generating, and at the end. Each case runs twice: the
first run compiles, the second finds the programs that were kept.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import app, flags

flags.DEFINE_string("scratch", None, "folder that keeps weights and programs; a temporary folder if not given")
flags.DEFINE_boolean("json", False, "print a JSON object for each run instead of a table")
flags.DEFINE_string("measure", None, "a case to measure in this process: for this script's own use")

_NEW = 16
_HEAD = f"{'MiB':47}  weights     cache   activ.  programs     total  measured     off   reading  measured compiling"
_HEAD += "     after"
_CASES = (
    "box,,512,1,auto",
    "box,int4-g32,512,8,auto",
    "tinyllama-1.1b,int4-g32,512,1,auto",
    "tinyllama-1.1b,int4-g32,2048,1,int8",
    "tinyllama-1.1b,int4-g32,1024,8,auto",
    "tinyllama-1.1b,int8,512,1,auto",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """The model to load and the settings of generation; `path` is that of the checkpoint."""

    shape: str
    recipe: str
    context: int
    batch: int
    cache: str
    path: str = ""

    @property
    def cache_dtype(self) -> str | None:
        """The cache's dtype as the library takes it."""
        return None if self.cache == "auto" else self.cache


def status() -> dict[str, int]:
    """Returns the resident bytes of this process, now and at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"now": found["VmRSS"], "most": found["VmHWM"]}


def forget_peak() -> None:
    """Resets the peak of resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(case: Case) -> dict[str, int]:
    """Loads and generates in this process; returns bytes beyond those before loading."""
    import jax
    import jax.numpy as jnp

    from llamajax import open_checkpoint
    from llamajax.cli import keep_compiled_programs
    from llamajax.cli.model_flags import read_model
    from llamajax.generation.stream import TextStream

    keep_compiled_programs()
    opened = open_checkpoint(case.path)
    jnp.zeros(1).block_until_ready()
    forget_peak()
    before = status()["now"]
    options = {"backend": jax.default_backend()}
    prompt = [5 + i % 200 for i in range(case.context - _NEW)]
    stream = TextStream(
        opened.outcome(jnp.float32, **options),
        None,
        [prompt] * case.batch,
        max_new_tokens=_NEW,
        temperature=0,
        cache_dtype=case.cache_dtype,
    )
    model = read_model(opened, jnp.float32, **options)
    reading = status()["most"]
    stream.compile_while(lambda: model)
    compiling = status()["most"]
    forget_peak()
    for _ in stream:
        pass
    after = status()
    made = {"reading": reading, "compiling": compiling, "generating": after["most"], "after": after["now"]}
    return {"before": before, "compiled": stream.speed.compilations} | {k: v - before for k, v in made.items()}


def written(case: Case, scratch: Path) -> Path:
    """Writes a checkpoint of random weights of the shape unless it exists; returns its path."""
    import llamajax
    from llamajax.evaluation.speed import random_model

    if not case.recipe:
        return Path(case.shape)
    path = scratch / f"{case.shape}-{case.recipe}"
    gguf = path.with_name(f"{path.name}.gguf")
    if not path.exists() and not gguf.exists():
        model = random_model(llamajax.preset(case.shape), case.recipe, dtype="float32")
        try:
            llamajax.save_checkpoint(model, gguf, form="gguf")
        except llamajax.LlamaJaxError:
            llamajax.save_checkpoint(model, path)
    return gguf if gguf.exists() else path


def predicted(case: Case):
    """Returns the plan of a case."""
    from llamajax import open_checkpoint
    from llamajax.plan import plan

    return plan(
        open_checkpoint(case.path),
        context=case.context,
        batch=case.batch,
        cache_dtype=case.cache_dtype,
        dtype="float32",
    )


def main(argv):
    """Measures all cases and prints a line for each run."""
    if flags.FLAGS.measure:
        print(json.dumps(measure(Case(**json.loads(flags.FLAGS.measure)))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(flags.FLAGS.scratch or temporary)
        scratch.mkdir(exist_ok=True)
        environment = {**os.environ, "XDG_CACHE_HOME": str(scratch / "cache")}
        if not flags.FLAGS.json:
            print(_HEAD)
        for text in argv[1:] or _CASES:
            shape, recipe, context, batch, cache = text.split(",")
            case = Case(shape, recipe, int(context), int(batch), cache)
            case = dataclasses.replace(case, path=str(written(case, scratch)))
            made = predicted(case)
            command = [sys.executable, __file__, f"--measure={json.dumps(dataclasses.asdict(case))}"]
            for _ in range(2):
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1]) | {"plan": made.total, "plan_reading": made.reading}
                print(json.dumps(found) if flags.FLAGS.json else line(text, made, found), flush=True)


def line(case: str, made, found: dict[str, int]) -> str:
    """Formats a row of the table."""
    parts = [made.weights, made.cache, made.activations, made.programs, made.total, found["generating"]]
    parts += [made.reading, found["reading"], found["compiling"], found["after"]]
    numbers = [f"{part / (1 << 20):9.1f}" for part in parts]
    numbers.insert(6, f"{made.total / found['generating'] - 1:+7.1%}")
    return f"{case:38} {'compiled' if found['compiled'] else 'kept':8}{' '.join(numbers)}"


if __name__ == "__main__":
    app.run(main)
