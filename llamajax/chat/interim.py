"""The template of ChatML behind the interface of all templates."""

from collections.abc import Sequence
from typing import Any

from llamajax.chat.chatml import END, ChatML
from llamajax.chat.messages import Message
from llamajax.errors import LlamaJaxError
from llamajax.tokenizer import Tokenizer


class Template:
    """ChatML."""

    def __init__(self, form: ChatML, name: str):
        """Of a checkpoint, or by name."""
        self._form, self.name, self.note = form, name, None

    @classmethod
    def of(cls, tokenizer: Tokenizer, source: str = "the checkpoint", name: str | None = None) -> "Template":
        """The checkpoint's, or "chatml"."""
        if name is None:
            return cls(ChatML.of(tokenizer, source), "the checkpoint's")
        if name != "chatml":
            raise LlamaJaxError(f"template {name!r}: expected chatml")
        return cls(ChatML(), name)

    def render(self, messages: Sequence[Message], *, reply: bool = True, tools: Any = None, **variables: Any) -> str:
        """The text of a conversation."""
        return "".join(text for text, _ in self._form.parts(messages, reply))  # type: ignore[arg-type]

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Any = None, **variables: Any
    ) -> list[int]:
        """Ids of a conversation."""
        return self._form.encode(tokenizer, messages)  # type: ignore[arg-type]

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """What ends an answer."""
        return tuple(dict.fromkeys([*tokenizer.stop_ids, self._form.check(tokenizer)[END]]))
