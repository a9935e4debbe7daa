"""Tasks against the float64 NumPy LLaMA: log likelihoods, choices and answers; files that are refused; work resumed."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamajax
from llamajax import Llama, LlamaJaxError, Tokenizer, evaluate_task
from llamajax.cli import main
from llamajax.evaluation import tasks_score
from llamajax.evaluation.tasks import Measure, differences, mean_of
from llamajax.evaluation.tasks_answers import as_number, exact_match, number_match
from llamajax.evaluation.tasks_read import read_questions
from tests.reference import forward, softmax, weights_of

ROOT = Path(__file__).parents[1]
# Cases: a space that is to be moved, no space, one in the choice too, no ASCII, choices of very different lengths.
CHOICES = [
    {"query": "The little fox found", "choices": ["a red apple.", "a river"], "gold": 0, "category": "foxes"},
    {
        "query": "One day Mia ate ",
        "choices": ["soup", "the café", "12 red apples under the tree, and was happy"],
        "gold": 2,
    },
    {"query": "It was closed,\n", "choices": ["so they went home", " then the sun went down", "x"], "gold": 1},
    {"query": "Ted", "choices": ["swam", "swam."], "gold": 1},
    {"query": "", "choices": ["Once upon a time", "Twice"], "gold": 0},
]
CLOZES = [
    {"context": "Once upon a", "continuation": "time"},
    {"context": "He lived by a big ", "continuation": "river, and he liked"},
    {"context": "'Yes,' said", "continuation": " Mia"},
]
ANSWERS = [
    {"question": "How many apples?", "answer": "12"},
    {"context": "How many foxes?", "answer": "1"},
    {"question": "How many rivers?", "answer": "2", "aliases": ["3", "4"]},
]


def write(path: Path, questions: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    return path


# ---- The oracle -----------------------------------------------------------------------------------------------------


class Oracle:
    """The harness's `_encode_pair` and `_loglikelihood_tokens`, one row at a time, in float64."""

    def __init__(self, model: Llama, tokenizer: Tokenizer):
        self.config, self.weights, self.tokenizer = model.config, weights_of(model), tokenizer

    def logs(self, ids: list[int]) -> np.ndarray:
        """Returns the log probabilities of the next token after each of the ids."""
        return np.log(softmax(forward(self.config, self.weights, np.array(ids))))

    def __call__(self, context: str, continuation: str) -> tuple[float, bool]:
        """Returns the log likelihood of a continuation, and whether greedy decoding gives it."""
        n_spaces = len(context) - len(context.rstrip())
        if n_spaces > 0:
            context, continuation = context[:-n_spaces], context[-n_spaces:] + continuation
        if context:
            before = self.tokenizer.encode(context)
            behind = self.tokenizer.encode(context + continuation)[len(before) :]
        else:
            before, behind = [1], self.tokenizer.encode(continuation, bos=False)
        ids = (before + behind)[-(self.config.context_length + 1) :]
        logs = self.logs(ids[:-1])[-len(behind) :]
        total = sum(log[target] for log, target in zip(logs, behind, strict=True))
        return float(total), [int(log.argmax()) for log in logs] == behind


@pytest.fixture(scope="module")
def oracle(tiny_model: Llama, tiny_tokenizer: Tokenizer) -> Oracle:
    return Oracle(tiny_model, tiny_tokenizer)


