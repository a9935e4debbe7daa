"""`llamajax eval`: measures how well models predict a text or answer questions, and their distance to a reference."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich.table import Table

from llamajax.checkpoint import Opened, need_tokenizer, read_tokenizer
from llamajax.cli import evaluate_tasks
from llamajax.cli.evaluate_models import about, check_named, layout, products, size_cells, size_of, without_infinities
from llamajax.cli.flag_groups import COMMON, SPEED, group
from llamajax.cli.model_flags import (
    chosen_activations,
    chosen_dtype,
    define_activations,
    define_dtype,
    define_model,
    define_threads,
    open_named,
    read_model,
)
from llamajax.cli.terminal import as_json, printable, progress, show, write
from llamajax.errors import LlamaJaxError
from llamajax.evaluation.evaluate import (
    DOCUMENT_SEPARATOR,
    compare_each,
    read_text,
    standard_error,
    text_windows,
    token_losses,
)
from llamajax.evaluation.noise import layer_noise, same_weights, weight_noise
from llamajax.evaluation.plots import Point, check_picture, error_by_layer, quality_curve
from llamajax.evaluation.windows import CONVENTIONS, Windows
from llamajax.model import Llama
from llamajax.train import heldout_stories

SUMMARY = "measure perplexity or accuracy of models, and how far they are from a reference"
EXAMPLES = (
    "llamajax eval --model=box-int8,box-int4 --reference=box --plot=curve.svg",
    "llamajax eval --model=any-llama.gguf --text=wiki.test.raw --convention=llama.cpp",
    "llamajax eval --model=any-llama.gguf --task=copa.jsonl,openbook_qa.jsonl",
)
_LARGEST_LOSS = 700.0  # its exponential is still a finite float
_DIFFERENT = "the architectures differ, so their layers cannot be compared"


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    define_model(values, several=True)
    with group(values, COMMON):
        flags.DEFINE_string(
            "text",
            "stories",
            "Measures perplexity on the text in `FILE` (UTF-8). stories are 200 stories that the included model was "
            "not trained on.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "reference",
            None,
            "Compares with this `MODEL`: KL divergence, top-1 agreement, and signal to noise by layer and by weight.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "plot",
            None,
            "Draws a picture to `FILE`, .svg or .png: the error by layer of one model, or KL divergence against bits "
            "per weight of several. Needs --reference and pip install 'llamajax[plot]'.",
            flag_values=values,
        )
        flags.DEFINE_boolean(
            "json", False, "Prints one JSON object for each model instead of tables.", flag_values=values
        )
    with group(values, "Text"):
        flags.DEFINE_enum(
            "convention",
            "documents",
            CONVENTIONS,
            "`RULE` for splitting and scoring the text. documents: splits at <|endoftext|>, puts BOS before each part, "
            "and scores every token; later windows of a part begin without BOS, which Gemma, for example, needs. "
            "llama.cpp: cuts the file into chunks that begin with BOS and scores their second half, as its perplexity "
            "tool does; usual with --context=512. gptq: joins lines by blank lines and scores whole windows, as papers "
            "on quantization do; usual with --context=2048.",
            flag_values=values,
        )
        flags.DEFINE_integer(
            "context", 512, "Runs the model on windows of `N` tokens, which do not overlap.", flag_values=values
        )
    evaluate_tasks.define(values)
    define_dtype(values)
    define_activations(values)
    define_threads(values)
    with group(values, SPEED):
        flags.DEFINE_integer("batch", 8, "Evaluates `N` windows or answers at once.", flag_values=values)
        flags.DEFINE_boolean(
            "reference_products",
            False,
            "Dequantizes each weight to float32 before it is multiplied. Without this flag the weights have the layout "
            "that generate uses, and the results include the rounding of that layout.",
            flag_values=values,
        )


def run(values: flags.FlagValues) -> None:
    """Measures, prints tables or JSON, and draws a picture if asked."""
    _check(values)
    if values.task:
        evaluate_tasks.run(values)
        return
    checkpoints = [open_named(values, name) for name in values.model]
    reference = open_named(values, values.reference) if values.reference else None
    windows = _windows(values, [*checkpoints, reference] if reference else checkpoints)
    if values.plot and reference and len(checkpoints) == 1:
        if not same_weights(checkpoints[0].abstract, reference.abstract):
            raise LlamaJaxError(f"--plot={values.plot}: {_DIFFERENT}")
    backend = layout(values)
    reference_model = read_model(reference, chosen_dtype(values), backend=backend) if reference else None
    results: list[dict[str, Any]] = []
    try:
        for result in _results(values, windows, checkpoints, reference, reference_model):
            results.append(result)
            if values.json:
                write(as_json(without_infinities(result)))
    finally:  # an error in one model does not lose the results of the models before it
        if results and not values.json:
            _print(results)
    if values.plot:
        _draw(results, values.plot)


def _results(
    values: flags.FlagValues,
    windows: Windows,
    checkpoints: list[Opened],
    reference: Opened | None,
    reference_model: Llama | None,
) -> Iterator[dict[str, Any]]:
    """Yields the result of each model."""
    for name, checkpoint in zip(values.model, checkpoints, strict=True):
        result = {
            "model": name,
            "text": values.text,
            "convention": values.convention,
            "context": values.context,
            "windows": len(windows.rows),
            "predictions": windows.predictions,
            "products": products(values),
        }
        model = read_model(
            checkpoint, chosen_dtype(values), backend=layout(values), activations=chosen_activations(values)
        )
        if reference is None or reference_model is None:
            with progress(f"evaluating {name}") as on_batch, about(name):
                losses = token_losses(model, windows, batch=values.batch, on_batch=on_batch)
                result |= _score(losses) | size_of(checkpoint)
        else:
            with about(f"{name} beside {values.reference}"):
                measured, reference_losses = _compare(model, reference_model, windows, values.batch, name)
            result |= measured | size_of(checkpoint)
            result["reference"] = {"model": values.reference, **_score(reference_losses), **size_of(reference)}
        del model  # before the next one is read
        yield result


def _check(values: flags.FlagValues) -> None:
    """Checks the flags, as far as that needs no file."""
    if values.context < 1 or values.batch < 1:
        raise LlamaJaxError(f"--context={values.context}, --batch={values.batch}: expected at least 1 for each")
    check_named(values)
    evaluate_tasks.check(values)
    if values.plot:
        if not values.reference:
            raise LlamaJaxError(
                "--plot is given without --reference: it draws the distance to a reference: add --reference=MODEL"
            )
        check_picture(values.plot)


def _windows(values: flags.FlagValues, checkpoints: list[Opened]) -> Windows:
    """The text in windows; all models must encode it to the same tokens, so that their results are comparable."""
    if values.text == "stories":
        text = (DOCUMENT_SEPARATOR if values.convention == "documents" else "\n\n").join(heldout_stories())
    else:
        text = read_text(values.text)
    windows: Windows | None = None
    for checkpoint in checkpoints:
        path, length = checkpoint.path, checkpoint.config.context_length
        if values.context > length:
            raise LlamaJaxError(
                f"--context={values.context}: expected at most {length}, the context of {path}: --context={length} "
                "works"
            )
        tokenizer = (need_tokenizer if windows is None else read_tokenizer)(checkpoint, values.tokenizer)
        if tokenizer is not None and (windows is None or values.tokenizer is None):
            cut = text_windows(text, tokenizer, values.context, values.convention)
            if windows is not None and not np.array_equal(cut.rows, windows.rows):
                raise LlamaJaxError(
                    f"{path} and {values.model[0]} have different tokenizers: expected models of one tokenizer"
                )
            windows = cut
        if windows is not None and windows.rows.max() >= checkpoint.config.vocab_size:
            raise LlamaJaxError(
                f"{path}: the text contains token {windows.rows.max()}: expected ids below "
                f"{checkpoint.config.vocab_size}, "
                "the size of the vocabulary: check --tokenizer"
            )
    assert windows is not None, "at least one checkpoint"
    return windows


def _compare(
    model: Llama, reference: Llama, windows: Windows, batch: int, name: str
) -> tuple[dict[str, Any], np.ndarray]:
    """The result of a model compared with a reference, and the reference's losses."""
    with progress(f"comparing {name}") as on_batch:
        each = compare_each(model, reference, windows, batch=batch, on_batch=on_batch)
    divergence, agreement, losses, reference_losses = each
    result = _score(losses) | {
        "kl_divergence": float(np.mean(divergence, dtype=np.float64)),
        "kl_standard_error": standard_error(divergence),
        "kl_99th_percentile": float(np.quantile(divergence, 0.99)),
        "kl_max": float(np.max(divergence)),
        "top1_agreement": float(np.mean(agreement, dtype=np.float64)),
        "signal_to_noise_db": None,
    }
    if same_weights(model, reference):
        with progress(f"signal to noise of {name}") as on_batch:
            by_layer = layer_noise(model, reference, windows, batch=batch, on_batch=on_batch)
        result["signal_to_noise_db"] = {**by_layer._asdict(), "weights": weight_noise(model, reference)}
    return result, reference_losses


