"""What a template does, seen from what it writes: whether it thinks, takes tools, and how it writes calls of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llamajax.chat.interim import Template
from llamajax.chat.messages import Message, ToolCall
from llamajax.chat.tool_calls import CallForm, form_of
from llamajax.errors import LlamaJaxError
from llamajax.tokenizer import Tokenizer

# The marks of thinking of DeepSeek R1, Qwen 3, QwQ, SmolLM 3 and those made from them.
THINK = ("<think>", "</think>")
# Variables by which templates of models that may think or not are told: of Qwen 3 and SmolLM 3; of Granite and DeepSeek
# V3.1.
_SWITCHES = ("enable_thinking", "thinking")
_QUESTION = Message("user", "question")


@dataclasses.dataclass(frozen=True)
class Abilities:
    """What a template can say.

    Attributes:
        thinking: the marks around a model's thinking, or None.
        switch: the variable that turns thinking on and off, or None.
        calls: how it writes the model's tool calls; None for a way that is not read, or without tools.
    """

    thinking: tuple[str, str] | None
    switch: str | None
    calls: CallForm | None


def abilities(template: Template, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]) -> Abilities:
    """Tries a template on short conversations.

    Raises:
        LlamaJaxError: if there are tools, for which it has no place.
    """
    written, switch = template.render([_QUESTION]), None
    for name in _SWITCHES:
        on, off = (template.render([_QUESTION], **{name: value}) for value in (True, False))
        switch = switch or (name if on != off else None)
        written += on + off
    # Templates that leave the marks to the model do not name them; its tokenizer has a token for each.
    known = all(tokenizer.id_of(mark) is not None for mark in THINK)
    thinking = THINK if known or THINK[0] in written else None
    return Abilities(thinking, switch, _calls(template, tools) if tools else None)


def opens_thinking(template: Template, variables: Mapping[str, Any]) -> bool:
    """Whether the text before an answer ends within thinking."""
    return template.render([_QUESTION], **variables).rstrip().endswith(THINK[0])


def _calls(template: Template, tools: Sequence[Mapping[str, Any]]) -> CallForm | None:
    if template.render([_QUESTION], tools=tools) == template.render([_QUESTION]):
        raise LlamaJaxError(
            f"tools are given, and the chat template ({template.name}) has no place for them: take a model that was "
            "trained to call tools, or describe them in the system message"
        )
    call = ToolCall("probe", {"key": "value"}, "abcdefghi")  # an id as Mistral's templates want them
    answered = Message("tool", "result", name="probe", tool_call_id="abcdefghi")
    asked = Message("assistant", "", tool_calls=(call,))
    return form_of(template.render([_QUESTION, asked, answered], tools=tools))
