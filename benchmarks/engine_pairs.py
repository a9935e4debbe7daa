"""Compares the speed of two trees of this repository: decode, prefill and the start of a command, in interleaved pairs.

    python benchmarks/engine_pairs.py --before=../old --after=. --model=box --pairs=15
    python benchmarks/engine_pairs.py --before=../old --after=. --shape=tinyllama-1.1b

One process per tree holds the model and measures on request, one process at a time and in turn, so that other load on
the machine affects both. Prints the median over the pairs of after / before: above 1 the second tree is faster.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags

flags.DEFINE_string("before", None, "folder of the first tree")
flags.DEFINE_string("after", ".", "folder of the second tree")
flags.DEFINE_string("model", "box", "checkpoint")
flags.DEFINE_string("shape", None, "preset: measure random weights of its shape instead of a model")
flags.DEFINE_integer("pairs", 15, "number of pairs of each measurement", lower_bound=1)
flags.DEFINE_integer("context", 128, "tokens in the cache of a decode step", lower_bound=1)
flags.DEFINE_multi_integer("prefill", [16, 256], "lengths of the prompts to prefill")
flags.DEFINE_multi_integer("batch", [1, 8], "numbers of rows of the decode steps")
flags.DEFINE_bool("start", True, "also measure the start of a command; only with --model, not with --shape")

# The program of each tree's process; it has to work with both trees. Requests are lines of JSON, answers are seconds.
_WORKER = """
import json, sys
import llamajax
from llamajax.evaluation.speed import measure_decode, measure_prefill, random_model
name, shape = sys.argv[1:]
model = random_model(llamajax.preset(shape)) if shape else llamajax.load(name)[0]
model = llamajax.prepare(model, donate=True)
measure = {"decode": measure_decode, "prefill": measure_prefill}
print("ready", flush=True)
for line in sys.stdin:
    kind, length, options = json.loads(line)
    print(json.dumps(measure[kind](model, length, repeats=1, **options).seconds), flush=True)
"""


class Tree:
    """A process that runs the measurements of one tree."""

    def __init__(self, folder: str):
        """Starts the process and waits until the model is loaded."""
        self._environment = {**os.environ, "PYTHONPATH": str(Path(folder).resolve())}
        command = [sys.executable, "-c", _WORKER, flags.FLAGS.model, flags.FLAGS.shape or ""]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=self._environment, stdin=pipe, stdout=pipe, text=True, cwd=folder)
        assert self._process.stdout is not None and self._process.stdin is not None
        self._answers, self._requests = self._process.stdout, self._process.stdin
        assert self._answers.readline() == "ready\n", "the process of a tree ended"

    def seconds(self, kind: str, length: int, options: dict[str, Any]) -> float:
        """Runs one measurement; returns its seconds."""
        if kind == "start":
            return self._start()
        print(json.dumps([kind, length, options]), file=self._requests, flush=True)
        return float(json.loads(self._answers.readline()))

    def _start(self) -> float:
        """Returns the seconds of a whole command that generates one token."""
        argv = ["generate", f"--model={flags.FLAGS.model}", "--prompt=Once upon a time", "--max_new_tokens=1"]
        begun = time.perf_counter()
        command = [sys.executable, "-m", "llamajax", *argv]
        subprocess.run(command, env=self._environment, capture_output=True, check=True)
        return time.perf_counter() - begun

    def end(self) -> None:
        """Ends the process."""
        self._requests.close()
        self._process.wait()


def main(_: list[str]) -> None:
    """Measures all pairs and prints a row for each kind of work."""
    values = flags.FLAGS
    work: list[tuple[str, int, dict[str, Any]]] = [
        ("decode", values.context, {"batch": batch, "steps": 16}) for batch in values.batch
    ]
    work += [("prefill", length, {}) for length in values.prefill]
    if values.start and not values.shape:
        work.append(("start", 0, {}))
    before, after = Tree(values.before), Tree(values.after)
    ratios: dict[int, list[float]] = {i: [] for i in range(len(work))}
    for pair in range(-1, values.pairs):  # the first pair compiles and is not counted
        for i, each in enumerate(work):
            first, second = (before, after) if pair % 2 else (after, before)
            took = {id(tree): tree.seconds(*each) for tree in (first, second)}
            if pair >= 0:
                ratios[i].append(took[id(before)] / took[id(after)])
    for i, (kind, length, options) in enumerate(work):
        what = " ".join(filter(None, (kind, str(length or ""), f"{options['batch']} rows" if options else "")))
        low, high = min(ratios[i]), max(ratios[i])
        print(f"{what:24} {statistics.median(ratios[i]):.3f} ({low:.2f} to {high:.2f}, {values.pairs} pairs)")
    before.end()
    after.end()


if __name__ == "__main__":
    flags.mark_flag_as_required("before")
    app.run(main)
