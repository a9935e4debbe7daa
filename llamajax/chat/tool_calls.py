"""Reads tool calls as models write them, and finds out which of these forms a chat template uses.

    <tool_call>{"name": "f", "arguments": {…}}</tool_call>          Hermes 2, Qwen 2.5 and 3
    {"name": "f", "parameters": {…}}                                Llama 3.1 and later, perhaps after <|python_tag|>
    [TOOL_CALLS][{"name": "f", "arguments": {…}, "id": "…"}]        Mistral; its later models: [TOOL_CALLS]f[ARGS]{…}
    <｜tool▁call▁begin｜>function<｜tool▁sep｜>f …json…              DeepSeek V3 and R1; V3.1 without the word

Each reader takes the text from the first mark to the end of the reply. Sources: the models' chat templates, which write
the calls of earlier turns in the same form. If a template puts other marks around such JSON, calls are read by these
marks.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llamajax.chat.messages import ToolCall
from llamajax.chat.probes import ToolCalls
from llamajax.errors import LlamaJaxError
from llamajax.files import shortened

_decoder = json.JSONDecoder()


@dataclasses.dataclass(frozen=True)
class CallForm:
    """One form of writing calls.

    Attributes:
        begins: the marks with which the calls of a reply begin.
        marks: all marks of the form; those that are control tokens must be decoded as text.
        read: returns the calls in a text that begins with a mark, and the text outside the calls. Raises ValueError for
            a text in another form.
        bare: the beginnings, without white space, of a reply that consists of calls without a mark.
    """

    begins: tuple[str, ...]
    marks: tuple[str, ...]
    read: Callable[[str], tuple[list[ToolCall], str]]
    bare: tuple[str, ...] = ()

    def may_begin(self, text: str) -> bool:
        """Whether a reply that begins with this may be a call without a mark."""
        begun = re.sub(r"\s+", "", text[:1000])
        return any(each.startswith(begun) or begun.startswith(each) for each in self.bare)


def form_of(written: ToolCalls) -> CallForm | None:
    """Returns the form in which a template writes calls; None for a form that is not supported."""
    for mark, form in _BY_MARK.items():
        if mark in written.before:
            return form
    if written.before and written.name_key and written.arguments_key:
        return marked(written.before, written.behind, written.name_key, written.arguments_key)
    return BARE if written.name_key else None


def _value(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at a position, after optional white space, and the position where it ends."""
    at += len(text[at:]) - len(text[at:].lstrip())
    try:
        return _decoder.raw_decode(text, at)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _call(value: Any, keys: Sequence[str] = ("name", "parameters")) -> ToolCall:
    """Reads a call from its object; `keys` are the model's own names for "name" and "arguments"."""
    if not isinstance(value, dict):
        raise ValueError(f"{shortened(value, 60)} is not an object with a name and arguments")
    for ours, theirs in zip(("name", "arguments"), keys, strict=True):
        if theirs in value and ours not in value:
            value = {**value, ours: value[theirs]}
            del value[theirs]
    return ToolCall.of(value)


def _skip(text: str, at: int, pattern: str) -> int:
    """The end of a match of `pattern` at a position; the position itself if there is no match."""
    found = re.compile(pattern).match(text, at)
    return found.end() if found else at


def marked(begin: str, end: str, name_key: str = "name", arguments_key: str = "parameters") -> CallForm:
    """The form of calls that stand, one by one or as a list, between two marks; a reply may omit the last mark."""

    def read(text: str) -> tuple[list[ToolCall], str]:
        calls, rest, at = [], "", 0
        while (start := text.find(begin, at)) >= 0:
            rest += text[at:start].strip()
            value, at = _value(text, start + len(begin))
            closed = _skip(text, at, rf"\s*{re.escape(end)}") if end else at
            if end and closed == at and text[at:].strip():
                raise ValueError(f"{end} is missing after it")
            values = value if isinstance(value, list) else [value]
            calls += [_call(each, (name_key, arguments_key)) for each in values]
            at = closed
        return calls, rest + text[at:].strip()

    return CallForm((begin,), tuple(each for each in (begin, end) if each), read)


