"""What a chat has to know of a template and a tokenizer, seen from what the template writes."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llamajax.chat.messages import Message, ToolCall
from llamajax.chat.reply import ReplyForm
from llamajax.chat.template import Template
from llamajax.chat.tool_calls import CallForm, form_of
from llamajax.errors import LlamaJaxError
from llamajax.tokenizer import Tokenizer

# Of DeepSeek R1, Qwen 3, QwQ, SmolLM 3 and those made from them: tokens of models whose templates may not name them.
_THINK = ("<think>", "</think>")
# Variables by which templates of models that may think or not are told: of Qwen 3 and SmolLM 3; of Granite and DeepSeek
# V3.1.
_SWITCHES = ("enable_thinking", "thinking")
_TOOL = {
    "type": "function",
    "function": {"name": "tool", "description": "A tool.", "parameters": {"type": "object", "properties": {}}},
}
_CALLING = Message("assistant", "", tool_calls=(ToolCall("tool", {}),))
_ASKED, _ANSWERED, _ASKED_MORE = Message("user", "question"), Message("assistant", "answer"), Message("user", "other")


def thinking_switch(template: Template) -> str | None:
    """The variable that turns thinking on and off; None for a template that has none."""
    for name in _SWITCHES:
        said: list[dict[str, Any]] = [{name: True}, {name: False}]
        if len({template.render([_ASKED], **variables) for variables in said}) == 2:
            return name
    return None


def in_terms_of(template: Template, messages: Sequence[Message]) -> Sequence[Message | dict[str, Any]]:
    """Messages as a template takes them: DeepSeek's want arguments of calls as JSON, others as objects."""
    if not any(message.tool_calls for message in messages):
        return messages
    try:
        template.render([_ASKED, _CALLING])
    except LlamaJaxError:
        return [_with_json(message) for message in messages]
    return messages


def _with_json(message: Message) -> dict[str, Any]:
    """A message as templates have it, its calls' arguments as JSON."""
    said = message.as_dict()
    for call in said.get("tool_calls", []):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return said


def reply_form(
    template: Template, tokenizer: Tokenizer, variables: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]
) -> ReplyForm:
    """How a model marks the parts of its answers.

    Raises:
        LlamaJaxError: if there are tools, for which the template has no place.
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
    """How calls are to be read; None where none are expected, or in a way that is not read."""
    has_place = _has_place(template, tools or [_TOOL])
    if tools and not has_place:
        raise LlamaJaxError(
            f"tools are given, and the chat template ({template.name}) has no place for them: take a model that was "
            "trained to call tools, or describe them in the system message"
        )
    form = form_of(template.tool_calls) if template.tool_calls else None
    if form is None or tools:
        return form
    # DeepSeek's has no place: tools are described in the system message. Marks that are tokens are nothing but marks.
    are_tokens = all(tokenizer.id_of(mark) is not None for mark in form.begins)
    return form if not has_place and are_tokens and not form.bare else None


def _has_place(template: Template, tools: Sequence[Mapping[str, Any]]) -> bool:
    try:
        return template.render([_ASKED], tools=tools) != template.render([_ASKED])
    except LlamaJaxError:  # a format that refuses tools
        return False


def turn_beginnings(template: Template, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Texts with which a template begins a user's message, where no control token does, as in Alpaca and Vicuna.

    A model that does not end its answer goes on with what it was trained to see next.
    """
    try:
        parts = template.parts([_ASKED, _ANSWERED, _ASKED_MORE], reply=False)
    except LlamaJaxError:  # a format of one turn
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
