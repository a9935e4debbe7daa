"""Chat templates: write a conversation as a model expects it, and tell the format's own tokens from contents.

    template = Template.of(tokenizer)                      # the checkpoint's, or Template.of(tokenizer, name="llama3")
    ids = template.encode(tokenizer, [{"role": "user", "content": "Hi"}])

A checkpoint brings its format as a Jinja template, which is rendered in a separate process (`jinja_process`); other
formats are built in (`builtin`). Messages, tools and variables are always encoded as plain text: `<|im_end|>` in a
message is spelt in ordinary pieces, and does not end the message.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from llamajax.chat import builtin, jinja_process, probes
from llamajax.chat.jinja_process import Rendering
from llamajax.chat.probes import Thinking, ToolCalls
from llamajax.errors import LlamaJaxError
from llamajax.files import parse_json, shortened
from llamajax.tokenizer import Tokenizer

# The known roles. Formats write roles among their own tokens, so other roles are refused.
ROLES = frozenset(
    (
        *("system", "developer", "user", "assistant", "model"),
        *("tool", "function", "ipython", "observation", "environment", "context"),
    )
)
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# The keys of a model's thinking in transformers; templates read the first.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_UNFOLLOWED = (
    "its chat template changes messages in a way that cannot be followed: control tokens in them stay text, but it is "
    "unknown which text comes from a message"
)
_UNSAFE = (
    "its chat template changes messages in a way that cannot be followed, and they hold control tokens: the messages "
    "go to the model unchanged"
)


class SaysItself(Protocol):
    """A message that is not a mapping."""

    def as_dict(self) -> dict[str, Any]:
        """The message as templates expect it."""


Messages = Sequence[Mapping[str, Any] | SaysItself]
Form = Callable[[list[dict[str, Any]], bool, Sequence[Any] | None, Mapping[str, Any]], Rendering]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a written conversation.

    Attributes:
        text: the text, not empty.
        is_content: whether the text comes from a message, tool or variable rather than from the format. White space,
            quotes and backslashes at the boundary count as the format's.
    """

    text: str
    is_content: bool