def _read_bare(text: str) -> tuple[list[ToolCall], str]:
    at = _skip(text, 0, r"\s*<\|python_tag\|>")
    calls = []
    while True:
        value, at = _value(text, at)
        calls.append(_call(value))
        at = _skip(text, at, r"[\s;,]*(<\|python_tag\|>)?")
        if at == len(text):
            return calls, ""


def _read_mistral(text: str) -> tuple[list[ToolCall], str]:
    calls: list[ToolCall] = []
    at = 0
    while (at := _skip(text, at, r"\s*(\[TOOL_CALLS\])?\s*")) < len(text):
        # Calls without an id get one below: Mistral's templates refuse ids that are not nine letters or digits.
        named = re.compile(r"([^\[\]{}\s]+)(?:\[CALL_ID\](\w+))?\[ARGS\]").match(text, at)
        if named:
            arguments, at = _value(text, named.end())
            values: Any = [{"name": named[1], "arguments": arguments, "id": named[2]}]
        else:
            values, at = _value(text, at)
            if not isinstance(values, list):
                raise ValueError(f"{shortened(values, 60)} is not a list of calls")
        for value in values:
            call = _call(value)
            calls.append(call if call.id else dataclasses.replace(call, id=f"call{len(calls):05d}"))
    return calls, ""


def _read_deepseek(text: str) -> tuple[list[ToolCall], str]:
    begin, separator = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"
    head = re.compile(rf"\s*(?:function{separator})?([^<{{\n]+)(?:{separator}|\s*```(?:json)?)")
    calls, at = [], 0
    while (start := text.find(begin, at)) >= 0:
        named = head.match(text, start + len(begin))
        if not named:
            raise ValueError(f"no name follows {begin}")
        arguments, at = _value(text, named.end())
        calls.append(_call({"name": named[1].strip(), "arguments": arguments}))
        at = _skip(text, at, r"\s*(?:```)?\s*<｜tool▁call▁end｜>")
    if not calls:
        raise ValueError(f"it contains no {begin}")
    return calls, text[_skip(text, at, r"\s*<｜tool▁calls▁end｜>") :].strip()


HERMES = marked("<tool_call>", "</tool_call>")
MISTRAL = CallForm(("[TOOL_CALLS]",), ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), _read_mistral)
DEEPSEEK = CallForm(
    ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
    _read_deepseek,
)
BARE = CallForm(("<|python_tag|>",), ("<|python_tag|>",), _read_bare, bare=('{"name"', '{"type":"function"'))
_BY_MARK = {
    "<tool_call>": HERMES,
    "[TOOL_CALLS]": MISTRAL,
    "<｜tool▁call▁begin｜>": DEEPSEEK,
    "<|python_tag|>": BARE,
}


def read_calls(form: CallForm, text: str) -> tuple[list[ToolCall], str, str | None]:
    """Reads the calls in the text of a model.

    Returns:
        The calls; the text outside the calls; and None. If the text does not have the form: no calls, the whole text,
        and the reason.
    """
    try:
        calls, rest = form.read(text)
    except ValueError as error:
        return [], text, str(error)
    return calls, rest, None


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """Checks tools and returns them as templates take them.

    Raises:
        LlamaJaxError: for anything but functions as JSON schemas.
    """
    if tools is None:
        return []
    if not isinstance(tools, list | tuple):
        raise LlamaJaxError(f"tools are {shortened(tools)}: expected a list of functions as JSON schemas")
    for number, tool in enumerate(tools, 1):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise LlamaJaxError(
                f'tool {number} is {shortened(tool)}: expected {{"type": "function", "function": {{"name": …, '
                '"description": …, "parameters": …}}'
            )
        try:
            json.dumps(tool, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise LlamaJaxError(
                f"tool {number} is not JSON ({shortened(str(error))}): expected a JSON schema"
            ) from None
    return [dict(tool) for tool in tools]
