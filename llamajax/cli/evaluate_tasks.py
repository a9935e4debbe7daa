"""`llamajax eval --task`: measures how often models answer the questions of public suites correctly."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from rich.table import Table

from llamajax.checkpoint import Opened, need_tokenizer
from llamajax.cli.evaluate_models import about, layout, products, size_cells, size_of
from llamajax.cli.flag_groups import group
from llamajax.cli.model_flags import chosen_activations, chosen_dtype, open_named, read_model
from llamajax.cli.terminal import as_json, printable, progress, show, write
from llamajax.errors import LlamaJaxError
from llamajax.evaluation.tasks import MAX_NEW_TOKENS, STOP, Measure, TaskResult, differences, evaluate_task
from llamajax.evaluation.tasks_read import read_questions
from llamajax.files import check_absent, new_file
from llamajax.model import Llama
from llamajax.tokenizer import Tokenizer

# Flags that go with questions only, and flags that go with a text only.
_OF_TASKS = ("limit", "fewshot", "prefix", "delimiter", "stop", "max_new_tokens", "output")
_OF_TEXTS = ("text", "convention", "context", "plot")
# The measures that a table shows, where a task has them.
_SHOWN = ("acc", "acc_norm", "perplexity", "exact_match", "number_match")


def define(values: flags.FlagValues) -> None:
    """Flags of `--task`."""
    with group(values, "Questions"):
        flags.DEFINE_list(
            "task",
            [],
            "Asks the questions in `FILES`, separated by commas, instead of measuring --text. Each line is a JSON "
            "object: query, choices and gold for multiple choice; context and continuation for cloze; question or "
            "context, and answer, for a short generated answer. The conventions are those of lm-evaluation-harness "
            "(docs/tasks.md). With --reference the difference from the reference is printed too.",
            flag_values=values,
        )
        flags.DEFINE_integer("limit", None, "Asks only the first `N` questions of each file.", flag_values=values)
        flags.DEFINE_integer(
            "fewshot",
            0,
            "Shows the first `N` questions of the file, with answers, before each one.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "prefix",
            None,
            "Puts `TEXT` before each question. Without this flag it is 'Question: ' for generated answers, and empty "
            "otherwise.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "delimiter",
            None,
            "Puts `TEXT` behind each question. Without this flag it is a new line and 'Answer:' for generated answers, "
            "and a space otherwise.",
            flag_values=values,
        )
        flags.DEFINE_multi_string(
            "stop", list(STOP), "Ends a generated answer before `TEXT`. May be repeated.", flag_values=values
        )
        flags.DEFINE_integer(
            "max_new_tokens", MAX_NEW_TOKENS, "Generates at most `N` tokens for an answer.", flag_values=values
        )
        flags.DEFINE_string(
            "output",
            None,
            "Writes the answers of each model to `FILE`, as JSON lines. It must not exist. Finished batches are kept "
            "in FILE.work, and the same command continues where it was stopped.",
            flag_values=values,
        )


def check(values: flags.FlagValues) -> None:
    """Refuses flags that do not go with questions, or that do not go with a text."""
    wrong = [name for name in (_OF_TEXTS if values.task else _OF_TASKS) if values[name].present]
    if wrong:
        goes = (
            "is for measuring a text, and --task asks questions" if values.task else "is for --task, which is not given"
        )
        raise LlamaJaxError(f"--{wrong[0]} {goes}: leave it out")
    if not all(values.task):
        raise LlamaJaxError(f"--task={','.join(values.task)}: expected a file, or several separated by commas")


def run(values: flags.FlagValues) -> None:
    """Asks the questions, prints tables or JSON, and writes the answers to --output."""
    output = None if values.output is None else Path(values.output)
    if output is not None:
        check_absent(output)
    for task in values.task:
        read_questions(task)  # finds an error in a file before hours of work
    names = [*([values.reference] if values.reference else []), *values.model]
    opened = [open_named(values, name) for name in names]
    tokenizers = [need_tokenizer(checkpoint, values.tokenizer) for checkpoint in opened]
    work = None if output is None else output.absolute().with_name(f"{output.name}.work")
    results: list[dict[str, Any]] = []
    said: list[dict[str, Any]] = []
    try:
        for result, outcomes in _results(values, list(zip(names, opened, tokenizers, strict=True)), work):
            results.append(result)
            said += outcomes
            if values.json:
                write(as_json(result))
    finally:  # an error in one model does not lose the results of the models before it
        if results and not values.json:
            _print(values, results)
    if output is not None and work is not None:
        with new_file(output) as partial:
            partial.write_text("".join(f"{as_json(line)}\n" for line in said), encoding="utf-8")
        _remove(work)


def _results(
    values: flags.FlagValues, models: list[tuple[str, Opened, Tokenizer]], work: Path | None
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yields, for each model and task, the result to print and the answers; the reference comes first."""
    references: dict[str, TaskResult] = {}
    for number, (name, checkpoint, tokenizer) in enumerate(models):
        is_reference = bool(values.reference) and number == 0
        activations = None if is_reference else chosen_activations(values)
        model = read_model(checkpoint, chosen_dtype(values), backend=layout(values), activations=activations)
        for place, task in enumerate(values.task):
            folder = None if work is None else work / f"{number}-{place}"
            with about(f"{name}, {task}"):
                result = _asked(values, model, tokenizer, task, folder, f"{Path(name).name}: {Path(task).name}")
            if is_reference:
                references[task] = result
            yield (
                _described(values, name, checkpoint, task, result, None if is_reference else references.get(task)),
                [{"model": name, "task": task, "question": i, **o} for i, o in enumerate(result.outcomes, 1)],
            )
        del model  # before the next one is read


