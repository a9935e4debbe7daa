"""Reduces a chat template to the strings between the messages of a conversation, for programs without Jinja.

A conversation in such a program has an optional system message, then user and assistant messages in turn, and a user
message last, which the model answers. User and system messages have no white space at their ends, because they are a
line of input or a flag. A template of the usual form turns such a conversation into

    begin             U  answer  A  next  U  …  reply
    system  S  behind U  answer  A  next  U  …  reply

The strings are found by rendering conversations of words that occur nowhere else in the template's output. Then other
conversations, of awkward texts and drawn at random, are rendered to check that the template does nothing else.
"""

import dataclasses
import os.path
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from llamajax.chat.messages import Message
from llamajax.errors import LlamaJaxError
from llamajax.files import shortened


class _Part(Protocol):
    """A part of a rendered conversation, as `Template.parts` returns it."""

    @property
    def text(self) -> str:
        """The text of the part."""


Render = Callable[[Sequence[Message], bool], Sequence[_Part]]

_CHECKS = 60
_THINKING_END = "</think>"
# Texts with marks that templates look for in messages, syntax of Jinja, control tokens, and white space at the ends.
_AWKWARD = (
    "Hi",
    "What is the capital of France?",
    "two\nlines\n\nand more",
    " spaces \t around \n",
    "\n\n",
    "<|im_start|>system\nx<|im_end|>",
    "[INST] <<SYS>> y <</SYS>> [/INST] </s><s>",
    "<|start_header_id|>user<|end_header_id|><|eot_id|>",
    "<start_of_turn>model<end_of_turn>",
    "{{ messages }} {% if x %} {# y #} \\n",
    "<think>\nSo.\n</think>\n\nParis.",
    "a <think> without an end",
    "an end </think> alone </think> twice",
    "<tool_call>{}</tool_call> <tool_response>",
    "'quoted' \"twice\" & <b>é 日本 \U0001f98a",
)


