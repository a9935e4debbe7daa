"""Our logits for a GGUF file beside llama.cpp's, for the same weights in floats and for the file as llama.cpp runs it.

    pip install 'llamajax[llamacpp]'
    python benchmarks/gguf_quality.py --text=wiki.test.raw --windows=4 SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/gguf_quality.py --windows=2 /tmp/gguf/tinyllama-1.1b-Q4_K_M.gguf …

llama.cpp rounds activations to 8 bits where it multiplies by packed weights, so it runs twice. The first run is on the
file that its own code converts to floats: nothing is rounded, and its logits must equal ours up to the order of sums.
The second run is on the packed file. The text is cut into windows as in `llamajax eval`; a file without a vocabulary
gets random ids.
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from gguf_files import quantize_gguf, tensors_of
from versus_llamacpp_quality import WINDOW, gguf_logits, open_gguf

import llamajax
from llamajax.checkpoint import read_tokenizer
from llamajax.evaluation.evaluate import read_text, text_windows


class Row(NamedTuple):
    """The results for one file: perplexities, and differences of logits from those of the same weights in floats.

    Attributes:
        name: the name of the file.
        bits: bits per weight in the file.
        ours: perplexity of llamajax on the file.
        floats: perplexity of llama.cpp on the file converted to floats.
        packed: perplexity of llama.cpp on the file.
        difference: largest difference between our logits and llama.cpp's with floats.
        packed_difference: largest difference between llama.cpp's logits on the file and those with floats.
        agreement: share of positions where llamajax and llama.cpp on the file have the same likeliest token.
        divergence: KL(llama.cpp on the file || ours), in nats.
    """

    name: str
    bits: float
    ours: float
    floats: float
    packed: float
    difference: float
    packed_difference: float
    agreement: float
    divergence: float


def token_rows(path: Path) -> np.ndarray:
    """Returns the windows, each with its last target, int32 [n, WINDOW + 1]."""
    opened = llamajax.open_checkpoint(path)
    count, tokenizer = flags.FLAGS.windows, read_tokenizer(opened)
    if tokenizer is None or flags.FLAGS.text is None:
        print(f"{path.name}: no vocabulary or no text: random ids", file=sys.stderr)
        return np.random.default_rng(0).integers(3, opened.config.vocab_size, (count, WINDOW + 1), np.int32)
    return text_windows(read_text(flags.FLAGS.text), tokenizer, WINDOW).rows[:count]


def their_logits(path: Path, rows: np.ndarray) -> np.ndarray:
    """Returns llama.cpp's logits, float32 [n, WINDOW, V]."""
    model = open_gguf(path)
    logits_BTV = np.stack([gguf_logits(model, row[:-1]).copy() for row in rows])
    model.close()
    return logits_BTV


def our_logits(path: Path, rows: np.ndarray) -> np.ndarray:
    """Returns our logits, float32 [n, WINDOW, V], with weights in this machine's layout and float32 activations."""
    model = llamajax.open_checkpoint(path).read("float32", backend=jax.default_backend())
    forward = jax.jit(lambda model, tokens_BT: model(tokens_BT)[0])
    return np.concatenate([np.asarray(forward(model, row[None, :-1])) for row in rows])


@jax.jit
def _loss(logits_TV: jax.Array, target_T: jax.Array) -> jax.Array:
    log_probability_TV = jax.nn.log_softmax(logits_TV)
    return -jnp.mean(jnp.take_along_axis(log_probability_TV, target_T[:, None], axis=-1))


@jax.jit
def _divergence(ours_TV: jax.Array, theirs_TV: jax.Array) -> jax.Array:
    ours_TV, theirs_TV = jax.nn.log_softmax(ours_TV), jax.nn.log_softmax(theirs_TV)
    return jnp.mean(jnp.sum(jnp.exp(theirs_TV) * (theirs_TV - ours_TV), axis=-1))


def measured(path: Path) -> Row:
    """Measures one file."""
    rows = token_rows(path)
    _, size, count = tensors_of(path)
    with tempfile.TemporaryDirectory(dir=flags.FLAGS.scratch) as folder:
        quantize_gguf(path, Path(folder, "floats.gguf"), "ALL_F32")
        floats = their_logits(Path(folder, "floats.gguf"), rows)
    packed, ours = their_logits(path, rows), our_logits(path, rows)

    def perplexity(logits_BTV: np.ndarray) -> float:
        losses = [float(_loss(logits, row[1:])) for logits, row in zip(logits_BTV, rows, strict=True)]
        return math.exp(float(np.mean(losses)))

    return Row(
        path.name,
        8 * size / count,
        perplexity(ours),
        perplexity(floats),
        perplexity(packed),
        float(np.abs(ours - floats).max()),
        float(np.abs(packed - floats).max()),
        float((ours.argmax(-1) == packed.argmax(-1)).mean()),
        float(np.mean([float(_divergence(*pair)) for pair in zip(ours, packed, strict=True)])),
    )


def main(argv):
    """Measures the files and prints the table."""
    rows = []
    for name in argv[1:]:
        rows.append(measured(Path(name)))
        print(f"{name}: done", file=sys.stderr)
    if flags.FLAGS.json:
        print(json.dumps([row._asdict() for row in rows]))
        return
    print(
        "| file | bits a weight | perplexity | llama.cpp, floats | largest difference of logits | llama.cpp, packed "
        "| its largest difference | same likeliest token | KL divergence, nats |\n|---|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        off = row.ours / row.floats - 1
        print(
            f"| {row.name} | {row.bits:.2f} | {row.ours:.4f} | {row.floats:.4f} ({off:+.5%}) | {row.difference:.1e} "
            f"| {row.packed:.4f} | {row.packed_difference:.1e} | {row.agreement:.2%} | {row.divergence:.1e} |"
        )


if __name__ == "__main__":
    flags.DEFINE_string("text", None, "UTF-8 text to measure on; random ids if not given")
    flags.DEFINE_integer("windows", 4, f"number of windows of {WINDOW} tokens", lower_bound=1)
    flags.DEFINE_string("scratch", None, "folder for the temporary file of floats: 4 bytes per weight")
    flags.DEFINE_bool("json", False, "print JSON instead of a table")
    app.run(main)
