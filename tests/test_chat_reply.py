"""Parsing of replies: the same message however the text is cut, and nothing is shown that turns out to be a mark."""

import importlib.util
import random
from pathlib import Path

import pytest

from llamajax.chat.abilities import in_terms_of
from llamajax.chat.messages import Message, ToolCall
from llamajax.chat.probes import ToolCalls
from llamajax.chat.reply import Reply, ReplyForm
from llamajax.chat.template import Template
from llamajax.chat.tool_calls import BARE, DEEPSEEK, HERMES, MISTRAL, form_of, marked
from llamajax.checkpoint.huggingface_words import choose_tokenizer, read_words
from llamajax.tokenizer import Tokenizer
from tests.conversations import write_folder

FORM = {"hermes": HERMES, "llama3": BARE, "mistral": MISTRAL, "deepseek": DEEPSEEK}
THINK = ("<think>", "</think>")
WEATHER = ToolCall("get_current_temperature", {"location": "San Francisco, CA, USA"})
LATER = ToolCall("get_temperature_date", {"location": "San Francisco, CA, USA", "date": "2024-10-01"})
# Calls as the documentation of Qwen 2.5, Llama 3.1, Mistral and DeepSeek prints them.
QWEN = """<tool_call>
{"name": "get_current_temperature", "arguments": {"location": "San Francisco, CA, USA"}}
</tool_call>
<tool_call>
{"name": "get_temperature_date", "arguments": {"location": "San Francisco, CA, USA", "date": "2024-10-01"}}
</tool_call>"""
LLAMA = '{"name": "get_current_temperature", "parameters": {"location": "San Francisco, CA, USA"}}'
NEMO = (
    '[TOOL_CALLS] [{"name": "get_current_temperature", "arguments": {"location": "San Francisco, CA, USA"}, '
    '"id": "VvvODy9mT"}]'
)
TEKKEN = '[TOOL_CALLS]get_current_temperature[CALL_ID]VvvODy9mT[ARGS]{"location": "San Francisco, CA, USA"}'
DEEPSEEK3 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_current_temperature\n```json\n"
    '{"location": "San Francisco, CA, USA"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>'
    'get_temperature_date\n```json\n{"location": "San Francisco, CA, USA", "date": "2024-10-01"}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
DEEPSEEK31 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_current_temperature<｜tool▁sep｜>"
    '{"location": "San Francisco, CA, USA"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)


def said(content: str, thinking: str | None = None, *calls: ToolCall) -> Message:
    return Message("assistant", content, thinking, calls)


def in_pieces(form: ReplyForm, parts: list[str]) -> Reply:
    """Feeds the pieces to a reply and checks that they show what the message holds."""
    reply, shown = Reply(form), {"content": "", "thinking": ""}
    for text in parts:
        for piece in reply.add(text):
            assert piece.text
            shown[piece.kind] += piece.text
    for piece in reply.finish():
        shown[piece.kind] += piece.text
    message = reply.message()
    assert shown == {"content": message.content, "thinking": message.thinking or ""}
    return reply


def cuts(text: str) -> list[list[str]]:
    """Returns a text as one piece, as characters, and cut in eight random ways."""
    rng, ways = random.Random(0), [[text], list(text)]
    for _ in range(8):
        ends = sorted(rng.sample(range(len(text) + 1), min(len(text), 6)))
        ways.append([text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)])
    return ways


