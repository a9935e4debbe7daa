"""Each GGUF file type: bits per weight in the file and in memory, and decoding, beside our recipes and llama.cpp.

    pip install 'llamajax[llamacpp]'
    python benchmarks/gguf_types.py --folder=/tmp/gguf --rounds=5 [--types=Q4_0,Q4_K_M] [--smollm2=FILE] [--json]

llama.cpp quantizes random weights of a preset's shape. The files stay in --folder for later runs (10 GB for the 1.1B
shape). For each file, three processes hold a model all the time: llamajax with the file; llamajax with random weights
in one of our schemes of about the same size; and llama.cpp with the file. They measure in turn, so that only one works
at a time. Figures are medians over the rounds. A ratio is that of the medians, followed by the lowest and highest ratio
of one round.

GB/s count the bytes that a step reads, of the weights as the file or the recipe stores them and of the cache. A layout
that takes more memory than the file therefore gets no higher figure. Bits in memory count what the model holds in its
layout. Compile time is that of the decode step. `mixed_layers.py --file=Q4_K_M` measures the cost of mixing types.

With --smollm2, also measures the time from the start of a process to its first token, tokenizer included, with warm
caches, for that file and for our checkpoint of the same weights, in turn.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import versus_llamacpp  # and its flags --shape, --rounds, --steps, --threads, --cache_dtype, --folder, --json
from absl import app, flags

# Nothing else is imported here: the measured processes load this file too, and then import only what they need.

flags.DEFINE_list("types", None, "file types to measure; all unless given")
flags.DEFINE_integer("context", 128, "tokens in the cache", lower_bound=1)
flags.DEFINE_string("smollm2", None, "SmolLM2-135M-Instruct.Q4_1.gguf, or another file, to time the first token with")
flags.DEFINE_string("held", None, "the model of a process: for this script's own use")

FILE, RECIPE, THEIRS = "file", "recipe", "llamacpp"


class Type(NamedTuple):
    """A file type to measure.

    Attributes:
        kind: llama.cpp's name of the file type.
        scheme: the scheme of our weights that it is compared with.
        group: the group size of our weights.
        least: the fraction of our weights' GB/s that it has to reach.
        pure: whether all matrices have one type.
    """

    kind: str
    scheme: str
    group: int
    least: float
    pure: bool = False


TYPES = {
    "Q4_0": Type("Q4_0", "int4", 32, 0.9),
    "Q4_1": Type("Q4_1", "int4", 16, 0.9),
    "Q8_0": Type("Q8_0", "int8", 32, 0.9),
    "Q4_K_M": Type("Q4_K_M", "int4", 32, 0.9),
    "Q5_K_M": Type("Q5_K_M", "int5", 32, 0.9),
    "Q6_K": Type("Q6_K", "int6", 32, 0.9),
    "Q2_K": Type("Q2_K", "int2", 32, 0.5),
    "Q3_K_M": Type("Q3_K_M", "int3", 32, 0.5),
    "IQ4_XS": Type("IQ4_XS", "int4", 64, 0.5),
    "IQ4_NL": Type("IQ4_NL", "int4", 32, 0.5),
    "MXFP4": Type("MXFP4_MOE", "int4", 64, 0.5, pure=True),
}
_RULES = """
[[rules]]
weights = "*norm*"
keep = true

