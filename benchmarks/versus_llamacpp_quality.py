"""Our recipes beside llama.cpp's types on the model in the box: bits per weight against loss of quality.

    pip install 'llamajax[llamacpp,plot]'
    python benchmarks/versus_llamacpp_quality.py

The box is written to GGUF in float32 and quantized by llama.cpp. Each program runs its models over the same tokens in
the same windows: stories that the box was not trained on. KL divergence and agreement are against the same program's
float32 logits, which are first checked to agree between the programs. llama.cpp rounds activations to 8 bits where it
multiplies by quantized weights; its figures include this rounding. With --dequantize it runs the same weights in
float32, so that only the error of the weights is left. Our weights are in the layout of this machine; with
--reference_products they are dequantized whole, in float32.

Bits per weight count all tensors, norms included, and no metadata. Everything that needs calibration, our recipes and
importance matrices, uses the same stories. Prints one table; --picture draws it, too.
"""

import collections
import json
import logging
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from gguf_files import quantize_gguf, read_model, tensors_of, write_gguf
from yardstick_llamacpp import importance_matrix

import llamajax
from llamajax.box.stories import corpus
from llamajax.cli.terminal import progress
from llamajax.evaluation.evaluate import Comparison, compare, encode_documents
from llamajax.evaluation.plots import Point, quality_curve
from llamajax.evaluation.windows import document_windows
from llamajax.quantization.calibrate import calibration_windows
from llamajax.quantization.quantize import quantize, read_recipe, recipe_names
from llamajax.train import heldout_stories

try:
    import gguf
    import llama_cpp
except ImportError:
    sys.exit("llama.cpp's Python binding is needed: pip install 'llamajax[llamacpp]'")

logging.getLogger("gguf").setLevel(logging.WARNING)  # It logs what it writes.

WINDOW = 512
# llama.cpp's threads wait for each other by spinning: under other load, two threads took seven times as long as one. No
# figure depends on this number.
RUNNING_THREADS = 1
CALIBRATION_TOKENS = 65536  # of stories that are not measured on, for our recipes and for importance matrices
_WITH_IMPORTANCE = "llama.cpp, importance matrix"
_TARGETS, _SEARCHED = "llamajax, target_bpw", "mixed-4.5bpw"
_MOST_BITS_DRAWN = 6  # points with more bits are not drawn: no curve is visible there
_MOST_DIVERGENCE_DRAWN = 0.1  # nats; above it a model is useless, for example an untrained ternary one


class Row(NamedTuple):
    """One point of a curve.

    Attributes:
        name: the recipe, or llama.cpp's type.
        family: the program and method that made it; each family is one curve.
        bits: bits per weight.
        bytes: the bytes of all tensors.
        result: the comparison with the same program's float32 model.
        tensors: the type of each tensor of a GGUF file, and the size of the file.
    """

    name: str
    family: str
    bits: float
    bytes: int
    result: Comparison
    tensors: dict[str, str | int]


# ---- llama.cpp ------------------------------------------------------------------------------------------------------


def open_gguf(path: Path) -> llama_cpp.Llama:
    """Opens a model with a context of one window and float32 keys and values, because only weights are compared."""
    length = {"n_ctx": WINDOW, "n_batch": WINDOW, "n_ubatch": WINDOW}
    threads = {"n_threads": RUNNING_THREADS, "n_threads_batch": RUNNING_THREADS}
    cache = {"type_k": int(gguf.GGMLQuantizationType.F32), "type_v": int(gguf.GGMLQuantizationType.F32)}
    return llama_cpp.Llama(str(path), logits_all=True, verbose=False, **length, **threads, **cache)


def gguf_logits(model: llama_cpp.Llama, tokens: np.ndarray) -> np.ndarray:
    """Returns logits [T, V] of one window from position 0, without a BOS; the next call overwrites them."""
    model.reset()
    model.eval(tokens.tolist())
    return model.scores[: len(tokens)]


def all_logits(model: llama_cpp.Llama, tokens: np.ndarray) -> list[np.ndarray]:
    """Returns the logits of every window, for the reference of many comparisons."""
    return [gguf_logits(model, window[:-1]).copy() for window in document_windows(tokens, WINDOW).rows]


