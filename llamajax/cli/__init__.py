"""The commands of `llamajax`: each module here defines its flags and turns them into one library call.

A command is a module with `SUMMARY`, `EXAMPLES`, `define(values)` and `run(values)`. The optional `POSITIONAL` names
the flag that may be given by its value alone. `flag_groups.group` puts flags under headings of `--help`. The flags of
each command are in an `absl.flags.FlagValues` of its own: no flag is global, and no command accepts another command's
flags. Entry points declare the commands of this package, of `export` and of other distributions: see `commands.py`.
"""

import hashlib
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import jax
from absl import flags

from llamajax import process
from llamajax.cli import help_pages, terminal
from llamajax.cli.command_line import WrongCommandLineError, in_words, nearest, parse
from llamajax.cli.commands import Command, find_commands
from llamajax.errors import LlamaJaxError
from llamajax.files import causes, disk_problem
from llamajax.generation.compilation import drop_oldest, is_private, processor_features
from llamajax.threads import thread_count, use_threads

COMMANDS = find_commands()

_HELP = ("-h", "-help", "--help")
# Messages with which XLA, TensorStore, Python and C++ report that memory, or a limit on it, is used up.
_OUT_OF_MEMORY = (
    *("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "Cannot allocate memory", "bad_alloc"),
    *("can't start new thread", "Resource temporarily unavailable", "failed to map segment"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 (bad input), 2 (wrong command line) or 130 (interrupt)."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: terminal.note(f"llamajax: {' '.join(str(message).split())}")
            return _run(list(sys.argv[1:] if argv is None else argv))
    except terminal.ReaderLeftError:
        terminal.drop_output()
        return 0
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or process.interrupted():  # any error may follow from an interrupt
            reason, code = process.interrupted() or ("interrupted", 130)
            return _fail(reason, code)
        message = explained(error)
        if message is None:
            raise
        if getattr(error, "filename", None) == terminal.OUTPUT:  # in other cases the caller may go on printing
            terminal.drop_output()
        return _fail(message, 1)


def _run(argv: list[str]) -> int:
    if not COMMANDS:
        remedy = "install it with pip, or run it from a checkout"
        return _fail(f"llamajax finds no commands: it is neither installed nor beside its pyproject.toml: {remedy}", 1)
    if not argv:
        terminal.write(help_pages.first_steps())
        return 2
    if argv[0] == "--version":
        from llamajax import __version__

        terminal.write(f"llamajax {__version__}")
        return 0
    if argv[0] in ("help", *_HELP):
        if len(argv) == 1:
            terminal.write(help_pages.overview({name: _summary(command) for name, command in COMMANDS.items()}))
            return 0
        argv = [argv[1], "--help"]
    name, *rest = argv
    if name not in COMMANDS:
        return _fail(_unknown_command(name), 2)
    command = _load(COMMANDS[name])
    values = flags.FlagValues()
    command.define(values)
    flags.DEFINE_boolean("help", False, "Shows this page.", short_name="h", flag_values=values)
    try:
        parse([name, *rest], command, values)
    except WrongCommandLineError as error:
        return _fail(f"{error} (see llamajax {name} --help)", 2)
    if values.help:
        terminal.write(help_pages.page(name, command, values))
        return 0
    if scarce := process.few_addresses():
        terminal.note(f"llamajax: {scarce}")
    if "threads" in values and values.threads is not None:
        use_threads(values.threads)
    keep_compiled_programs()
    with process.interruptible():
        command.run(values)
    return 0


def _unknown_command(name: str) -> str:
    if name.startswith("-") and name not in ("-", "--"):
        if close := nearest(name, ("--help", "--version")):
            return f"unknown flag {name}: did you mean {close}?"
        return f"{name}: expected a command before the flags, such as llamajax generate (see llamajax --help)"
    close = nearest(name, COMMANDS)
    return f"unknown command {name!r}: " + (
        f"did you mean {close!r}?" if close else f"expected {in_words([*COMMANDS])}"
    )


def _load(command: Command) -> ModuleType:
    """Imports and returns the module of a command.

    Raises:
        LlamaJaxError: if two distributions declare the command, or its module cannot be imported or is no command.
    """
    name, module, owner = command.name, command.module, command.distribution
    if len(command.modules) > 1:
        rivals = " and ".join(f"{each} ({place})" for each, place in command.modules.items())
        raise LlamaJaxError(f"command {name!r}: declared by {rivals}: expected one distribution: uninstall the other")
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        if explained(error):  # memory is used up: no dependency is missing
            raise
        raise LlamaJaxError(
            f"command {name!r}: {module} of the distribution {owner} cannot be imported ({error}): install what it "
            f"needs, or another version of {owner}, or uninstall it"
        ) from error
    missing = [each for each in ("SUMMARY", "EXAMPLES", "define", "run") if not hasattr(loaded, each)]
    if missing:
        raise LlamaJaxError(
            f"command {name!r}: {module} of the distribution {owner} has no {', '.join(missing)}: expected a command's "
            f"module: install another version of {owner}, or uninstall it"
        )
    return loaded


def explained(error: BaseException) -> str | None:
    """Returns one line about an error that bad input or a full machine causes, in any library; None for a bug."""
    if isinstance(error, LlamaJaxError):
        return str(error)
    if problem := disk_problem(error):
        return f"{getattr(error, 'filename', None) or 'a file'}: {problem}: make room or choose another place"
    if isinstance(error, OSError):
        return f"{error.filename or 'input/output'}: {error.strerror or error}"
    for seen in causes(error):
        if isinstance(seen, MemoryError) or any(sign in str(seen) for sign in _OUT_OF_MEMORY):
            device = "device " if isinstance(seen, jax.errors.JaxRuntimeError) else ""
            return f"out of {device}memory: use a smaller model, --dtype=bfloat16 or a shorter context"
    return None


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles in the user's cache folder, so that a second start does not compile again.

    JAX's own settings take precedence: JAX_COMPILATION_CACHE_DIR names another folder,
    JAX_ENABLE_COMPILATION_CACHE=false turns the cache off. Each folder serves one kind of processor and one number of
    threads, because JAX's cache keys do not distinguish programs by instruction set or by number of threads. The
    folder is used only if nobody else can write to it. When it holds too many files, the oldest are deleted.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    made_for = f"{processor_features()} {thread_count()}"
    folder = user_caches() / f"xla-{hashlib.sha256(made_for.encode()).hexdigest()[:12]}"
    if not is_private(folder):  # Commands work without the cache.
        return
    drop_oldest(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Keep small programs too, such as those for an empty KV cache or a PRNG key: together they take 0.1 s to compile
    # and less to load.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def user_caches() -> Path:
    """The user's folder for files that can be made or fetched again: in XDG_CACHE_HOME, or else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "llamajax"


def user_state() -> Path:
    """The user's folder for what commands keep between runs: in XDG_STATE_HOME, or else in ~/.local/state."""
    return Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")) / "llamajax"


def _fail(message: str, code: int) -> int:
    lines = (line.strip() for line in message.splitlines())
    terminal.note(f"llamajax: {' '.join(line for line in lines if line)}")
    return code


def _summary(command: Command) -> str:
    """The command's summary, one line; if the command cannot be loaded, the reason: the others still work."""
    try:
        return _load(command).SUMMARY
    except LlamaJaxError as error:
        return f"cannot be used: {error}"
