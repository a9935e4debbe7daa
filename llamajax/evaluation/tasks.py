"""Evaluates a model on multiple choice, cloze and short answers, by the conventions of lm-evaluation-harness.

    result = evaluate_task(model, tokenizer, "openbook_qa.jsonl")
    print(result.measures["acc_norm"])              # Measure(value=0.336, standard_error=0.0211)

The model is measured in the layout that its weights have (see `evaluate.py`). `tasks_read.py` specifies the files,
`tasks_score.py` how texts become ids, and `tasks_answers.py` when a generated answer is right. `docs/tasks.md`
describes all of this, and how the harness and llm-foundry differ.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llamajax.errors import LlamaJaxError
from llamajax.evaluation.evaluate import standard_error
from llamajax.evaluation.tasks_answers import as_number, exact_match, number_match
from llamajax.evaluation.tasks_read import Question, Shape, as_questions, read_questions
from llamajax.evaluation.tasks_score import NoParts, Parts, Scored, answers, encode_pair, log_likelihoods
from llamajax.fields import check_whole
from llamajax.model import Llama
from llamajax.tokenizer import Tokenizer

# The text between a question and its continuation, and the text before a question, as in the harness and llm-foundry.
DELIMITERS: Mapping[Shape, str] = {"choices": " ", "continuation": " ", "answer": "\nAnswer:"}
PREFIXES: Mapping[Shape, str] = {"choices": "", "continuation": "", "answer": "Question: "}
STOP = ("\n",)
MAX_NEW_TOKENS = 64
_BETWEEN = "\n\n"  # between examples, and between the last one and the question
_LARGEST_LOSS = 700.0  # its exponential is still a finite float


class Measure(NamedTuple):
    """A mean over questions.

    Attributes:
        value: the mean; None for a perplexity too large for a float.
        standard_error: the questions' sample standard deviation over the root of their number, as in the harness; for
            a perplexity, the perplexity times the standard error of its logarithm. None for one question.
    """

    value: float | None
    standard_error: float | None


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The results of a model on a task.

    Attributes:
        shape: "choices", "continuation" or "answer".
        measures: the measures by name: for choices "acc", "acc_norm" and "acc_bytes"; for continuations "acc",
            "perplexity" and "log_likelihood"; for answers "exact_match", and "number_match" if all are numbers.
        outcomes: for each question, in order: the model's output (JSON values) and, by the measures' names, whether it
            is right.
    """

    shape: Shape
    measures: dict[str, Measure]
    outcomes: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Asking:
    """How questions are presented to the model.

    Attributes:
        prefix: text before each question.
        delimiter: text between a question and its continuation.
        fewshot: number of examples before each question.
        stop: strings at which an answer ends.
        max_new_tokens: maximum number of tokens of an answer.
    """

    prefix: str
    delimiter: str
    fewshot: int
    stop: tuple[str, ...]
    max_new_tokens: int

    def text(self, question: Question) -> str:
        """The prefix and the text of a question, without delimiter and continuation."""
        return self.prefix + question.text

    def context(self, question: Question, among: Sequence[Question]) -> str:
        """Everything before the delimiter and the question's continuation: the examples and the question."""
        examples = [each for each in among[: self.fewshot + 1] if each is not question][: self.fewshot]
        return "".join(self._example(each) + _BETWEEN for each in examples) + self.text(question)

    def _example(self, question: Question) -> str:
        right = question.options[question.gold]
        before = self.text(question) + self.behind(self.text(question), right)
        return before + (" " if question.shape == "answer" and not before[-1:].isspace() else "") + right

    def behind(self, text: str, continuation: str) -> str:
        """The delimiter; empty if it is white space and the text ends, or the continuation begins, with white space."""
        spaced = text[-1:].isspace() or continuation[:1].isspace()
        return "" if self.delimiter.isspace() and spaced else self.delimiter


