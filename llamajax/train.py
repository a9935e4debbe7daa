"""Trains a small LLaMA from scratch: AdamW, cosine schedule, resumable. The built-in model was trained with it."""

import csv
import dataclasses
import hashlib
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llamajax.box.stories import corpus
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.evaluation.evaluate import cross_entropy, next_token_losses, read_documents
from llamajax.files import new_file, read_text, shortened
from llamajax.model import Llama, model_from
from llamajax.parameters import leaves, path_name
from llamajax.quantization.resume import PartsOnDisk
from llamajax.tokenizer import Tokenizer, train_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Run-time choices of a training run.

    Attributes:
        steps: number of optimizer steps in all.
        batch: rows per step.
        sequence_length: T, tokens per row that are predicted.
        learning_rate: peak learning rate; it rises linearly over `warmup` steps and falls along a cosine to a tenth.
        warmup: number of warmup steps.
        weight_decay: AdamW's weight decay, on matrices only.
        clip: largest norm of the gradient.
        seed: seed of the initial weights and of the order of the data.
        eval_every: steps between measurements of the held-out loss; a checkpoint is saved at each.
    """

    steps: int = 3000
    batch: int = 8
    sequence_length: int = 512
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 250

    def __post_init__(self):
        """Refuse values that cannot train anything."""
        for name in ("steps", "batch", "sequence_length", "eval_every"):
            if getattr(self, name) < 1:
                raise LlamaJaxError(f"{name} is {getattr(self, name)}: expected at least 1")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise LlamaJaxError(f"{name} is {getattr(self, name)}: expected a positive number")
        if not 0 <= self.weight_decay < math.inf:
            raise LlamaJaxError(f"weight_decay is {self.weight_decay}: expected 0 or more")
        if not 0 <= self.seed < 1 << 32:
            raise LlamaJaxError(f"seed is {self.seed}: expected a whole number from 0 to {(1 << 32) - 1}")
        if not 0 <= self.warmup:
            raise LlamaJaxError(f"warmup is {self.warmup}: expected 0 or more steps")


class Texts(NamedTuple):
    """Documents to learn from, and documents to measure on."""

    training: list[str]
    heldout: list[str]


# Seeds of held-out stories begin here; training stories take seeds from 0 on.
HELDOUT_SEED = 1_000_000_000
_HELDOUT_STORIES = 200
_TOKENIZER_DOCUMENTS = 20_000


def story_texts(count: int) -> Texts:
    """Returns `count` generated stories for training, and 200 others for measuring."""
    if not 1 <= count <= HELDOUT_SEED:
        raise LlamaJaxError(f"stories is {count}: expected 1 to {HELDOUT_SEED}")
    return Texts(list(corpus(0, count)), heldout_stories())


def heldout_stories() -> list[str]:
    """Returns the 200 stories on which the loss of the built-in model is measured."""
    return list(corpus(HELDOUT_SEED, _HELDOUT_STORIES))


def file_texts(path: str | Path) -> Texts:
    """Returns the documents of a text file (see `evaluate.read_documents`), with every hundredth held out.

    Raises:
        LlamaJaxError: as `read_documents`, and if the file holds fewer than 100 documents.
    """
    documents = read_documents(path)
    if len(documents) < 100:
        raise LlamaJaxError(f"{path}: {len(documents)} documents: expected at least 100, of which 1% are held out")
    return Texts([text for i, text in enumerate(documents) if i % 100], documents[::100])


def tokenizer_for(texts: Texts, vocab_size: int) -> Tokenizer:
    """Trains a tokenizer on the training documents, of which at most the first 20,000 are used."""
    return train_tokenizer(texts.training[:_TOKENIZER_DOCUMENTS], vocab_size)


class Progress(NamedTuple):
    """The report of `train` after each step."""

    step: int
    loss: float
    heldout_loss: float | None
    learning_rate: float


def schedule(options: TrainOptions) -> optax.Schedule:
    """Returns the learning rate by step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=options.learning_rate,
        warmup_steps=options.warmup,
        decay_steps=max(options.steps, options.warmup + 1),
        end_value=options.learning_rate / 10,
    )


def make_optimizer(options: TrainOptions) -> optax.GradientTransformation:
    """Makes AdamW after clipping; only matrices decay, because decay of a norm's gain to zero regularizes nothing."""

    def decayed(model):
        return model_from({name: leaf.spec.is_matrix for name, leaf in leaves(model.config).items()}, model.config)

    return optax.chain(
        optax.clip_by_global_norm(options.clip),
        optax.adamw(schedule(options), b1=0.9, b2=0.95, weight_decay=options.weight_decay, mask=decayed),
    )


