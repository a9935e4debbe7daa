"""Formats of conversations that are built in: for checkpoints that carry none, and for no Jinja.

Sources: what llama.cpp writes (`llama_chat_apply_template`), with which the tests compare each but Alpaca's and the
thinking one of DeepSeek; `PROMPT_DICT` in train.py of github.com/tatsu-lab/stanford_alpaca; the templates of
DeepSeek-R1 and its distilled models, which open the thinking part themselves and leave it out of earlier answers.

Where the marks of a format are no tokens but plain text, as Alpaca's, Vicuna's and the brackets of LLaMA 2, users can
write them as well: the model sees no difference.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from llamajax.errors import LlamaJaxError
from llamajax.tokenizer import Tokenizer

# A text, and whether it is somebody's content.
Span = tuple[str, bool]
# A role and what it says.
Said = tuple[str, str]


class BuiltIn(Protocol):
    """A format."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """Control tokens that it cannot do without."""

    def write(self, said: Sequence[Said], reply: bool) -> Iterator[Span]:
        """A conversation, without BOS; the answer is begun if there is to be one."""


@dataclasses.dataclass(frozen=True)
class Roles:
    """A format that writes each message by itself.

    Attributes:
        tokens: see `BuiltIn`.
        around: what stands before and behind a message, by role; `{role}` is its role.
        other: the same for roles that are not among them.
        reply: begins the answer.
        trims: whether white space around a message is left out.
        drops: what a message is left out up to, where it is in it: the end of a thinking part.
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
    """A format in which a pair of brackets holds all that is said before an answer.

    Attributes:
        tokens: see `BuiltIn`.
        first: the bracket that opens a conversation, which stands even before none; None for `opening`.
        opening: the bracket where one is not open.
        system: before and behind a system message.
        closing: behind a user's.
        answer: before and behind an answer.
        trims: whether white space around an answer is left out.
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
    """A task and its answer. A message of the role "context" is the input of a task; a system message the preamble."""

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
    """Gemma's, which has no system messages: they go before what is said next, but an answer."""

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


# Mistral's, of which `find` chooses one.
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
    """A built-in format.

    Args:
        name: of `NAMES`; "mistral" is the version whose tokens the tokenizer has.
        tokenizer: whose tokens are the format's.

    Raises:
        LlamaJaxError: if the tokenizer does not have them.
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
