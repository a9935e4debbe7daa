"""Reads questions of public suites from JSON lines: one object per line, of one of three shapes.

    choices        query, choices, gold           which of several continuations is likeliest
    continuation   context, continuation          whether greedy decoding gives the continuation (LAMBADA's cloze)
    answer         question or context, answer    a generated answer of a few words or a number

These are the keys of llm-foundry's files (`query`, `gold`, `context`, `continuation`, `answer`, `aliases`). `aliases`
are other right answers. Other keys, such as `category` or `chain_of_thought`, are ignored. All lines have one shape.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from llamajax.errors import LlamaJaxError
from llamajax.files import read_bytes, shortened

Shape = Literal["choices", "continuation", "answer"]
# Each shape is recognised by the key of its name.
SHAPES: tuple[Shape, ...] = ("choices", "continuation", "answer")
_KEYS = (
    'the keys "query", "choices" and "gold", or "context" and "continuation", or "question" (or "context") and "answer"'
)
# The largest file that we know of, HellaSwag's, has 12 MB; the longest line of MMLU has 13 kB.
_LARGEST_FILE = 256 << 20
_LARGEST_LINE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        shape: the kind of the question.
        text: the text that the model is shown.
        options: the choices, or the one continuation, or the right answers; the first right answer is shown if the
            question is an example.
        gold: index of the right choice; 0 for the other shapes.
        source: file and line of the question, for error messages.
    """

    shape: Shape
    text: str
    options: tuple[str, ...]
    gold: int
    source: str


def read_questions(path: str | Path) -> list[Question]:
    """Reads the questions of a file.

    Raises:
        LlamaJaxError: if the file is missing, empty, too large or not UTF-8, or a line is no question or has another
            shape than the first; the message names file and line.
    """
    try:
        data = read_bytes(path, _LARGEST_FILE)
    except FileNotFoundError:
        raise LlamaJaxError(f"{path}: no such file: expected one JSON object per line with {_KEYS}") from None
    lines = data.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    named = ((line, f"{path}: line {i}") for i, line in enumerate(lines, 1))
    return _questions(((_object(line, source), source) for line, source in named), str(path))


def as_questions(examples: Iterable[Mapping[str, Any]]) -> list[Question]:
    """Makes questions from objects like the lines of a file.

    Raises:
        LlamaJaxError: as `read_questions`.
    """
    return _questions(((example, f"question {i}") for i, example in enumerate(examples, 1)), "the questions")


def _questions(found: Iterable[tuple[Any, str]], name: str) -> list[Question]:
    """Makes questions; checks that there is at least one, and that all have one shape."""
    questions: list[Question] = []
    for value, source in found:
        question = _question(value, source)
        if questions and question.shape != questions[0].shape:
            _refuse(source, f'has "{question.shape}"', f'expected "{questions[0].shape}", as {questions[0].source} has')
        questions.append(question)
    if not questions:
        raise LlamaJaxError(f"{name}: no question: expected at least one, one JSON object per line with {_KEYS}")
    return questions


def _object(line: bytes, source: str) -> Any:
    """The JSON value of a line; a key that occurs twice is an error."""
    if len(line) > _LARGEST_LINE:
        _refuse(source, f"{len(line)} bytes", f"expected at most {_LARGEST_LINE}")
    if not line.strip():
        _refuse(source, "empty", "expected a JSON object")
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        _refuse(source, f"not UTF-8 at byte {error.start}", "expected UTF-8")
    except (ValueError, RecursionError) as error:
        _refuse(source, f"not JSON ({shortened(str(error))})", "expected a JSON object")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {shortened(key)} twice")
        found[key] = value
    return found


def _question(value: Any, source: str) -> Question:
    """Makes a question from the JSON value of a line."""
    if not isinstance(value, Mapping):
        _refuse(source, shortened(value), f"expected a JSON object with {_KEYS}")
    shapes = [shape for shape in SHAPES if shape in value]
    if len(shapes) != 1:
        keys = ", ".join(shortened(key) for key in list(value)[:10]) or "none"
        _refuse(source, f"keys {keys}", f"expected {_KEYS}")
    shape = shapes[0]
    if shape == "choices":
        choices = value["choices"]
        if not isinstance(choices, list | tuple) or len(choices) < 2:
            _refuse(source, f'"choices" is {shortened(choices)}', "expected a list of at least 2 texts")
        options = tuple(_text(choice, f'"choices"[{i}]', source) for i, choice in enumerate(choices))
        return Question(shape, _context(value, source, "query"), options, _gold(value, len(options), source), source)
    if shape == "continuation":
        continuation = _text(value["continuation"], '"continuation"', source)
        return Question(shape, _context(value, source, "context"), (continuation,), 0, source)
    answer = _text(value["answer"], '"answer"', source)
    aliases = value.get("aliases", ())
    if not isinstance(aliases, list | tuple):
        _refuse(source, f'"aliases" is {shortened(aliases)}', "expected a list of texts")
    others = tuple(_text(alias, f'"aliases"[{i}]', source) for i, alias in enumerate(aliases))
    if "question" in value and "context" in value:
        _refuse(source, 'has "question" and "context"', "expected one of them: put the context into the question")
    key = "question" if "question" in value else "context"
    return Question(shape, _context(value, source, key), (answer, *others), 0, source)


def _context(value: Mapping[str, Any], source: str, key: str) -> str:
    """The text that the model is shown; it may be empty."""
    if key not in value:
        _refuse(source, f'no key "{key}"', f"expected {_KEYS}")
    return _text(value[key], f'"{key}"', source, empty=True)


def _text(value: Any, name: str, source: str, empty: bool = False) -> str:
    if not isinstance(value, str) or not (empty or value.strip()):
        _refuse(source, f"{name} is {shortened(value)}", f"expected a text{'' if empty else ' that is not empty'}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        _refuse(source, f"{name} is not Unicode at character {error.start}", "expected UTF-8")
    return value


def _gold(value: Mapping[str, Any], choices: int, source: str) -> int:
    """Index of the right choice, counted from 0."""
    if "gold" not in value:
        _refuse(source, 'no key "gold"', f"expected the number of the right choice, 0 to {choices - 1}")
    gold = value["gold"]
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < choices:
        _refuse(source, f'"gold" is {shortened(gold)}', f"expected a whole number from 0 to {choices - 1}")
    return gold


def _refuse(source: str, found: str, expected: str) -> NoReturn:
    raise LlamaJaxError(f"{source}: {found}: {expected}")
