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

SUMMARY = "continue a prompt with a bundle, on any runtime that is here"
EXAMPLES = (
    "llamajax run box.bundle --prompt='Once upon a time'",
    "llamajax run box.bundle --runtime=onnx --temperature=0.8 --seed=1",
    "llamajax run box.bundle --runtime=iree --python=iree=path/to/env/bin/python",
)
POSITIONAL = "bundle"


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    flags.DEFINE_string("bundle", None, "the bundle; may be given without --bundle=", flag_values=values)
    flags.DEFINE_enum("runtime", "jax", list(RUNTIMES), "what runs it", flag_values=values)
    flags.DEFINE_string("prompt", "Once upon a time", "text to continue", flag_values=values)
    flags.DEFINE_string("ids", None, "ids with commas between instead of a prompt; prints ids", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 64, "most tokens to make", lower_bound=1, flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "0 is greedy; higher is more surprising", 0.0, flag_values=values)
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
    arguments = [f"--{name}={values[name].value}" for name in ("max_new_tokens", "temperature", "seed")]
    arguments.append(f"--prompt={values.prompt}" if values.ids is None else f"--ids={values.ids}")
    if values.parse_special:
        arguments.append("--parse_special")
    python = pythons(values).get(values.runtime, sys.executable)
    note(run_bundle(bundle, values.runtime, python, arguments, write_bytes))
