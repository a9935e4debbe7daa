"""What a model can do: multiple choice, cloze and short answers, by the conventions of lm-evaluation-harness.

    result = evaluate_task(model, tokenizer, "openbook_qa.jsonl")
    print(result.measures["acc_norm"])              # Measure(value=0.336, standard_error=0.0211)

What is measured is the model that is given, multiplied as its weights are held (see `evaluate.py`). `tasks_read.py`
says what a file holds, `tasks_score.py` how texts become ids, `tasks_answers.py` when a generated answer is right, and
`docs/tasks.md` all of it, and where the harness and llm-foundry differ.
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

# Between a question and what is behind it, and before a question: as in the harness's tasks, and as in llm-foundry's.
DELIMITERS: Mapping[Shape, str] = {"choices": " ", "continuation": " ", "answer": "\nAnswer:"}
PREFIXES: Mapping[Shape, str] = {"choices": "", "continuation": "", "answer": "Question: "}
STOP = ("\n",)
MAX_NEW_TOKENS = 64
_BETWEEN = "\n\n"  # examples, and the question behind them
_LARGEST_LOSS = 700.0  # of which the exponential is a float


class Measure(NamedTuple):
    """A mean over questions.

    Attributes:
        value: None for a perplexity too large for a float.
        standard_error: the questions' sample standard deviation over the root of their number, as in the harness; of
            a perplexity, what that of its logarithm makes of it. None for one question.
    """

    value: float | None
    standard_error: float | None


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What a model did with the questions of a task.

    Attributes:
        shape: "choices", "continuation" or "answer".
        measures: by name; of choices "acc", "acc_norm" and "acc_bytes"; of continuations "acc", "perplexity" and
            "log_likelihood"; of answers "exact_match", and "number_match" where all of them are numbers.
        outcomes: of each question, in their order: what the model said (JSON values) and, by the measures' names,
            whether that is right.
    """

    shape: Shape
    measures: dict[str, Measure]
    outcomes: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Asking:
    """How questions are put.

    Attributes:
        prefix: before each question.
        delimiter: between a question and its continuation.
        fewshot: examples before each question.
        stop: strings at which an answer ends.
        max_new_tokens: most tokens of an answer.
    """

    prefix: str
    delimiter: str
    fewshot: int
    stop: tuple[str, ...]
    max_new_tokens: int

    def text(self, question: Question) -> str:
        """A question as the model sees it, without what is behind it."""
        return self.prefix + question.text

    def context(self, question: Question, among: Sequence[Question]) -> str:
        """All that stands before the question's continuation, less the delimiter: the examples, and the question."""
        examples = [each for each in among[: self.fewshot + 1] if each is not question][: self.fewshot]
        return "".join(self._example(each) + _BETWEEN for each in examples) + self.text(question)

    def _example(self, question: Question) -> str:
        right = question.options[question.gold]
        before = self.text(question) + self.behind(self.text(question), right)
        return before + (" " if question.shape == "answer" and not before[-1:].isspace() else "") + right

    def behind(self, text: str, continuation: str) -> str:
        """The delimiter; nothing where it is white space, and the texts have some between them."""
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
    """Asks a model the questions of a task: accuracies with their standard errors, and what it said to each.

    Args:
        model: the model, prepared (`llamajax.prepare`) for what it says where it runs, or not, for the reference.
        tokenizer: its tokenizer.
        questions: a file of JSON lines, or the objects that stand in one: {"query", "choices", "gold"}, {"context",
            "continuation"} or {"question" (or "context"), "answer"}.
        prefix: text before each question; none, or "Question: " before questions to be answered, unless given.
        delimiter: between a question and what is behind it; a space, or a new line and "Answer:", unless
            given.
        fewshot: so many questions, the first of the file but for the one asked, stand before it with what is right.
        limit: how many questions are asked, from the first on; all unless given.
        stop: strings at which a generated answer ends.
        max_new_tokens: most tokens of a generated answer.
        batch: continuations, or answers, at once.
        work: folder for finished batches, so that the same call goes on where it was stopped. It is refused for
            another model, file or option, and stays when all is done.
        on_batch: called with (done, in all) of continuations or answers.

    Raises:
        LlamaJaxError: for a file or an object that is no question (naming the line), an option out of range, a text
            that the model's context has no room for, logits that are not finite, or a folder of other work.
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
    """What is likeliest of the choices; likeliest a character, and a byte of UTF-8. Of equals the first, as in NumPy.

    The delimiter does not count for the length, as in the harness.
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
    """What was generated; numbers are looked for where all answers are some."""
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
    """What a model is better by than another at the same questions, for each rate.

    The standard error is that of the mean of the differences, question by question: where both models mostly say the
    same, it is much smaller than that of either rate.

    Raises:
        LlamaJaxError: if they were asked other questions.
    """
    ours, theirs = result.outcomes, reference.outcomes
    if result.shape != reference.shape or len(ours) != len(theirs):
        raise LlamaJaxError(
            f"{len(ours)} questions of shape {result.shape}, the reference {len(theirs)} of {reference.shape}: "
            "expected the same questions"
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
    """The folder of finished batches, for this work alone: whatever the result depends on is named in `work.json`."""
    from llamajax.quantization.resume import PartsOnDisk  # here: it needs safetensors

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
    """Of its arrays as they are held, and of how they are multiplied."""
    digest = hashlib.sha256(str(jax.tree.structure(model)).encode())
    for leaf in jax.tree.leaves(model):
        digest.update(f"\n{leaf.dtype} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
