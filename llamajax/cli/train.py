"""`llamajax train`: a small LLaMA from scratch."""

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags

from llamajax.checkpoint import save_checkpoint
from llamajax.cli.model_flags import define_threads
from llamajax.cli.terminal import note, progress, spinner
from llamajax.config import Config, preset, preset_names
from llamajax.errors import LlamaJaxError
from llamajax.evaluation.evaluate import encode_documents
from llamajax.files import check_absent, read_toml, writing
from llamajax.train import TrainOptions

SUMMARY = "train a small model and its tokenizer; resumes where it was stopped"
EXAMPLES = (
    "llamajax train --output=runs/box",
    "llamajax train --config=box --data=my_texts.txt --steps=5000 --output=runs/mine",
    "llamajax generate --model=runs/box/model",
)

_DEFAULTS: dict[str, Any] = dataclasses.asdict(TrainOptions())
_OPTION_HELP = {
    "steps": "optimizer steps in all",
    "batch": "rows a step",
    "sequence_length": "tokens a row",
    "learning_rate": "at its peak",
    "warmup": "steps over which the learning rate rises",
    "weight_decay": "of AdamW",
    "clip": "largest norm of the gradient",
    "seed": "of the first weights and the order of the data",
    "eval_every": "steps between held-out losses and checkpoints",
}


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    flags.DEFINE_string("output", None, "folder for checkpoints, loss.csv, loss.svg and model/", flag_values=values)
    flags.DEFINE_string(
        "config", "box", "name of a preset, or path of a .toml file with its fields", flag_values=values
    )
    flags.DEFINE_string(
        "data",
        "stories",
        "stories (our generator), or a UTF-8 file, documents separated by <|endoftext|>",
        flag_values=values,
    )
    flags.DEFINE_integer("stories", 40_000, "how many generated stories to train on", flag_values=values)
    for name, text in _OPTION_HELP.items():
        default: Any = _DEFAULTS[name]
        define_flag: Any = flags.DEFINE_float if isinstance(default, float) else flags.DEFINE_integer
        define_flag(name, default, text, flag_values=values)
    define_threads(values)


def run(values: flags.FlagValues) -> None:
    """Trains, saves `output/model` and draws the loss curve."""
    from llamajax import train

    if not values.output:
        raise LlamaJaxError("--output is needed: the folder for checkpoints and the trained model")
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
    # Last: where there is a model, all is done.
    save_checkpoint(model, folder / "model", tokenizer=tokenizer, source=f"llamajax train on {values.data}")
    note(f"{folder / 'model'}: trained; try llamajax generate --model={folder / 'model'}")


def _config(name: str) -> Config:
    if name in preset_names():
        return preset(name)
    path = Path(name)
    if not path.is_file():
        raise LlamaJaxError(f"config is {name!r}: expected a .toml file or one of {', '.join(preset_names())}")
    return Config.from_dict(read_toml(path), str(path))


def _draw(folder: Path) -> None:
    """The loss curve as SVG, where matplotlib is installed."""
    from llamajax.train import draw_loss

    try:
        draw_loss(folder / "loss.csv", folder / "loss.svg")
    except ImportError:
        note("loss.svg is not drawn: pip install 'llamajax[plot]' for matplotlib")