# ---- Log likelihoods and choices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
def test_choices_are_numpys(batch: int, oracle: Oracle, tiny_model: Llama, tiny_tokenizer: Tokenizer) -> None:
    """Question and choice are joined by a space, unless the question ends or the choice begins with one."""
    calls: list[tuple[int, int]] = []
    result = evaluate_task(
        tiny_model, tiny_tokenizer, CHOICES, batch=batch, on_batch=lambda done, total: calls.append((done, total))
    )
    assert result.shape == "choices" and calls[-1] == (12, 12) and sorted(calls) == calls
    rates: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for question, outcome in zip(CHOICES, result.outcomes, strict=True):
        query: Any = question["query"]
        choices: Any = question["choices"]
        pairs = [(query, each if query[-1:].isspace() or each[0] == " " else " " + each) for each in choices]
        expected = np.array([oracle(*pair)[0] for pair in pairs])
        np.testing.assert_allclose(outcome["log_likelihoods"], expected, rtol=2e-5, atol=1e-4)
        lengths = {"acc": 1, "acc_norm": np.array([len(each) for each in choices])}
        lengths["acc_bytes"] = np.array([len(each.encode()) for each in choices])
        for name, length in lengths.items():
            chosen = int((expected / length).argmax())
            assert outcome["chosen"][name] == chosen
            assert outcome[name] is (chosen == question["gold"])
            rates[name].append(chosen == question["gold"])
    for name, right in rates.items():
        mean = sum(right) / 5
        error = math.sqrt(sum((x - mean) ** 2 for x in right) / 4) / math.sqrt(5)
        assert result.measures[name] == (pytest.approx(mean), pytest.approx(error))
    assert any(o["chosen"]["acc"] != o["chosen"]["acc_norm"] for o in result.outcomes)


def test_standard_error_by_hand() -> None:
    """For 3 right answers of 4, the error is the sample's standard deviation, 1/2, divided by the root of 4."""
    assert mean_of([True, True, True, False]) == Measure(0.75, pytest.approx(0.25))
    assert mean_of([1]) == Measure(1.0, None)


def test_a_long_question_loses_its_beginning(tiny_model: Llama, tiny_tokenizer: Tokenizer) -> None:
    """The last tokens stay: as many as the model's context, and one more that is only a target."""
    config = llamajax.Config.from_dict(tiny_model.config.to_dict() | {"context_length": 20})
    short = llamajax.model_from(llamajax.named_weights(tiny_model), config)
    query = "Once upon a time there was a little fox. " * 3
    assert len(tiny_tokenizer.encode(query)) > 40
    question = {"query": query, "choices": ["He lived by a big river", "Ted"], "gold": 0}
    result = evaluate_task(short, tiny_tokenizer, [question], delimiter="", batch=4)
    expected = [Oracle(short, tiny_tokenizer)(query, each)[0] for each in ("He lived by a big river", "Ted")]
    np.testing.assert_allclose(result.outcomes[0]["log_likelihoods"], expected, rtol=2e-5, atol=1e-4)
    with pytest.raises(LlamaJaxError, match=r"question 1: the continuation has \d+ tokens: expected at most 20"):
        evaluate_task(short, tiny_tokenizer, [{"context": "Once", "continuation": query}], batch=4)


def test_clozes_are_numpys(oracle: Oracle, tiny_model: Llama, tiny_tokenizer: Tokenizer) -> None:
    """Accuracy and perplexity are LAMBADA's; one of the continuations is what greedy decoding gives."""

    def greedy(length: int) -> tuple[str, str] | None:
        """Returns a text's beginning and the likeliest next token, or None if the whole is encoded differently."""
        context = "Once upon a time, there was a little fox named Ted. He lived by a big river."[:length].strip()
        ids = tiny_tokenizer.encode(context)
        ids.append(int(oracle.logs(ids)[-1].argmax()))
        whole = tiny_tokenizer.decode(ids)
        is_kept = tiny_tokenizer.encode(whole) == ids and whole.startswith(context) and whole.strip() != context
        return (context, whole.removeprefix(context)) if is_kept else None

    context, made = next(found for found in map(greedy, range(5, 60)) if found)
    result = evaluate_task(
        tiny_model, tiny_tokenizer, [*CLOZES, {"context": context, "continuation": made}], delimiter="", batch=4
    )
    pairs = [(str(each["context"]), str(each["continuation"])) for each in CLOZES] + [(context, made)]
    expected = [oracle(*pair) for pair in pairs]
    values = [value for value, _ in expected]
    np.testing.assert_allclose([o["log_likelihood"] for o in result.outcomes], values, rtol=2e-5, atol=1e-4)
    assert [o["acc"] for o in result.outcomes] == [hit for _, hit in expected] and expected[-1][1]
    perplexity = math.exp(-sum(values) / 4)
    error = np.std(values, ddof=1) / 2
    assert result.measures["perplexity"] == (
        pytest.approx(perplexity, rel=1e-4),
        pytest.approx(perplexity * error, rel=1e-3),
    )
    assert result.measures["log_likelihood"].standard_error == pytest.approx(error, rel=1e-3)
    assert result.measures["acc"].value == sum(hit for _, hit in expected) / 4