def sample_batch(tokens: np.ndarray, step: int, options: TrainOptions) -> np.ndarray:
    """Returns rows of T + 1 consecutive tokens from random places, int32 [B, T+1], by the seed and step alone.

    A resumed run therefore gets the same batches.
    """
    generator = np.random.default_rng((options.seed, step))
    starts = generator.integers(0, len(tokens) - options.sequence_length, options.batch)
    return np.stack([tokens[start : start + options.sequence_length + 1] for start in starts]).astype(np.int32)


def train(
    config: Config,
    tokens: np.ndarray,
    heldout: np.ndarray,
    options: TrainOptions,
    folder: Path,
    on_step: Callable[[Progress], None] = lambda progress: None,
    *,
    tokenizer: Tokenizer | None = None,
    on_note: Callable[[str], None] = warnings.warn,
) -> Llama:
    """Trains a model and returns it in float32.

    Continues from the newest intact checkpoint in `folder/checkpoints`, if there is one, and appends to
    `folder/loss.csv` (step, loss, heldout_loss, learning_rate). The folder records the settings of the run.

    Args:
        config: the architecture.
        tokens: training text, one row of ids.
        heldout: text outside of training, one row of ids.
        options: run-time choices.
        folder: for checkpoints and the loss curve.
        on_step: called after every step.
        tokenizer: the tokenizer of the texts, if a resumed run must use the same one.
        on_note: called with a line about a damaged checkpoint if an older one is used instead.

    Raises:
        LlamaJaxError: if a text is shorter than a row, the loss becomes infinite or NaN, or the folder is damaged or
            belongs to a run with other settings.
    """
    for name, text in (("training", tokens), ("held-out", heldout)):
        if len(text) < options.sequence_length + 2:
            raise LlamaJaxError(
                f"the {name} text has {len(text)} tokens: expected more than {options.sequence_length + 1}"
            )
    checkpoints = PartsOnDisk(folder / "checkpoints", _run_key(config, tokens, heldout, options, tokenizer))
    optimizer = make_optimizer(options)
    state, first = _restore_or_start(config, optimizer, options, checkpoints, on_note)
    step_function = jax.jit(lambda state, tokens_BT: _step(optimizer, state, tokens_BT), donate_argnums=0)
    _cut_log(folder / "loss.csv", first)
    for step in range(first + 1, options.steps + 1):
        state, loss = step_function(state, jnp.asarray(sample_batch(tokens, step, options)))
        loss = float(loss)
        if not math.isfinite(loss):
            raise LlamaJaxError(f"the loss is {loss} at step {step}: lower learning_rate ({options.learning_rate})")
        heldout_loss = None
        if step % options.eval_every == 0 or step == options.steps:
            heldout_loss = cross_entropy(state["model"], heldout, window=options.sequence_length)
        progress = Progress(step, loss, heldout_loss, float(schedule(options)(jnp.float32(step))))
        _append(folder / "loss.csv", progress)
        if heldout_loss is not None:  # after its row is logged: `_cut_log` cuts surplus rows, but restores none
            _store(checkpoints, step, state)
        on_step(progress)
    return state["model"]


def _step(optimizer: optax.GradientTransformation, state: dict[str, Any], tokens_BT: jax.Array):
    """Computes one update: the state before -> the state after, and the loss before. A pure function."""
    loss, gradient = jax.value_and_grad(lambda model: next_token_losses(model, tokens_BT).mean())(state["model"])
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in int32 and multiplies them with floats
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], state["model"])
    return {"model": optax.apply_updates(state["model"], updates), "optimizer": optimizer_state}, loss


