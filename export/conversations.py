"""A checkpoint's chat template for runners: the section `chat` of the manifest, and golden conversations.

Runners have no Jinja. For a template of the usual form they get the strings between messages (`llamajax.role_strings`).
Control tokens in these strings are ids, so that no text, such as a message's, becomes a control token. When a bundle is
written, a runner's ids are compared with the template's for conversations with awkward content.
"""

import dataclasses
import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from export.vocabulary import Vocabulary, text_of
from llamajax import LlamaJaxError, Message, Template, Tokenizer, files, role_strings

# Number of compared conversations that the bundle holds, for each runner to encode.
_GOLDEN = 12
_MOST_TOKENS = 16
_SPECIAL = 1  # the bit of a special token, as in runners/text.py
_INSTEAD = ": a built-in format may be named instead (--template)"
_STRINGS = ("begin", "system", "behind_system", "answer", "next", "reply")


@dataclasses.dataclass(frozen=True)
class Chat:
    """The data of conversations for runners.

    Attributes:
        section: the section of the manifest; None if runners cannot chat.
        golden: conversations, each with the ids by the template and its tokenizer.
        refusal: the reason for a missing section, or "".
    """

    section: dict[str, Any] | None
    golden: list[dict[str, Any]]
    refusal: str


def chat_of(tokenizer: Tokenizer | None, vocabulary: Vocabulary | None, name: str | None, source: str) -> Chat:
    """The chat of a bundle.

    Args:
        tokenizer: the tokenizer, with the checkpoint's template; None for a bundle that takes only ids.
        vocabulary: the tokenizer's tables for runners.
        name: the name of a template, as for `Template.of`.
        source: the checkpoint, for error messages.

    Raises:
        LlamaJaxError: if there is no template of that name.
    """
    if tokenizer is None or vocabulary is None:
        return Chat(None, [], "it has no tokenizer")
    if vocabulary.values["refusal"] is not None:
        return Chat(None, [], vocabulary.values["refusal"])
    try:
        template = Template.of(tokenizer, source, name)
    except LlamaJaxError as error:
        if name is not None:
            raise
        return Chat(None, [], str(error))
    if "strftime_now" in tokenizer.words.chat_templates.get(name or "default", ""):
        return Chat(None, [], f"its chat template says the day's date{_INSTEAD}")
    strings, refusal = role_strings.role_strings(lambda messages, reply: template.parts(messages, reply=reply))
    if strings is None:
        return Chat(None, [], f"its chat template is not of the usual form: {refusal}{_INSTEAD}")
    runner = text_of(vocabulary.values)
    try:
        section = _section(strings, template, tokenizer, runner)
        golden = _compared(section, template, tokenizer, runner)
    except LlamaJaxError as error:
        return Chat(None, [], str(error))
    return Chat(section, golden, "")


def _section(
    strings: role_strings.RoleStrings, template: Template, tokenizer: Tokenizer, runner: Any
) -> dict[str, Any]:
    """The section `chat` of the manifest. `runner` is the runners' `Text`."""
    control = _control(template, tokenizer)
    tokens = {text: (index, bits) for some in runner.added[True] for text, (index, bits) in some.texts.items()}
    tokens |= {token.text: tokens.get(token.text, (token.id, token.special)) for token in tokenizer.added}
    written = {text: token for text, token in tokens.items() if token[1] & _SPECIAL or token[0] in control}
    made: dict[str, Any] = {}
    for key in _STRINGS:
        string = getattr(strings, key)
        made[key] = None if string is None else _pieces(string, written, runner)
    begun = template.encode(tokenizer, [Message("user", "Hi")])[:1]
    is_added = (
        begun == [tokenizer.bos_id] and made["begin"][:1] != begun
    )  # a built-in format leaves BOS to the tokenizer
    return {
        "bos": begun if is_added else [],
        **made,
        "trims_answers": strings.trims_answers,
        "thinking_end": strings.thinking_end,
        "thinking_blank": strings.thinking_blank,
        "control": control,
        "stop": list(template.stop_ids(tokenizer)),
    }


def _control(template: Template, tokenizer: Tokenizer) -> list[int]:
    """Ids of added tokens that are not special, and that the template recognises only in its own text."""
    tokens = [token for token in tokenizer.added if not token.special and token.text.strip()]
    if not tokens:
        return []
    ids_of = lambda text: Counter(template.encode(tokenizer, [Message("user", text)]))  # noqa: E731
    read = ids_of("x " + " x ".join(token.text for token in tokens) + " x") - ids_of("x")
    return [token.id for token in tokens if token.id not in read]


def _pieces(string: str, written: dict[str, tuple[int, int]], runner: Any) -> list[int | str]:
    """Splits a string of the template into ids of control tokens and text."""
    longest = importlib.import_module("export.runners.text_models").Longest(written)
    return [part for _, part in runner.around_added(longest, string, True)]


def _compared(section: dict[str, Any], template: Template, tokenizer: Tokenizer, runner: Any) -> list[dict[str, Any]]:
    """Compares conversations, and returns the golden ones.

    Raises:
        LlamaJaxError: if a runner's ids differ from the template's.
    """
    encode = importlib.import_module("export.runners.answers").conversation
    golden = []
    for messages in _conversations(tokenizer, section["system"] is not None):
        said = [[message.role, message.content] for message in messages]
        ids = template.encode(tokenizer, messages)
        if encode(runner, section, said) != ids:
            last = files.shortened(messages[-1].content)
            raise LlamaJaxError(
                f"a conversation of {len(messages)} messages, the last {last}, has other ids by its template's strings"
            )
        golden.append({"messages": said, "ids": ids})
    return golden[:_GOLDEN]


def _conversations(tokenizer: Tokenizer, with_system: bool) -> Iterator[Sequence[Message]]:
    """Yields the conversations to compare; first usual ones and ones that contain the texts of control tokens."""
    asked, told = (
        Message("user", "What is the capital of France?"),
        Message("assistant", "The capital of France is Paris."),
    )
    yield [asked]
    yield [*[Message("system", "Be brief.")] * with_system, asked, told, Message("user", "And of Italy?")]
    for token in tokenizer.added[:_MOST_TOKENS]:
        text = f"a{token.text}b {token.text}"
        yield [Message("user", text.strip()), Message("assistant", text), Message("user", f"{text} c")]
    yield from role_strings.conversations(with_system)
