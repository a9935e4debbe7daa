"""The cost of several samples of one prompt beside one sample: SmolLM2-135M-Instruct, one batch, one prefilled prompt.

    python benchmarks/samples.py --samples=8 --max_new_tokens=64 --rounds=7

One sample and several samples are generated in turn; which goes first alternates between rounds. The figures are
medians. The ratio is the median of the ratios of the rounds, with the lowest and the highest, because the speed of a
shared machine changes from second to second. Programs are compiled before. No sample ends early, because stop tokens
are disabled.
"""

import statistics
import time

import jax
from absl import app, flags

import llamajax
from llamajax.cli import smollm2
from llamajax.generation.stream import TextStream

_SAMPLES = flags.DEFINE_integer("samples", 8, "number of samples, compared with one", lower_bound=2)
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "new tokens of each sample", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "number of rounds", lower_bound=1)
_MODEL = flags.DEFINE_string("model", None, "checkpoint; SmolLM2-135M-Instruct unless given")
_TOP_P = flags.DEFINE_float("top_p", 0.95, "top-p of the draws; 1 is off")

_PROMPT = "Question: Tom has 3 boxes with 12 pencils in each, and gives 5 pencils away. How many are left?\nAnswer:"


def main(argv: list[str]) -> None:
    """Measures both and prints their seconds and ratio."""
    if argv[1:]:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: expected --flag=value")
    model, tokenizer = llamajax.load(_MODEL.value or smollm2.fetch(), backend=jax.default_backend())

    def seconds(samples: int) -> float:
        stream = TextStream(
            model,
            tokenizer,
            _PROMPT,
            samples=samples,
            max_new_tokens=_NEW_TOKENS.value,
            temperature=0.8,
            top_p=_TOP_P.value,
            stop_ids=[],
            smooth=False,
        )
        stream.compile()
        begin = time.perf_counter()
        for _ in stream:
            pass
        assert sum(len(each.tokens) for each in stream.completions) == samples * _NEW_TOKENS.value
        return time.perf_counter() - begin

    counts = (1, _SAMPLES.value)
    for count in counts:
        seconds(count)
    took: dict[int, list[float]] = {count: [] for count in counts}
    for number in range(_ROUNDS.value):
        for count in counts[:: -1 if number % 2 else 1]:
            took[count].append(seconds(count))
    for count, all_seconds in took.items():
        median = statistics.median(all_seconds)
        print(f"{count:3} samples {median:7.3f} s {count * _NEW_TOKENS.value / median:8.1f} tokens/s")
    ratios = sorted(several / one for one, several in zip(*took.values(), strict=True))
    print(f"ratio {statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    app.run(main)