def compare_gguf(path: Path, reference: list[np.ndarray], tokens: np.ndarray) -> Comparison:
    """The same as `llamajax.evaluation.evaluate.compare`, with logits of llama.cpp."""
    model = open_gguf(path)
    windows = document_windows(tokens, WINDOW).rows
    sums = np.zeros(len(Comparison._fields))
    with progress(path.stem) as show:
        for done, (window, theirs) in enumerate(zip(windows, reference, strict=True), 1):
            fields = _comparison(gguf_logits(model, window[:-1]), theirs, window[1:])
            sums += np.sum(np.asarray(fields), axis=1, dtype=np.float64)
            show(done, len(windows))
    model.close()
    return Comparison(*(float(value) for value in sums / (len(windows) * WINDOW)))


@jax.jit
def _comparison(ours_TV: jax.Array, theirs_TV: jax.Array, target_T: jax.Array) -> jax.Array:
    """The fields of `Comparison` at each position, float32 [4, T]; the second logits are the reference's."""
    ours_TV, theirs_TV = jax.nn.log_softmax(ours_TV), jax.nn.log_softmax(theirs_TV)
    divergence_T = jnp.sum(jnp.exp(theirs_TV) * (theirs_TV - ours_TV), axis=-1)
    agreement_T = (jnp.argmax(ours_TV, axis=-1) == jnp.argmax(theirs_TV, axis=-1)).astype(jnp.float32)
    losses = [-jnp.take_along_axis(each, target_T[:, None], axis=-1)[:, 0] for each in (ours_TV, theirs_TV)]
    return jnp.stack([divergence_T, agreement_T, *losses])


# ---- Both families --------------------------------------------------------------------------------------------------


def our_rows(model: llamajax.Llama, tokens: np.ndarray, calibration: np.ndarray, sizes: set[float]) -> Iterator[Row]:
    """Yields a row for each of our recipes, and one for each of llama.cpp's sizes with a `target_bpw` of at most it."""
    recipes = {name: ("llamajax, recipes", read_recipe(name)) for name in recipe_names()}
    for size in sizes:
        target = math.floor(size * 100) / 100
        recipe = read_recipe(_SEARCHED).with_target(target)
        recipes[f"target_bpw={target:.2f}"] = (_TARGETS, recipe)
    for name, (family, recipe) in recipes.items():
        quantized = quantize(model, recipe, calibration=calibration)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))
        if not flags.FLAGS.reference_products:
            quantized = llamajax.prepare(quantized, donate=True)
        with progress(name) as show:
            result = compare(quantized, model, tokens, window=WINDOW, on_batch=show)
        yield Row(name, family, 8 * size / model.config.num_parameters, size, result, {})


def llamacpp_rows(
    folder: Path, reference: list[np.ndarray], tokens: np.ndarray, importance: dict[str, np.ndarray] | None = None
) -> Iterator[Row]:
    """Yields a row for each of llama.cpp's types, made from `folder`/float32.gguf."""
    family = _WITH_IMPORTANCE if importance else "llama.cpp"
    for kind in flags.FLAGS.types:
        path = folder / f"{kind}.gguf"
        quantize_gguf(folder / "float32.gguf", path, f"MOSTLY_{kind}", importance)
        kinds, size, count = tensors_of(path)
        tensors = kinds | {"file bytes": path.stat().st_size}
        name = f"{kind}, imatrix" if importance else kind
        if flags.FLAGS.dequantize:
            quantized, path = path, folder / f"{kind}-dequantized.gguf"
            quantize_gguf(quantized, path, "ALL_F32")
        yield Row(name, family, 8 * size / count, size, compare_gguf(path, reference, tokens), tensors)


def check_same_logits(model: llamajax.Llama, reference: list[np.ndarray], tokens: np.ndarray) -> float:
    """Returns the largest difference of float32 logits between the programs over one window; exits if it is large."""
    ours = np.asarray(model(tokens[None, :WINDOW])[0][0])
    difference = float(np.max(np.abs(ours - reference[0])))
    if not difference < 1e-2:
        sys.exit(f"float32 logits differ by {difference:.3g}: expected less than 0.01, so the GGUF file is wrong")
    return difference


