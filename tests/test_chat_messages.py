"""Messages: read strictly from what other libraries write, and kept in a file that is treated as hostile when read."""

import json
import os
from pathlib import Path

import pytest

from llamajax.chat.messages import Message, ToolCall, load_conversation, save_conversation
from llamajax.errors import LlamaJaxError

# An answer that calls a function, and the function's answer, as in OpenAI's reference.
OPENAI = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call_abc123",
            "type": "function",
            "function": {"name": "get_current_weather", "arguments": '{\n"location": "Boston, MA"\n}'},
        }
    ],
}
# An example from the documentation of transformers' chat templates.
TRANSFORMERS = {
    "role": "assistant",
    "tool_calls": [
        {
            "type": "function",
            "function": {
                "name": "get_current_temperature",
                "arguments": {"location": "Paris, France", "unit": "celsius"},
            },
        }
    ],
}
CONVERSATION = [
    Message("system", "Be brief."),
    Message("user", "Wie heiß ist es in Köln? 🌡"),
    Message("assistant", "", thinking="A tool knows.", tool_calls=(ToolCall("heat", {"place": "Köln"}, "a1"),)),
    Message("tool", "31", name="heat", tool_call_id="a1"),
    Message("assistant", "31 °C."),
]


def test_calls_of_openai_and_transformers_are_read() -> None:
    call = ToolCall("get_current_weather", {"location": "Boston, MA"}, "call_abc123")
    assert Message.of(OPENAI) == Message("assistant", "", tool_calls=(call,))
    call = ToolCall("get_current_temperature", {"location": "Paris, France", "unit": "celsius"})
    assert Message.of(TRANSFORMERS) == Message("assistant", "", tool_calls=(call,))
    bare = {**TRANSFORMERS, "tool_calls": [TRANSFORMERS["tool_calls"][0]["function"]]}
    assert Message.of(bare) == Message.of(TRANSFORMERS)


def test_a_message_is_what_templates_expect() -> None:
    assert CONVERSATION[2].as_dict() == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "A tool knows.",
        "tool_calls": [
            {"type": "function", "function": {"name": "heat", "arguments": {"place": "Köln"}}, "id": "a1"},
        ],
    }
    assert CONVERSATION[3].as_dict() == {"role": "tool", "content": "31", "name": "heat", "tool_call_id": "a1"}
    assert Message("user", "hi").as_dict() == {"role": "user", "content": "hi"}
    assert [Message.of(message.as_dict()) for message in CONVERSATION] == CONVERSATION
    assert Message.of(CONVERSATION[0]) is CONVERSATION[0]


def test_text_parts_are_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert Message.of({"role": "user", "content": parts}) == Message("user", "one\ntwo")
    assert Message.of({"role": "assistant", "content": "2", "thinking": "1 + 1"}).thinking == "1 + 1"


CALL = {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    "value, error",
    [
        ("hi", r"m: 'hi': expected an object with some of role, content"),
        ({"content": "hi"}, "m: 'role' is missing: expected one of system, user, assistant, tool"),
        ({"role": "user"}, "m: 'content' is missing: expected the text"),
        ({"role": "User", "content": ""}, "m: the role is 'User': expected one of system, user, assistant, tool"),
        ({"role": ["user"], "content": ""}, r"m: the role is \['user'\]: expected one of"),
        ({"role": "user", "content": 3}, "m: content is 3: expected a text"),
        ({"role": "user", "content": "", "colour": 1}, "m: unknown key 'colour': expected some of role"),
        ({"role": "user", "content": "a\ud800"}, "m: content is not Unicode at character 1"),
        ({"role": "user", "content": "", "name": 3}, "m: name is 3: expected a text"),
        ({"role": "user", "content": "", "thinking": "x"}, "role 'user' has thinking: expected it in .*'assistant'"),
        ({"role": "user", "content": "", "tool_calls": [CALL]}, "role 'user' has tool_calls: expected it"),
        ({"role": "user", "content": "", "tool_call_id": "x"}, "has tool_call_id: expected it in .* role 'tool' only"),
        ({"role": "assistant", "content": "", "thinking": "a", "reasoning_content": "b"}, "'thinking' differ"),
        ({"role": "assistant", "tool_calls": "f()"}, "m: tool_calls are 'f\\(\\)': expected a list"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "the type 'image_url'.*text only"),
        ({"role": "user", "content": ["hi"]}, "content has a part 'hi'.*: expected parts"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "text of a part of the content is 1: expected"),
    ],
)
def test_other_messages_are_refused(value, error: str) -> None:
    with pytest.raises(LlamaJaxError, match=error):
        Message.of(value, "m")


