"""Arithmetic in words: how often a vote of several samples is right, for SmolLM2-135M-Instruct.

    LLAMAJAX_SHARED=../shared python benchmarks/svamp.py --output=svamp --questions=300

SVAMP (Patel et al. 2021, arXiv:2103.07191), 300 questions of which stand in `data/tasks/svamp.jsonl` of the folder that
LLAMAJAX_SHARED names. Each is a user's message in the model's chat template, in one of two ways: "direct" begins the
reply with "The answer is", "steps" is --think. All samples of some questions are one batch; a question's number is its
seed. What is finished stands in the output folder, and a run that was broken off goes on from there; --report prints
the tables of what there is.

Right is a final answer (`final_answer`) that equals the question's. For k of n samples the n samples are taken as n/k
groups of k in their order, which are independent: the share of right groups of a question has the accuracy of k samples
as its mean. Its standard error over questions is behind each figure, in per cent.
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

_OUTPUT = flags.DEFINE_string("output", None, "folder of what is finished", required=True)
_QUESTIONS = flags.DEFINE_integer("questions", 300, "how many, from the first on", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 16, "samples of each question", lower_bound=1)
_TOGETHER = flags.DEFINE_integer("together", 8, "questions in a batch", lower_bound=1)
_WAYS = flags.DEFINE_multi_enum("way", ["direct", "steps"], ["direct", "steps"], "how a question is asked")
_REPORT = flags.DEFINE_boolean("report", False, "print the tables alone")

# Wang et al. 2022 (arXiv:2203.11171) draw at this temperature, of all tokens, from GPT-3.
_TEMPERATURE = 0.7
_NEW_TOKENS = {"direct": 20, "steps": 96}
_BEGUN = "The answer is"


def questions() -> list[dict[str, str]]:
    """All of the file's, each with "context" and "answer"."""
    folder = os.environ.get("LLAMAJAX_SHARED")
    if not folder:
        raise app.UsageError("LLAMAJAX_SHARED names no folder: expected one with data/tasks/svamp.jsonl")
    return [json.loads(line) for line in (Path(folder) / "data/tasks/svamp.jsonl").read_text().splitlines()]


def answered(file: Path) -> dict[int, list[Completion]]:
    """The samples of each question that is finished. A score stands for those of the tokens whose mean it is."""
    found = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        row = json.loads(line)
        found[row["question"]] = [
            Completion(sample["text"], [], [sample["mean_log_probability"]], 0, sample["finish_reason"])
            for sample in row["samples"]
        ]
    return found


def answer(way: str, numbers: Sequence[int], asked: Sequence[dict[str, str]], file: Path) -> None:
    """Makes the samples of questions of these numbers, and appends them to the file as they come."""
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
    """Lines of Markdown: accuracy by the number of samples, and by how one of them is chosen."""
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
    """Of a question's groups of k samples, how many come to the right answer."""
    groups = [slice(first, first + k) for first in range(0, n - n % k, k)]
    chosen = [texts[group][choose(i, group).index] for group in groups]
    return statistics.fmean(final_answer(text) == expected for text in chosen)


def main(argv: list[str]) -> None:
    """Makes what is missing, then prints the tables."""
    if argv[1:]:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: write --flag=value")
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