REPLIES = {
    "plain": (ReplyForm(), "Hello <think> </think>", said("Hello <think> </think>")),
    "empty": (ReplyForm(THINK, calls=BARE), "", said("")),
    "thinking": (ReplyForm(THINK), "\n<think>\nOne.\n\nTwo.\n</think>\n\nThree.\n", said("Three.\n", "One.\n\nTwo.")),
    "opened thinking": (ReplyForm(THINK, True), "One < two\n</think>\n\n3", said("3", "One < two")),
    "cut thinking": (ReplyForm(THINK, True), "\nOne\n</thi", said("", "One\n</thi")),
    "empty thinking": (ReplyForm(THINK), "<think>\n\n</think>\n\nYes", said("Yes")),
    "no thinking": (ReplyForm(THINK), "  <thin air", said("  <thin air")),
    "thinking in content": (ReplyForm(THINK), "The mark <think> opens", said("The mark <think> opens")),
    "a first space": (ReplyForm(drops_first_space=True), "  two", said(" two")),
    "Qwen": (ReplyForm(THINK, calls=HERMES), QWEN, said("", None, WEATHER, LATER)),
    "Qwen 3": (
        ReplyForm(THINK, calls=HERMES),
        f"<think>\nHm.\n</think>\n\nLet me see.\n{QWEN}",
        said("Let me see.", "Hm.", WEATHER, LATER),
    ),
    "Qwen, not closed": (ReplyForm(calls=HERMES), QWEN[:-13], said("", None, WEATHER, LATER)),
    "Qwen, text between": (
        ReplyForm(calls=HERMES),
        f"{QWEN.splitlines()[0]}{QWEN.splitlines()[1]}</tool_call> That is all. ",
        said("That is all.", None, WEATHER),
    ),
    "a mark in a call": (
        ReplyForm(calls=HERMES),
        '<tool_call>{"name": "f", "arguments": {"a": "</tool_call><tool_call>"}}</tool_call>',
        said("", None, ToolCall("f", {"a": "</tool_call><tool_call>"})),
    ),
    "Llama": (ReplyForm(calls=BARE), LLAMA, said("", None, WEATHER)),
    "Llama, two": (ReplyForm(calls=BARE), f"\n{LLAMA}; {LLAMA}", said("", None, WEATHER, WEATHER)),
    "Llama, marked": (ReplyForm(calls=BARE), f"<|python_tag|>{LLAMA}", said("", None, WEATHER)),
    "Llama, behind text": (ReplyForm(calls=BARE), f"So: <|python_tag|>{LLAMA}", said("So:", None, WEATHER)),
    "Llama, other JSON": (ReplyForm(calls=BARE), '{"nap": 1} \n', said('{"nap": 1} \n')),
    "Mistral": (
        ReplyForm(calls=MISTRAL),
        NEMO,
        said("", None, ToolCall(WEATHER.name, WEATHER.arguments, "VvvODy9mT")),
    ),
    "Mistral's later": (
        ReplyForm(calls=MISTRAL),
        TEKKEN,
        said("", None, ToolCall(WEATHER.name, WEATHER.arguments, "VvvODy9mT")),
    ),
    "Mistral, no ids": (
        ReplyForm(calls=MISTRAL),
        '[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[ARGS]{"a": 1}',
        said("", None, ToolCall("f", {}, "call00000"), ToolCall("g", {"a": 1}, "call00001")),
    ),
    "DeepSeek": (ReplyForm(calls=DEEPSEEK), f"Yes. {DEEPSEEK3}", said("Yes.", None, WEATHER, LATER)),
    "DeepSeek V3.1": (ReplyForm(calls=DEEPSEEK), DEEPSEEK31, said("", None, WEATHER)),
    "half a mark": (ReplyForm(calls=HERMES), "a \n<tool_cal", said("a \n<tool_cal")),
}


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_is_taken_apart_however_it_is_cut(name: str) -> None:
    form, text, message = REPLIES[name]
    for parts in cuts(text):
        reply = in_pieces(form, parts)
        assert reply.message() == message, parts
        assert reply.note is None


@pytest.mark.parametrize(
    "name, text, problem",
    [
        ("hermes", 'So <tool_call>{"name": "f", "arguments": {"a": </tool_call>', "Expecting value"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}} and more', "</tool_call> is missing after it"),
        ("hermes", '<tool_call>["f"]</tool_call>', "is not an object with a name and arguments"),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', "'arguments' is missing"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "are not JSON"),
        ("hermes", '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 100_000, "nested too deeply"),
        ("llama3", '{"name": "get_current_temperature", "parameters": {"loc', "Unterminated string"),
        ("llama3", '<|python_tag|>brave_search.call(query="weather")', "Expecting value"),
        ("llama3", f"{LLAMA} is the call", "Expecting value"),
        ("mistral", '[TOOL_CALLS]{"name": "f", "arguments": {}}', "is not a list of calls"),
        ("deepseek", "<｜tool▁calls▁begin｜>f()", "it contains no <｜tool▁call▁begin｜>"),
        ("deepseek", "<｜tool▁call▁begin｜>\n{}", "no name follows"),
    ],
)
def test_what_is_no_call_stays_text_and_is_said(name: str, text: str, problem: str) -> None:
    reply = in_pieces(ReplyForm(calls=FORM[name]), [text])
    assert reply.message() == said(text)
    assert reply.note.startswith("what began as a tool call stays text: ") and problem in reply.note