@pytest.mark.parametrize(
    "call, error",
    [
        (1, "m: tool call 1: 1: expected an object"),
        ({"name": "f"}, "m: tool call 1: 'arguments' is missing: expected a name and arguments"),
        ({"arguments": {}}, "'name' is missing"),
        ({"name": "", "arguments": {}}, "has no name"),
        ({"name": "f", "arguments": "{"}, "its arguments: not JSON"),
        ({"name": "f", "arguments": "[" * 100_000}, "its arguments: not JSON"),
        ({"name": "f", "arguments": "[1]"}, r"arguments of the tool call 'f' are \[1\]: expected an object"),
        ({"name": "f", "arguments": '{"a": NaN}'}, "'f' are not JSON .*expected texts, finite numbers"),
        ({"name": "f", "arguments": {"a": {1, 2}}}, "'f' are not JSON"),
        ({"type": "code", **CALL}, "type is 'code': expected 'function'"),
        ({"function": CALL, "name": "g"}, "'name' is beside 'function': expected it inside"),
        ({"function": {**CALL, "strict": True}}, "function: unknown key 'strict'"),
        ({**CALL, "id": 7}, "the id of a tool call is 7: expected a text"),
    ],
)
def test_other_tool_calls_are_refused(call, error: str) -> None:
    with pytest.raises(LlamaJaxError, match=error):
        Message.of({"role": "assistant", "tool_calls": [call]}, "m")


def test_tool_calls_of_a_message_are_a_tuple() -> None:
    with pytest.raises(LlamaJaxError, match=r"tool_calls are \[\]: expected a tuple of ToolCall"):
        Message("assistant", "", tool_calls=[])


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_a_conversation_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("what stood there")
    save_conversation(path, CONVERSATION)
    assert load_conversation(path) == CONVERSATION
    assert os.listdir(tmp_path) == ["a.json"]
    said = json.loads(path.read_text())
    assert said["version"] == 1 and said["messages"][1] == {"role": "user", "content": CONVERSATION[1].content}
    with pytest.raises(LlamaJaxError, match="a folder: expected the name of a file"):
        save_conversation(tmp_path, CONVERSATION)
    with pytest.raises(LlamaJaxError, match="has 17.* bytes: expected at most 16777216"):
        save_conversation(path, [Message("user", "x" * (17 << 20))])
    assert load_conversation(path) == CONVERSATION, "the file must be unchanged"


@pytest.mark.parametrize(
    "data, error",
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[]", r"expected \{\"version\": 1, \"messages\""),
        (b'{"version": 1}', "expected"),
        (b'{"version": 1, "messages": [], "extra": 1}', "expected"),
        (b'{"version": true, "messages": []}', "its version is True"),
        (b'{"version": 2, "messages": []}', "its version is 2"),
        (b'{"version": 1, "messages": {}}', r"its messages are \{\}"),
        (b'{"version": 1, "messages": [{"role": "user", "content": ""}, 5]}', "message 2: 5: expected an object"),
        (b'{"version": 1, "messages": [{"role": "user", "content": "\\ud800"}]}', "message 1: content is not Unicode"),
        (b'{"version": 1, "messages": [{"role": "user", "content": 1%s}]}' % (b"0" * 5000), "not JSON"),
    ],
)
def test_another_file_is_one_line(tmp_path: Path, data: bytes, error: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(LlamaJaxError, match=error) as raised:
        load_conversation(path)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


def test_what_is_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LlamaJaxError, match="cannot be read .No such file or directory.: expected a saved conv"):
        load_conversation(tmp_path / "none")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(LlamaJaxError, match="a FIFO: expected a regular file"):
        load_conversation(tmp_path / "fifo")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(LlamaJaxError, match="1099511627776 bytes: expected at most 16777216"):
        load_conversation(tmp_path / "large")
