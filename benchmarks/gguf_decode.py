"""Decoding speed of a packed GGUF file beside llama.cpp's on the same file: in turn, on one machine, with the ratio.

    pip install 'llamajax[parity]'
    python benchmarks/gguf_decode.py --gguf=gemma-3-270m-q4_k_m.gguf --contexts=128,2048 --rounds=5

llama.cpp is the library in the wheel xllamacpp, called by the ctypes of `tests/llamacpp.py`. Both programs run in this
process and use the same cores. Only one works at a time: ours first in one round, llama.cpp's first in the next.
Figures are medians over the rounds. Of the ratios of single rounds, the lowest, the median and the highest are shown,
because the speed of a shared machine changes from second to second. Keys and values are float16 in both programs. With
long `--contexts`, the memory of our cache, which is also printed, shows what sliding windows save.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

import llamajax
from llamajax.caches import KVCache
from llamajax.evaluation.speed import measure_decode

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import llamacpp

flags.DEFINE_string("gguf", None, "file to decode", required=True)
flags.DEFINE_list("contexts", ["128", "2048"], "numbers of tokens in the cache before decoding")
flags.DEFINE_integer("rounds", 5, "number of rounds", lower_bound=1)
flags.DEFINE_integer("steps", 16, "decode steps per measurement, whose mean is taken", lower_bound=1)
flags.DEFINE_integer("threads", 2, "threads of llama.cpp; llamajax uses all cores of the process", lower_bound=1)


def context_params(slots: int) -> llamacpp._ContextParams:
    """Parameters of a context as in llama.cpp's programs: float16 keys and values, flash attention where possible."""
    params = llamacpp.library().llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = slots, 512, 512
    params.n_threads = params.n_threads_batch = flags.FLAGS.threads
    return params


def theirs(model: llamacpp.Model, context: int) -> Callable[[], float]:
    """Returns a function that measures llama.cpp's tokens per second after `context` tokens."""
    entered = model._context(context + flags.FLAGS.steps * (flags.FLAGS.rounds + 1) + 512)
    feed = entered.__enter__()
    for first in range(0, context, 512):
        feed(list(range(3, 3 + min(512, context - first))))

    def measured() -> float:
        start = time.perf_counter()
        for _ in range(flags.FLAGS.steps):
            feed([5])
        return flags.FLAGS.steps / (time.perf_counter() - start)

    measured.entered = entered  # type: ignore[attr-defined]  # keeps the context alive
    measured()
    return measured


def main(argv: list[str]) -> None:
    """Measures and prints a line for each context."""
    del argv
    llamacpp._context_params = context_params
    opened = llamajax.open_checkpoint(flags.FLAGS.gguf)
    model = opened.read("float32", backend="cpu")
    with llamacpp.Model(flags.FLAGS.gguf) as other:
        for context in map(int, flags.FLAGS.contexts):
            ask = theirs(other, context)

            def ours(context: int = context) -> float:
                options = {"steps": flags.FLAGS.steps, "repeats": 1, "cache_dtype": "float16"}
                return measure_decode(model, context, **options).tokens_per_second

            ours()
            pairs = []
            for number in range(flags.FLAGS.rounds):
                first, second = (ours, ask) if number % 2 == 0 else (ask, ours)
                found = {first: first(), second: second()}
                pairs.append((found[ours], found[ask]))
            ratios = sorted(one / two for one, two in pairs)
            medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
            slots = context + flags.FLAGS.steps
            cache = jax.eval_shape(lambda slots=slots: KVCache.empty(opened.config, 1, slots, np.float16))
            nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
            spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(
                f"context {context}: ours {medians[0]:.1f} tok/s, llama.cpp {medians[1]:.1f} tok/s, ratio {spread}, "
                f"our cache {nbytes / 1e6:.1f} MB",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)
