"""A chat template as the strings between the messages of a conversation, for programs that have no Jinja.

A conversation that such a program has is a system message or none, then user and assistant in turn, and a user's
message last, which the model is to answer. What users and the system say has no white space at its ends: it is a line
of input, or a flag. Of a template of the usual form such a conversation becomes

    begin             U  answer  A  next  U  …  reply
    system  S  behind U  answer  A  next  U  …  reply

What the strings are is found by rendering conversations of words that stand nowhere else. That the template does
nothing but this is checked by rendering others: awkward texts, and conversations drawn at random.
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
    """A stretch of a rendered conversation, as `Template.parts` gives them."""

    @property
    def text(self) -> str:
        """What it says."""


Render = Callable[[Sequence[Message], bool], Sequence[_Part]]

_CHECKS = 60
_THINKING_END = "</think>"
# What templates look for in messages, what Jinja and tokenizers read, and white space where it may be cut.
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
        begin: what stands before the first user's message where there is no system message: the beginning of the
            text, and the system message that the template has of its own.
        system: what stands before a system message; None where the template takes none, or has no one place for it.
        behind_system: what stands between it and the first user's message. Formats that put the system message into
            the user's (Llama 2, Gemma) differ from others in these two alone.
        answer: what stands between a user's message and its answer.
        next: what stands between an answer and the next user's message.
        reply: what stands behind the last user's message: there the model goes on.
        trims_answers: whether answers lose white space at both ends.
        thinking_end: up to the last of which an answer is left out of the conversation behind it; None for none.
        thinking_blank: characters that are left out behind it too.
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
        """What a conversation has of a message."""
        text = message.content
        if message.role != "assistant":
            return text.strip()
        if self.thinking_end is not None and self.thinking_end in text:
            text = text.rpartition(self.thinking_end)[2].lstrip(self.thinking_blank)
        return text.strip() if self.trims_answers else text

    def parts(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """A conversation as texts, each with whether it stands in a message.

        Raises:
            LlamaJaxError: for messages in another order than `conversations` have, or a system message where the
                template takes none.
        """
        roles = [message.role for message in messages]
        with_system = roles[:1] == ["system"]
        turns = roles[with_system:]
        if len(turns) % 2 == 0 or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
            raise LlamaJaxError(
                f"messages of {', '.join(roles) or 'nobody'}: expected a system message or none, then user and "
                "assistant in turn, and a user message at the end"
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
    """Why a template is none of the usual form."""


def role_strings(render: Render) -> tuple[RoleStrings | None, str]:
    """The strings of a template, if it is of the usual form.

    Args:
        render: a conversation, and whether an answer is to begin, as parts; raises LlamaJaxError where the template
            refuses it.

    Returns:
        The strings and ""; or None, and why there are none.
    """
    try:
        strings = _found(render)
        _check(strings, render, conversations(with_system=False))
    except _Unusual as error:
        return None, str(error)
    if strings.system is not None:
        try:
            _check(strings, render, conversations(with_system=True))
        except (LlamaJaxError, _Unusual):  # as Mistral's, which puts it before the last of the user's messages
            strings = dataclasses.replace(strings, system=None, behind_system=None)
    return strings, ""


def conversations(with_system: bool) -> Iterator[list[Message]]:
    """Conversations of the usual form: with each of the awkward texts, and at random; the same ones each time."""
    draw = random.Random(0)
    for text in _AWKWARD:
        yield _alternating(["Hi", text, "And?"])
        if text.strip():
            yield from (_alternating([text]), _alternating(["Hi", "So.", text]))
            yield from [[Message("system", text.strip()), Message("user", "Hi")]] * with_system
    for _ in range(_CHECKS):
        texts = draw.choices((*_AWKWARD, ""), k=2 * draw.randint(0, 4) + 1)
        # A user who says nothing is not answered, and a system message that says nothing is none.
        texts = [text if number % 2 or text.strip() else "Go on." for number, text in enumerate(texts)]
        first = [Message("system", draw.choice([text.strip() for text in _AWKWARD if text.strip()]))]
        yield first * (with_system and draw.random() < 0.5) + _alternating(texts)


def _alternating(texts: Sequence[str]) -> list[Message]:
    return [
        Message("assistant", text) if number % 2 else Message("user", text.strip()) for number, text in enumerate(texts)
    ]


def _found(render: Render) -> RoleStrings:
    """The strings, by conversations of words that stand nowhere else."""
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
    """What stands around the contents of messages, each of which is a word of its own.

    Raises:
        LlamaJaxError: if the template refuses the messages and they hold a system message.
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
            raise  # it takes none
        raise _Unusual(str(error)) from None


def _answer_as(render: Render, answer: str) -> str:
    """What stands in the text of an answer."""
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
    """What becomes of an answer that holds the model's thinking: the fields of `RoleStrings` that say it."""
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
    """Compares what the strings give with what the template does."""
    for messages in some:
        theirs, ours = _text(render, messages), "".join(text for text, _ in strings.parts(messages))
        if theirs != ours:
            at = len(os.path.commonprefix([theirs, ours]))
            raise _Unusual(
                f"it depends on more than roles: for {len(messages)} messages it writes {shortened(theirs[at:], 40)} "
                f"where {shortened(ours[at:], 40)} was expected"
            )
