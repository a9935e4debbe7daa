"""Finds properties of a format that no file states, by writing conversations in it.

The properties are where answers end, how thinking is marked, and how tools are called.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llamajax.errors import LlamaJaxError

# Writes a conversation. Arguments: messages, whether to begin the answer, tools. Result: texts, each with whether it is
# the content of a message.
Write = Callable[[list[dict[str, Any]], bool, list[Any] | None], Sequence[tuple[str, bool]]]

_QUESTION, _ANSWER, _THOUGHT = "what is asked", "what is answered", "what is thought"
_NAME, _ARGUMENTS = "tool_that_is_probed", {"probe_key": "probe value"}
_ASKED = {"role": "user", "content": _QUESTION}
_ANSWERED = {"role": "assistant", "content": _ANSWER}
_TOOL = {
    "type": "function",
    "function": {
        "name": "other_tool",
        "description": "It does nothing.",
        "parameters": {
            "type": "object",
            "properties": {"probe_key": {"type": "string", "description": "A text."}},
            "required": ["probe_key"],
        },
    },
}
_TAG = r"<[^<>\s]+>|\[[^\[\]\s]+\]"
_LAST_TAG, _FIRST_TAG = re.compile(rf"({_TAG})\s*\Z"), re.compile(rf"\s*({_TAG})")
# Marks of formats that look for them in an answer, and leave out the text between them.
_KNOWN = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<reasoning>", "</reasoning>"))


@dataclasses.dataclass(frozen=True)
class Thinking:
    """How a format marks a model's thinking before its answer.

    Attributes:
        begin: "<think>".
        end: "</think>".
        opened: whether the format itself writes `begin` at the start of an answer, so that the model does not.
    """

    begin: str
    end: str
    opened: bool


@dataclasses.dataclass(frozen=True)
class ToolCalls:
    """How a format writes a call of a tool, as `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

    Attributes:
        before: the text before the call; may be "".
        behind: the text after the call; may be "".
        name_key: the key of the name in the JSON object; None if the name stands before the JSON, which is then the
            arguments alone.
        arguments_key: the key of the arguments; None if `name_key` is None, or if no key holds them.
        between: the text between name and arguments; "" unless `name_key` is None.
        listed: whether the objects of all calls stand in one JSON list.
    """

    before: str
    behind: str
    name_key: str | None
    arguments_key: str | None
    between: str = ""
    listed: bool = False


def behind_answers(write: Write) -> Iterator[str]:
    """Yields the text that a format writes after an answer, first at the end of a conversation, then within one."""
    for more in ([], [{"role": "user", "content": "what else"}]):
        spans = _written(write, [_ASKED, _ANSWERED, *more], False)
        texts = [text for text, is_content in spans]
        if _ANSWER in texts:
            yield "".join(texts[texts.index(_ANSWER) + 1 :])


def thinking(write: Write) -> Thinking | None:
    """Returns how a format marks thinking; None if it does not."""
    begun = "".join(text for text, _ in _written(write, [_ASKED], True)).rstrip()
    spans = _written(write, [_ASKED, _ANSWERED | {"reasoning_content": _THOUGHT, "thinking": _THOUGHT}], False)
    texts = [text for text, _ in spans]
    pairs = []
    if _THOUGHT in texts:
        at = texts.index(_THOUGHT)
        before, behind = "".join(texts[:at]), "".join(texts[at + 1 :])
        first, last = _LAST_TAG.search(before), _FIRST_TAG.match(behind)
        if first and last and last[1] == f"{first[1][0]}/{first[1][1:]}":
            pairs.append((first[1], last[1]))
    for begin, end in _KNOWN:
        said = {"content": f"{begin}{_THOUGHT}{end}{_ANSWER}"}
        told = "".join(text for text, _ in _written(write, [_ASKED, _ANSWERED | said], False))
        if begun.endswith(begin) or (_ANSWER in told and _THOUGHT not in told):
            pairs.append((begin, end))
    return Thinking(*pairs[0], opened=begun.endswith(pairs[0][0])) if pairs else None


def tool_calls(write: Write, ends: Sequence[str]) -> ToolCalls | None:
    """Returns how a format writes a call of a tool; None if it does not, or in an unknown way.

    Args:
        write: writes a conversation.
        ends: the texts of the tokens that end an answer.
    """
    plain = "".join(text for text, _ in _written(write, [_ASKED, _ANSWERED], False, [_TOOL]))
    header = plain[: plain.find(_ANSWER)]
    for arguments in (_ARGUMENTS, json.dumps(_ARGUMENTS)):
        call = {"id": "probe0001", "type": "function", "function": {"name": _NAME, "arguments": arguments}}
        is_refused = True
        for content in ({}, {"content": ""}):
            messages: list[dict[str, Any]] = [_ASKED, {"role": "assistant", **content, "tool_calls": [call]}]
            text = "".join(text for text, _ in _written(write, messages, False, [_TOOL]))
            is_refused = is_refused and not text
            found = _found(text[len(os.path.commonprefix([header, text])) :], ends)
            if found:
                return found
        if not is_refused:  # arguments as JSON text are only for templates that refuse objects
            break
    return None


def _found(text: str, ends: Sequence[str]) -> ToolCalls | None:
    """The form of the call in the text after the header of an answer."""
    decoder = json.JSONDecoder()
    for start in (found.start() for found in re.finditer(r"[\[{]", text)):
        try:
            value, end = decoder.raw_decode(text, start)
        except ValueError:
            continue
        behind = text[end:]
        behind = behind[: min((at for at in map(behind.find, ends) if at >= 0), default=len(behind))].strip()
        before, listed = text[:start], isinstance(value, list)
        if value == _ARGUMENTS and _NAME in before:
            before, _, between = before.rpartition(_NAME)
            return ToolCalls(before.strip(), behind, None, None, between)
        for call in value if listed else [value]:
            if isinstance(call, dict) and _NAME in call.values():
                keys = {str(said): key for key, said in call.items()}
                arguments = keys.get(str(_ARGUMENTS)) or keys.get(json.dumps(_ARGUMENTS))
                return ToolCalls(before.strip(), behind, keys[_NAME], arguments, listed=listed)
    return None


def _written(
    write: Write, messages: list[dict[str, Any]], reply: bool, tools: list[Any] | None = None
) -> Sequence[tuple[str, bool]]:
    """The conversation in the format, or [] if the format refuses it."""
    try:
        return write(messages, reply, tools)
    except LlamaJaxError:
        return []
