"""The size and quality of each quantization recipe, for the model in the box and stories260K: docs/performance.md.

    python benchmarks/recipes.py [--json] [--reference_products] [--recipes=int4-g32,int4-g128-gptq]

Bits per weight and bytes count all weights at rest, norms included. KL divergence and top-1 agreement are against the
same model in floats, computed in float32 with weights in the layout of this machine or, with --reference_products,
dequantized whole. Calibration uses 65,536 tokens of text that is not measured on. stories260K (weights by others, not
in this repository) is read from the folder that LLAMAJAX_SHARED names; without it its table is omitted.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import llamajax
from llamajax.box.stories import corpus
from llamajax.evaluation.evaluate import compare, encode_documents
from llamajax.quantization.quantize import quantize, recipe_names
from llamajax.train import heldout_stories

_RECIPES = flags.DEFINE_list("recipes", None, "recipes to measure; all unless given")
_JSON = flags.DEFINE_boolean("json", False, "print JSON")
_REFERENCE_PRODUCTS = flags.DEFINE_boolean(
    "reference_products", False, "measure unprepared weights, which are dequantized whole in float32"
)
_CALIBRATION_TOKENS = 65536
_MEASURED_BYTES = 1 << 18  # of the TinyStories sample, as in docs/performance.md


class Subject(NamedTuple):
    """A model, tokens for calibration and tokens to measure on."""

    name: str
    model: llamajax.Llama
    calibration: np.ndarray
    measured: np.ndarray


class Row(NamedTuple):
    """One line of a table."""

    model: str
    recipe: str
    bits_per_weight: float
    bytes: int
    perplexity: float
    kl_divergence: float
    top1_agreement: float
    products: str


def box() -> Subject:
    """Loads the model in the box, stories that it was trained on, and 200 stories that it was not trained on."""
    model, tokenizer = llamajax.load("box", dtype=jnp.float32)
    assert tokenizer is not None
    seen = encode_documents(tokenizer, list(corpus(0, 600)))[:_CALIBRATION_TOKENS]
    return Subject("box", model, seen, encode_documents(tokenizer, heldout_stories()))


def stories260k() -> Subject | None:
    """Loads stories260K and TinyStories: the first 256 KiB to measure on, the text from 512 KiB on for calibration."""
    folder = Path(os.environ.get("LLAMAJAX_SHARED", "")) / "data"
    if not os.environ.get("LLAMAJAX_SHARED") or not folder.is_dir():
        return None
    weights = folder / "stories260K"
    model, tokenizer = llamajax.load(weights / "stories260K.bin", tokenizer=weights / "tok512.model")
    assert tokenizer is not None
    text = (folder / "tinystories" / "tinystories_sample_2MiB.txt").read_bytes()
    parts = [
        part.decode("utf-8", "ignore").split("<|endoftext|>") for part in (text[:_MEASURED_BYTES], text[1 << 19 :])
    ]
    measured, rest = ([story.strip() for story in stories if story.strip()] for stories in parts)
    seen = encode_documents(tokenizer, rest)[:_CALIBRATION_TOKENS]
    return Subject("stories260K", model, seen, encode_documents(tokenizer, measured))


def products() -> str:
    """Returns as text how quantized weights are multiplied."""
    return "reference" if _REFERENCE_PRODUCTS.value else f"prepared for {jax.default_backend()}"


def rows(subject: Subject, names: list[str]) -> list[Row]:
    """Measures all recipes; returns a row for 16-bit floats, then a row for each recipe, the largest first."""
    made, parameters = [], subject.model.config.num_parameters
    loss = math.nan
    for name in names:
        print(f"{subject.name}: {name}", file=sys.stderr)
        quantized = quantize(subject.model, name, calibration=subject.calibration)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))
        measured = quantized if _REFERENCE_PRODUCTS.value else llamajax.prepare(quantized, donate=True)
        result = compare(measured, subject.model, subject.measured)
        loss = result.reference_cross_entropy
        perplexity = math.exp(result.cross_entropy)
        distance = result.kl_divergence, result.top1_agreement
        made.append(Row(subject.name, name, 8 * size / parameters, size, perplexity, *distance, products()))
    floats = Row(subject.name, "16-bit floats", 16.0, 2 * parameters, math.exp(loss), 0.0, 1.0, products())
    return [floats, *sorted(made, key=lambda row: -row.bytes)]


def main(argv):
    """Measures both models and prints the tables."""
    del argv
    subjects = [subject for subject in (box(), stories260k()) if subject is not None]
    tables = [rows(subject, _RECIPES.value or recipe_names()) for subject in subjects]
    if _JSON.value:
        print(json.dumps([row._asdict() for table in tables for row in table]))
        return
    for subject, table in zip(subjects, tables, strict=True):
        print(f"\n{subject.name}, products: {products()}:\n")
        print("| recipe | bits a weight | bytes | perplexity | KL divergence, nats | top-1 agreement |")
        print("|---|---|---|---|---|---|")
        for row in table:
            name = row.recipe if row.bits_per_weight == 16 else f"`{row.recipe}`"
            divergence = f"{row.kl_divergence:.5f}" if row.kl_divergence else "0"
            print(
                f"| {name} | {row.bits_per_weight:.2f} | {row.bytes:,} | {row.perplexity:.4f} | {divergence} "
                f"| {row.top1_agreement:.2%} |"
            )


if __name__ == "__main__":
    app.run(main)