@dataclasses.dataclass(frozen=True)
class RoleStrings:
    """The strings between the messages of a conversation.

    Attributes:
        begin: the text before the first user message if there is no system message; it includes the template's own
            default system message, if any.
        system: the text before a system message; None if the template takes none, or has no fixed place for it.
        behind_system: the text between the system message and the first user message. Formats that put the system
            message into the user message (Llama 2, Gemma) differ from others only in `system` and `behind_system`.
        answer: the text between a user message and its answer.
        next: the text between an answer and the next user message.
        reply: the text after the last user message, from which the model continues.
        trims_answers: whether answers lose white space at both ends.
        thinking_end: a mark; an earlier answer loses all text up to its last occurrence. None if there is no such mark.
        thinking_blank: characters that are removed after that mark, too.
    """

    begin: str
    system: str | None
    behind_system: str | None
    answer: str
    next: str
    reply: str
    trims_answers: bool = False
    thinking_end: str | None = None
    thinking_blank: str = ""

    def content(self, message: Message) -> str:
        """The text of a message that the conversation keeps."""
        text = message.content
        if message.role != "assistant":
            return text.strip()
        if self.thinking_end is not None and self.thinking_end in text:
            text = text.rpartition(self.thinking_end)[2].lstrip(self.thinking_blank)
        return text.strip() if self.trims_answers else text

    def parts(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """Writes a conversation as texts, each with whether it is the content of a message.

        Raises:
            LlamaJaxError: for messages in another order than those of `conversations`, or a system message if the
                template takes none.
        """
        roles = [message.role for message in messages]
        with_system = roles[:1] == ["system"]
        turns = roles[with_system:]
        if len(turns) % 2 == 0 or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
            raise LlamaJaxError(
                f"messages of {', '.join(roles) or 'nobody'}: expected a system message or none, then messages of user "
                "and assistant in turn, and a user message at the end"
            )
        if with_system and (self.system is None or self.behind_system is None):
            raise LlamaJaxError("the chat template has no fixed place for a system message: write it into the user's")
        made: list[tuple[str, bool]] = []
        before = self.system if with_system else self.begin
        for message in messages:
            made += [(str(before), False), (self.content(message), True)]
            before = {"system": self.behind_system, "user": self.answer, "assistant": self.next}[message.role]
        return [*made, (self.reply, False)]


class _Unusual(Exception):
    """The reason why a template does not have the usual form."""


def role_strings(render: Render) -> tuple[RoleStrings | None, str]:
    """Returns the strings of a template, if it has the usual form.

    Args:
        render: takes a conversation and whether to begin an answer, and returns parts; raises LlamaJaxError if the
            template refuses the conversation.

    Returns:
        The strings and ""; or None and the reason.
    """
    try:
        strings = _found(render)
        _check(strings, render, conversations(with_system=False))
    except _Unusual as error:
        return None, str(error)
    if strings.system is not None:
        try:
            _check(strings, render, conversations(with_system=True))
        except (LlamaJaxError, _Unusual):  # for example Mistral's, which puts it before the last user message
            strings = dataclasses.replace(strings, system=None, behind_system=None)
    return strings, ""


def conversations(with_system: bool) -> Iterator[list[Message]]:
    """Yields conversations of the usual form: with each awkward text, and random ones; the same in every call."""
    draw = random.Random(0)
    for text in _AWKWARD:
        yield _alternating(["Hi", text, "And?"])
        if text.strip():
            yield from (_alternating([text]), _alternating(["Hi", "So.", text]))
            yield from [[Message("system", text.strip()), Message("user", "Hi")]] * with_system
    for _ in range(_CHECKS):
        texts = draw.choices((*_AWKWARD, ""), k=2 * draw.randint(0, 4) + 1)
        # User messages and system messages are never empty.
        texts = [text if number % 2 or text.strip() else "Go on." for number, text in enumerate(texts)]
        first = [Message("system", draw.choice([text.strip() for text in _AWKWARD if text.strip()]))]
        yield first * (with_system and draw.random() < 0.5) + _alternating(texts)


def _alternating(texts: Sequence[str]) -> list[Message]:
    return [
        Message("assistant", text) if number % 2 else Message("user", text.strip()) for number, text in enumerate(texts)
    ]


def _found(render: Render) -> RoleStrings:
    """Finds the strings with conversations of words that occur nowhere else."""
    one, two, three = "kqwone", "kqwtwo", "kqwthree"
    begin, reply = _between(render, _alternating([one]))
    first, answer, following, last = _between(render, _alternating([one, two, three]))
    if (first, last) != (begin, reply):
        raise _Unusual("the text around a message depends on the number of messages")
    try:
        system, behind, last = _between(render, [Message("system", one), Message("user", two)])
    except LlamaJaxError:
        system, behind, last = None, None, reply
    if last != reply:
        raise _Unusual("the text after a message depends on the system message")
    strings = RoleStrings(begin, system, behind, answer, following, reply)
    trims = _trims_answers(render)
    return dataclasses.replace(strings, trims_answers=trims, **_thinking(render, trims))


def _between(render: Render, messages: Sequence[Message]) -> list[str]:
    """The texts before, between and after the contents of messages; each content must be a unique word.

    Raises:
        LlamaJaxError: if the template refuses the messages and the first is a system message.
    """
    text, strings = _text(render, messages), []
    for message in messages:
        if text.count(message.content) != 1:
            raise _Unusual(f"it does not contain a message of the role {message.role} once and unchanged")
        before, _, text = text.partition(message.content)
        strings.append(before)
    return [*strings, text]


def _text(render: Render, messages: Sequence[Message]) -> str:
    try:
        return "".join(part.text for part in render(messages, True))
    except LlamaJaxError as error:
        if messages[0].role == "system":
            raise  # the template takes no system message
        raise _Unusual(str(error)) from None


def _answer_as(render: Render, answer: str) -> str:
    """What a template writes for an answer of this text."""
    shown = _between(render, _alternating(["kqwone", "kqwtwo", "kqwthree"]))
    text = _text(render, _alternating(["kqwone", answer, "kqwthree"]))
    return text.removeprefix(shown[0] + "kqwone" + shown[1]).removesuffix(shown[2] + "kqwthree" + shown[3])


def _trims_answers(render: Render) -> bool:
    answer = "\n kqwanswer\t\n"
    shown = _answer_as(render, answer)
    if shown not in (answer, answer.strip()):
        raise _Unusual(f"white space around an answer is neither kept nor trimmed: it becomes {shortened(shown)}")
    return shown != answer


def _thinking(render: Render, trims: bool) -> Mapping[str, Any]:
    """The fields of `RoleStrings` about an answer that holds the model's thinking."""
    before, after = "<think>kqwthought" + _THINKING_END, "\n\n kqwanswer"
    shown = _answer_as(render, before + after)
    if shown == before + after:
        return {}
    for blank in ("", "\n"):
        left = after.lstrip(blank)
        if shown == (left.strip() if trims else left):
            return {"thinking_end": _THINKING_END, "thinking_blank": blank}
    raise _Unusual(f"an answer with {_THINKING_END} in it becomes {shortened(shown, 60)}")


def _check(strings: RoleStrings, render: Render, some: Iterable[list[Message]]) -> None:
    """Compares conversations written with the strings to those that the template renders."""
    for messages in some:
        theirs, ours = _text(render, messages), "".join(text for text, _ in strings.parts(messages))
        if theirs != ours:
            at = len(os.path.commonprefix([theirs, ours]))
            raise _Unusual(
                f"it depends on more than roles: for {len(messages)} messages it writes {shortened(theirs[at:], 40)} "
                f"where {shortened(ours[at:], 40)} was expected"
            )
