"""Arithmetic in words: the accuracy of a vote of several samples, for SmolLM2-135M-Instruct.

    LLAMAJAX_SHARED=../shared python benchmarks/svamp.py --output=svamp --questions=300

300 questions of SVAMP (Patel et al. 2021, arXiv:2103.07191) are in `data/tasks/svamp.jsonl` of the folder that
LLAMAJAX_SHARED names. Each question is a user's message in the model's chat template, asked in one of two ways:
"direct" begins the reply with "The answer is", "steps" uses --think. All samples of some questions are one batch; the
seed is the number of the question. Finished questions are kept in the output folder, and an interrupted run resumes
from there; --report prints the tables of the results so far.

A sample is right if its final answer (`final_answer`) equals the question's. For k of n samples, the n samples are
split in order into n/k groups of k, which are independent: the expected share of right groups of a question is the
accuracy of k samples. The tables show this accuracy and its standard error over questions, in per cent.
"""

import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from rich.progress import track

import llamajax
from llamajax.chat.messages import Message
from llamajax.chat.template import Template
from llamajax.cli import smollm2
from llamajax.generation.answers import final_answer
from llamajax.generation.choose import Choice, best_of, vote, with_steps
from llamajax.generation.request import Completion

_OUTPUT = flags.DEFINE_string("output", None, "folder of finished questions", required=True)
_QUESTIONS = flags.DEFINE_integer("questions", 300, "number of questions, from the first on", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 16, "samples of each question", lower_bound=1)
_TOGETHER = flags.DEFINE_integer("together", 8, "questions in a batch", lower_bound=1)
_WAYS = flags.DEFINE_multi_enum("way", ["direct", "steps"], ["direct", "steps"], "ways to ask a question")
_REPORT = flags.DEFINE_boolean("report", False, "only print the tables")

# Wang et al. 2022 (arXiv:2203.11171) sample from GPT-3 at this temperature, from all tokens.
_TEMPERATURE = 0.7
_NEW_TOKENS = {"direct": 20, "steps": 96}
_BEGUN = "The answer is"


def questions() -> list[dict[str, str]]:
    """Reads all questions of the file, each with "context" and "answer"."""
    folder = os.environ.get("LLAMAJAX_SHARED")
    if not folder:
        raise app.UsageError("LLAMAJAX_SHARED names no folder: expected a folder with data/tasks/svamp.jsonl")
    return [json.loads(line) for line in (Path(folder) / "data/tasks/svamp.jsonl").read_text().splitlines()]


def answered(file: Path) -> dict[int, list[Completion]]:
    """Reads the samples of each finished question. One score, the mean, replaces the scores of the tokens."""
    found = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        row = json.loads(line)
        found[row["question"]] = [
            Completion(sample["text"], [], [sample["mean_log_probability"]], 0, sample["finish_reason"])
            for sample in row["samples"]
        ]
    return found


def answer(way: str, numbers: Sequence[int], asked: Sequence[dict[str, str]], file: Path) -> None:
    """Generates the samples of the questions `numbers`, and appends them to the file as they come."""
    model, tokenizer = llamajax.load(smollm2.fetch(), backend=jax.default_backend())
    assert tokenizer is not None
    template = Template.of(tokenizer)
    batches = [numbers[i : i + _TOGETHER.value] for i in range(0, len(numbers), _TOGETHER.value)]
    with file.open("a") as out:
        for batch in track(batches, way):
            made = llamajax.generate(
                model,
                tokenizer,
                [_prompt(way, asked[number]["context"], template, tokenizer) for number in batch],
                temperature=_TEMPERATURE,
                seed=list(batch),
                samples=_SAMPLES.value,
                stop_ids=template.stop_ids(tokenizer),
                max_new_tokens=_NEW_TOKENS[way],
            )
            for number, samples in zip(batch, made, strict=True):
                rows = [
                    {
                        "text": sample.text,
                        "mean_log_probability": statistics.fmean(sample.log_probabilities or [-1e9]),
                        "finish_reason": sample.finish_reason,
                    }
                    for sample in samples
                ]
                print(json.dumps({"question": number, "samples": rows}), file=out, flush=True)


def _prompt(way: str, question: str, template: Template, tokenizer: llamajax.Tokenizer) -> list[int]:
    message = Message("user", with_steps(question) if way == "steps" else question)
    begun = tokenizer.encode(_BEGUN, bos=False, eos=False) if way == "direct" else []
    return template.encode(tokenizer, [message]) + begun


def table(way: str, finished: dict[int, list[Completion]], asked: Sequence[dict[str, str]]) -> Iterator[str]:
    """Yields lines of Markdown: accuracy by number of samples and by the method that chooses one of them."""
    n = min(map(len, finished.values()))
    texts = {i: [_BEGUN * (way == "direct") + each.text for each in samples] for i, samples in finished.items()}
    cut = statistics.fmean(each.finish_reason == "length" for samples in finished.values() for each in samples)
    yield f"{way}: {len(finished)} questions, {n} samples each, {cut:.0%} of them cut at {_NEW_TOKENS[way]} tokens"
    yield ""
    yield "| samples | vote | likeliest |"
    yield "|---|---|---|"

    def by_vote(i: int, group: slice) -> Choice:
        return vote(finished[i][group], texts[i][group])

    def by_likeliest(i: int, group: slice) -> Choice:
        return best_of(finished[i][group])

    for k in (k for k in (1, 4, 16) if k <= n):
        cells = []
        for choose in (by_vote, by_likeliest):
            shares = [_share(choose, i, k, n, texts[i], final_answer(asked[i]["answer"])) for i in finished]
            error = statistics.stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else float("nan")
            cells.append(f"{statistics.fmean(shares):.1%} ± {error:.1%}")
        yield f"| {k} | {' | '.join(cells)} |"


def _share(
    choose: Callable[[int, slice], Choice], i: int, k: int, n: int, texts: list[str], expected: str | None
) -> float:
    """Returns the share of a question's groups of k samples that give the right answer."""
    groups = [slice(first, first + k) for first in range(0, n - n % k, k)]
    chosen = [texts[group][choose(i, group).index] for group in groups]
    return statistics.fmean(final_answer(text) == expected for text in chosen)


def main(argv: list[str]) -> None:
    """Generates the missing samples, then prints the tables."""
    if argv[1:]:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: expected --flag=value")
    folder, asked = Path(_OUTPUT.value), questions()
    folder.mkdir(parents=True, exist_ok=True)
    for way in _WAYS.value:
        file = folder / f"{way}.jsonl"
        finished: Any = answered(file)
        missing = [number for number in range(min(_QUESTIONS.value, len(asked))) if number not in finished]
        if missing and not _REPORT.value:
            answer(way, missing, asked, file)
            finished = answered(file)
        if finished:
            print("\n".join(table(way, finished, asked)), end="\n\n")


if __name__ == "__main__":
    app.run(main)