def test_a_perplexity_beyond_floats_is_none(tiny_model: Llama, tiny_tokenizer: Tokenizer) -> None:
    question = {"context": "Once", "continuation": "upon a time there was a little fox " * 9}
    measures = evaluate_task(tiny_model, tiny_tokenizer, [question], batch=4).measures
    assert measures["perplexity"] == (None, None) and measures["log_likelihood"].value < -700


def test_examples_stand_before_the_question(tiny_model: Llama, tiny_tokenizer: Tokenizer) -> None:
    """Examples are the file's first questions except the one asked, with answers, as if written out in the query."""
    given = [each for each in CHOICES if each["query"]]
    asked = evaluate_task(
        tiny_model, tiny_tokenizer, given, fewshot=2, prefix="Q: ", delimiter="\nA: ", limit=3, batch=4
    )
    shown = [f"Q: {each['query']}\nA: {each['choices'][each['gold']]}\n\n" for each in given]  # type: ignore[index]
    written = [
        {**each, "query": before + f"Q: {each['query']}\nA: "}
        for each, before in zip(given, (shown[1] + shown[2], shown[0] + shown[2], shown[0] + shown[1]), strict=False)
    ]
    expected = evaluate_task(tiny_model, tiny_tokenizer, written, delimiter="", batch=4)
    assert len(asked.outcomes) == 3
    for ours, theirs in zip(asked.outcomes, expected.outcomes, strict=True):
        np.testing.assert_allclose(ours["log_likelihoods"], theirs["log_likelihoods"], rtol=1e-5, atol=1e-5)


def test_few_programs_serve_any_lengths(tiny_model: Llama, tiny_tokenizer: Tokenizer, monkeypatch) -> None:
    """Rows of 1 to 60 words need only a few shapes, whose sizes double."""
    shapes = set()

    def seen(model: Llama, tokens_BT: np.ndarray, count_B: np.ndarray, scored: int) -> tuple[np.ndarray, np.ndarray]:
        shapes.add((*tokens_BT.shape, scored))
        zeros = np.zeros((len(tokens_BT), scored), np.float32)
        return zeros, zeros == 1

    monkeypatch.setattr(tasks_score, "_target_scores", seen)
    questions = [
        {"context": "fox " * n, "continuation": "apple " * m} for n in range(1, 60, 3) for m in range(1, 20, 4)
    ]
    evaluate_task(tiny_model, tiny_tokenizer, questions, batch=3)
    doubled = (16, 32, 64, 128, 256, 512)
    assert shapes <= {(3, inputs + 1, scored) for inputs in doubled for scored in (8, 32, 128, inputs)}
    assert 3 < len(shapes) < 16


def test_packed_weights_are_measured_as_they_run(tiny_int4: Llama, tiny_tokenizer: Tokenizer) -> None:
    """Weights laid out for the backend give the reference product's results where nothing is rounded."""
    prepared = evaluate_task(llamajax.prepare(tiny_int4, "cpu"), tiny_tokenizer, CHOICES[3:], batch=4)
    reference = evaluate_task(tiny_int4, tiny_tokenizer, CHOICES[3:], batch=4)
    for ours, theirs in zip(prepared.outcomes, reference.outcomes, strict=True):
        np.testing.assert_allclose(ours["log_likelihoods"], theirs["log_likelihoods"], rtol=1e-4, atol=1e-4)


