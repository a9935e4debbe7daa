"""Speed of int4-g32 beside llama.cpp's Q4_0: the same shape, bits, cores and cache, in turn, on one machine.

    pip install 'llamajax[llamacpp]'
    python benchmarks/versus_llamacpp.py --shape=tinyllama-1.1b --rounds=5

Weights are random, because speed does not depend on them. Both formats have 4-bit codes and a float16 scale per 32
weights in all matrices, embeddings and head included. Each program has a process that holds the model all the time.
They measure in turn, llamajax first in one round and llama.cpp first in the next, so that only one works at a time.
Figures are medians over the rounds. The ratio of the medians is followed by the lowest and the highest ratio of one
round, because the speed of a shared machine changes from second to second.

Decoding is greedy. Prefill in llama.cpp also computes one token's logits, a thousandth of its work, and omits what the
last layer would compute for the other tokens. Resident memory counts mapped pages. It is measured in a new process that
decodes 32 tokens, as is the time from the start to the first token, with warm caches: JAX's compiled programs, and the
files in the system's page cache. Both processes are Python and import their program. This script needs Linux, whose
/proc reports resident memory.
"""

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags, logging

# Nothing else is imported here: the measured processes load this file too, and then import only what they need.

flags.DEFINE_string("shape", "tinyllama-1.1b", "preset of the shape")
flags.DEFINE_integer("rounds", 5, "number of rounds", lower_bound=1)
flags.DEFINE_integer("steps", 16, "decode steps per measurement, whose mean is taken", lower_bound=1)
flags.DEFINE_integer("threads", 0, "cores that each program uses; all unless given", lower_bound=0)
flags.DEFINE_enum("cache_dtype", "float16", ["float16", "float32"], "dtype of keys and values in both programs")
flags.DEFINE_enum(
    "activations", "float32", ["float32", "bfloat16", "int8"], "rounding of our activations (llama.cpp: int8)"
)
flags.DEFINE_list("decode", ["1x128", "1x1024", "8x128"], "rows x context of the decode steps to measure")
flags.DEFINE_integer("prefill", 512, "length of the prompt to measure; 0 for none", lower_bound=0)
flags.DEFINE_bool("start", True, "measure new processes: time to the first token, and resident memory")
flags.DEFINE_string("gguf", None, "GGUF file for llama.cpp; a file of random weights is written if not given")
flags.DEFINE_string("folder", None, "folder that keeps files for later runs; a temporary folder if not given")
flags.DEFINE_bool("json", False, "print JSON instead of a table")
flags.DEFINE_string("as_child", None, "the process of a program: for this script's own use")

OURS, THEIRS = "llamajax", "llamacpp"
RECIPE, KIND = "int4-g32", "Q4_0"
_BLOCK, _BLOCK_BYTES = 32, 18  # weights of a Q4_0 block, and its bytes: a float16 scale and 16 bytes of codes
_MOST_TOKENS = 512  # given to llama.cpp at once; its own default for the tokens that it computes at once
_START_PROMPT, _START_TOKENS = 16, 32  # tokens of the new processes


class Figure(NamedTuple):
    """One quantity that is measured for both programs in each round.

    Attributes:
        label: the name for people.
        work: the request to the processes; None for figures of new processes.
        unit: the unit of the values.
        values: program -> one value per round.
    """

    label: str
    work: dict[str, Any] | None
    unit: str
    values: dict[str, list[float]]


# ---- Files ----------------------------------------------------------------------------------------------------------


