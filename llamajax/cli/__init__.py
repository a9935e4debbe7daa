"""Commands: each module here defines its flags and turns them into one library call.

A command is a module with `SUMMARY`, `EXAMPLES`, `define(values)` and `run(values)`; `POSITIONAL` names the flag that
may be given by its value alone. Flags belong to the command, in an `absl.flags.FlagValues` of its own: nothing is
defined globally, and no command accepts another's. Commands about bundles stand in the package `export`, which this one
knows by name only.
"""

import difflib
import hashlib
import importlib
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import jax
from absl import flags

from llamajax.compilation import drop_oldest, is_private, processor_features
from llamajax.errors import LlamaJaxError

COMMANDS = {
    "generate": "llamajax.cli.generate",
    "inspect": "llamajax.cli.inspect",
    "convert": "llamajax.cli.convert",
    "quantize": "llamajax.cli.quantize",
    "eval": "llamajax.cli.evaluate",
    "bench": "llamajax.cli.bench",
    "train": "llamajax.cli.train",
    "export": "export.cli.export",
    "verify": "export.cli.verify",
    "run": "export.cli.run",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 for bad input, 2 for a wrong command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("help", "-h", "-help", "--help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        from llamajax import __version__

        print(f"llamajax {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(COMMANDS)}"
        return _fail(f"unknown command {name!r}: {hint}", 2)
    command = importlib.import_module(COMMANDS[name])
    values = flags.FlagValues()
    command.define(values)
    if any(argument in ("-h", "-help", "--help") for argument in rest):
        print(_help(name, command, values))
        return 0
    try:
        surplus = values([name, *rest])[1:]
        positional = getattr(command, "POSITIONAL", None)
        if surplus and positional and values[positional].value is None:
            values[positional].value = surplus.pop(0)
        if surplus:
            raise flags.Error(f"unexpected argument {surplus[0]!r}: write --flag=value")
    except flags.Error as error:
        return _fail(f"{error} (see llamajax {name} --help)", 2)
    return _guarded(command, values)


def _guarded(command: ModuleType, values: flags.FlagValues) -> int:
    """Runs a command; what bad input or a full machine can cause becomes one line, a bug keeps its traceback."""
    try:
        keep_compiled_programs()
        command.run(values)
        sys.stdout.flush()
        return 0
    except LlamaJaxError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:
        # The reader (head, less) has left: nothing is wrong, and Python must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"{error.filename or 'input/output'}: {error.strerror or error}", 1)
    except MemoryError:
        return _fail("out of memory: use a smaller model, --dtype=bfloat16 or a shorter context", 1)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail("out of device memory: use a smaller model, --dtype=bfloat16 or a shorter context", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles in the user's cache folder, so that a second start does not compile again.

    JAX's own settings win: JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false turns it
    off. A folder is for one kind of processor: JAX does not tell apart programs for different instruction sets. It is
    used only if nobody else can write to it, and the oldest files of it go where they become too many.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    folder = root / "llamajax" / f"xla-{hashlib.sha256(processor_features().encode()).hexdigest()[:12]}"
    if not is_private(folder):  # Everything works without.
        return
    drop_oldest(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _fail(message: str, code: int) -> int:
    print(f"llamajax: {' '.join(message.split())}", file=sys.stderr)
    return code


def _overview() -> str:
    lines = ["llamajax: one functional LLaMA in JAX", "", "usage: llamajax COMMAND [--flag=value …]", ""]
    lines += [f"  {name:10} {importlib.import_module(module).SUMMARY}" for name, module in COMMANDS.items()]
    lines += ["", "examples:", "  llamajax generate --prompt='Once upon a time'", "  llamajax inspect --model=box", ""]
    return "\n".join([*lines, "llamajax COMMAND --help shows a command's flags and examples; --version the version."])


def _help(name: str, command: ModuleType, values: flags.FlagValues) -> str:
    lines = [f"llamajax {name}: {command.SUMMARY}", "", "examples:"]
    lines += [f"  {example}" for example in command.EXAMPLES]
    lines += ["", "flags:"]
    for flag in (values[flag_name] for flag_name in values if not _inherited(values, flag_name)):
        shown = ", ".join(flag.default) if isinstance(flag.default, list) else flag.default
        default = "" if shown in (None, "") else f" (default: {shown})"
        text = flag.help.split(";\n")[0] + default  # absl says of itself how to repeat a flag; our texts do too
        lines.append(f"  --{flag.name}")
        lines += textwrap.wrap(text, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _inherited(values: flags.FlagValues, name: str) -> bool:
    """Flags that absl puts into every FlagValues (--flagfile, --undefok) are not worth a reader's time."""
    return name in ("flagfile", "undefok")