def table(rows: list[Row]) -> str:
    """Returns a Markdown table, most bits first."""
    lines = [
        "| | bits a weight | bytes | perplexity | KL divergence, nats | top-1 agreement |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row.bits):
        name = f"`{row.name}`" if row.family.startswith("llamajax") else f"llama.cpp {row.name}"
        perplexity, result = math.exp(row.result.cross_entropy), row.result
        lines.append(
            f"| {name} | {row.bits:.2f} | {row.bytes:,} | {perplexity:.4f} | {result.kl_divergence:.5f} "
            f"| {result.top1_agreement:.2%} |"
        )
    return "\n".join(lines)


def made_of(row: Row) -> str:
    """Returns as text how many tensors of each type a GGUF file holds."""
    counts = collections.Counter(kind for kind in row.tensors.values() if isinstance(kind, str))
    parts = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    return f"{row.name}: {parts}; file of {row.tensors['file bytes']:,} bytes"


def draw(rows: list[Row], picture: Path) -> None:
    """Draws the curves. Points with importance matrices need no label: the same size without one is just above them."""
    points = [
        Point(row.family, "" if row.family == _WITH_IMPORTANCE else row.name, row.bits, row.result.kl_divergence)
        for row in sorted(
            rows, key=lambda row: not row.family.startswith("llamajax")
        )  # first, so that their labels get the best places
        if row.bits <= _MOST_BITS_DRAWN and row.result.kl_divergence <= _MOST_DIVERGENCE_DRAWN
    ]
    quality_curve(points, picture)


def main(argv):
    """Measures all models, draws the curves and prints the table."""
    del argv
    model, tokenizer = llamajax.load("box", dtype=jnp.float32)
    tokens = encode_documents(tokenizer, heldout_stories())
    stories = encode_documents(tokenizer, corpus(0, 600))
    calibration = calibration_windows(stories, model.config, WINDOW, tokenizer.first_id)[: CALIBRATION_TOKENS // WINDOW]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_gguf(folder / "float32.gguf", model.config, read_model(model))
        reference = all_logits(open_gguf(folder / "float32.gguf"), tokens)
        difference = check_same_logits(model, reference, tokens)
        rows = list(llamacpp_rows(folder, reference, tokens))
        if flags.FLAGS.imatrix:
            rows += llamacpp_rows(folder, reference, tokens, importance_matrix(model, calibration))
    rows += our_rows(model, tokens, calibration, {row.bits for row in rows})
    if flags.FLAGS.picture:
        draw(rows, Path(flags.FLAGS.picture))
    products = "reference" if flags.FLAGS.reference_products else f"prepared for {jax.default_backend()}"
    if flags.FLAGS.json:
        entries = [row._asdict() | {"result": row.result._asdict()} for row in rows]
        print(json.dumps({"largest_logit_difference": difference, "products": products, "rows": entries}))
        return
    losses = [next(row.result for row in rows if row.family == family) for family in (_TARGETS, "llama.cpp")]
    ours, theirs = (math.exp(result.reference_cross_entropy) for result in losses)
    print(f"float32: perplexity {ours:.6f} by llamajax, {theirs:.6f} by llama.cpp; over the first window their logits")
    print(f"differ by at most {difference:.2g}. Products of llamajax: {products}.\n")
    print(table(rows), "", *(made_of(row) for row in rows if row.tensors), sep="\n")


if __name__ == "__main__":
    # Defined here and not above, because importing scripts have flags of their own.
    flags.DEFINE_list("types", ["Q4_0", "Q4_1", "Q4_K_M", "Q3_K_M", "Q2_K"], "types that llama.cpp quantizes to")
    flags.DEFINE_bool("imatrix", True, "also measure these types with an importance matrix")
    flags.DEFINE_bool("dequantize", False, "run llama.cpp with its weights in float32, which rounds no activations")
    flags.DEFINE_bool("reference_products", False, "run llamajax with weights dequantized whole, in float32")
    flags.DEFINE_bool("json", False, "print JSON instead of a table")
    flags.DEFINE_string("picture", None, "file to draw the curves to, .svg or .png")
    app.run(main)