[[rules]]
weights = "*"
scheme = "{scheme}"
group_size = {group}
scale_dtype = "float16"
"""


class Row(NamedTuple):
    """The results for one file.

    Attributes:
        name: the name of the type.
        made_of: the number of tensors of each ggml type.
        file_bits: bits per weight of all tensors in the file.
        memory_bits: bits per weight of the model in its layout.
        bytes: the bytes that a step reads, as stored, by program.
        tokens: tokens per second, one value per round, by program.
        compile_seconds: compile time of the decode step, for the file and for the recipe.
    """

    name: str
    made_of: dict[str, int]
    file_bits: float
    memory_bits: float
    bytes: dict[str, int]
    tokens: dict[str, list[float]]
    compile_seconds: dict[str, float]

    def gigabytes(self, program: str) -> float:
        """Returns the GB/s at the median speed."""
        return self.bytes[program] * statistics.median(self.tokens[program]) / 1e9

    def ratio(self, first: str, second: str, by_bytes: bool) -> str:
        """Returns the ratio of the medians, with the lowest and highest ratio of one round."""
        scale = self.bytes[first] / self.bytes[second] if by_bytes else 1.0
        ours, theirs = self.tokens[first], self.tokens[second]
        rounds = [scale * mine / other for mine, other in zip(ours, theirs, strict=True)]
        value = scale * statistics.median(ours) / statistics.median(theirs)
        return f"{value:.2f} ({min(rounds):.2f} to {max(rounds):.2f})"


# ---- Files ----------------------------------------------------------------------------------------------------------


def gguf_file(folder: Path, name: str) -> Path:
    """Returns the file of a type; makes it if it does not exist."""
    from gguf_files import quantize_gguf, read_random, write_gguf

    from llamajax.config import preset

    source = folder / f"{flags.FLAGS.shape}-F16.gguf"
    target = folder / f"{flags.FLAGS.shape}-{name.replace(' ', '-')}.gguf"
    unfinished = folder / "unfinished.gguf"
    if not source.exists():
        config = preset(flags.FLAGS.shape)
        write_gguf(unfinished, config, read_random(config), "F16")
        unfinished.rename(source)
    if not target.exists():
        print(f"llama.cpp makes {target}", file=sys.stderr)
        quantize_gguf(source, unfinished, f"MOSTLY_{TYPES[name].kind}", pure=TYPES[name].pure)
        unfinished.rename(target)
    return target


# ---- Processes ------------------------------------------------------------------------------------------------------


def our_model() -> tuple[Any, Any]:
    """Returns the model of our process twice: abstract, as stored; and in the layout of this machine."""
    import jax

    import llamajax
    from llamajax.evaluation.speed import random_model

    held = flags.FLAGS.held
    if not held.startswith("scheme:"):
        opened = llamajax.open_checkpoint(held)
        return opened.abstract, opened.read("float32", backend=jax.default_backend())
    _, scheme, group = held.split(":")
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Path(scratch, "recipe.toml")
        recipe.write_text(_RULES.format(scheme=scheme, group=group))
        stored = random_model(llamajax.preset(flags.FLAGS.shape), recipe)
    abstract = jax.eval_shape(lambda: stored)
    return abstract, llamajax.prepare(stored, donate=True)


def our_answers() -> tuple[dict[str, Any], Callable[[], float]]:
    """Returns facts about the model of our process, and a function that measures its tokens per second."""
    from llamajax.evaluation.speed import measure_decode
    from llamajax.parameters import named_weights, step_bytes
    from quant import nbytes

    abstract, model = our_model()
    context, steps, cache = flags.FLAGS.context, flags.FLAGS.steps, flags.FLAGS.cache_dtype
    first = measure_decode(model, context, steps=steps, repeats=1, cache_dtype=cache)
    cached = first.bytes_read - step_bytes(model)
    memory = sum(nbytes(weight) for weight in named_weights(model).values())
    facts = {
        "bytes": step_bytes(abstract) + cached,
        "memory_bits": 8 * memory / model.config.num_parameters,
        "compile_seconds": first.compile_seconds,
    }

    def answer() -> float:
        return measure_decode(model, context, steps=steps, repeats=1, cache_dtype=cache).tokens_per_second

    return facts, answer


def their_answers() -> tuple[dict[str, Any], Callable[[], float]]:
    """The same as `our_answers`, for llama.cpp."""
    flags.FLAGS.gguf = flags.FLAGS.held
    answer, work = versus_llamacpp.their_answers(), {"decode": [1, flags.FLAGS.context, flags.FLAGS.steps]}
    answer(work)
    return {}, lambda: answer(work)


def our_start() -> Iterator[None]:
    """Starts like `llamajax generate` in a new process; yields after the first token."""
    import jax

    import llamajax
    from llamajax.checkpoint import need_tokenizer
    from llamajax.generation.stream import TextStream

    opened = llamajax.open_checkpoint(flags.FLAGS.held)
    wanted = {"backend": jax.default_backend()}
    options = {"max_new_tokens": 8, "temperature": 0, "cache_dtype": flags.FLAGS.cache_dtype}
    outcome = opened.outcome("float32", **wanted)
    stream = TextStream(outcome, need_tokenizer(opened), "The capital of France is", **options)
    stream.compile_while(lambda: opened.read("float32", **wanted))
    next(iter(stream))
    yield


def serve(program: str) -> None:
    """Runs a child process: prints its facts, then measures once for each line of stdin."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: versus_llamacpp._threads()])
    if program == "start":
        next(our_start())
        print("first", flush=True)
        return
    facts, answer = their_answers() if program == THEIRS else our_answers()
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        print(answer(), flush=True)


def start_child(program: str, held: str, cache: str | None = None) -> subprocess.Popen:
    """Starts a process of this script with our flags; compiled programs are kept in `cache`, if given."""
    given = ("shape", "context", "steps", "cache_dtype", "threads")
    options = [f"--{flag}={flags.FLAGS[flag].value}" for flag in given if flags.FLAGS[flag].value]
    command = [sys.executable, __file__, f"--as_child={program}", f"--held={held}", *options]
    kept = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} if cache else {}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | kept, **pipes)


# ---- Measuring ------------------------------------------------------------------------------------------------------


