"""Built-in conversation formats, for checkpoints without a chat template and for use without Jinja.

Sources: the output of llama.cpp (`llama_chat_apply_template`), with which the tests compare each format except Alpaca's
and deepseek-r1; `PROMPT_DICT` in train.py of github.com/tatsu-lab/stanford_alpaca; the templates of DeepSeek-R1 and its
distilled models, which open the thinking part themselves and leave it out of earlier answers.

The marks of Alpaca and Vicuna and the brackets of LLaMA 2 are plain text, not tokens. A user can write them, too, and
the model sees no difference.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from llamajax.errors import LlamaJaxError
from llamajax.tokenizer import Tokenizer

# A text, and whether it is the content of a message.
Span = tuple[str, bool]
# A role and the content of its message.
Said = tuple[str, str]


class BuiltIn(Protocol):
    """A built-in format."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """The control tokens that the format needs."""

    def write(self, said: Sequence[Said], reply: bool) -> Iterator[Span]:
        """Writes a conversation, without BOS; with `reply`, also the beginning of the answer."""


@dataclasses.dataclass(frozen=True)
class Roles:
    """A format that writes each message by itself.

    Attributes:
        tokens: see `BuiltIn`.
        around: the texts before and after a message, by role; `{role}` is replaced by the role.
        other: the same for all other roles.
        reply: the text that begins the answer.
        trims: whether white space around a message is removed.
        drops: the mark that ends a thinking part; an assistant's message loses all text up to it.
    """

    tokens: tuple[str, ...]
    around: Mapping[str, tuple[str, str]]
    other: tuple[str, str]
    reply: str = ""
    trims: bool = False
    drops: str | None = None

    def write(self, said: Sequence[Said], reply: bool) -> Iterator[Span]:
        """See `BuiltIn.write`."""
        for role, content in said:
            before, behind = self.around.get(role, self.other)
            if self.drops and role == "assistant":
                content = content.rpartition(self.drops)[2]
            yield before.replace("{role}", role), False
            yield content.strip() if self.trims else content, True
            yield behind, False
        if reply:
            yield self.reply, False


@dataclasses.dataclass(frozen=True)
class Brackets:
    """A format in which a pair of brackets holds all messages before an answer.

    Attributes:
        tokens: see `BuiltIn`.
        first: the bracket that opens a conversation, even one without messages; None to use `opening`.
        opening: the bracket before a message if no bracket is open.
        system: the texts before and after a system message.
        closing: the text after a user's message.
        answer: the texts before and after an answer.
        trims: whether white space around an answer is removed.
    """

    tokens: tuple[str, ...]
    first: str | None
    opening: str
    system: tuple[str, str]
    closing: str
    answer: tuple[str, str]
    trims: bool = False

    def write(self, said: Sequence[Said], reply: bool) -> Iterator[Span]:
        """See `BuiltIn.write`."""
        is_open = self.first is not None
        yield self.first or "", False
        for role, content in said:
            if not is_open:
                yield self.opening, False
            is_open = role in ("system", "user")
            before, behind = {"system": self.system, "user": ("", self.closing)}.get(role, self.answer)
            yield before, False
            yield content.strip() if self.trims and not is_open else content, True
            yield behind, False


class Alpaca:
    """Alpaca's format of a task and its answer.

    A message of the role "context" is the input of a task; a system message at the beginning replaces the preamble.
    """

    tokens = ("</s>",)
    _ALONE = "Below is an instruction that describes a task. "
    _WITH_INPUT = "Below is an instruction that describes a task, paired with an input that provides further context. "
    _PREAMBLE = "Write a response that appropriately completes the request."
    _HEADS: Mapping[str, str] = {"user": "Instruction:\n", "context": "Input:\n"}

    def write(self, said: Sequence[Said], reply: bool) -> Iterator[Span]:
        """See `BuiltIn.write`."""
        roles = [role for role, _ in said]
        if "system" not in roles[:1]:
            yield (self._WITH_INPUT if "context" in roles else self._ALONE) + self._PREAMBLE, False
        for number, (role, content) in enumerate(said):
            if role == "system":
                yield "\n\n" if number else "", False
                yield content, True
                continue
            yield f"\n\n### {self._HEADS.get(role, 'Response:')}", False
            yield content, True
            yield "" if role in self._HEADS else "</s>", False
        if reply:
            yield "\n\n### Response:", False


class Gemma:
    """Gemma's format, which has no system messages: their text goes before the next message that is not an answer."""

    tokens = ("<start_of_turn>", "<end_of_turn>")

    def write(self, said: Sequence[Said], reply: bool) -> Iterator[Span]:
        """See `BuiltIn.write`."""
        system = ""
        for role, content in said:
            if role == "system":
                system += content.strip()
                continue
            yield f"<start_of_turn>{'model' if role == 'assistant' else role}\n", False
            if system and role != "assistant":
                yield system, True
                yield "\n\n", False
                system = ""
            yield content.strip(), True
            yield "<end_of_turn>\n", False
        if reply:
            yield "<start_of_turn>model\n", False


