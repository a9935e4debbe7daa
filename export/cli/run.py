"""`llamajax run`: generates text with a bundle on a chosen runtime, in a separate process without llamajax."""

import sys

from absl import flags

from export.bundle import open_bundle
from export.cli.export import define_python, pythons
from export.verification import RUNTIMES
from export.verification import run as run_bundle
from llamajax import LlamaJaxError
from llamajax.cli.flag_groups import COMMON, group
from llamajax.cli.model_flags import define_parse_special
from llamajax.cli.terminal import note, write_bytes

SUMMARY = "continue a prompt, or chat, with a bundle on a runtime of your choice"
EXAMPLES = (
    "llamajax run box.bundle --prompt='Once upon a time'",
    "llamajax run box.bundle --runtime=onnx --temperature=0.8 --seed=1",
    "llamajax run chat.bundle --runtime=onnx --chat --system='Be brief.'",
)
POSITIONAL = "bundle"


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    with group(values, COMMON):
        flags.DEFINE_string(
            "bundle", None, "Folder of the bundle, as `BUNDLE`; --bundle= may be left out.", flag_values=values
        )
        flags.DEFINE_enum("runtime", "jax", list(RUNTIMES), "`RUNTIME` that executes the bundle.", flag_values=values)
        flags.DEFINE_string(
            "prompt",
            None,
            "Continues `TEXT`, or answers it with --chat. Without this flag the text is 'Once upon a time'.",
            flag_values=values,
        )
        flags.DEFINE_integer("max_new_tokens", 64, "Generates at most `N` tokens.", 1, flag_values=values)
        flags.DEFINE_float(
            "temperature",
            0.0,
            "0 always takes the likeliest token; higher values give more varied text.",
            0.0,
            flag_values=values,
        )
        flags.DEFINE_integer("seed", 0, "The same seed gives the same text on one runtime.", 0, flag_values=values)
    with group(values, "Chat"):
        flags.DEFINE_boolean(
            "chat", False, "Answers each line of standard input, as one conversation.", flag_values=values
        )
        flags.DEFINE_string(
            "system", None, "System message `TEXT`. Without this flag the chat template decides.", flag_values=values
        )
    with group(values, "Prompt and sampling"):
        flags.DEFINE_string(
            "ids", None, "Continues these token ids, such as `1,403,407`, and prints token ids.", flag_values=values
        )
        define_parse_special(values)
        flags.DEFINE_multi_string("stop", [], "Stops before `TEXT`. May be repeated.", flag_values=values)
        flags.DEFINE_integer("top_k", None, "Samples from the `K` likeliest tokens only.", 1, flag_values=values)
        flags.DEFINE_float(
            "top_p",
            None,
            "Samples from the smallest set of likeliest tokens whose probabilities sum to at least `P`.",
            flag_values=values,
        )
    define_python(values)


def run(values: flags.FlagValues) -> None:
    """Streams text to stdout and prints the speed to stderr.

    Raises:
        LlamaJaxError: if the runtime fails.
    """
    if not values.bundle:
        raise LlamaJaxError("no bundle is given: expected llamajax run BUNDLE --prompt=…")
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