def write_random_blocks(path: Path, shape: str) -> None:
    """Writes random Q4_0 weights of a preset's shape, without a vocabulary; all scales are equal, norms are ones."""
    import numpy as np
    from gguf_files import read_random, stored_shape, write_gguf

    from llamajax.config import preset

    config = preset(shape)
    generator, floats = np.random.default_rng(0), read_random(config)

    def read(place, theirs):
        size = stored_shape(config, place)
        if len(size) == 1:
            return floats(place, theirs)
        block = np.frombuffer(generator.bytes(math.prod(size) // _BLOCK * _BLOCK_BYTES), np.uint8).copy()
        block = block.reshape(-1, _BLOCK_BYTES)
        block[:, :2] = np.frombuffer(np.float16(0.004).tobytes(), np.uint8)
        return block.reshape(size[0], -1)

    write_gguf(path, config, read, KIND)


def write_checkpoint(path: Path, shape: str) -> None:
    """Writes a checkpoint of ours with random weights."""
    import llamajax
    from llamajax.evaluation.speed import random_model

    llamajax.save_checkpoint(random_model(llamajax.preset(shape), RECIPE), path)


# ---- llama.cpp ------------------------------------------------------------------------------------------------------


class Context:
    """A context of llama.cpp with empty rows."""

    def __init__(self, model: Any, rows: int, slots: int):
        """Makes a context with `slots` tokens per row."""
        import gguf
        import llama_cpp

        self.api, self.rows, threads = llama_cpp, rows, _threads()
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = rows * slots, rows
        params.n_batch = params.n_ubatch = _MOST_TOKENS
        params.n_threads = params.n_threads_batch = threads
        kind = gguf.GGMLQuantizationType["F16" if flags.FLAGS.cache_dtype == "float16" else "F32"]
        params.type_k = params.type_v = int(kind)
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._batch = llama_cpp.llama_batch_init(_MOST_TOKENS, 0, 1)
        self._memory = llama_cpp.llama_get_memory(self._context)
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def run(self, tokens: list[int], first: int, rows: list[int]) -> list[int]:
        """Feeds each row a token at `first`, or one row tokens from there on; returns the likeliest next tokens."""
        import numpy as np

        batch = self._batch
        together = len(rows) > 1
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, first if together else first + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, rows[i] if together else rows[0]
            batch.logits[i] = together or i == len(tokens) - 1
        batch.n_tokens = len(tokens)
        if self.api.llama_decode(self._context, batch):
            sys.exit("llama.cpp could not decode")
        best = []
        for i in range(len(tokens)):
            if batch.logits[i]:
                logits = self.api.llama_get_logits_ith(self._context, i)
                best.append(int(np.argmax(np.ctypeslib.as_array(logits, (self._vocab_size,)))))
        return best

    def fill(self, length: int) -> None:
        """Puts `length` tokens into every row."""
        for first in range(0, length, _MOST_TOKENS):
            self.run([7] * min(_MOST_TOKENS, length - first), first, [0])
        for row in range(1, self.rows):
            self.api.llama_memory_seq_cp(self._memory, 0, row, -1, -1)

    def forget(self, length: int) -> None:
        """Removes all but the first `length` tokens of each row."""
        for row in range(self.rows):
            self.api.llama_memory_seq_rm(self._memory, row, length, -1)


def open_gguf(path: str) -> Any:
    """Loads a model in llama.cpp, mapped and laid out by its own defaults."""
    import llama_cpp

    # The binding logs warnings as errors; a call that really fails returns null.
    llama_cpp._logger.logger.setLevel("CRITICAL")
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    return model if model else sys.exit(f"llama.cpp could not open {path}")


def their_answers() -> Callable[[dict[str, Any]], float]:
    """Returns the function by which llama.cpp's process answers a request with tokens per second."""
    model, contexts = open_gguf(flags.FLAGS.gguf), {}

    def prefill(length: int) -> float:
        context = contexts.setdefault("prefill", None) or Context(model, 1, _slots(length))
        contexts["prefill"] = context
        context.forget(0)
        start = time.perf_counter()
        for first in range(0, length, _MOST_TOKENS):
            context.run(list(range(3, 3 + min(_MOST_TOKENS, length - first))), first, [0])
        return length / (time.perf_counter() - start)

    def decode(rows: int, length: int, steps: int) -> float:
        if (rows, length) not in contexts:
            contexts[rows, length] = Context(model, rows, _slots(length + steps + 1))
            contexts[rows, length].fill(length)
        context = contexts[rows, length]
        tokens = context.run([5] * rows, length, list(range(rows)))
        context.forget(length)
        start = time.perf_counter()
        for step in range(steps):
            tokens = context.run(tokens, length + step, list(range(rows)))
        seconds = time.perf_counter() - start
        context.forget(length)
        return rows * steps / seconds

    return lambda work: prefill(work["prefill"]) if "prefill" in work else decode(*work["decode"])


def their_start() -> Iterator[None]:
    """Generates with llama.cpp in a new process; yields after the first token and after the last."""
    model = open_gguf(flags.FLAGS.gguf)
    context = Context(model, 1, _slots(_START_PROMPT + _START_TOKENS))
    tokens = context.run(list(range(3, 3 + _START_PROMPT)), 0, [0])
    yield
    for step in range(_START_TOKENS - 1):
        tokens = context.run(tokens, _START_PROMPT + step, [0])
    yield


# ---- Ours -----------------------------------------------------------------------------------------------------------


def our_answers() -> Callable[[dict[str, Any]], float]:
    """Returns the function by which our process answers a request with tokens per second."""
    import llamajax
    from llamajax.evaluation.speed import measure_decode, measure_prefill, random_model

    model = llamajax.with_activations(random_model(llamajax.preset(flags.FLAGS.shape), RECIPE), flags.FLAGS.activations)
    model = llamajax.prepare(model, donate=True)
    cache = flags.FLAGS.cache_dtype

    def answer(work: dict[str, Any]) -> float:
        if "prefill" in work:
            return measure_prefill(model, work["prefill"], cache_dtype=cache, repeats=1).tokens_per_second
        rows, length, steps = work["decode"]
        options = {"batch": rows, "steps": steps, "repeats": 1, "cache_dtype": cache}
        return measure_decode(model, length, **options).tokens_per_second

    return answer


def our_start() -> Iterator[None]:
    """Generates like `llamajax generate` in a new process; yields after the first token and after the last."""
    import jax

    import llamajax
    from llamajax.generation.stream import TextStream

    opened = llamajax.open_checkpoint(Path(flags.FLAGS.folder, "llamajax"))
    wanted = {"backend": jax.default_backend(), "activations": flags.FLAGS.activations}
    prompt = list(range(3, 3 + _START_PROMPT))
    options = {"max_new_tokens": _START_TOKENS, "temperature": 0, "cache_dtype": flags.FLAGS.cache_dtype}
    stream = TextStream(opened.outcome("float32", **wanted), None, prompt, **options)
    stream.compile_while(lambda: opened.read("float32", **wanted))
    pieces = iter(stream)
    next(pieces)
    yield
    for _ in pieces:
        pass
    yield


# ---- Processes ------------------------------------------------------------------------------------------------------


def serve(name: str) -> None:
    """Runs a child process: answers each line of stdin, or starts once and reports the first token and its memory."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _threads()])
    logging.set_verbosity(logging.WARNING)  # Orbax logs every array that it reads.
    program, what = name.split("-")
    if what == "start":
        milestones = our_start() if program == OURS else their_start()
        next(milestones)
        print("first", flush=True)
        next(milestones)
        status = Path("/proc/self/status").read_text()
        print(1024 * int(status.split("VmRSS:")[1].split()[0]), flush=True)
        return
    answer = our_answers() if program == OURS else their_answers()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def start_child(name: str) -> subprocess.Popen:
    """Starts a process of this script with our flags."""
    given = ("shape", "gguf", "folder", "cache_dtype", "activations", "threads")
    options = [f"--{flag}={flags.FLAGS[flag].value}" for flag in given if flags.FLAGS[flag].value]
    command = [sys.executable, __file__, f"--as_child={name}", *options]
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(Path(flags.FLAGS.folder, "xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | compiled, **pipes)


def heard(child: subprocess.Popen, program: str) -> str:
    """Reads a line of a child's output; exits if the child has ended."""
    line = child.stdout.readline()
    return line.strip() if line else sys.exit(f"the process of {program} ended with code {child.wait()}")


def asked(child: subprocess.Popen, program: str, work: dict[str, Any]) -> float:
    """Returns a child's answer to one request."""
    print(json.dumps(work), file=child.stdin, flush=True)
    return float(heard(child, program))


def started(program: str) -> tuple[float, float]:
    """Starts a new process; returns seconds to its first token, and GiB resident while it decodes."""
    begin = time.perf_counter()
    with start_child(f"{program}-start") as child:
        heard(child, program)
        seconds = time.perf_counter() - begin
        return seconds, int(heard(child, program)) / 2**30


def measure(rounds: int) -> tuple[list[Figure], float]:
    """Measures all figures, and the memory bandwidth in bytes per second."""
    from llamajax.evaluation.speed import memory_bandwidth

    figures, steps = [], flags.FLAGS.steps
    for rows, context in (map(int, work.split("x")) for work in flags.FLAGS.decode):
        label = f"decode, {rows} row{'s' if rows > 1 else ''}, context {context}"
        figures.append(Figure(label, {"decode": [rows, context, steps]}, "tokens/s", {OURS: [], THEIRS: []}))
    if length := flags.FLAGS.prefill:
        figures.append(Figure(f"prefill, {length} tokens", {"prefill": length}, "tokens/s", {OURS: [], THEIRS: []}))
    first = Figure("start to first token", None, "s", {OURS: [], THEIRS: []})
    resident = Figure("resident memory", None, "GiB", {OURS: [], THEIRS: []})
    bandwidth = memory_bandwidth()
    children = {program: start_child(f"{program}-serve") for program in (OURS, THEIRS)}
    try:
        for program, child in children.items():
            heard(child, program)
            for figure in figures:  # the first request compiles and fills contexts
                asked(child, program, figure.work)
            if flags.FLAGS.start:
                started(program)
        for done in range(rounds):
            order = (OURS, THEIRS) if done % 2 == 0 else (THEIRS, OURS)
            for figure in figures:
                for program in order:
                    figure.values[program].append(asked(children[program], program, figure.work))
            for program in order if flags.FLAGS.start else ():
                for figure, value in zip((first, resident), started(program), strict=True):
                    figure.values[program].append(value)
            bandwidth = max(bandwidth, memory_bandwidth())
            print(f"round {done + 1} of {rounds}, load average {os.getloadavg()[0]:.1f}", file=sys.stderr)
    finally:
        for child in children.values():
            child.terminate()
            child.wait()
    return figures + ([first, resident] if flags.FLAGS.start else []), bandwidth


# ---- Results --------------------------------------------------------------------------------------------------------


def table(figures: list[Figure]) -> str:
    """Returns a Markdown table: medians, and ours divided by theirs."""
    lines = [f"| | llamajax {RECIPE} | llama.cpp {KIND} | ratio | of one round |", "|---|---|---|---|---|"]
    for label, _, unit, values in figures:
        ours, theirs = (statistics.median(values[program]) for program in (OURS, THEIRS))
        ratios = [mine / other for mine, other in zip(values[OURS], values[THEIRS], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"| {label}, {unit} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} | {spread} |")
    return "\n".join(lines)


def _threads() -> int:
    """Returns the number of cores to use."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(flags.FLAGS.threads or available, available)


def _slots(length: int) -> int:
    """Returns the slots of a row for `length` tokens: a multiple of 256, as in both programs."""
    return -(-length // 256) * 256


def _write_files(folder: Path) -> None:
    """Writes missing files in a separate process, because memory of this process could count as its children's."""
    import multiprocessing

    shape, gguf = flags.FLAGS.shape, Path(flags.FLAGS.gguf)
    wanted = [(write_random_blocks, gguf), *([(write_checkpoint, folder / "llamajax")] if flags.FLAGS.start else [])]
    for write, path in wanted:
        if not path.exists():
            writer = multiprocessing.get_context("spawn").Process(target=write, args=(path, shape))
            writer.start()
            writer.join()
            if writer.exitcode:
                sys.exit(f"writing {path} failed")


def main(argv):
    """Writes the files, measures in turn, and prints the table."""
    del argv
    if flags.FLAGS.as_child:
        serve(flags.FLAGS.as_child)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(flags.FLAGS.folder or scratch, flags.FLAGS.shape)
        folder.mkdir(parents=True, exist_ok=True)
        flags.FLAGS.folder, flags.FLAGS.gguf = str(folder), flags.FLAGS.gguf or str(folder / f"{KIND}.gguf")
        _write_files(folder)
        figures, bandwidth = measure(flags.FLAGS.rounds)
        size = Path(flags.FLAGS.gguf).stat().st_size
    setting = {
        "shape": flags.FLAGS.shape,
        "threads": _threads(),
        "cache_dtype": flags.FLAGS.cache_dtype,
        "activations": flags.FLAGS.activations,
        "rounds": flags.FLAGS.rounds,
        "gguf_bytes": size,
        "memory_gigabytes_per_second": bandwidth / 1e9,
        "load_average": os.getloadavg()[0],
    }
    if flags.FLAGS.json:
        print(json.dumps(setting | {"figures": [figure._asdict() for figure in figures]}))
        return
    print(
        f"{flags.FLAGS.shape}, {_threads()} cores, {flags.FLAGS.cache_dtype} cache, {flags.FLAGS.activations} "
        f"activations, medians of {flags.FLAGS.rounds}\n"
    )
    print(table(figures))
    print(f"\nMemory: {bandwidth / 1e9:.1f} GB/s, so that {size / 1e9:.2f} GB of weights can be read", end=" ")
    print(f"{bandwidth / size:.1f} times a second. Load average at the end: {setting['load_average']:.1f}.")


if __name__ == "__main__":
    flags.register_validator(
        "decode",
        lambda value: all(re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", work) for work in value),
        "expected ROWSxCONTEXT, commas between, as 1x128,8x128",
    )
    app.run(main)
