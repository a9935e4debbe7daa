"""A conversation at a terminal: what is typed is answered, or is a command; Ctrl-C stops an answer, not the program."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from prompt_toolkit.completion import Completer, PathCompleter, WordCompleter

from llamajax import process
from llamajax.chat.answer import Answer
from llamajax.chat.chat import Chat
from llamajax.chat.messages import load_conversation
from llamajax.cli import explained
from llamajax.cli.chat_commands import COMMANDS, run_command
from llamajax.cli.chat_input import PROMPT, PlainlyTyped, Typed, Words, message_of
from llamajax.cli.chat_screen import Screen
from llamajax.cli.conversation import Conversation
from llamajax.cli.terminal import harmless, is_dumb, keys_unseen, spinner, tell, write
from llamajax.errors import LlamaJaxError


class Session:
    """One conversation, until the person who types ends it.

    Attributes:
        chat: the messages so far and how they are answered.
    """

    def __init__(self, conversation: Conversation, markdown: bool, history: Path | None):
        """Nothing typed yet.

        Args:
            conversation: with what was said before, if anything.
            markdown: whether answers are read as Markdown.
            history: the file of what is typed, or None for none.
        """
        self.chat: Chat = conversation.chat
        self.chat.on_note = _say
        self._conversation, self._markdown = conversation, markdown
        self._typed = PlainlyTyped() if is_dumb() else Typed(Words(dict(_completers())), history)
        self._answer: Answer | None = None
        self._stopping = self._ended = False

    def run(self) -> None:
        """Answers until the end of input."""
        self._conversation.read_weights()
        self.say(f"{self._conversation.described()}. /help lists the commands, Ctrl-D ends.")
        with process.interrupt_calls(self._stop):
            while not self._ended:
                self._turn()

    def say(self, text: str) -> None:
        """Tells the person who types what a command did."""
        tell(text, "dim")

    def end(self) -> None:
        """Ends the conversation behind this turn."""
        self._ended = True

    def reset(self) -> None:
        """Begins a new conversation."""
        self.chat.reset()

    def load(self, path: Path) -> None:
        """Goes on with the conversation of a file."""
        messages = load_conversation(path)
        self.reset()
        self.chat.messages = messages
        self.show_history()

    def show_history(self) -> None:
        """Prints the conversation so far."""
        if not self.chat.messages:
            self.say("the conversation is empty")
        for message in self.chat.messages:
            if message.role == "user":
                write(harmless(f"{PROMPT}{message.content}"))
            elif message.role == "assistant":
                screen = Screen(self._markdown)
                for kind, text in (("thinking", message.thinking), ("content", message.content)):
                    if text:
                        screen.show(kind, text)
                screen.finish()
            else:
                self.say(f"{message.role}: {message.content}")

    def retry(self) -> None:
        """Answers the last message once more."""
        if self.chat.knobs.get("temperature") == 0:
            self.say("the temperature is 0, so the answer will be the same: /temperature 0.7 gives another one")
        self._show(self._conversation.retry())

    def _turn(self) -> None:
        try:
            typed = self._typed.read()
        except EOFError:
            self.end()
            return
        except KeyboardInterrupt:
            if process.interrupted():  # SIGTERM
                raise
            return
        self._stopping = False
        try:
            self._take(typed)
        except (LlamaJaxError, OSError) as error:
            _say(str(explained(error)))

    def _take(self, typed: str) -> None:
        """Answers what was typed, or does it."""
        text = message_of(typed)
        if typed.startswith("/") and not typed.startswith("//"):
            run_command(self, text)
        elif text:
            self._show(self._conversation.stream(text[1:] if typed.startswith("//") else text))

    def _show(self, answer: Answer) -> None:
        """Writes an answer as it comes, and what it took."""
        screen = Screen(self._markdown)
        self._answer = answer
        if self._stopping:
            answer.stop()
        try:
            with keys_unseen():
                with spinner("answering"):  # a long text is read first, or several samples are made
                    first = list(itertools.islice(answer, 1))
                for piece in itertools.chain(first, answer):
                    screen.show(piece.kind, piece.text)
        finally:
            self._answer = None
            screen.finish()
        self.say(self._conversation.took(answer))

    def _stop(self) -> None:
        """What Ctrl-C does, at any time but at the prompt."""
        self._stopping = True
        if self._answer is not None:
            self._answer.stop()


def _say(text: str) -> None:
    """What a person should know, under our name."""
    tell(f"llamajax: {text}")


def _completers() -> Iterator[tuple[str, Completer | None]]:
    """What stands behind each command."""
    for name, command in COMMANDS.items():
        if command.argument == "FILE":
            yield name, PathCompleter(expanduser=True)
        else:
            yield name, WordCompleter(list(command.choices)) if command.choices else None
