"""Finds out from the text that a template writes how a chat has to use that template and its tokenizer."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llamajax.chat.messages import Message, ToolCall
from llamajax.chat.reply import ReplyForm
from llamajax.chat.template import Template
from llamajax.chat.tool_calls import CallForm, form_of
from llamajax.errors import LlamaJaxError
from llamajax.tokenizer import Tokenizer

# Thinking marks of DeepSeek R1, Qwen 3, QwQ, SmolLM 3 and models made from them, whose templates may not name them.
_THINK = ("<think>", "</think>")
# Variables by which templates turn thinking on and off: the first is for Qwen 3 and SmolLM 3, the second for Granite
# and DeepSeek V3.1.
_SWITCHES = ("enable_thinking", "thinking")
_TOOL = {
    "type": "function",
    "function": {"name": "tool", "description": "A tool.", "parameters": {"type": "object", "properties": {}}},
}
_CALLING = Message("assistant", "", tool_calls=(ToolCall("tool", {}),))
_ASKED, _ANSWERED, _ASKED_MORE = Message("user", "question"), Message("assistant", "answer"), Message("user", "other")


def thinking_switch(template: Template) -> str | None:
    """Returns the variable that turns thinking on and off; None for a template without such a variable."""
    for name in _SWITCHES:
        said: list[dict[str, Any]] = [{name: True}, {name: False}]
        if len({template.render([_ASKED], **variables) for variables in said}) == 2:
            return name
    return None


def in_terms_of(template: Template, messages: Sequence[Message]) -> Sequence[Message | dict[str, Any]]:
    """Converts messages to a template's form: DeepSeek's takes the arguments of calls as JSON, others as objects."""
    if not any(message.tool_calls for message in messages):
        return messages
    try:
        template.render([_ASKED, _CALLING])
    except LlamaJaxError:
        return [_with_json(message) for message in messages]
    return messages


def _with_json(message: Message) -> dict[str, Any]:
    """The fields of a message for templates, with the arguments of its calls as JSON text."""
    said = message.as_dict()
    for call in said.get("tool_calls", []):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return said


def reply_form(
    template: Template, tokenizer: Tokenizer, variables: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]
) -> ReplyForm:
    """Returns how a model marks the parts of its answers.

    Raises:
        LlamaJaxError: if tools are given and the template has no place for them.
    """
    written = template.thinking
    thinking = (written.begin, written.end) if written else None
    if not thinking and all(tokenizer.id_of(mark) is not None for mark in _THINK):
        thinking = _THINK
    return ReplyForm(
        thinking,
        opened=thinking is not None and template.opens_thinking(template.parts([_ASKED], **variables)),
        calls=_call_form(template, tokenizer, tools),
        drops_first_space=tokenizer.drops_first_space,
    )


def _call_form(template: Template, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]) -> CallForm | None:
    """The form in which calls are read; None if no calls are expected, or their form is not supported."""
    has_place = _has_place(template, tools or [_TOOL])
    if tools and not has_place:
        raise LlamaJaxError(
            f"tools are given, but the chat template ({template.name}) has no place for them: take a model that was "
            "trained to call tools, or describe them in the system message"
        )
    form = form_of(template.tool_calls) if template.tool_calls else None
    if form is None or tools:
        return form
    # DeepSeek's template has no place for tools; they are described in the system message. Calls are then expected only
    # if the marks are tokens, because ordinary text cannot contain these.
    are_tokens = all(tokenizer.id_of(mark) is not None for mark in form.begins)
    return form if not has_place and are_tokens and not form.bare else None


def _has_place(template: Template, tools: Sequence[Mapping[str, Any]]) -> bool:
    try:
        return template.render([_ASKED], tools=tools) != template.render([_ASKED])
    except LlamaJaxError:  # the format refuses tools
        return False


def turn_beginnings(template: Template, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns the text that begins a user's message if it has no control token, as in Alpaca and Vicuna.

    A model that does not end its answer continues with this text, because it was trained to see it next.
    """
    try:
        parts = template.parts([_ASKED, _ANSWERED, _ASKED_MORE], reply=False)
    except LlamaJaxError:  # the format has only one turn
        return ()
    said = [part.text if part.is_content else "" for part in parts]
    if _ANSWERED.content not in said or _ASKED_MORE.content not in said:
        return ()
    begun = parts[said.index(_ANSWERED.content) + 1 : said.index(_ASKED_MORE.content)]
    text = "".join(part.text for part in begun).strip()
    for end in template.ends:
        text = text.removeprefix(end).strip()
    spelt = tokenizer.encode(text, bos=False, eos=False, special=False)
    return (text,) if text and tokenizer.encode(text, bos=False, eos=False, special=True) == spelt else ()