def test_text_is_shown_as_soon_as_it_is_certain() -> None:
    reply = Reply(ReplyForm(THINK, calls=BARE))
    shown = [
        [(piece.kind, piece.text) for piece in reply.add(text)] for text in ("<thi", "nk>", "a <", "b", "</think>")
    ]
    assert shown == [[], [], [("thinking", "a ")], [("thinking", "<b")], []]
    shown = [[piece.text for piece in reply.add(text)] for text in ("\n", "{", "'a'", " <|pyt", "hon")]
    assert shown == [[], [], ["{'a'"], [], []]
    assert [piece.text for piece in reply.finish()] == [" <|python"]


def test_the_way_of_calls_is_that_of_the_template() -> None:
    assert form_of(ToolCalls("<tool_call>", "</tool_call>", "name", "arguments")) is HERMES
    assert form_of(ToolCalls("[TOOL_CALLS]", "", "name", "arguments", listed=True)) is MISTRAL
    begun = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    assert form_of(ToolCalls(begun, "<｜tool▁call▁end｜>", None, None, "\n```json\n")) is DEEPSEEK
    assert form_of(ToolCalls("", "", "name", "parameters")) is BARE
    assert form_of(ToolCalls("<call>", "</call>", None, None, ": ")) is None


def test_other_marks_around_json_are_read() -> None:
    """A call as in Command R's template."""
    form = form_of(ToolCalls("Action: ```json", "```", "tool_name", "parameters", listed=True))
    said_so = '[{"tool_name": "f", "parameters": {"a": 1}}, {"tool_name": "g", "parameters": {}}]'
    text = f"I see. Action: ```json\n{said_so}\n```"
    for parts in cuts(text):
        calls = ToolCall("f", {"a": 1}), ToolCall("g", {})
        assert in_pieces(ReplyForm(calls=form), parts).message() == said("I see.", None, *calls)
    assert marked("<f>", "").marks == ("<f>",)


def test_marks_of_a_form() -> None:
    assert ReplyForm().marks == ()
    assert ReplyForm(THINK, calls=BARE).marks == ("<think>", "</think>", "<|python_tag|>")


@pytest.mark.extras
@pytest.mark.parametrize("name", ["llama3_1", "llama3_2", "qwen2_5", "qwen3", "qwen3_instruct_2507", "deepseekv3"])
def test_what_published_templates_write_is_read_back(name: str, tmp_path: Path) -> None:
    """Calls of earlier turns stand in prompts as models write them. The templates are trl's copies."""
    found = importlib.util.find_spec("trl")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs trl's copies of published templates: pip install --no-deps trl")
    text = (Path(found.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text()
    write_folder(tmp_path, text)
    data, words = choose_tokenizer(tmp_path, read_words(tmp_path, {}, 1 << 20)[0])
    template = Template.of(Tokenizer(data, words=words))
    asked = [Message("user", "what?")]
    several = (ToolCall("add", {"a": 1.5}), ToolCall("sub", {"a": [2, {"b": "</tool_call>"}], "c": "é"}))
    begun = template.render(asked).removesuffix("<think>\n")
    for calls in (several[:1], several[1:] if "llama" in name else several):  # Llama's templates refuse several calls
        answer = in_terms_of(template, [Message("assistant", "", tool_calls=calls)])
        written = template.render([*asked, *answer], reply=False)
        assert written.startswith(begun)
        form = ReplyForm(THINK if template.thinking else None, calls=form_of(template.tool_calls))
        reply = in_pieces(form, [written.removeprefix(begun).split(template.ends[0])[0]])
        assert reply.message() == said("", None, *calls) and reply.note is None