def _run_key(
    config: Config, tokens: np.ndarray, heldout: np.ndarray, options: TrainOptions, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Returns everything that a run depends on, by name; an error names an entry that differs in a folder."""
    digest = lambda data: hashlib.sha256(data).hexdigest()  # noqa: E731
    return {
        "config": config.to_dict(),
        **dataclasses.asdict(options),
        "tokenizer (sha256)": None if tokenizer is None else digest(tokenizer.model_bytes),
        "training text (sha256)": digest(np.asarray(tokens, np.int32).tobytes()),
        "held-out text (sha256)": digest(np.asarray(heldout, np.int32).tobytes()),
    }


def _restore_or_start(
    config: Config,
    optimizer: optax.GradientTransformation,
    options: TrainOptions,
    checkpoints: PartsOnDisk,
    on_note: Callable[[str], None],
) -> tuple[dict[str, Any], int]:
    """Returns the state, restored or new, and the number of steps already done."""

    def start():
        model = Llama(config, key=jax.random.key(options.seed))
        return {"model": model, "optimizer": optimizer.init(model)}

    abstract = jax.eval_shape(start)
    steps = _steps(checkpoints)
    for tried, step in enumerate(reversed(steps)):
        try:
            state = _load(checkpoints, step, abstract)
        except LlamaJaxError as error:
            if tried + 1 == len(steps):
                raise
            on_note(f"{error}; continuing from step {steps[-2 - tried]}")
            continue
        for damaged in steps[len(steps) - tried :]:
            checkpoints.discard(_part(damaged))
        return state, step
    return jax.jit(start)(), 0


_KEPT_CHECKPOINTS = 2


def _part(step: int) -> str:
    return f"step-{step:09}"


def _steps(checkpoints: PartsOnDisk) -> list[int]:
    """Returns the steps of the checkpoints, ascending."""
    numbers = (name.removeprefix("step-") for name in checkpoints.names())
    return [int(number) for number in numbers if number.isdecimal() and number.isascii()]


def _store(checkpoints: PartsOnDisk, step: int, state: dict[str, Any]) -> None:
    """Writes a checkpoint, then removes all but the newest two."""
    checkpoints.store_arrays(_part(step), {name: np.asarray(leaf) for name, leaf in _arrays(state).items()})
    for old in _steps(checkpoints)[:-_KEPT_CHECKPOINTS]:
        checkpoints.discard(_part(old))


def _load(checkpoints: PartsOnDisk, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """Loads the state of a checkpoint."""
    loaded = checkpoints.load_arrays(_part(step))
    arrays, expected = ({} if loaded is None else loaded[0]), _arrays(abstract)
    kinds = [{name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()} for leaves in (arrays, expected)]
    if kinds[0] != kinds[1]:
        raise LlamaJaxError(f"the checkpoint of step {step} does not hold the model's arrays: remove it")
    return jax.tree.unflatten(jax.tree.structure(abstract), [jnp.asarray(arrays[name]) for name in expected])


def _read_log(path: Path) -> list[Progress]:
    """Reads the rows of `loss.csv`; an incomplete last row is left out.

    Raises:
        LlamaJaxError: if the file cannot be read or holds anything else.
    """
    try:
        lines = read_text(path).splitlines(keepends=True)
    except OSError as error:
        raise LlamaJaxError(f"{path}: cannot be read ({error.strerror})") from None
    if lines and not lines[-1].endswith("\n"):
        del lines[-1]
    rows: list[Progress] = []
    for number, line in enumerate(lines, 1):
        fields = line.strip().split(",")
        if number == 1 and tuple(fields) == Progress._fields:
            continue
        try:
            step, loss, heldout_loss, learning_rate = fields
            row = Progress(int(step), float(loss), float(heldout_loss) if heldout_loss else None, float(learning_rate))
        except ValueError:
            row = None
        if number == 1 or row is None or row.step <= (rows[-1].step if rows else 0):
            raise LlamaJaxError(
                f"{path}: line {number} is {shortened(line)}: expected {','.join(Progress._fields)}, with increasing "
                "steps: correct the line or remove the file"
            )
        rows.append(row)
    return rows


def _cut_log(path: Path, last_step: int) -> None:
    """Cuts the log to the header and the rows up to `last_step`, because later steps are about to be repeated."""
    rows = _read_log(path) if path.exists() else []
    with new_file(path) as partial, partial.open("w", newline="") as file:
        csv.writer(file).writerows([Progress._fields, *(row for row in rows if row.step <= last_step)])


def _append(path: Path, progress: Progress) -> None:
    """Adds a row to the log."""
    try:
        with path.open("a", newline="") as file:
            csv.writer(file).writerow(progress)
    except OSError as error:
        raise LlamaJaxError(
            f"{path}: cannot be written ({error.strerror}): make room and run the same again, which continues from the "
            "last checkpoint"
        ) from None


def draw_loss(log: Path, picture: Path) -> None:
    """Draws `loss.csv` as an SVG or PNG, by the picture's suffix.

    Raises:
        LlamaJaxError: if `train` did not write it.
        ImportError: without matplotlib (extra `plot`).
    """
    rows = _read_log(log)
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
    axes.plot([row.step for row in rows], [row.loss for row in rows], linewidth=0.6, alpha=0.6, label="training batch")
    measured = [(row.step, row.heldout_loss) for row in rows if row.heldout_loss is not None]
    axes.plot(*zip(*measured, strict=True), marker="o", label="held out")
    axes.set(xlabel="step", ylabel="cross-entropy, nats a token", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(picture)


def _arrays(state: Any) -> dict[str, Any]:
    """Returns the arrays of a state by their names in storage: `layers.…` if there is a single stack of layers."""
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    return {path_name(path).replace("stacks.0.0.", "layers."): leaf for path, leaf in flat}
