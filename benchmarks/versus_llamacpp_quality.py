"""Our recipes beside llama.cpp's types on the model in the box: bits a weight against what they cost.

    pip install 'llamajax[llamacpp,plot]'
    python benchmarks/versus_llamacpp_quality.py

The box is written to GGUF in float32, llama.cpp quantizes it, and each program runs what it made over the same tokens
in the same windows: stories that the box was not trained on. KL divergence and agreement are against the same program's
float32 logits, which are first checked to be the same in both. llama.cpp rounds activations to 8 bits where it
multiplies by quantized weights; that is how it runs them, and it is in its figures. With --dequantize it runs the same
weights in float32: what is left is the error of the weights. Our weights are laid out as they run on this machine; with
--reference_products they are dequantized whole, in float32.

Bits a weight count all tensors, norms included, and no metadata. What needs calibration, our recipes and importance
matrices, sees the same stories. Prints one table and draws `docs/images/quality.svg`.
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

import llamajax
from llamajax.box.stories import corpus
from llamajax.cli.terminal import progress
from llamajax.evaluation.evaluate import Comparison, compare, encode_documents
from llamajax.evaluation.plots import Point, quality_curve
from llamajax.evaluation.windows import document_windows
from llamajax.parameters import inputs
from llamajax.quantization import calibrate
from llamajax.quantization.quantize import quantize, read_recipe, recipe_names
from llamajax.train import heldout_stories

try:
    import gguf
    import llama_cpp
except ImportError:
    sys.exit("llama.cpp's Python binding is needed: pip install 'llamajax[llamacpp]'")

logging.getLogger("gguf").setLevel(logging.WARNING)  # It tells what it writes.

WINDOW = 512
# llama.cpp's threads wait for each other by spinning: on a machine that does something else, too, two took seven times
# as long as one. No figure depends on it.
RUNNING_THREADS = 1
CALIBRATION_TOKENS = 65536  # of stories that are not measured on: for our recipes and for importance matrices
_WITH_IMPORTANCE = "llama.cpp, importance matrix"
_TARGETS, _SEARCHED = "llamajax, target_bpw", "mixed-4.5bpw"
_MOST_BITS_DRAWN = 6  # beyond, no curve to see
_MOST_DIVERGENCE_DRAWN = 0.1  # nats; beyond, no model left: ternary weights, say, in one not trained for them
_PICTURE = Path(__file__).parents[1] / "docs" / "images" / "quality.svg"


class Row(NamedTuple):
    """One point of a curve.

    Attributes:
        name: recipe, or llama.cpp's type.
        family: who made it; one curve each.
        bits: per weight.
        bytes: of all tensors.
        result: beside the same program's float32 model.
        tensors: what the tensors of a GGUF file became, and the size of the file.
    """

    name: str
    family: str
    bits: float
    bytes: int
    result: Comparison
    tensors: dict[str, str | int]


# ---- llama.cpp ------------------------------------------------------------------------------------------------------


def open_gguf(path: Path) -> llama_cpp.Llama:
    """A model of one window, with float32 keys and values: what is measured is the weights."""
    length = {"n_ctx": WINDOW, "n_batch": WINDOW, "n_ubatch": WINDOW}
    threads = {"n_threads": RUNNING_THREADS, "n_threads_batch": RUNNING_THREADS}
    cache = {"type_k": int(gguf.GGMLQuantizationType.F32), "type_v": int(gguf.GGMLQuantizationType.F32)}
    return llama_cpp.Llama(str(path), logits_all=True, verbose=False, **length, **threads, **cache)


def gguf_logits(model: llama_cpp.Llama, tokens: np.ndarray) -> np.ndarray:
    """Logits of one window from position 0, no BOS added, [T, V]; overwritten by the next call."""
    model.reset()
    model.eval(tokens.tolist())
    return model.scores[: len(tokens)]


def all_logits(model: llama_cpp.Llama, tokens: np.ndarray) -> list[np.ndarray]:
    """Logits of every window: of the reference, which is compared with many times."""
    return [gguf_logits(model, window[:-1]).copy() for window in document_windows(tokens, WINDOW).rows]


def compare_gguf(path: Path, reference: list[np.ndarray], tokens: np.ndarray) -> Comparison:
    """`llamajax.evaluation.evaluate.compare`, by llama.cpp."""
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


def importance_matrix(model: llamajax.Llama, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """What `llama-imatrix` collects: the mean square of each input of every matrix but the embedding and head."""
    rows = calibrate.calibration_windows(tokens, model.config, WINDOW)
    x_WTD = np.array(model.embed_VD[rows])
    names = {"attention": ("attn_q", "attn_k", "attn_v"), "out": ("attn_output",)}
    names |= {"ffn": ("ffn_gate", "ffn_up"), "down": ("ffn_down",)}
    means = {}
    for layer in range(model.config.num_layers):
        block, numbers = model.layer(layer), model.config.numbers(layer)
        first = {group: members[0] for group, members in inputs(model.config, layer).items()}
        for group, statistics in calibrate.observe(block, x_WTD, first, hessians=False, numbers=numbers).items():
            mean = np.array(statistics.mean_square_K, np.float32)
            means |= {f"blk.{layer}.{name}.weight": mean for name in names[group]}
        x_WTD = calibrate.advance(block, x_WTD, numbers)
    return means


# ---- Both families --------------------------------------------------------------------------------------------------


def our_rows(model: llamajax.Llama, tokens: np.ndarray, calibration: np.ndarray, sizes: set[float]) -> Iterator[Row]:
    """A row for each of our recipes, and one for each of llama.cpp's sizes, by `--target_bpw` of no more than that."""
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
    """A row for each of llama.cpp's types, made from `folder`/float32.gguf."""
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
    """Largest difference between our float32 logits and llama.cpp's over one window; large means a wrong GGUF file."""
    ours = np.asarray(model(tokens[None, :WINDOW])[0][0])
    difference = float(np.max(np.abs(ours - reference[0])))
    if not difference < 1e-2:
        sys.exit(f"float32 logits differ by {difference:.3g}: expected less than 0.01, so the GGUF file is wrong")
    return difference


