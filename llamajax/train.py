"""Trains a small LLaMA from scratch: AdamW, cosine schedule, resumable. The model in the box was made with it."""

import csv
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from llamajax.checkpoint.naming import leaf_name, named_leaves
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.evaluate import cross_entropy, next_token_losses, read_documents
from llamajax.model import Llama
from llamajax.stories import corpus
from llamajax.tokenizer import Tokenizer, train_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Run-time choices of a training run.

    Attributes:
        steps: optimizer steps in all.
        batch: rows per step.
        sequence_length: T, tokens per row that are predicted.
        learning_rate: at its peak; it rises linearly over `warmup` steps and falls along a cosine to a tenth.
        warmup: steps.
        weight_decay: of AdamW, on matrices only.
        clip: largest norm of the gradient.
        seed: of the first weights and of the order of the data.
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
    """`count` stories of our generator for training and 200 others for measuring."""
    if not 1 <= count <= HELDOUT_SEED:
        raise LlamaJaxError(f"stories is {count}: expected 1 to {HELDOUT_SEED}")
    return Texts(list(corpus(0, count)), heldout_stories())


def heldout_stories() -> list[str]:
    """The 200 stories that the loss of the box is measured on."""
    return list(corpus(HELDOUT_SEED, _HELDOUT_STORIES))


def file_texts(path: str | Path) -> Texts:
    """The documents of a text file (see `evaluate.read_documents`), every hundredth of them held out.

    Raises:
        LlamaJaxError: if the file holds fewer than 100 documents, besides `read_documents`' reasons.
    """
    documents = read_documents(path)
    if len(documents) < 100:
        raise LlamaJaxError(f"{path}: {len(documents)} documents: expected at least 100, of which 1% are held out")
    return Texts([text for i, text in enumerate(documents) if i % 100], documents[::100])


def tokenizer_for(texts: Texts, vocab_size: int) -> Tokenizer:
    """A tokenizer learnt from (the first 20,000 of) the training documents."""
    return train_tokenizer(texts.training[:_TOKENIZER_DOCUMENTS], vocab_size)


class Progress(NamedTuple):
    """What `train` reports after each step."""

    step: int
    loss: float
    heldout_loss: float | None
    learning_rate: float


def schedule(options: TrainOptions) -> optax.Schedule:
    """Learning rate by step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=options.learning_rate,
        warmup_steps=options.warmup,
        decay_steps=max(options.steps, options.warmup + 1),
        end_value=options.learning_rate / 10,
    )


def make_optimizer(options: TrainOptions) -> optax.GradientTransformation:
    """AdamW behind a clip; norms are not decayed: pulling a gain to zero regularizes nothing."""

    def decayed(model):
        return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in leaf_name(path), model)

    return optax.chain(
        optax.clip_by_global_norm(options.clip),
        optax.adamw(schedule(options), b1=0.9, b2=0.95, weight_decay=options.weight_decay, mask=decayed),
    )


def sample_batch(tokens: np.ndarray, step: int, options: TrainOptions) -> np.ndarray:
    """Rows of T + 1 consecutive tokens from random places, int32 [B, T+1]; a function of the seed and step alone.

    So a resumed run sees the batches it would have seen.
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
) -> Llama:
    """Trains a model and returns it in float32.

    Continues from the newest checkpoint in `folder/checkpoints`, if there is one, and appends to `folder/loss.csv`
    (step, loss, heldout_loss, learning_rate).

    Args:
        config: the architecture.
        tokens: training text, one row of ids.
        heldout: text that is not trained on, one row of ids.
        options: run-time choices; the same as before where a run is resumed.
        folder: for checkpoints and the loss curve.
        on_step: called after every step.

    Raises:
        LlamaJaxError: if a text is shorter than a row, or the loss stops being finite.
    """
    for name, text in (("training", tokens), ("held-out", heldout)):
        if len(text) < options.sequence_length + 2:
            raise LlamaJaxError(
                f"the {name} text has {len(text)} tokens: expected more than {options.sequence_length + 1}"
            )
    optimizer = make_optimizer(options)
    state, first = _restore_or_start(config, optimizer, options, folder)
    step_function = jax.jit(lambda state, tokens_BT: _step(optimizer, state, tokens_BT), donate_argnums=0)
    _cut_log(folder / "loss.csv", first)
    with _manager(folder) as manager, (folder / "loss.csv").open("a", newline="") as log:
        writer = csv.writer(log)
        for step in range(first + 1, options.steps + 1):
            state, loss = step_function(state, jnp.asarray(sample_batch(tokens, step, options)))
            loss = float(loss)
            if not math.isfinite(loss):
                raise LlamaJaxError(f"the loss is {loss} at step {step}: lower learning_rate ({options.learning_rate})")
            heldout_loss = None
            if step % options.eval_every == 0 or step == options.steps:
                heldout_loss = cross_entropy(state["model"], heldout, window=options.sequence_length)
            progress = Progress(step, loss, heldout_loss, float(schedule(options)(step)))
            writer.writerow(progress)
            log.flush()
            if heldout_loss is not None:  # After its row: what is logged beyond a checkpoint is cut, not made up for.
                manager.save(step, args=ocp.args.StandardSave(named_leaves(state)))
            on_step(progress)
    return state["model"]


def _step(optimizer: optax.GradientTransformation, state: dict[str, Any], tokens_BT: jax.Array):
    """One update. Pure: the state before -> the state after, and the loss before."""
    loss, gradient = jax.value_and_grad(lambda model: next_token_losses(model, tokens_BT).mean())(state["model"])
    updates, optimizer_state = optimizer.update(gradient, state["optimizer"], state["model"])
    return {"model": optax.apply_updates(state["model"], updates), "optimizer": optimizer_state}, loss


def _restore_or_start(config: Config, optimizer, options: TrainOptions, folder: Path) -> tuple[dict[str, Any], int]:
    """State and number of steps already done."""

    def start():
        model = Llama(config, key=jax.random.key(options.seed))
        return {"model": model, "optimizer": optimizer.init(model)}

    folder.mkdir(parents=True, exist_ok=True)
    abstract = jax.eval_shape(start)
    with _manager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            return jax.jit(start)(), 0
        flat = manager.restore(step, args=ocp.args.StandardRestore(named_leaves(abstract)))
    return jax.tree.unflatten(jax.tree.structure(abstract), [flat[name] for name in named_leaves(abstract)]), step


def _cut_log(path: Path, last_step: int) -> None:
    """Leaves the header and the rows up to `last_step`: what came after the checkpoint is about to be done again."""
    rows = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= last_step]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([Progress._fields, *rows])


def _manager(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)


def draw_loss(log: Path, picture: Path) -> None:
    """Draws `loss.csv` as an SVG or PNG, by the picture's suffix.

    Raises:
        ImportError: without matplotlib (extra `plot`).
    """
    from matplotlib.figure import Figure

    with log.open(newline="") as file:
        rows = [
            Progress(int(r[0]), float(r[1]), float(r[2]) if r[2] else None, float(r[3]))
            for r in list(csv.reader(file))[1:]
        ]
    axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
    axes.plot([row.step for row in rows], [row.loss for row in rows], linewidth=0.6, alpha=0.6, label="training batch")
    measured = [(row.step, row.heldout_loss) for row in rows if row.heldout_loss is not None]
    axes.plot(*zip(*measured, strict=True), marker="o", label="held out")
    axes.set(xlabel="step", ylabel="cross-entropy, nats a token", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(picture)