def _asked(
    values: flags.FlagValues, model: Llama, tokenizer: Tokenizer, task: str, folder: Path | None, label: str
) -> TaskResult:
    with progress(label) as on_batch:
        return evaluate_task(
            model,
            tokenizer,
            task,
            prefix=values.prefix,
            delimiter=values.delimiter,
            fewshot=values.fewshot,
            limit=values.limit,
            stop=values.stop,
            max_new_tokens=values.max_new_tokens,
            batch=values.batch,
            work=folder,
            on_batch=on_batch,
        )


def _described(
    values: flags.FlagValues,
    name: str,
    checkpoint: Opened,
    task: str,
    result: TaskResult,
    reference: TaskResult | None,
) -> dict[str, Any]:
    """The JSON object of one model and task."""
    return {
        "model": name,
        "task": task,
        "shape": result.shape,
        "questions": len(result.outcomes),
        "fewshot": values.fewshot,
        "products": products(values),
        **_flat(result.measures),
        **size_of(checkpoint),
        **({"difference": {"to": values.reference, **_flat(differences(result, reference))}} if reference else {}),
    }


def _flat(measures: Mapping[str, Measure]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, measure in measures.items():
        found |= {name: measure.value, f"{name}_standard_error": measure.standard_error}
    return found


def _remove(work: Path) -> None:
    """Removes the folders of finished batches."""
    from llamajax.quantization.resume import remove_parts

    for folder in work.iterdir():
        remove_parts(folder)
    remove_parts(work)


# ---- Tables ----------------------------------------------------------------------------------------------------------


def _print(values: flags.FlagValues, results: list[dict[str, Any]]) -> None:
    """Prints a table for each task, with one row per model."""
    for task in values.task:
        rows = [result for result in results if result["task"] == task]
        if rows:
            show(_table(values, task, rows))


def _table(values: flags.FlagValues, task: str, rows: list[dict[str, Any]]) -> Table:
    examples = f", {values.fewshot} examples before each" if values.fewshot else ""
    title = f"{printable(task)}: {rows[0]['questions']:,} questions{examples}; products: {rows[0]['products']}"
    table = Table(title=title, title_justify="left")
    shown = [name for name in _SHOWN if name in rows[0]]
    compared = [name for name in shown if name in rows[-1].get("difference", {})]
    table.add_column("model")
    for column in ("bits a\nweight", "in memory", "on disk", *shown, *(f"{name},\ndifference" for name in compared)):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [_cell(name, row) for name in shown]
        cells += [_cell(name, row["difference"], sign="+") if "difference" in row else "" for name in compared]
        table.add_row(
            printable(row["model"]), *size_cells(row), *cells, end_section=bool(compared) and "difference" not in row
        )
    return table


def _cell(name: str, of: Mapping[str, Any], sign: str = "") -> str:
    """A value and its standard error; accuracies in per cent, differences of accuracies in percentage points."""
    value, error = of[name], of[f"{name}_standard_error"]
    if value is None:
        return "overflows"
    scale, digits = (1, 4) if name == "perplexity" else (100, 2)
    behind = "" if error is None else f" ± {scale * error:.{digits}f}"
    return f"{scale * value:{sign}.{digits}f}{behind}"
