"""Tool calls as models write them, and which of these ways a chat template has.

    <tool_call>{"name": "f", "arguments": {…}}</tool_call>          Hermes 2, Qwen 2.5 and 3
    {"name": "f", "parameters": {…}}                                Llama 3.1 and later, perhaps behind <|python_tag|>
    [TOOL_CALLS][{"name": "f", "arguments": {…}, "id": "…"}]        Mistral; its later models: [TOOL_CALLS]f[ARGS]{…}
    <｜tool▁call▁begin｜>function<｜tool▁sep｜>f …json…              DeepSeek V3 and R1; V3.1 without the word

Each reader takes the text from the first mark to the reply's end. Sources: the models' chat templates, which write the
calls of earlier turns in the same way.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from llamajax.chat.messages import ToolCall
from llamajax.errors import LlamaJaxError
from llamajax.files import shortened

_BARE_BEGINNINGS = ('{"name"', '{"type":"function"')
_decoder = json.JSONDecoder()


@dataclasses.dataclass(frozen=True)
class CallForm:
    """One way to write calls.

    Attributes:
        name: of the way.
        begins: marks with which a reply's calls begin.
        marks: all marks within; where they are control tokens they must be seen.
        read: the calls of a text that begins with a mark, and the text that belongs to none of them.
            Raises ValueError where it is not what it should be.
        recognised: of the text that a template makes of a message with a call of `probe`.
        bare: whether calls may begin a reply without a mark.
    """

    name: str
    begins: tuple[str, ...]
    marks: tuple[str, ...]
    read: Callable[[str], tuple[list[ToolCall], str]]
    recognised: re.Pattern[str]
    bare: bool = False

    def may_begin(self, text: str) -> bool:
        """Whether a reply that begins with this may be a call without a mark."""
        begun = re.sub(r"\s+", "", text)
        return self.bare and any(each.startswith(begun) or begun.startswith(each) for each in _BARE_BEGINNINGS)


def form_of(rendered: str) -> CallForm | None:
    """The way in which a template wrote a call of the function `probe`; None for one that is not read."""
    return next((form for form in FORMS if form.recognised.search(rendered)), None)


def _value(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at a place, white space aside, and where it ends."""
    at += len(text[at:]) - len(text[at:].lstrip())
    try:
        return _decoder.raw_decode(text, at)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _call(value: Any, **given: Any) -> ToolCall:
    """A call from its object, whose arguments some models call parameters."""
    if not isinstance(value, dict):
        raise ValueError(f"{shortened(value, 60)} is no object with a name and arguments")
    value = {**value, **{key: field for key, field in given.items() if key not in value}}
    if "parameters" in value and "arguments" not in value:
        value["arguments"] = value.pop("parameters")
    return ToolCall.of(value)


def _skip(text: str, at: int, pattern: str) -> int:
    """Where a pattern that may begin at a place ends."""
    found = re.compile(pattern).match(text, at)
    return found.end() if found else at


def _read_hermes(text: str) -> tuple[list[ToolCall], str]:
    begin, end = "<tool_call>", "</tool_call>"
    calls, rest, at = [], "", 0
    while (start := text.find(begin, at)) >= 0:
        rest += text[at:start].strip()
        value, at = _value(text, start + len(begin))
        closed = _skip(text, at, rf"\s*{end}")
        if closed == at and text[at:].strip():
            raise ValueError(f"{end} is missing behind it")
        calls.append(_call(value))
        at = closed
    return calls, rest + text[at:].strip()


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
        # Its templates refuse calls whose ids are not nine letters or digits.
        named = re.compile(r"([^\[\]{}\s]+)(?:\[CALL_ID\](\w+))?\[ARGS\]").match(text, at)
        if named:
            arguments, at = _value(text, named.end())
            values: Any = [{"name": named[1], "arguments": arguments, "id": named[2]}]
        else:
            values, at = _value(text, at)
            if not isinstance(values, list):
                raise ValueError(f"{shortened(values, 60)} is no list of calls")
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
            raise ValueError(f"no name stands behind {begin}")
        arguments, at = _value(text, named.end())
        calls.append(_call({"name": named[1].strip(), "arguments": arguments}))
        at = _skip(text, at, r"\s*(?:```)?\s*<｜tool▁call▁end｜>")
    if not calls:
        raise ValueError(f"no {begin} stands in it")
    return calls, text[_skip(text, at, r"\s*<｜tool▁calls▁end｜>") :].strip()


FORMS = (
    CallForm(
        "hermes",
        begins=("<tool_call>",),
        marks=("<tool_call>", "</tool_call>"),
        read=_read_hermes,
        recognised=re.compile(r'<tool_call>\s*\{\s*"name":\s*"probe"'),
    ),
    CallForm(
        "mistral",
        begins=("[TOOL_CALLS]",),
        marks=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        read=_read_mistral,
        recognised=re.compile(r"\[TOOL_CALLS\]"),
    ),
    CallForm(
        "deepseek",
        begins=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
        marks=(
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ),
        read=_read_deepseek,
        recognised=re.compile("<｜tool▁call▁begin｜>"),
    ),
    CallForm(
        "llama3",
        begins=("<|python_tag|>",),
        marks=("<|python_tag|>",),
        read=_read_bare,
        recognised=re.compile(r'\{\s*"name":\s*"probe",\s*"parameters"'),
        bare=True,
    ),
)


def read_calls(form: CallForm, text: str) -> tuple[list[ToolCall], str, str | None]:
    """The calls in what a model wrote.

    Returns:
        The calls; the text that is none of them; and, where the whole is no call as the form has it, why not: the
        text is then all of it.
    """
    try:
        calls, rest = form.read(text)
    except ValueError as error:
        return [], text, str(error)
    return calls, rest, None


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """Tools as templates are given them.

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