def _score(losses: np.ndarray) -> dict[str, Any]:
    loss, error = float(np.mean(losses, dtype=np.float64)), standard_error(losses)
    if loss > _LARGEST_LOSS:
        raise LlamaJaxError(
            f"cross-entropy is {loss:.0f} nats per token: expected at most {_LARGEST_LOSS:.0f}: the perplexity "
            "overflows"
        )
    perplexity = math.exp(loss)
    return {
        "cross_entropy_nats": loss,
        "cross_entropy_standard_error": error,
        "perplexity": perplexity,
        "perplexity_standard_error": perplexity * error,
    }


def _print(results: list[dict[str, Any]]) -> None:
    """Prints one row per model, the reference first; for a single model also a table of its layers."""
    first = results[0]
    reference = first.get("reference")
    cut = f"{first['windows']:,} windows of {first['context']:,} tokens, {first['predictions']:,} predictions"
    title = f"{printable(first['text'])} by convention {first['convention']}: {cut}; products: {first['products']}"
    table = Table(title=title, title_justify="left")
    columns = ["bits a\nweight", "in memory", "on disk", "nats a\ntoken", "perplexity"]
    columns += ["KL divergence,\nnats", "its 99th\npercentile", "top-1\nagreement"] if reference else []
    table.add_column("model")
    for column in columns:
        table.add_column(column, justify="right")
    for result in [reference, *results] if reference else results:
        cells = [
            *size_cells(result),
            f"{result['cross_entropy_nats']:.4f}",
            f"{result['perplexity']:.4f} ± {result['perplexity_standard_error']:.4f}",
        ]
        if "kl_divergence" in result:
            cells += [
                f"{result['kl_divergence']:.5f} ± {result['kl_standard_error']:.5f}",
                f"{result['kl_99th_percentile']:.5f}",
                f"{result['top1_agreement']:.2%}",
            ]
        table.add_row(printable(result["model"]), *cells, end_section=result is reference)
    show(table)
    if reference and len(results) == 1:
        show(_layer_table(first["signal_to_noise_db"]) if first["signal_to_noise_db"] else _DIFFERENT)