def evaluate_task(
    model: Llama,
    tokenizer: Tokenizer,
    questions: str | Path | Iterable[Mapping[str, Any]],
    *,
    prefix: str | None = None,
    delimiter: str | None = None,
    fewshot: int = 0,
    limit: int | None = None,
    stop: Sequence[str] = STOP,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch: int = 8,
    work: Path | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> TaskResult:
    """Asks a model the questions of a task; returns measures with standard errors, and the output for each question.

    Args:
        model: prepared (`llamajax.prepare`) to measure it as it runs on a backend, or not, for the reference product.
        tokenizer: the model's tokenizer.
        questions: a file of JSON lines, or the objects of such lines: {"query", "choices", "gold"}, {"context",
            "continuation"} or {"question" (or "context"), "answer"}.
        prefix: text before each question; by default "Question: " for questions of shape "answer", else none.
        delimiter: text between a question and its continuation; by default a new line and "Answer:" for questions of
            shape "answer", else a space.
        fewshot: number of examples before each question: the first questions of the file other than the one asked,
            each with its right answer.
        limit: number of questions that are asked, from the first on; all unless given.
        stop: strings at which a generated answer ends.
        max_new_tokens: maximum number of tokens of a generated answer.
        batch: continuations, or answers, at once.
        work: folder for finished batches, so that the same call continues where it was stopped. A folder of another
            model, file or option is refused. The folder is kept when everything is done.
        on_batch: called with (done, in all) of continuations or answers.

    Raises:
        LlamaJaxError: for a file or an object that is no question (naming the line), an option out of range, a text
            that is too long for the model's context, logits that are not finite, or a folder of other work.
    """
    is_path = isinstance(questions, str | Path)
    found = read_questions(questions) if is_path else as_questions(questions)  # type: ignore[arg-type]
    check_whole("batch", batch)
    check_whole("max_new_tokens", max_new_tokens)
    check_whole("limit", 1 if limit is None else limit)
    if isinstance(fewshot, bool) or not isinstance(fewshot, int) or not 0 <= fewshot < len(found):
        raise LlamaJaxError(f"fewshot is {fewshot!r}: expected a whole number from 0 to {len(found) - 1}")
    shape = found[0].shape
    asking = Asking(
        PREFIXES[shape] if prefix is None else prefix,
        DELIMITERS[shape] if delimiter is None else delimiter,
        fewshot,
        tuple(stop),
        max_new_tokens,
    )
    asked = found[:limit]
    contexts = [asking.context(question, found) for question in asked]
    parts = NoParts() if work is None else _parts(work, model, tokenizer, asked, contexts, asking, batch)
    if shape == "answer":
        outcomes = _answered(model, tokenizer, asked, contexts, asking, batch=batch, on_batch=on_batch, parts=parts)
    else:
        rows = [
            encode_pair(tokenizer, text + asking.behind(text, option), option, question.source)
            for question, text in zip(asked, contexts, strict=True)
            for option in question.options
        ]
        scored = iter(log_likelihoods(model, rows, batch, on_batch, parts))
        each = [[next(scored) for _ in question.options] for question in asked]
        outcomes = [_OUTCOMES[shape](question, of) for question, of in zip(asked, each, strict=True)]
    return TaskResult(shape, _measures(shape, outcomes), outcomes)


# ---- Outcomes --------------------------------------------------------------------------------------------------------


def _chosen(question: Question, scored: Sequence[Scored]) -> dict[str, Any]:
    """The likeliest choice: in total, per character, and per byte of UTF-8. Of equal choices the first is taken.

    As in the harness, the delimiter does not count for the length.
    """
    values = np.array([each.log_likelihood for each in scored])
    characters = np.array([len(option) for option in question.options])
    nbytes = np.array([len(option.encode()) for option in question.options])
    choices = {"acc": values, "acc_norm": values / characters, "acc_bytes": values / nbytes}
    chosen = {name: int(np.argmax(of)) for name, of in choices.items()}
    return {
        "gold": question.gold,
        "log_likelihoods": values.tolist(),
        "chosen": chosen,
        **{name: choice == question.gold for name, choice in chosen.items()},
    }


def _continued(question: Question, scored: Sequence[Scored]) -> dict[str, Any]:
    (only,) = scored
    return {"log_likelihood": only.log_likelihood, "acc": only.greedy}


_OUTCOMES: Mapping[Shape, Callable[[Question, Sequence[Scored]], dict[str, Any]]] = {
    "choices": _chosen,
    "continuation": _continued,
}


def _answered(
    model: Llama, tokenizer: Tokenizer, asked: Sequence[Question], contexts: Sequence[str], asking: Asking, **run: Any
) -> list[dict[str, Any]]:
    """Generates the answers and compares them; "number_match" is included if all right answers are numbers."""
    prompts = [
        (tokenizer.encode(text + asking.behind(text, ""), eos=False), question.source)
        for text, question in zip(contexts, asked, strict=True)
    ]
    texts = answers(model, tokenizer, prompts, stop=asking.stop, max_new_tokens=asking.max_new_tokens, **run)
    numbers = all(as_number(option) is not None for question in asked for option in question.options)
    return [
        {
            "text": text,
            "exact_match": exact_match(text, question.options),
            **({"number_match": number_match(text, question.options)} if numbers else {}),
        }
        for text, question in zip(texts, asked, strict=True)
    ]


def _measures(shape: Shape, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
    """Means over questions."""
    rates = [name for name, value in outcomes[0].items() if isinstance(value, bool)]
    found = {name: mean_of([outcome[name] for outcome in outcomes]) for name in rates}
    if shape == "continuation":
        mean = mean_of([outcome["log_likelihood"] for outcome in outcomes])
        assert mean.value is not None, "a mean of what is finite"
        perplexity = math.exp(-mean.value) if -mean.value < _LARGEST_LOSS else None
        error = None if perplexity is None or mean.standard_error is None else perplexity * mean.standard_error
        found |= {"perplexity": Measure(perplexity, error), "log_likelihood": mean}
    return found


def mean_of(values: Sequence[float]) -> Measure:
    """A mean, and its standard error."""
    each = np.asarray(values, np.float64)
    return Measure(float(each.mean()), standard_error(each) if len(each) > 1 else None)


def differences(result: TaskResult, reference: TaskResult) -> dict[str, Measure]:
    """Differences of a model's rates from a reference's on the same questions; positive if the model is better.

    The standard error is that of the mean of the differences, question by question. If both models mostly give the
    same answers, it is much smaller than the standard error of either rate.

    Raises:
        LlamaJaxError: if the models were not asked the same questions.
    """
    ours, theirs = result.outcomes, reference.outcomes
    if result.shape != reference.shape or len(ours) != len(theirs):
        raise LlamaJaxError(
            f"the model has {len(ours)} questions of shape {result.shape}, the reference {len(theirs)} of "
            f"{reference.shape}: expected the same questions"
        )
    rates = [name for name, value in ours[0].items() if isinstance(value, bool)]
    return {
        name: mean_of([int(our[name]) - int(their[name]) for our, their in zip(ours, theirs, strict=True)])
        for name in rates
    }


# ---- Work on disk ----------------------------------------------------------------------------------------------------


def _parts(
    work: Path,
    model: Llama,
    tokenizer: Tokenizer,
    asked: Sequence[Question],
    contexts: Sequence[str],
    asking: Asking,
    batch: int,
) -> Parts:
    """The folder of finished batches of this work; its `work.json` records everything that the result depends on."""
    from llamajax.quantization.resume import PartsOnDisk  # imported here, because it needs safetensors

    shown = [[text, question.options, question.gold] for text, question in zip(contexts, asked, strict=True)]
    key = {
        "version": 1,
        "questions": len(asked),
        **dataclasses.asdict(asking),
        "batch": batch,
        "questions (sha256)": _sha256(json.dumps(shown)),
        "tokenizer (sha256)": _sha256(tokenizer.model_bytes, json.dumps(tokenizer.words.to_dict())),
        "model (sha256)": _model_sha256(model),
    }
    return PartsOnDisk(work, key)


def _sha256(*values: str | bytes) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.encode() if isinstance(value, str) else value)
    return digest.hexdigest()


def _model_sha256(model: Llama) -> str:
    """SHA-256 of a model's arrays in their layout, and of its structure, which says how they are multiplied."""
    digest = hashlib.sha256(str(jax.tree.structure(model)).encode())
    for leaf in jax.tree.leaves(model):
        digest.update(f"\n{leaf.dtype} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
