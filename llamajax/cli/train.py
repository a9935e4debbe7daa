"""`llamajax train`: trains a small LLaMA from scratch."""

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags

from llamajax.checkpoint import save_checkpoint
from llamajax.cli.flag_groups import COMMON, group
from llamajax.cli.model_flags import define_threads
from llamajax.cli.terminal import note, progress, spinner
from llamajax.config import Config, preset, preset_names
from llamajax.errors import LlamaJaxError
from llamajax.evaluation.evaluate import encode_documents
from llamajax.files import check_absent, read_toml, writing
from llamajax.train import TrainOptions

SUMMARY = "train a small model and its tokenizer"
EXAMPLES = (
    "llamajax train --output=runs/box",
    "llamajax train --config=box --data=my_texts.txt --steps=5000 --output=runs/mine",
    "llamajax train --config=my_shape.toml --stories=2000 --steps=200 --output=runs/small",
)

_DEFAULTS: dict[str, Any] = dataclasses.asdict(TrainOptions())
_OPTION_HELP = {
    COMMON: {
        "steps": "Number of optimizer steps.",
        "batch": "Rows per step.",
        "sequence_length": "Tokens per row.",
        "seed": "Determines the initial weights and the order of the data.",
    },
    "Optimizer": {
        "learning_rate": "Highest learning rate.",
        "warmup": "Steps during which the learning rate rises.",
        "weight_decay": "Weight decay of AdamW.",
        "clip": "Largest norm of the gradient; longer gradients are scaled down.",
        "eval_every": "Measures the held-out loss and writes a checkpoint every `N` steps.",
    },
}


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    with group(values, COMMON):
        flags.DEFINE_string(
            "output",
            None,
            "Writes checkpoints, loss.csv, loss.svg and the trained model (model/) to `FOLDER`. The same command "
            "continues where it was stopped.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "config",
            "box",
            "Architecture: the `NAME` of a preset, or a .toml file with its fields.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "data",
            "stories",
            "Trains on `FILE`: UTF-8 texts, separated by <|endoftext|>. stories are made by a generator that is "
            "included.",
            flag_values=values,
        )
        flags.DEFINE_integer("stories", 40_000, "Generates `N` stories to train on.", flag_values=values)
    for heading, texts in _OPTION_HELP.items():
        with group(values, heading):
            for name, text in texts.items():
                default: Any = _DEFAULTS[name]
                define_flag: Any = flags.DEFINE_float if isinstance(default, float) else flags.DEFINE_integer
                define_flag(name, default, text, flag_values=values)
    define_threads(values)


def run(values: flags.FlagValues) -> None:
    """Trains, saves `output/model` and draws the loss curve."""
    from llamajax import train

    if not values.output:
        raise LlamaJaxError("--output is missing: expected a folder for checkpoints and the trained model")
    folder = Path(values.output)
    check_absent(folder / "model")
    config = _config(values.config)
    chosen: dict[str, Any] = {name: values[name].value for name in _DEFAULTS}
    options = TrainOptions(**chosen)
    with spinner("preparing text and tokenizer"):
        texts = train.story_texts(values.stories) if values.data == "stories" else train.file_texts(values.data)
        tokenizer = train.tokenizer_for(texts, config.vocab_size)
        tokens, heldout = (encode_documents(tokenizer, part) for part in texts)
    note(f"{config.num_parameters:,} parameters, {len(tokens):,} tokens to train on, {len(heldout):,} held out")
    with progress("training") as show, writing(folder):

        def on_step(step: train.Progress) -> None:
            show(step.step, options.steps)
            if step.heldout_loss is not None:
                note(f"step {step.step:6}  loss {step.loss:.4f}  held-out {step.heldout_loss:.4f}")

        model = train.train(config, tokens, heldout, options, folder, on_step, tokenizer=tokenizer, on_note=note)
    with writing(folder / "loss.svg"):
        _draw(folder)
    # The model is written last: its presence means that everything is done.
    save_checkpoint(model, folder / "model", tokenizer=tokenizer, source=f"llamajax train on {values.data}")
    note(f"{folder / 'model'} is trained: try llamajax generate --model={folder / 'model'}")


def _config(name: str) -> Config:
    if name in preset_names():
        return preset(name)
    path = Path(name)
    if not path.is_file():
        raise LlamaJaxError(f"--config={name}: expected a .toml file or one of {', '.join(preset_names())}")
    return Config.from_dict(read_toml(path), str(path))


def _draw(folder: Path) -> None:
    """Draws the loss curve as SVG, if matplotlib is installed."""
    from llamajax.train import draw_loss

    try:
        draw_loss(folder / "loss.csv", folder / "loss.svg")
    except ImportError:
        note("loss.svg is not drawn, because matplotlib is not installed: pip install 'llamajax[plot]'")