def test_logits_that_are_not_finite_are_an_error(tiny_model: Llama, tiny_tokenizer: Tokenizer) -> None:
    broken = jax.tree.map(lambda leaf: leaf, tiny_model)
    broken.head_VD.set_value(tiny_model.head_VD[...].at[7].set(jnp.inf))
    with pytest.raises(LlamaJaxError, match="question 1: the model's logits are not finite: .*float32"):
        evaluate_task(broken, tiny_tokenizer, CHOICES[3:], batch=4)


# ---- Answers --------------------------------------------------------------------------------------------------------


def test_answers_are_greedy(oracle: Oracle, tiny_model: Llama, tiny_tokenizer: Tokenizer) -> None:
    result = evaluate_task(tiny_model, tiny_tokenizer, ANSWERS, max_new_tokens=6, batch=2)
    for question, outcome in zip(ANSWERS, result.outcomes, strict=True):
        text = question.get("question") or question["context"]
        ids = tiny_tokenizer.encode(f"Question: {text}\nAnswer:")
        made: list[int] = []
        while len(made) < 6 and not set(made) & set(tiny_tokenizer.stop_ids):
            made.append(int(oracle.logs(ids + made)[-1].argmax()))
        whole = tiny_tokenizer.decode(ids + made).removeprefix(tiny_tokenizer.decode(ids))
        assert outcome["text"] == whole.partition("\n")[0]
    assert set(result.measures) == {"exact_match", "number_match"}
    words = [{"question": "Who?", "answer": "Ted"}]
    assert set(evaluate_task(tiny_model, tiny_tokenizer, words, max_new_tokens=6, batch=2).measures) == {"exact_match"}


@pytest.mark.parametrize(
    ("text", "answers", "exact", "number"),
    [
        (" The Eiffel Tower.\n", ["eiffel tower"], True, False),
        ("an Eiffel-Tower", ["eiffel tower"], False, False),
        ("Paris", ["London", "paris"], True, False),
        (" 17", ["17"], True, True),
        ("17.0", ["17"], True, True),
        ("$1,000.", ["1000"], True, True),
        ("-5", ["5"], False, False),
        ("1.5", ["15"], False, False),
        ("8 - 7 = 1 more cup.", ["1"], False, True),
        ("7 or 1, or 2", ["1"], False, False),
        ("It is 12.", ["12"], False, True),
        ("1...", ["1"], False, False),  # gsm8k's expression takes "1..." for a number, too
        ("", ["1"], False, False),
    ],
)
def test_what_is_right(text: str, answers: list[str], exact: bool, number: bool) -> None:
    """Answers are judged by the harness's rules: exact_match of triviaqa and nq_open, flexible-extract of gsm8k."""
    assert exact_match(text, answers) is exact
    assert number_match(text, answers) is number


def test_numbers() -> None:
    assert [as_number(text) for text in ("٣", "1e5", "--1", "1.", ".5", "Infinity", "")] == [None] * 3 + [
        1,
        0.5,
        None,
        None,
    ]
    assert as_number("9" * 10_000) is not None  # no error, whatever the length


# ---- Files that are refused -----------------------------------------------------------------------------------------

