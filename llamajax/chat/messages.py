"""Messages of a conversation: checks them, reads the forms of other libraries, and keeps them in a JSON file.

question = Message("user", "What is the weather in Paris?")
answer = Message.of({"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather", …}}]})
save_conversation(path, [question, answer])
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamajax.errors import LlamaJaxError
from llamajax.files import new_file, parse_json, read_json, shortened

ROLES = ("system", "user", "assistant", "tool")
# The version of the JSON file, which changes if an older reader would misread the file.
VERSION = 1
_LARGEST_FILE = 16 << 20
# Keys of a message's thinking: that of DeepSeek, vLLM and transformers' templates, then that of Ollama and gpt-oss.
_THINKING = ("reasoning_content", "thinking")
_KEYS = ("role", "content", *_THINKING, "tool_calls", "name", "tool_call_id")


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A function that the model asks the program to call.

    Attributes:
        name: the name of the function.
        arguments: the arguments by name, as JSON values.
        id: an id by which the answer refers to this call, in formats that have such ids.

    Raises:
        LlamaJaxError: for an attribute of a wrong type, or arguments that are not JSON.
    """

    name: str
    arguments: dict[str, Any]
    id: str | None = None

    def __post_init__(self):
        """Checks the attributes."""
        _check_text("the name of a tool call", self.name)
        if not self.name:
            raise LlamaJaxError("a tool call has no name: expected the name of the function to call")
        if self.id is not None:
            _check_text("the id of a tool call", self.id)
        if not isinstance(self.arguments, dict):
            raise LlamaJaxError(
                f"arguments of the tool call {shortened(self.name)} are {shortened(self.arguments)}: expected an "
                "object of arguments by name"
            )
        try:
            json.dumps(self.arguments, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise LlamaJaxError(
                f"arguments of the tool call {shortened(self.name)} are not JSON ({shortened(str(error))}): expected "
                "texts, finite numbers, true, false, null, and lists and objects of these"
            ) from None

    @classmethod
    def of(cls, value: Any, source: str = "a tool call") -> "ToolCall":
        """Reads a call as OpenAI's API, Mistral and transformers write it, or its inner object alone.

        The form is `{"type": "function", "id": …, "function": {"name": …, "arguments": …}}`, or the object of
        "function" by itself; "arguments" is an object, or the JSON text of an object.

        Raises:
            LlamaJaxError: for anything else; the message begins with `source`.
        """
        call = _fields(value, ("type", "id", "function", "name", "arguments"), source)
        if call.get("type", "function") != "function":
            raise LlamaJaxError(f"{source}: type is {shortened(call['type'])}: expected 'function'")
        if "function" in call:
            if extra := sorted({"name", "arguments"} & call.keys()):
                raise LlamaJaxError(f"{source}: {extra[0]!r} is beside 'function': expected it inside")
            inner = _fields(call["function"], ("name", "arguments"), f"{source}: function")
        else:
            inner = call
        if missing := [key for key in ("name", "arguments") if key not in inner]:
            raise LlamaJaxError(f"{source}: {missing[0]!r} is missing: expected a name and arguments")
        arguments = inner["arguments"]
        if isinstance(arguments, str):
            arguments = parse_json(arguments, f"{source}: its arguments")
        with _errors_of(source):
            return cls(inner["name"], arguments, call.get("id"))

    def as_dict(self) -> dict[str, Any]:
        """The call as templates expect it; `of` reads it back."""
        call: dict[str, Any] = {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return call if self.id is None else {**call, "id": self.id}


@dataclasses.dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: one of `ROLES`.
        content: the text.
        thinking: what the model wrote for itself before it answered; only in an assistant's message.
        tool_calls: the functions that the model asks to call; only in an assistant's message.
        name: the name of the speaker; in a tool's message, of the function.
        tool_call_id: the id of the call that a tool's message answers; only in a tool's message.

    Raises:
        LlamaJaxError: for an unknown role, an attribute of a wrong type or that the role does not have, or a text that
            is not Unicode.
    """

    role: str
    content: str
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None

    def __post_init__(self):
        """Checks the attributes."""
        if self.role not in ROLES:
            raise LlamaJaxError(f"the role is {shortened(self.role)}: expected one of {', '.join(ROLES)}")
        _check_text("content", self.content)
        for name in ("thinking", "name", "tool_call_id"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        if not isinstance(self.tool_calls, tuple) or not all(isinstance(call, ToolCall) for call in self.tool_calls):
            raise LlamaJaxError(f"tool_calls are {shortened(self.tool_calls)}: expected a tuple of ToolCall")
        only = {"thinking": "assistant", "tool_calls": "assistant", "tool_call_id": "tool"}
        for name, role in only.items():
            if getattr(self, name) and self.role != role:
                raise LlamaJaxError(
                    f"a message of the role {self.role!r} has {name}: expected it in messages of the role {role!r} only"
                )

    @classmethod
    def of(cls, value: Any, source: str = "a message") -> "Message":
        """Reads a message as OpenAI's API and transformers write it; a value of null counts as absent.

        Raises:
            LlamaJaxError: for an unknown key, role or type, or content that is not text; the message begins with
                `source`.
        """
        if isinstance(value, Message):
            return value
        said = _fields(value, _KEYS, source)
        if "role" not in said:
            raise LlamaJaxError(f"{source}: 'role' is missing: expected one of {', '.join(ROLES)}")
        calls = said.get("tool_calls", [])
        if not isinstance(calls, list | tuple):
            raise LlamaJaxError(f"{source}: tool_calls are {shortened(calls)}: expected a list")
        if "content" not in said and not calls:
            raise LlamaJaxError(f"{source}: 'content' is missing: expected the text of the message")
        thoughts = [said[key] for key in _THINKING if key in said]
        if len(thoughts) == 2 and thoughts[0] != thoughts[1]:
            raise LlamaJaxError(f"{source}: {_THINKING[0]!r} and {_THINKING[1]!r} differ: expected one of them")
        with _errors_of(source):
            return cls(
                said["role"],
                _text_of(said.get("content", "")),
                thoughts[0] if thoughts else None,
                tuple(ToolCall.of(call, f"tool call {number}") for number, call in enumerate(calls, 1)),
                said.get("name"),
                said.get("tool_call_id"),
            )

    def as_dict(self) -> dict[str, Any]:
        """The message as transformers' templates expect it, without keys for absent values; `of` reads it back."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.thinking is not None:
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def as_messages(said: Any) -> list[Message]:
    """Converts a user's text, a message, or several messages to a list of messages.

    Raises:
        LlamaJaxError: see `Message.of`; or for an empty list.
    """
    if isinstance(said, str):
        return [Message("user", said)]
    if isinstance(said, Message | Mapping):
        return [Message.of(said)]
    if not isinstance(said, Sequence) or not said:
        raise LlamaJaxError(f"{shortened(said)}: expected a text, a message, or a list of messages")
    return [Message.of(each, f"message {number}") for number, each in enumerate(said, 1)]


def save_conversation(path: str | Path, messages: Sequence[Message]) -> None:
    """Writes messages to a JSON file; an existing file is replaced only once the new one is complete.

    Raises:
        LlamaJaxError: if the file cannot be written, or would be larger than `load_conversation` reads.
    """
    path = Path(path)
    said = {"version": VERSION, "messages": [message.as_dict() for message in messages]}
    data = (json.dumps(said, ensure_ascii=False, indent=1) + "\n").encode()
    if len(data) > _LARGEST_FILE:
        raise LlamaJaxError(f"{path}: the conversation has {len(data)} bytes: expected at most {_LARGEST_FILE}")
    if path.is_dir():
        raise LlamaJaxError(f"{path}: a folder: expected the name of a file")
    with new_file(path) as partial:
        partial.write_bytes(data)


def load_conversation(path: str | Path) -> list[Message]:
    """Reads a file of `save_conversation`.

    Raises:
        LlamaJaxError: if the file cannot be read, or holds anything else: the message names the file and the place.
    """
    try:
        said = read_json(path, _LARGEST_FILE)
    except OSError as error:
        raise LlamaJaxError(f"{path}: cannot be read ({error.strerror}): expected a saved conversation") from None
    expected = f'expected {{"version": {VERSION}, "messages": [...]}}, as /save writes it'
    if not isinstance(said, dict) or set(said) != {"version", "messages"}:
        raise LlamaJaxError(f"{path}: {shortened(said, 60)}: {expected}")
    if isinstance(said["version"], bool) or said["version"] != VERSION:
        raise LlamaJaxError(f"{path}: its version is {shortened(said['version'])}: {expected}")
    if not isinstance(said["messages"], list):
        raise LlamaJaxError(f"{path}: its messages are {shortened(said['messages'], 60)}: {expected}")
    return [Message.of(each, f"{path}: message {number}") for number, each in enumerate(said["messages"], 1)]


@contextlib.contextmanager
def _errors_of(source: str) -> Iterator[None]:
    """Puts `source` before the text of errors that are raised inside."""
    try:
        yield
    except LlamaJaxError as error:
        raise LlamaJaxError(f"{source}: {error}") from None


def _fields(value: Any, known: Sequence[str], source: str) -> dict[str, Any]:
    """The fields of a mapping that are not None; an unknown key is an error."""
    if not isinstance(value, Mapping):
        raise LlamaJaxError(f"{source}: {shortened(value)}: expected an object with some of {', '.join(known)}")
    if unknown := [key for key in value if key not in known]:
        raise LlamaJaxError(f"{source}: unknown key {shortened(unknown[0])}: expected some of {', '.join(known)}")
    return {key: field for key, field in value.items() if field is not None}


def _text_of(content: Any) -> Any:
    """The text of content that may be a list of parts, which are joined by line ends as in llama.cpp and vLLM.

    Other types are returned unchanged, because `Message` checks them.
    """
    if not isinstance(content, list | tuple):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or set(part) != {"type", "text"}:
            what = f"of the type {shortened(kind)}" if isinstance(kind, str) and kind != "text" else shortened(part)
            raise LlamaJaxError(
                f"content has a part {what}, but models of this package read text only: expected parts "
                '{"type": "text", "text": …}'
            )
        _check_text("text of a part of the content", part["text"])
        texts.append(part["text"])
    return "\n".join(texts)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise LlamaJaxError(f"{name} is {shortened(value)}: expected a text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise LlamaJaxError(f"{name} is not Unicode at character {error.start}: expected a text") from None
