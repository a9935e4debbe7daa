"""`llamajax run`: text from a bundle, on a runtime of choice, in a process that never sees the model's source."""

import sys

from absl import flags

from export.bundle import open_bundle
from export.cli.export import define_python, pythons
from export.verification import RUNTIMES
from export.verification import run as run_bundle
from llamajax import LlamaJaxError
from llamajax.cli.model_flags import define_parse_special
from llamajax.cli.terminal import note, write_bytes

SUMMARY = "continue a prompt with a bundle, or chat with it, on any runtime that is here"
EXAMPLES = (
    "llamajax run box.bundle --prompt='Once upon a time'",
    "llamajax run box.bundle --runtime=onnx --temperature=0.8 --seed=1",
    "llamajax run chat.bundle --runtime=onnx --chat --system='Be brief.'",
    "llamajax run box.bundle --runtime=iree --python=iree=path/to/env/bin/python",
)
POSITIONAL = "bundle"


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    flags.DEFINE_string("bundle", None, "the bundle; may be given without --bundle=", flag_values=values)
    flags.DEFINE_enum("runtime", "jax", list(RUNTIMES), "what runs it", flag_values=values)
    flags.DEFINE_string(
        "prompt",
        None,
        "text to continue, 'Once upon a time' unless given; with --chat the one message to answer",
        flag_values=values,
    )
    flags.DEFINE_string("ids", None, "ids with commas between instead of a prompt; prints ids", flag_values=values)
    flags.DEFINE_boolean("chat", False, "answer each line of standard input, as one conversation", flag_values=values)
    flags.DEFINE_string("system", None, "system message of --chat; the format's own unless given", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 64, "most tokens to make, or of each answer", 1, flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "0 is greedy; higher is more surprising", 0.0, flag_values=values)
    flags.DEFINE_integer("top_k", None, "choose among the K likeliest tokens only", 1, flag_values=values)
    flags.DEFINE_float(
        "top_p", None, "choose among the likeliest tokens that make up this probability", flag_values=values
    )
    flags.DEFINE_multi_string("stop", [], "end before this text; may be repeated", flag_values=values)
    flags.DEFINE_integer("seed", 0, "the same seed gives the same text on one runtime", 0, flag_values=values)
    define_parse_special(values)
    define_python(values)


def run(values: flags.FlagValues) -> None:
    """Streams text to stdout; speed on stderr.

    Raises:
        LlamaJaxError: if the runtime fails.
    """
    if not values.bundle:
        raise LlamaJaxError("which bundle? llamajax run BUNDLE --prompt=…")
    bundle = open_bundle(values.bundle)
    given = ("prompt", "ids", "system", "max_new_tokens", "temperature", "top_k", "top_p", "seed")
    arguments = [f"--{name}={values[name].value}" for name in given if values[name].value is not None]
    arguments += [f"--{name}" for name in ("chat", "parse_special") if values[name].value]
    arguments += [f"--stop={stop}" for stop in values.stop]
    python = pythons(values).get(values.runtime, sys.executable)
    is_typed = values.chat and sys.stdin is not None and sys.stdin.isatty()
    said = run_bundle(bundle, values.runtime, python, arguments, write_bytes, shows_notes=is_typed)
    if said:
        note(said)