GOOD = '{"query": "a", "choices": ["b", "c"], "gold": 0}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "a", "choices": ["b", "c"]}', 'no key "gold": expected the number of the right choice, 0 to 1'),
        ('{"choices": ["b", "c"], "gold": 1}', 'no key "query": expected the keys "query", "choices" and "gold", or'),
        ('{"query": "a", "gold": 1}', "keys 'query', 'gold': expected the keys"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', '"gold" is 2: expected a whole number from 0 to 1'),
        ('{"query": "a", "choices": ["b", "c"], "gold": -1}', '"gold" is -1: expected a whole number from 0 to 1'),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', '"gold" is True: expected a whole number'),
        ('{"query": "a", "choices": ["b", "c"], "gold": "b"}', "\"gold\" is 'b': expected a whole number"),
        ('{"query": "a", "choices": [], "gold": 0}', '"choices" is []: expected a list of at least 2 texts'),
        ('{"query": "a", "choices": "bc", "gold": 0}', "\"choices\" is 'bc': expected a list of at least 2 texts"),
        (
            '{"query": "a", "choices": ["b", " "], "gold": 0}',
            "\"choices\"[1] is ' ': expected a text that is not empty",
        ),
        ('{"query": "a", "choices": ["b", 3], "gold": 0}', '"choices"[1] is 3: expected a text that is not empty'),
        ('{"query": 7, "choices": ["b", "c"], "gold": 0}', '"query" is 7: expected a text'),
        ('{"query": "\\ud800", "choices": ["b", "c"], "gold": 0}', '"query" is not Unicode at character 0'),
        ('{"context": "a"}', "keys 'context': expected the keys"),
        ('{"context": "a", "continuation": ""}', "\"continuation\" is '': expected a text that is not empty"),
        ('{"context": "a", "answer": "b", "continuation": "c"}', "expected the keys"),
        ('{"context": "a", "question": "q", "answer": "b"}', 'has "question" and "context": expected one of them'),
        ('{"question": "a", "answer": 3}', '"answer" is 3: expected a text that is not empty'),
        ('{"question": "a", "answer": "3", "aliases": "4"}', "\"aliases\" is '4': expected a list of texts"),
        ('{"question": "a", "answer": "3"}', 'has "answer": expected "choices", as FILE: line 1 has'),
        ("{}", "keys none: expected the keys"),
        ("[1]", "[1]: expected a JSON object"),
        ("", "empty: expected a JSON object"),
        ('{"query": "a"', 'not JSON ("Expecting'),
        ('{"query": "a", "query": "b", "choices": ["b", "c"], "gold": 0}', "key 'query' twice"),
        ("[" * 100_000, "not JSON ("),
        ('{"query": "%s"}' % ("x" * (1 << 20)), "1048589 bytes: expected at most 1048576"),
        ('{"query": "a", "choices": ["b", "c"], "gold": %s}' % ("9" * 5000), "not JSON ("),
    ],
)
def test_lines_that_are_no_questions(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n", encoding="utf-8")
    with pytest.raises(LlamaJaxError) as caught:
        read_questions(path)
    assert f"{path}: line 2: " in str(caught.value) and message.replace("FILE", str(path)) in str(caught.value)
    assert len(str(caught.value)) < 600 + 2 * len(str(path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "task.jsonl: no such file: expected one JSON object per line"),
        (b"", "task.jsonl: no question: expected at least one, one JSON object per line"),
        (f"{GOOD}\n".encode() + b'{"query": "caf\xe9"}', "task.jsonl: line 2: not UTF-8 at byte 14"),
        (f"{GOOD}\n\n".encode(), "task.jsonl: line 2: empty"),
        (b"\xff\xfe" + GOOD.encode("utf-16-le"), "task.jsonl: line 1: not UTF-8 at byte 0"),
    ],
)
def test_files_that_are_no_tasks(data: bytes | None, message: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "task.jsonl").write_bytes(data)
    with pytest.raises(LlamaJaxError) as caught:
        read_questions(tmp_path / "task.jsonl")
    assert message in str(caught.value)


