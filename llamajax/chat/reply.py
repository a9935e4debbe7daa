"""Splits the text of a model, while it is generated, into thinking, content and tool calls.

    reply = Reply(ReplyForm(thinking=("<think>", "</think>")))
    for text in stream:
        for piece in reply.add(text):
            print(piece.kind, piece.text)
    print(reply.finish(), reply.message())

Text that may still become a mark, or white space that belongs to a mark, is held back.
"""

import dataclasses
from collections.abc import Callable

from llamajax.chat.messages import Message, ToolCall
from llamajax.chat.tool_calls import CallForm, read_calls
from llamajax.generation.request import overlap

CONTENT, THINKING = "content", "thinking"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        kind: "content" or "thinking".
        text: its text.
    """

    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class ReplyForm:
    """How a model marks the parts of its answers.

    Attributes:
        thinking: the marks before and after the model's thinking, or None.
        opened: whether the prompt ends within thinking, so that the model does not write the first mark.
        calls: how the model writes tool calls; None if none are expected.
        drops_first_space: whether a space at the start of the reply was added by the tokenizer.
    """

    thinking: tuple[str, str] | None = None
    opened: bool = False
    calls: CallForm | None = None
    drops_first_space: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks. Those that are control tokens of a tokenizer must be decoded as text."""
        return (*(self.thinking or ()), *(self.calls.marks if self.calls else ()))


class Reply:
    """One reply, which is read text by text.

    Attributes:
        note: why text that began as a tool call stays content, or None.
    """

    def __init__(self, form: ReplyForm):
        """Starts an empty reply."""
        self.note: str | None = None
        self._form = form
        self._held = ""  # the text that is held back
        self._said = {CONTENT: "", THINKING: ""}
        self._calls: tuple[ToolCall, ...] = ()
        self._part: Callable[[bool], list[Piece]] = self._thinking if form.thinking and form.opened else self._start

    def add(self, text: str) -> list[Piece]:
        """Adds text; returns the pieces that have become certain."""
        self._held += text
        return self._take(last=False)

    def finish(self) -> list[Piece]:
        """Ends the reply; returns the pieces that were held back."""
        return self._take(last=True)

    def message(self) -> Message:
        """The message so far."""
        return Message("assistant", self._said[CONTENT], self._said[THINKING] or None, self._calls)

    def _take(self, last: bool) -> list[Piece]:
        """Reads part after part, until the held text stays in the same part."""
        pieces, part = [], None
        while part != self._part:
            part = self._part
            pieces += part(last)
        return pieces

    def _start(self, last: bool) -> list[Piece]:
        """At the start: thinking begins here, perhaps after white space, or there is none."""
        if not self._held and not last:
            return []
        if self._form.drops_first_space:
            self._held = self._held.removeprefix(" ")
            self._form = dataclasses.replace(self._form, drops_first_space=False)
        begun = self._held.lstrip()
        if self._form.thinking:
            mark = self._form.thinking[0]
            if begun.startswith(mark):
                self._held = begun[len(mark) :]
                self._part = self._thinking
                return []
            if mark.startswith(begun) and not last:
                return []
        self._part = self._first_content
        return []

    def _thinking(self, last: bool) -> list[Piece]:
        """Within thinking, without the line breaks after the first mark and before the last one."""
        assert self._form.thinking
        if not self._said[THINKING]:
            self._held = self._held.lstrip("\n")
        mark = self._form.thinking[1]
        thought, found, rest = self._held.partition(mark)
        if found:
            self._held, self._part = rest, self._behind_thinking
            return self._say(THINKING, thought.rstrip("\n"))
        certain = self._held if last else self._held[: len(self._held) - overlap(self._held, (mark,))]
        certain = certain.rstrip("\n")
        self._held = "" if last else self._held[len(certain) :]
        return self._say(THINKING, certain)

    def _behind_thinking(self, last: bool) -> list[Piece]:
        """After thinking: skips line breaks before the content."""
        self._held = self._held.lstrip("\n")
        if self._held:
            self._part = self._first_content
        return []

    def _first_content(self, last: bool) -> list[Piece]:
        """At the start of content, which may be a call without a mark."""
        calls = self._form.calls
        if calls and calls.may_begin(self._held):
            if self._held.strip() or last:
                self._part = self._calling
            return []
        self._part = self._content
        return []

    def _content(self, last: bool) -> list[Piece]:
        """Within content, up to the first mark of a call; white space before the mark belongs to the call."""
        begins = self._form.calls.begins if self._form.calls else ()
        starts = [at for mark in begins if (at := self._held.find(mark)) >= 0]
        if starts:
            certain = self._held[: min(starts)].rstrip()
            self._part = self._calling
        elif begins and not last:
            certain = self._held[: len(self._held) - overlap(self._held, begins)].rstrip()
        else:
            certain = self._held
        self._held = self._held[len(certain) :]
        return self._say(CONTENT, certain)

    def _calling(self, last: bool) -> list[Piece]:
        """Within calls, which are read when the reply ends, unless the text turns out not to be a call."""
        assert self._form.calls
        if not last:
            begun = self._held.lstrip()
            if not begun.startswith(self._form.calls.begins) and not self._form.calls.may_begin(begun):
                self._part = self._content
            return []
        text, self._held = self._held, ""
        if not text.strip():
            return self._say(CONTENT, text)
        calls, rest, problem = read_calls(self._form.calls, text)
        self._calls = tuple(calls)
        if problem:
            self.note = f"what began as a tool call stays text: {problem}"
        return self._say(CONTENT, rest)

    def _say(self, kind: str, text: str) -> list[Piece]:
        self._said[kind] += text
        return [Piece(kind, text)] if text else []
