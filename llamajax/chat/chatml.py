"""ChatML: the format of a conversation in which each message stands between `<|im_start|>` and `<|im_end|>`.

    <|im_start|>user
    What is the capital of France?<|im_end|>
    <|im_start|>assistant

A checkpoint carries its format as a Jinja template (`chat_template.jinja`). Those that say ChatML, and nothing more
than a system message where a conversation begins without one, are recognised here as text; every other is an error.
"""

import dataclasses
import re
from collections.abc import Sequence

from llamajax.errors import LlamaJaxError
from llamajax.files import shortened
from llamajax.tokenizer import Tokenizer

TEMPLATE = "chat_template.jinja"
START, END = "<|im_start|>", "<|im_end|>"

# The template in which blanks around Jinja's marks are gone, and `\n` is a newline; `system` is what it puts before a
# conversation that has no system message. As that of SmolLM2, or without `system` as transformers' ChatML.
_LOOP = re.escape("{%for message in messages%}")
_SYSTEM = (
    re.escape("{%if loop.first and messages[0]['role'] != 'system'%}{{'<|im_start|>system\n")
    + r"(?P<system>[^']*?)"
    + re.escape("<|im_end|>\n'}}{%endif%}")
)
_MESSAGE = re.escape("{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{%endfor%}")
_REPLY = re.escape("{%if add_generation_prompt%}{{'<|im_start|>assistant\n'}}{%endif%}")
_CHATML = re.compile(f"{_LOOP}(?:{_SYSTEM})?{_MESSAGE}{_REPLY}")


@dataclasses.dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
        content: its text.
    """

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class ChatML:
    """The format, as a checkpoint has it.

    Attributes:
        system: content of the system message of a conversation that has none; None for no such message.
    """

    system: str | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer, source: str = "the checkpoint") -> "ChatML":
        """The format that the checkpoint of a tokenizer carries.

        Args:
            tokenizer: with the checkpoint's words.
            source: the checkpoint, for errors.

        Raises:
            LlamaJaxError: if it carries no template, or one of another format.
        """
        data = tokenizer.words.files.get(TEMPLATE)
        if data is None:
            raise LlamaJaxError(
                f"{source}: it carries no chat template, so it was not trained to answer: continue a text with "
                "llamajax generate, or give a model for chat"
            )
        return cls.recognised(data.decode("utf-8", "replace"), source)

    @classmethod
    def recognised(cls, template: str, source: str = "the chat template") -> "ChatML":
        """The format that a Jinja template says.

        Raises:
            LlamaJaxError: for another format than ChatML.
        """
        bare = re.sub(r"(\{[{%])\s*|\s*([%}]\})", r"\1\2", template.strip().replace("\\n", "\n"))
        found = _CHATML.fullmatch(bare)
        if found is None:
            raise LlamaJaxError(
                f"{source}: its chat template begins with {shortened(template, 60)}: only ChatML is read so far: "
                "continue a text in its own format with llamajax generate"
            )
        return cls(found["system"])

    def parts(self, messages: Sequence[Message], reply: bool = True) -> list[tuple[str, bool]]:
        """A conversation as texts, each with whether it is one of the format's own tokens.

        What stands in a message is never a token of the format, whatever it spells: who encodes the parts encodes
        those that are text as text.

        Args:
            messages: in order.
            reply: whether the model is to answer: its message is begun.
        """
        begun = [] if messages and messages[0].role == "system" else [self.system]
        said = [Message("system", system) for system in begun if system is not None] + list(messages)
        parts: list[tuple[str, bool]] = []
        for message in said:
            parts += [(START, True), (f"{message.role}\n{message.content}", False), (END, True), ("\n", False)]
        return [*parts, (START, True), ("assistant\n", False)] if reply else parts

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation that the model is to answer.

        Raises:
            LlamaJaxError: as `check`.
        """
        ids = self.check(tokenizer)
        made: list[int] = []
        for text, is_token in self.parts(messages):
            made += [ids[text]] if is_token else tokenizer.encode(text, bos=False, eos=False, special=False)
        return made

    def ending(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer, by which generation ends where the format ends a message.

        Raises:
            LlamaJaxError: as `check`.
        """
        end = self.check(tokenizer)[END]
        if end in tokenizer.stop_ids:
            return tokenizer
        words = dataclasses.replace(tokenizer.words, stop_ids=(*tokenizer.stop_ids, end))
        return Tokenizer(tokenizer.model_bytes, words=words)

    @staticmethod
    def check(tokenizer: Tokenizer) -> dict[str, int]:
        """The ids of the format's tokens.

        Raises:
            LlamaJaxError: for a tokenizer that does not have them, or that puts a space before text: at which messages,
                templates do not say.
        """
        ids = {text: tokenizer.id_of(text) for text in (START, END)}
        missing = [text for text, index in ids.items() if index is None]
        if missing:
            raise LlamaJaxError(
                f"the tokenizer has no token {missing[0]!r}, which the chat template needs: expected the tokenizer "
                "that the model was trained with"
            )
        if tokenizer.drops_first_space:
            raise LlamaJaxError(
                "ChatML with a tokenizer that puts a space before text is not read so far: continue a text in its own "
                "format with llamajax generate"
            )
        return {text: index for text, index in ids.items() if index is not None}