def _layer_table(noise: dict[str, Any]) -> Table:
    """Table of signal-to-noise ratios in dB; a column for each weight of the layers that differs from the reference."""
    weights = {name: values for name, values in noise["weights"].items() if any(map(math.isfinite, values))}
    inside = {name.removeprefix("layers."): v for name, v in weights.items() if name.startswith("layers.")}
    outside = [f"{name} {_decibels(v[0])}" for name, v in weights.items() if not name.startswith("layers.")]
    table = Table(title="signal to noise by layer, dB", title_justify="left", caption_justify="left")
    table.caption = f"weights outside of the layers: {', '.join(outside)}" if outside else None
    for column in ("layer", "residual\nstream", *(name.replace(".", "\n") for name in inside)):
        table.add_column(column, justify="right")
    table.add_row("embedding", _decibels(noise["embedding"]))
    for layer, value in enumerate(noise["layers"]):
        table.add_row(str(layer), _decibels(value), *(_decibels(values[layer]) for values in inside.values()))
    table.add_row("logits", _decibels(noise["logits"]))
    return table


def _decibels(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.2f}"


def _draw(results: list[dict[str, Any]], path: str) -> None:
    if len(results) == 1:
        noise = results[0]["signal_to_noise_db"]
        stacked = {name: v for name, v in noise["weights"].items() if name.startswith("layers.")}
        weights = {name.removeprefix("layers."): values for name, values in stacked.items()}
        error_by_layer(noise["layers"], noise["logits"], weights, path)
        return
    family = f"against {results[0]['reference']['model']}"
    names = [Path(result["model"]).name for result in results]
    if len(set(names)) < len(names):
        names = [result["model"] for result in results]
    points = zip(names, results, strict=True)
    quality_curve([Point(family, name, r["bits_per_weight"], r["kl_divergence"]) for name, r in points], path)
