"""A conversation at a terminal: each input is a message or a command; Ctrl-C stops an answer, not the program."""

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
    """One conversation, until the user ends it.

    Attributes:
        chat: the messages so far, and the settings for answers.
    """

    def __init__(self, conversation: Conversation, markdown: bool, history: Path | None):
        """Sets up the session; reads nothing yet.

        Args:
            conversation: the conversation, with earlier messages if it was loaded.
            markdown: whether answers are shown as Markdown.
            history: file for the history of typed messages, or None to keep none.
        """
        self.chat: Chat = conversation.chat
        self.chat.on_note = _say
        self._conversation, self._markdown = conversation, markdown
        self._typed = PlainlyTyped() if is_dumb() else Typed(Words(dict(_completers())), history)
        self._answer: Answer | None = None
        self._stopping = self._ended = False

    def run(self) -> None:
        """Answers messages until the end of input."""
        self._conversation.read_weights()
        self.say(f"{self._conversation.described()}. /help lists the commands, Ctrl-D ends.")
        with process.interrupt_calls(self._stop):
            while not self._ended:
                self._turn()

    def say(self, text: str) -> None:
        """Tells the user what a command did."""
        tell(text, "dim")

    def end(self) -> None:
        """Ends the conversation after this turn."""
        self._ended = True

    def reset(self) -> None:
        """Begins a new conversation."""
        self.chat.reset()

    def load(self, path: Path) -> None:
        """Continues the conversation in a file."""
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
        """Answers the message that was typed, or runs the command."""
        text = message_of(typed)
        if typed.startswith("/") and not typed.startswith("//"):
            run_command(self, text)
        elif text:
            self._show(self._conversation.stream(text[1:] if typed.startswith("//") else text))

    def _show(self, answer: Answer) -> None:
        """Streams an answer to the screen, then says how many tokens it took and how fast."""
        screen = Screen(self._markdown)
        self._answer = answer
        if self._stopping:
            answer.stop()
        try:
            with keys_unseen():
                with spinner("answering"):  # the first piece can take long: a long prompt, several samples
                    first = list(itertools.islice(answer, 1))
                for piece in itertools.chain(first, answer):
                    screen.show(piece.kind, piece.text)
        finally:
            self._answer = None
            screen.finish()
        self.say(self._conversation.took(answer))

    def _stop(self) -> None:
        """Stops the answer: what Ctrl-C does, except at the prompt."""
        self._stopping = True
        if self._answer is not None:
            self._answer.stop()


def _say(text: str) -> None:
    """Tells the user something, after the program's name."""
    tell(f"llamajax: {text}")


def _completers() -> Iterator[tuple[str, Completer | None]]:
    """Yields each command with the completer of its argument."""
    for name, command in COMMANDS.items():
        if command.argument == "FILE":
            yield name, PathCompleter(expanduser=True)
        else:
            yield name, WordCompleter(list(command.choices)) if command.choices else None
