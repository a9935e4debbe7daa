"""The commands of a conversation at a terminal, such as `/help`, in one table."""

import dataclasses
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from llamajax.chat.messages import load_conversation, save_conversation
from llamajax.cli.terminal import show
from llamajax.errors import LlamaJaxError
from llamajax.files import shortened
from llamajax.generation.sampling import make_sampler

if TYPE_CHECKING:
    from llamajax.cli.chat_terminal import Session

_KEYS = (
    "Enter sends the message. Alt-Enter, or a backslash at the end of a line, starts a new line; in a message that "
    'begins with """, Enter starts a new line until """ ends the message. The arrow keys show earlier messages, Tab '
    "completes a command. Ctrl-C stops an answer, or clears the message that is being typed; Ctrl-D ends the program. "
    "To send a message that begins with /, type // or a space first."
)


@dataclasses.dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        argument: the command's argument as /help shows it; in brackets if it is optional.
        summary: what the command does, for /help.
        run: runs the command, given the session and the argument.
        choices: the values that the argument may have; None for any value.
    """

    argument: str
    summary: str
    run: Callable[["Session", str], None]
    choices: tuple[str, ...] | None = None


def run_command(session: "Session", line: str) -> None:
    """Runs the command in a line that begins with a slash.

    Raises:
        LlamaJaxError: for an unknown command, or an argument that the command does not take.
        OSError: for a file that cannot be read or written.
    """
    name, *rest = line.split(maxsplit=1)
    argument = rest[0].strip() if rest else ""
    name = _OTHER_NAMES.get(name, name)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, [*COMMANDS, *_OTHER_NAMES], 1)
        hint = f"did you mean {close[0]}?" if close else "/help lists the commands"
        raise LlamaJaxError(
            f"unknown command {shortened(name, 40)}: {hint} (to send a message that begins with /, type // instead)"
        )
    command = COMMANDS[name]
    if argument and not command.argument:
        raise LlamaJaxError(f"{name}: unexpected argument {shortened(argument, 40)}: expected {name} alone")
    if not argument and command.argument and not command.argument.startswith("["):
        raise LlamaJaxError(f"{name}: no {command.argument} is given: expected {name} {command.argument}")
    if argument and command.choices and argument not in command.choices:
        raise LlamaJaxError(f"{name}: {shortened(argument, 40)}: expected {' or '.join(command.choices)}")
    command.run(session, argument)


def _help(session: "Session", argument: str) -> None:
    table = Table.grid(padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(Text(f"{name} {command.argument}"), Text(command.summary))
    show(table)
    show(f"\n{_KEYS}")


def _reset(session: "Session", argument: str) -> None:
    session.reset()
    session.say("started a new conversation")


def _save(session: "Session", argument: str) -> None:
    path = Path(argument).expanduser()
    if path.exists():
        try:
            load_conversation(path)
        except LlamaJaxError as error:
            raise LlamaJaxError(f"{path} exists and is not a saved conversation: choose another name") from error
    messages = session.chat.messages
    save_conversation(path, messages)
    session.say(f"{path}: saved {len(messages)} messages")


def _load(session: "Session", argument: str) -> None:
    session.load(Path(argument).expanduser())


def _system(session: "Session", argument: str) -> None:
    if argument:
        session.chat.system = None if argument == "-" else argument
    system = session.chat.system
    session.say("the chat template sets the system message" if system is None else f"the system message: {system}")


def _think(session: "Session", argument: str) -> None:
    if argument:
        session.chat.think = argument == "on"
    session.say(f"thinking before the answer is {'on' if session.chat.think else 'off'}")


def _most(session: "Session", argument: str) -> None:
    if argument:
        session.chat.max_new_tokens = _number("/max_new_tokens", argument, int)
    session.say(f"an answer has at most {session.chat.max_new_tokens} tokens")


def _knob(knob: str, kind: type) -> Callable[["Session", str], None]:
    """Returns the function of the command that shows or sets one sampling parameter."""

    def run(session: "Session", argument: str) -> None:
        if argument:
            value = None if argument == "off" else _number(f"/{knob}", argument, kind)
            if value is None and knob == "temperature":
                value = 0.0
            make_sampler(**{**session.chat.knobs, knob: value})
            session.chat.knobs[knob] = value
        value = session.chat.knobs.get(knob)
        session.say(f"{knob} is off" if value is None else f"{knob} is {value:g}")

    return run


def _number(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise LlamaJaxError(f"{name}: {shortened(text, 40)}: expected {expected}") from None


COMMANDS: dict[str, Command] = {
    "/help": Command("", "shows this help", _help),
    "/retry": Command("", "generates another answer to the last message", lambda session, _: session.retry()),
    "/reset": Command("", "starts a new conversation and keeps the system message", _reset),
    "/system": Command("[TEXT]", "shows or sets the system message; - restores the chat template's", _system),
    "/temperature": Command(
        "[X]", "0 takes the likeliest token; higher values vary the text", _knob("temperature", float)
    ),
    "/top_k": Command("[K]", "samples from the K likeliest tokens; or off", _knob("top_k", int)),
    "/top_p": Command("[P]", "samples from the likeliest tokens of total probability P; or off", _knob("top_p", float)),
    "/min_p": Command(
        "[P]", "samples from tokens at least P times as likely as the likeliest; or off", _knob("min_p", float)
    ),
    "/repetition_penalty": Command(
        "[X]", "values above 1 make earlier tokens less likely; or off", _knob("repetition_penalty", float)
    ),
    "/max_new_tokens": Command("[N]", "limits the tokens of an answer", _most),
    "/think": Command("[on|off]", "makes the model think before it answers", _think, choices=("on", "off")),
    "/history": Command("", "shows the conversation so far", lambda session, _: session.show_history()),
    "/save": Command("FILE", "writes the conversation to a JSON file", _save),
    "/load": Command("FILE", "continues a saved conversation", _load),
    "/exit": Command("", "ends the program, as Ctrl-D does", lambda session, _: session.end()),
}
# Names that other programs use for these commands.
_OTHER_NAMES = {
    "/quit": "/exit",
    "/bye": "/exit",
    "/clear": "/reset",
    "/new": "/reset",
    "/regenerate": "/retry",
    "/?": "/help",
}