class Template:
    """The format of a conversation.

    Attributes:
        name: "the checkpoint's", the name of one of the checkpoint's templates, or the name of a built-in format.
        note: a note to show to the user once, set when the parts of a rendering could not be told apart; else None.
    """

    def __init__(self, name: str, form: Form, tokenizer: Tokenizer, source: str, written: str, adds_bos: bool):
        """Stores a format; use `of` to make a template.

        Args:
            name: see the attributes.
            form: writes a conversation.
            tokenizer: the tokenizer whose tokens the format uses.
            source: where the format is from, for errors.
            written: a text in which all tokens that the format writes occur.
            adds_bos: whether to put BOS before the text of `form`, if the tokenizer adds BOS by default.
        """
        self.name = name
        self.note: str | None = None
        self._form, self._source, self._adds_bos = form, source, adds_bos
        self._control = frozenset(
            token.text
            for token in tokenizer.added
            if not token.special and token.text in written and not token.text.isspace()
        )
        special = {token.text for token in (*tokenizer.added, *tokenizer.controls) if token.special}
        longest_first = sorted(special | self._control, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @classmethod
    def of(cls, tokenizer: Tokenizer, source: str = "the checkpoint", name: str | None = None) -> "Template":
        """Returns the format of a checkpoint, or a built-in one.

        Args:
            tokenizer: the checkpoint's tokenizer, with its words.
            source: the checkpoint, for errors.
            name: one of `builtin.NAMES`, or the name of one of the checkpoint's templates. None for the checkpoint's
                choice: "tool_use" if tools are given and it has a template of that name, else "default".

        Raises:
            LlamaJaxError: if there is no such format, or the tokenizer does not have the format's tokens.
        """
        if name is not None and name in builtin.NAMES:
            return cls._built_in(tokenizer, name)
        texts = tokenizer.words.chat_templates
        if name is not None and name not in texts:
            named = ", ".join([*builtin.NAMES, *texts])
            raise LlamaJaxError(f"no chat template is called {shortened(name)}: expected one of {named}")
        if not texts:
            raise LlamaJaxError(
                f"{source}: it carries no chat template, so it was not trained to answer: continue a text with "
                f"llamajax generate, or name the format that it was trained with: {', '.join(builtin.NAMES)}"
            )
        return cls._of_jinja(texts if name is None else {"default": texts[name]}, tokenizer, source, name)

    @classmethod
    def of_text(cls, text: str, tokenizer: Tokenizer, source: str = "the template") -> "Template":
        """Returns the format of a Jinja template that is not from a checkpoint.

        Args:
            text: the Jinja template.
            tokenizer: the tokenizer whose tokens the format uses.
            source: where the template is from, for errors.
        """
        return cls._of_jinja({"default": text}, tokenizer, source, source)

    @classmethod
    def _of_jinja(cls, texts: Mapping[str, str], tokenizer: Tokenizer, source: str, name: str | None) -> "Template":
        trusted = _special_tokens(tokenizer)
        jinja_process.start()

        def form(messages: list[dict[str, Any]], reply: bool, tools: Any, variables: Mapping[str, Any]) -> Rendering:
            text = texts.get("tool_use" if tools is not None and "tool_use" in texts else "default")
            if text is None:
                raise LlamaJaxError(f"{source}: it has several chat templates: name one of {', '.join(texts)}")
            said = {"documents": None, **variables, "messages": messages, "tools": tools}
            return jinja_process.render(text, trusted | {"add_generation_prompt": reply}, said, source)

        return cls(name or "the checkpoint's", form, tokenizer, source, "\0".join(texts.values()), adds_bos=False)

    @classmethod
    def _built_in(cls, tokenizer: Tokenizer, name: str) -> "Template":
        built = builtin.find(name, tokenizer)

        def form(messages: list[dict[str, Any]], reply: bool, tools: Any, variables: Mapping[str, Any]) -> Rendering:
            if tools:
                raise LlamaJaxError(f"the format {name} has no place for tools: expected a chat template that has one")
            spans = tuple(built.write([(each["role"], str(each.get("content") or "")) for each in messages], reply))
            return Rendering("".join(text for text, _ in spans), spans)

        return cls(name, form, tokenizer, name, "\0".join(built.tokens), adds_bos=True)

    def parts(
        self, messages: Messages, *, reply: bool = True, tools: Sequence[Any] | None = None, **variables: Any
    ) -> list[Part]:
        """Writes a conversation as parts.

        Args:
            messages: the messages in order: mappings as in transformers, or objects with `as_dict`.
            reply: whether to begin the message in which the model answers.
            tools: the JSON schemas of the functions that the model may call.
            variables: other variables that the template knows, such as `enable_thinking`.

        Raises:
            LlamaJaxError: for invalid messages, or messages that the template refuses; see `jinja_process.render`.
        """
        rendering = self._form(_plain_messages(messages), reply, tools, variables)
        return [Part(text, is_content) for text, is_content in self._followed(rendering) if text]

    def render(
        self, messages: Messages, *, reply: bool = True, tools: Sequence[Any] | None = None, **variables: Any
    ) -> str:
        """Writes a conversation as one text; see `parts`."""
        return "".join(part.text for part in self.parts(messages, reply=reply, tools=tools, **variables))

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Messages,
        *,
        reply: bool = True,
        tools: Sequence[Any] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Returns the ids of a conversation; only the template can write control tokens; see `parts`.

        Raises:
            LlamaJaxError: see `parts`; also for text that cannot be encoded.
        """
        parts = self.parts(messages, reply=reply, tools=tools, **variables)
        pairs = [(part.text, not part.is_content) for part in parts]
        return tokenizer.encode_parts(pairs, bos=None if self._adds_bos else False, control=self._control)

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end an answer: the tokenizer's stop ids, and the token that the format writes after one."""
        ids = map(tokenizer.id_of, self.ends)
        return tuple(dict.fromkeys([*tokenizer.stop_ids, *(index for index in ids if index is not None)]))

    @functools.cached_property
    def ends(self) -> tuple[str, ...]:
        """The token that the format writes after an answer, or () if that is not a token."""
        found = (self._tokens.match(behind.lstrip()) for behind in probes.behind_answers(self._write))
        return next(((token[0],) for token in found if token), ())

    @functools.cached_property
    def thinking(self) -> Thinking | None:
        """How the format marks a model's thinking before its answer; None if it does not."""
        return probes.thinking(self._write)

    @functools.cached_property
    def tool_calls(self) -> ToolCalls | None:
        """How the format writes tool calls; None if it does not, or in an unknown way."""
        return probes.tool_calls(self._write, self.ends)

    def opens_thinking(self, parts: Sequence[Part]) -> bool:
        """Whether a written conversation ends within thinking, so that the answer continues the thinking."""
        text = "" if not parts or parts[-1].is_content else parts[-1].text
        return self.thinking is not None and text.rfind(self.thinking.begin) > text.rfind(self.thinking.end)

    def _write(
        self, messages: list[dict[str, Any]], reply: bool, tools: list[Any] | None
    ) -> Sequence[tuple[str, bool]]:
        """Writes a conversation for `probes`."""
        rendering = self._form(_plain_messages(messages), reply, tools, {})
        return rendering.spans or ((rendering.text, False),)

    def _followed(self, rendering: Rendering) -> Sequence[tuple[str, bool]]:
        """The parts of a rendering, each with whether it is content.

        If the template does the same with stand-ins as without, these are the spans. If not, the plain text is taken as
        one part of the format, provided that no content holds a control token and that the plain text has exactly the
        control tokens that the template wrote; otherwise the spans with stand-ins are taken.
        """
        spans = rendering.spans
        if spans is None:
            raise LlamaJaxError(
                f"{self._source}: its chat template computes with the content of messages, so control tokens in the "
                "content cannot be distinguished from the template's: choose a built-in format instead, such as chatml"
            )
        if "".join(text for text, _ in spans) == rendering.text:
            return spans
        written = "\0".join(text for text, is_content in spans if not is_content)
        is_safe = self._tokens.findall(rendering.text) == self._tokens.findall(written) and not any(
            self._tokens.search(text) for text, is_content in spans if is_content
        )
        self.note = _UNFOLLOWED if is_safe else _UNSAFE
        return [(rendering.text, False)] if is_safe else spans


def _plain_messages(messages: Messages) -> list[dict[str, Any]]:
    """Converts messages to the form of templates: without fields of None, and with the usual names of thinking.

    Raises:
        LlamaJaxError: for objects that are not messages, and unknown roles.
    """
    if not messages:
        raise LlamaJaxError("the conversation has no messages: expected one or more")
    made = []
    for message in messages:
        if not isinstance(message, Mapping) and not hasattr(message, "as_dict"):
            raise LlamaJaxError(f"message {shortened(message)}: expected a role and a content")
        fields = dict(message if isinstance(message, Mapping) else message.as_dict())
        fields = {key: value for key, value in fields.items() if value is not None}
        if fields.get("role") not in ROLES:
            raise LlamaJaxError(f"role {shortened(fields.get('role'))}: expected one of {', '.join(sorted(ROLES))}")
        thought = next((fields[name] for name in _REASONING if name in fields), None)
        made.append(fields if thought is None else {"thinking": thought, **fields, "reasoning_content": thought})
    return made


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The variables that name special tokens, from the checkpoint's files; missing ones from the tokenizer."""
    files = tokenizer.words.files
    said: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        value = parse_json(files[name], name) if name in files else {}
        said |= value if isinstance(value, Mapping) else {}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id}
    texts = {name: None if index is None else tokenizer.piece(index) for name, index in ids.items()}
    for name in _SPECIAL:
        token = said.get(name, texts.get(name))
        texts[name] = token.get("content") if isinstance(token, Mapping) else token
    return {name: text for name, text in texts.items() if isinstance(text, str)}