def test_the_last_line_needs_no_end_and_others_may_have_a_return(tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").write_bytes(f"{GOOD}\r\n{GOOD}".encode())
    questions = read_questions(tmp_path / "task.jsonl")
    assert [each.options for each in questions] == [("b", "c")] * 2 and questions[1].source.endswith("line 2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch is 0: expected a whole number from 1"),
        ({"limit": 0}, "limit is 0: expected a whole number from 1"),
        ({"fewshot": 5}, "fewshot is 5: expected a whole number from 0 to 4"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: expected a whole number from 1"),
    ],
)
def test_options_out_of_range(options: dict, message: str, tiny_model: Llama, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(LlamaJaxError, match=message):
        evaluate_task(tiny_model, tiny_tokenizer, CHOICES, **options)


def test_answers_need_room(tiny_model: Llama, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(LlamaJaxError, match="max_new_tokens is 512: expected less than 512, the model's context"):
        evaluate_task(tiny_model, tiny_tokenizer, ANSWERS, max_new_tokens=512)


# ---- Work that was stopped ------------------------------------------------------------------------------------------


class StopError(Exception):
    """Ends a call in its middle."""


def test_the_same_call_goes_on(tiny_model: Llama, tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch) -> None:
    """Finished scores are not computed again, and the result is that of one call. Other work is refused."""
    whole = evaluate_task(tiny_model, tiny_tokenizer, CHOICES, batch=4)
    computed = []
    score = tasks_score._score
    monkeypatch.setattr(tasks_score, "_score", lambda *args: computed.append(len(args[1])) or score(*args))

    def stop(done: int, total: int) -> None:
        if done >= 4:
            raise StopError

    with pytest.raises(StopError):
        evaluate_task(tiny_model, tiny_tokenizer, CHOICES, batch=4, work=tmp_path / "w", on_batch=stop)
    first = sum(computed)
    assert evaluate_task(tiny_model, tiny_tokenizer, CHOICES, batch=4, work=tmp_path / "w") == whole
    assert 4 <= first < sum(computed) == 12
    other = jax.tree.map(lambda leaf: leaf * 2, tiny_model)
    for model, options, what in (
        (other, {}, "model \\(sha256\\)"),
        (tiny_model, {"batch": 3}, "batch is 4 there, 3 here"),
        (tiny_model, {"delimiter": ": "}, "delimiter is ' ' there, ': ' here"),
        (tiny_model, {"limit": 2}, "questions is 5 there, 2 here"),
    ):
        with pytest.raises(LlamaJaxError, match=f"holds parts of other work: {what}"):
            evaluate_task(model, tiny_tokenizer, CHOICES, **{"batch": 4, **options}, work=tmp_path / "w")
    part = next((tmp_path / "w").glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(LlamaJaxError, match=f"{part.name}: damaged .*: remove it to compute it again"):
        evaluate_task(tiny_model, tiny_tokenizer, CHOICES, batch=4, work=tmp_path / "w")
    part.unlink()
    assert evaluate_task(tiny_model, tiny_tokenizer, CHOICES, batch=4, work=tmp_path / "w") == whole


def test_answers_go_on(tiny_model: Llama, tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "batch": 2, "work": tmp_path / "w"}
    whole = evaluate_task(tiny_model, tiny_tokenizer, ANSWERS, **options)
    monkeypatch.setattr(tasks_score, "generate", pytest.fail)
    assert evaluate_task(tiny_model, tiny_tokenizer, ANSWERS, **options) == whole


# ---- The command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model: Llama, tiny_tokenizer: Tokenizer) -> Path:
    """Two models and two tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, factor in (("one", 1.0), ("two", 0.7)):
        model = jax.tree.map(lambda leaf, factor=factor: leaf * factor, tiny_model)
        llamajax.save_checkpoint(model, folder / name, tokenizer=tiny_tokenizer)
    write(folder / "choices.jsonl", CHOICES)
    write(folder / "clozes.jsonl", CLOZES)
    return folder


def test_eval_of_tasks(folder: Path, tiny_model: Llama, tiny_tokenizer: Tokenizer, capsys, monkeypatch) -> None:
    """JSON has a line per model and task, and tables align; outcomes are written, and the work folder is removed."""
    monkeypatch.chdir(folder)
    argv = ["eval", "--model=one,two", "--reference=one", "--task=choices.jsonl,clozes.jsonl", "--batch=4"]
    assert main([*argv, "--json", "--output=said.jsonl"]) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    assert err == "" and [(line["model"], line["task"]) for line in lines] == [
        (model, task) for model in ("one", "one", "two") for task in ("choices.jsonl", "clozes.jsonl")
    ]
    result = evaluate_task(tiny_model, tiny_tokenizer, CHOICES, batch=4)
    for name, measure in result.measures.items():
        assert lines[0][name] == pytest.approx(measure.value) and "difference" not in lines[0]
        assert lines[0][f"{name}_standard_error"] == pytest.approx(measure.standard_error)
    said = [json.loads(line) for line in (folder / "said.jsonl").read_text().splitlines()]
    assert len(said) == 3 * (5 + 3) and not (folder / "said.jsonl.work").exists()
    rates = {
        name: [each["acc"] for each in said if (each["model"], each["task"]) == (name, "choices.jsonl")]
        for name in ("one", "two")
    }
    pairs = [int(ours) - int(theirs) for ours, theirs in zip(rates["two"], rates["one"][:5], strict=True)]
    assert lines[4]["difference"]["to"] == "one" and lines[2]["difference"]["acc"] == 0
    assert lines[4]["difference"]["acc"] == pytest.approx(np.mean(pairs))
    assert lines[4]["difference"]["acc_standard_error"] == pytest.approx(np.std(pairs, ddof=1) / math.sqrt(5))
    assert main([*argv, "--limit=2"]) == 0
    out = capsys.readouterr().out
    choices, clozes = out.split("clozes.jsonl: ")
    assert "choices.jsonl: 2 questions; products: prepared for cpu" in choices
    for table, columns in ((choices, ("acc", "acc_norm")), (clozes, ("acc", "perplexity"))):
        rows = [line for line in table.splitlines() if line.startswith("│")]
        assert [row.split()[1] for row in rows] == ["one", "one", "two"] and all("±" in row for row in rows)
        assert len({len(line) for line in table.splitlines()[1:] if line}) == 1
        assert all(column in table for column in columns)


def test_eval_goes_on_behind_a_kill(folder: Path, tmp_path: Path, capsys) -> None:
    """After a kill, the same command resumes and writes the file that it writes in one go."""
    many = write(
        tmp_path / "many.jsonl", [{**each, "query": f"{each['query']} {i}"} for i in range(40) for each in CHOICES]
    )
    argv = ["eval", f"--model={folder}/one", f"--task={many}", "--batch=4", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "llamajax", *argv, f"--output={tmp_path}/said"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    work = tmp_path / "said.work" / "0-0"
    deadline = time.monotonic() + 120
    while len(list(work.glob("scores-*.safetensors"))) < 5 and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "the command ended before it was killed"
    assert not (tmp_path / "said").exists() and 5 <= len(list(work.glob("*.safetensors"))) < 120
    assert main([*argv, f"--output={tmp_path}/said"]) == 0
    assert main([*argv, f"--output={tmp_path}/whole"]) == 0
    one, other = capsys.readouterr().out.splitlines()
    assert one == other and (tmp_path / "said").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many.jsonl", "said", "whole"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--task=choices.jsonl", "--text=x"],
            "--text is for measuring a text, and --task asks questions: leave it out",
        ),
        (["--task=choices.jsonl", "--context=64"], "--context is for measuring a text, and --task asks"),
        (["--limit=3"], "--limit is for --task, which is not given: leave it out"),
        (["--output=x"], "--output is for --task, which is not given: leave it out"),
        (["--task=choices.jsonl,"], "--task=choices.jsonl,: expected a file, or several separated by commas"),
        (["--task=none.jsonl"], "none.jsonl: no such file: expected one JSON object"),
        (["--task=choices.jsonl", "--fewshot=9"], "fewshot is 9: expected a whole number from 0 to 4"),
        (["--task=choices.jsonl", "--output=clozes.jsonl"], "clozes.jsonl: exists already"),
    ],
)
def test_eval_refuses(flags: list[str], message: str, folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    assert main(["eval", "--model=one", *flags]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("llamajax: ") and message in err and err.count("\n") == 1


def test_differences_are_of_the_same_questions(tiny_model: Llama, tiny_tokenizer: Tokenizer) -> None:
    ours, theirs = (
        evaluate_task(tiny_model, tiny_tokenizer, questions, batch=4) for questions in (CHOICES, CHOICES[:3])
    )
    with pytest.raises(
        LlamaJaxError, match="5 questions of shape choices, the reference 3 of choices: expected the same"
    ):
        differences(ours, theirs)