_IM = ("<|im_start|>", "<|im_end|>")
_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
_DEEPSEEK_AROUND = {"system": ("", "\n\n"), "user": (_DEEPSEEK[0], "")}
_INST = ("[INST]", "[/INST]", "</s>")
_SYSTEM_PROMPT = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")


def _mistral_v7(space: str) -> Roles:
    around = {
        "system": (_SYSTEM_PROMPT[0] + space, _SYSTEM_PROMPT[1]),
        "user": (_INST[0] + space, _INST[1]),
    }
    return Roles((*_INST, *_SYSTEM_PROMPT), around, other=(space, "</s>"))


# The name for which `find` chooses one of Mistral's formats.
MISTRAL = "mistral"
BUILT_IN: Mapping[str, BuiltIn] = {
    "llama2": Brackets(
        tokens=("<s>", "</s>"),
        first="[INST] ",
        opening="<s>[INST] ",
        system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        closing=" [/INST]",
        answer=("", "</s>"),
    ),
    "llama3": Roles(
        tokens=_HEADERS,
        around={},
        other=("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
        reply="<|start_header_id|>assistant<|end_header_id|>\n\n",
        trims=True,
    ),
    "mistral-v1": Brackets(("</s>",), None, " [INST] ", ("", "\n\n"), " [/INST]", (" ", "</s>")),
    "mistral-v3": Brackets(_INST, None, "[INST] ", ("", "\n\n"), "[/INST]", (" ", "</s>"), trims=True),
    "mistral-v3-tekken": Brackets(_INST, None, "[INST]", ("", "\n\n"), "[/INST]", ("", "</s>")),
    "mistral-v7": _mistral_v7(" "),
    "mistral-v7-tekken": _mistral_v7(""),
    "alpaca": Alpaca(),
    "gemma": Gemma(),
    "vicuna": Roles(
        tokens=("</s>",),
        around={"system": ("", "\n\n"), "user": ("USER: ", "\n")},
        other=("ASSISTANT: ", "</s>\n"),
        reply="ASSISTANT:",
    ),
    "chatml": Roles(
        tokens=_IM,
        around={},
        other=("<|im_start|>{role}\n", "<|im_end|>\n"),
        reply="<|im_start|>assistant\n",
    ),
    "deepseek": Roles(
        tokens=_DEEPSEEK,
        around=_DEEPSEEK_AROUND,
        other=_DEEPSEEK[1:],
        reply=_DEEPSEEK[1],
    ),
    "deepseek-r1": Roles(
        tokens=_DEEPSEEK,
        around=_DEEPSEEK_AROUND,
        other=_DEEPSEEK[1:],
        reply=f"{_DEEPSEEK[1]}<think>\n",
        drops="</think>",
    ),
}
NAMES = tuple(sorted([*BUILT_IN, MISTRAL]))


def find(name: str, tokenizer: Tokenizer) -> BuiltIn:
    """Returns a built-in format.

    Args:
        name: one of `NAMES`; "mistral" stands for the version whose tokens the tokenizer has.
        tokenizer: the tokenizer, which must have the tokens of the format.

    Raises:
        LlamaJaxError: if the tokenizer lacks a token of the format.
    """
    if name == MISTRAL:
        tekken = "" if tokenizer.drops_first_space or tokenizer.form == "sentencepiece" else "-tekken"
        has = lambda token: tokenizer.id_of(token) is not None  # noqa: E731
        version = f"v7{tekken}" if has(_SYSTEM_PROMPT[0]) else f"v3{tekken}" if has(_INST[0]) else "v1"
        name = f"{MISTRAL}-{version}"
    built_in = BUILT_IN[name]
    missing = [text for text in built_in.tokens if tokenizer.id_of(text) is None]
    if missing:
        raise LlamaJaxError(
            f"the tokenizer has no token {missing[0]!r}, which the format {name} needs: expected the format that the "
            "model was trained with"
        )
    return built_in