def measured(name: str, path: Path) -> Row:
    """Measures one file, with its three processes in turn."""
    from gguf_files import tensors_of

    kinds, size, count = tensors_of(path)
    wanted = {FILE: str(path), RECIPE: f"scheme:{TYPES[name].scheme}:{TYPES[name].group}", THEIRS: str(path)}
    children, facts = {}, {}
    try:
        for program, held in wanted.items():
            children[program] = start_child(program, held)
            facts[program] = json.loads(versus_llamacpp.heard(children[program], program))
        tokens = {program: [] for program in children}
        for done in range(flags.FLAGS.rounds):
            for program in list(children) if done % 2 == 0 else reversed(children):
                print("", file=children[program].stdin, flush=True)
                tokens[program].append(float(versus_llamacpp.heard(children[program], program)))
            print(f"{name}: round {done + 1}, load average {os.getloadavg()[0]:.1f}", file=sys.stderr)
    finally:
        for child in children.values():
            child.terminate()
            child.wait()
    read = {FILE: facts[FILE]["bytes"], RECIPE: facts[RECIPE]["bytes"], THEIRS: facts[FILE]["bytes"]}
    made_of = {kind: list(kinds.values()).count(kind) for kind in sorted(set(kinds.values()) - {"F32"})}
    compiling = {program: facts[program]["compile_seconds"] for program in (FILE, RECIPE)}
    return Row(name, made_of, 8 * size / count, facts[FILE]["memory_bits"], read, tokens, compiling)


def first_tokens(path: Path, rounds: int) -> dict[str, list[float]]:
    """Measures seconds from the start of a process to its first token, for a file and our checkpoint of its weights."""
    import llamajax
    from llamajax.checkpoint import need_tokenizer

    seconds: dict[str, list[float]] = {"file": [], "checkpoint": []}
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder, "checkpoint")
        opened = llamajax.open_checkpoint(path)
        llamajax.save_checkpoint(opened.read("float32"), own, tokenizer=need_tokenizer(opened))
        for done in range(rounds + 1):  # The first round warms caches.
            for name, held in (("file", path), ("checkpoint", own)):
                begin = time.perf_counter()
                with start_child("start", str(held), str(Path(folder, "xla"))) as child:
                    versus_llamacpp.heard(child, name)
                    if done:
                        seconds[name].append(time.perf_counter() - begin)
    return seconds


def table(rows: list[Row]) -> str:
    """Returns the table as Markdown."""
    lines = [
        "| file | tensors | bits a weight: file | memory | decode, tokens/s | GB/s | our scheme | its GB/s "
        "| ratio of GB/s | llama.cpp, tokens/s | ratio | compiling, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        scheme = f"{TYPES[row.name].scheme}-g{TYPES[row.name].group}"
        made_of = ", ".join(f"{count} {kind}" for kind, count in row.made_of.items())
        ours, theirs = (statistics.median(row.tokens[program]) for program in (FILE, THEIRS))
        lines.append(
            f"| {row.name} | {made_of} | {row.file_bits:.2f} | {row.memory_bits:.2f} | {ours:.1f} "
            f"| {row.gigabytes(FILE):.1f} | `{scheme}` | {row.gigabytes(RECIPE):.1f} | {row.ratio(FILE, RECIPE, True)} "
            f"| {theirs:.1f} | {row.ratio(FILE, THEIRS, False)} | {row.compile_seconds[FILE]:.1f} |"
        )
    return "\n".join(lines)


def main(argv):
    """Measures all types and prints the table."""
    del argv
    if flags.FLAGS.as_child:
        return serve(flags.FLAGS.as_child)
    with tempfile.TemporaryDirectory() as scratch:
        flags.FLAGS.folder = flags.FLAGS.folder or scratch
        folder = Path(flags.FLAGS.folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {name: gguf_file(folder, name) for name in flags.FLAGS.types or TYPES}
        rows = {name: measured(name, path) for name, path in files.items()}
        first = first_tokens(Path(flags.FLAGS.smollm2), flags.FLAGS.rounds) if flags.FLAGS.smollm2 else None
    if flags.FLAGS.json:
        print(json.dumps({"rows": [row._asdict() for row in rows.values()], "first_token": first}))
        return None
    print(table(list(rows.values())))
    short = [name for name, row in rows.items() if row.gigabytes(FILE) < TYPES[name].least * row.gigabytes(RECIPE)]
    print(f"\nBelow the GB/s that they shall reach: {', '.join(short) or 'none'}.")
    if first:
        ours, own = (statistics.median(first[name]) for name in ("file", "checkpoint"))
        print(f"First token, warm: {ours:.2f} s from the file, {own:.2f} s from our checkpoint: {ours / own:.2f}.")
    return None


if __name__ == "__main__":
    app.run(main)