def table(rows: list[Row]) -> str:
    """Markdown, most bits first."""
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
    """How many tensors a GGUF file holds of each type."""
    counts = collections.Counter(kind for kind in row.tensors.values() if isinstance(kind, str))
    parts = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    return f"{row.name}: {parts}; file of {row.tensors['file bytes']:,} bytes"


def draw(rows: list[Row], picture: Path) -> None:
    """The curves. An importance matrix changes no size: such a point needs no label, its type's is just above it."""
    points = [
        Point(row.family, "" if row.family == _WITH_IMPORTANCE else row.name, row.bits, row.result.kl_divergence)
        for row in sorted(
            rows, key=lambda row: not row.family.startswith("llamajax")
        )  # whose labels then have the best places
        if row.bits <= _MOST_BITS_DRAWN and row.result.kl_divergence <= _MOST_DIVERGENCE_DRAWN
    ]
    quality_curve(points, picture)


def main(argv):
    """Measures, prints, draws."""
    del argv
    model, tokenizer = llamajax.load("box", dtype=jnp.float32)
    tokens = encode_documents(tokenizer, heldout_stories())
    calibration = encode_documents(tokenizer, corpus(0, 600))[:CALIBRATION_TOKENS]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_gguf(folder / "float32.gguf", model.config, read_model(model))
        reference = all_logits(open_gguf(folder / "float32.gguf"), tokens)
        difference = check_same_logits(model, reference, tokens)
        rows = list(llamacpp_rows(folder, reference, tokens))
        if flags.FLAGS.imatrix:
            rows += llamacpp_rows(folder, reference, tokens, importance_matrix(model, calibration))
    rows += our_rows(model, tokens, calibration, {row.bits for row in rows})
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
    # Defined here, not above: quantize_1b.py imports this file and has flags of its own.
    flags.DEFINE_list("types", ["Q4_0", "Q4_1", "Q4_K_M", "Q3_K_M", "Q2_K"], "what llama.cpp quantizes to")
    flags.DEFINE_bool("imatrix", True, "measure these types with an importance matrix, too")
    flags.DEFINE_bool("dequantize", False, "llama.cpp runs its weights in float32, and rounds no activations")
    flags.DEFINE_bool("reference_products", False, "llamajax dequantizes its weights whole, in float32")
    flags.DEFINE_bool("json", False, "print JSON instead of a table")
    flags.DEFINE_string("picture", str(_PICTURE), "where to draw the curves")
    app.run(main)
