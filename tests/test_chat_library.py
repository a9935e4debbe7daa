"""`llamajax.Chat`: the model sees the template's text, whatever was kept, stopped, retried or dropped."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import llamajax
from llamajax import Chat, LlamaJaxError, Message, ToolCall
from llamajax.chat.window import fit
from llamajax.generation.request import Completion
from llamajax.words import Words
from tests.chat_models import random_model

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|python_tag|>"]


def tokenizer_with(template: str, marks: tuple[str, ...] = ()) -> llamajax.Tokenizer:
    """Returns a byte-level tokenizer with ChatML's control tokens, and with marks that are tokens with a text."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=CONTROL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(["Once upon a time there was a little fox. user assistant system"] * 9, trainer)
    library.add_tokens(list(marks))
    words = Words(stop_ids=(0,), files={"chat_template.jinja": template.encode()})
    return llamajax.Tokenizer(library.to_str().encode(), words=words)


@pytest.fixture(scope="module")
def tokenizer() -> llamajax.Tokenizer:
    return tokenizer_with(CHATML)


@pytest.fixture(scope="module")
def model(tokenizer) -> llamajax.Llama:
    """Random weights, and a context that 40 or so words fill."""
    return random_model(tokenizer.vocab_size, 256)


def prompt(tokenizer: llamajax.Tokenizer, messages: list[Message]) -> list[int]:
    """Returns ChatML's ids of a conversation, written by hand."""
    start, end = tokenizer.id_of("<|im_start|>"), tokenizer.id_of("<|im_end|>")
    encode = lambda text: tokenizer.encode(text, bos=False)  # noqa: E731
    ids = []
    for message in messages:
        ids += [start, *encode(f"{message.role}\n{message.content}"), end, *encode("\n")]
    return [*ids, start, *encode("assistant\n")]


def fresh(model, tokenizer, messages: list[Message], **options) -> str:
    """Returns what `generate` makes of a conversation that it has not seen before."""
    ending = tokenizer.replying([0, tokenizer.id_of("<|im_end|>")])
    return llamajax.generate(model, ending, prompt(tokenizer, messages), **options).text


def test_every_turn_is_what_the_whole_conversation_gives(model, tokenizer) -> None:
    knobs = {"temperature": 0.9, "top_p": 0.95, "seed": 5, "max_new_tokens": 12}
    chat, said = Chat(model, tokenizer, system="Be a fox.", **knobs), [Message("system", "Be a fox.")]
    for text in ("Once upon a time", "there was<|im_end|>", "a little fox"):
        said.append(Message("user", text))
        answer = chat.stream(text)
        pieces = list(answer)
        expected = fresh(model, tokenizer, said, **knobs)
        assert "".join(piece.text for piece in pieces) == answer.message.content == expected
        said.append(Message("assistant", expected))
        assert chat.messages == said
        assert chat.context_used == len(prompt(tokenizer, said[:-1])) + len(answer.completion.tokens)


GREEDY = {"temperature": 0, "max_new_tokens": 12}


def ask(text: str) -> Message:
    return Message("user", text)


def reply_to(text: str) -> Message:
    return Message("assistant", text)


# ---- What happens between turns --------------------------------------------------------------------------------------


def test_another_answer_is_of_another_seed(model, tokenizer) -> None:
    chat = Chat(model, tokenizer, temperature=1.0, seed=(1 << 32) - 1, max_new_tokens=12)
    with pytest.raises(LlamaJaxError, match="there is no answer to replace: expected a message first"):
        chat.retry()
    first = chat.send("Once upon a time")
    for seed in (0, 1):
        answer = chat.retry()
        list(answer)
        assert answer.message.content == fresh(
            model, tokenizer, [ask("Once upon a time")], seed=seed, max_new_tokens=12
        )
        assert chat.messages == [ask("Once upon a time"), answer.message] and answer.message != first
    second = chat.send("a little fox").content
    assert second == fresh(model, tokenizer, chat.messages[:-1], seed=(1 << 32) - 1, max_new_tokens=12)


def test_system_knobs_and_messages_may_change(model, tokenizer) -> None:
    chat = Chat(model, tokenizer, **GREEDY)
    chat.send("Once upon a time")
    chat.system = "Be a fox."
    assert (chat.system, len(chat.messages)) == ("Be a fox.", 3)
    chat.knobs["temperature"], chat.seed = 1.0, 7
    answer = chat.send("a fox")
    assert answer.content == fresh(model, tokenizer, chat.messages[:-1], temperature=1.0, seed=7, max_new_tokens=12)
    chat.reset()
    assert chat.messages == [Message("system", "Be a fox.")] and chat.context_used == 0
    chat.system = None
    assert chat.messages == [] and chat.system is None
    chat.messages = [ask("there was"), reply_to("a fox")]
    few = [{"role": "user", "content": "Who?"}, reply_to("Ted"), ask("What?")]
    answer = chat.send(few)
    said = [ask("there was"), reply_to("a fox"), ask("Who?"), reply_to("Ted"), ask("What?")]
    assert chat.messages == [*said, answer]
    assert answer.content == fresh(model, tokenizer, said, temperature=1.0, seed=7, max_new_tokens=12)


def test_the_checkpoint_says_knobs(model, tokenizer) -> None:
    words = dataclasses.replace(tokenizer.words, sampling={"temperature": 0.5, "top_k": 3})
    said = llamajax.Tokenizer(tokenizer.model_bytes, words=words)
    assert Chat(model, said, top_k=5).knobs == {"temperature": 0.5, "top_k": 5}


# ---- Answers that end early ------------------------------------------------------------------------------------------


def test_a_stopped_answer_stays_as_far_as_it_came(model, tokenizer) -> None:
    chat = Chat(model, tokenizer, temperature=0, max_new_tokens=100)
    answer = chat.stream("Once upon a time")
    shown = next(answer).text
    answer.stop()
    shown += "".join(piece.text for piece in answer)
    assert chat.messages == [ask("Once upon a time"), reply_to(shown)] and answer.message is chat.messages[-1]
    assert answer.completion.finish_reason == "stopped" and 0 < len(answer.completion.tokens) < 100
    assert fresh(model, tokenizer, [ask("Once upon a time")], temperature=0, max_new_tokens=100).startswith(shown)
    chat.max_new_tokens = 12
    assert chat.send("a fox").content == fresh(model, tokenizer, chat.messages[:3], **GREEDY)


def test_an_answer_stopped_before_it_began_is_empty(model, tokenizer) -> None:
    chat = Chat(model, tokenizer, **GREEDY)
    answer = chat.stream("Once upon a time")
    answer.stop()
    assert list(answer) == [] and chat.messages == [ask("Once upon a time"), reply_to("")]
    list(chat.retry())
    assert chat.messages[1].content == fresh(model, tokenizer, chat.messages[:1], **GREEDY)


def test_an_abandoned_answer_stays_as_far_as_it_came(model, tokenizer) -> None:
    chat = Chat(model, tokenizer, temperature=0, max_new_tokens=100)
    never = chat.stream("not asked in the end")
    abandoned = chat.stream("Once upon a time")
    assert list(never) == [] and chat.messages == []
    shown = next(abandoned).text
    assert chat.messages == [ask("Once upon a time"), reply_to(shown)]
    chat.max_new_tokens = 12
    answer = chat.send("a fox")
    assert chat.messages == [ask("Once upon a time"), reply_to(shown), ask("a fox"), answer]
    assert answer.content == fresh(model, tokenizer, chat.messages[:3], **GREEDY)
    assert list(abandoned) == []


def test_an_interrupted_answer_stays_as_far_as_it_came(model, tokenizer, monkeypatch) -> None:
    chat = Chat(model, tokenizer, temperature=0, max_new_tokens=100)
    answer = chat.stream("Once upon a time")
    shown = next(answer).text
    monkeypatch.setattr(chat._kept, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(answer)
    monkeypatch.undo()
    assert chat.messages == [ask("Once upon a time"), reply_to(shown)]
    chat.max_new_tokens = 12
    assert chat.send("a fox").content == fresh(model, tokenizer, chat.messages[:3], **GREEDY)


def test_an_answer_interrupted_before_it_is_shown_is_empty(model, tokenizer, monkeypatch) -> None:
    """The first token exists already, but its text is still held back."""
    chat = Chat(model, tokenizer, **GREEDY)
    answer = chat.stream("Once upon a time")
    monkeypatch.setattr(answer._stream, "_account", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(answer)
    assert chat.messages == [ask("Once upon a time"), reply_to("")]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_answer_that_fails_at_once_leaves_no_trace(model, tokenizer) -> None:
    chat = Chat(model, tokenizer, **GREEDY)
    first = chat.send("Once upon a time")
    chat.model = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), model)
    with pytest.raises(LlamaJaxError, match="are not finite"):
        chat.send("a fox")
    assert chat.messages == [ask("Once upon a time"), first]
    chat.model = model
    assert chat.send("a fox").content == fresh(model, tokenizer, chat.messages[:3], **GREEDY)


# ---- The window ------------------------------------------------------------------------------------------------------


def test_the_oldest_turns_leave_a_full_window(model, tokenizer) -> None:
    notes: list[str] = []
    chat = Chat(model, tokenizer, system="Be a fox.", on_note=notes.append, temperature=0, max_new_tokens=20)
    text, left = "Once upon a time there was a little fox", []
    for turn in range(12):
        before = len(notes)
        answer = chat.send(text)
        asked = [chat.messages[0], *chat.messages[1 + 2 * sum(left) : -1]]
        if len(notes) > before:
            left.append(
                int(re.search(r"^the context holds 256 tokens: the oldest (\d+) turns have left it", notes[-1])[1])
            )
            asked = [chat.messages[0], *chat.messages[1 + 2 * sum(left) : -1]]
            assert len(prompt(tokenizer, asked)) - 1 + 20 <= 192, "a quarter of the context must be free again"
        assert len(prompt(tokenizer, asked)) - 1 + 20 <= 256
        assert answer.content == fresh(model, tokenizer, asked, temperature=0, max_new_tokens=20)
        assert len(chat.messages) == 1 + 2 * (turn + 1), "messages must keep the whole conversation"
    assert 2 <= len(left) <= 5, "turns must not be dropped at every turn"


def test_what_does_not_fit_is_refused(model, tokenizer) -> None:
    chat = Chat(model, tokenizer, **GREEDY)
    chat.send("a fox")
    before = list(chat.messages)
    with pytest.raises(
        LlamaJaxError,
        match=r"the last turn.* has \d\d\d tokens, and its answer up to 12: expected at most 256 together",
    ):
        chat.send("fox " * 300)
    assert chat.messages == before
    with pytest.raises(LlamaJaxError, match="max_new_tokens"):
        Chat(model, tokenizer, max_new_tokens=257).send("a fox")
    notes: list[str] = []
    chat = Chat(model, tokenizer, temperature=0, on_note=notes.append)
    answer = chat.stream("fox " * 115)
    list(answer)
    assert answer.completion.finish_reason in ("length", "stop") and chat.context_used <= 257 and notes == []


def test_turns_leave_whole() -> None:
    said = [Message("system", "s")]
    for turn in range(5):
        call = ToolCall("f", {})
        said += [ask(f"u{turn}"), Message("assistant", "", tool_calls=(call,)), Message("tool", "t"), reply_to("a")]
    said.append(ask("u5"))
    seen = fit(said, 0, lambda messages: [0] * 10 * len(messages), context=160, most=10, least=10)
    assert [said[seen.first].content, seen.turns, len(seen.ids)] == ["u3", 3, 100]
    assert seen.ids == fit(said, seen.first, lambda messages: [0] * 10 * len(messages), 160, 10, 10).ids
    greeted = [reply_to("Hello!"), ask("u")]
    assert fit(greeted, 0, lambda messages: [0] * 10 * len(messages), 100, 10, 10).first == 0
    assert fit(greeted, 0, lambda messages: [0] * 10 * len(messages), 25, 10, 10).first == 1


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error",
    [
        ({"heat": 1}, "unknown knob heat: expected some of temperature, top_k"),
        ({"temperature": -1}, "temperature is -1"),
        ({"stop": 5}, "stop is 5: expected texts of at least one character"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: expected a whole number, at least 1"),
        ({"samples": 1.5}, "samples is 1.5: expected a whole number, at least 1"),
        ({"tools": {}}, r"tools are \{\}: expected a list of functions"),
        ({"tools": [{"name": "f"}]}, "tool 1 is .*: expected .*function"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": {1}}}]}, "tool 1 is not JSON"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools are given, but .* has no place for them"),
    ],
)
def test_options_out_of_range(model, tokenizer, options, error: str) -> None:
    with pytest.raises(LlamaJaxError, match=error):
        Chat(model, tokenizer, **options)


def test_messages_that_nobody_answers(model, tokenizer) -> None:
    chat = Chat(model, tokenizer)
    with pytest.raises(LlamaJaxError, match=r"\[\]: expected a text, a message, or a list of messages"):
        chat.stream([])
    with pytest.raises(LlamaJaxError, match="the last message is by the assistant: expected one by the user"):
        chat.stream([ask("a"), reply_to("b")])
    with pytest.raises(LlamaJaxError, match="message 2: the role is 'fox'"):
        chat.stream([ask("a"), {"role": "fox", "content": "b"}])
    assert chat.messages == []


def test_chats_of_one_model_share_programs(model, tokenizer) -> None:
    Chat(model, tokenizer, **GREEDY).send("Once upon a time")
    chat = Chat(model, tokenizer, temperature=0.5, top_k=4, max_new_tokens=5)
    answer = chat.stream("there was a fox")
    list(answer)
    assert answer.speed.compilations == answer.speed.loads == 0


# ---- What is kept ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_model(tokenizer) -> llamajax.Llama:
    return random_model(tokenizer.vocab_size, 2048)


def test_the_second_turn_prefills_what_is_new(long_model, tokenizer) -> None:
    chat = Chat(long_model, tokenizer, **GREEDY)
    chat.messages = [ask("Once upon a time there was a little fox. " * 60), reply_to("a fox " * 150)]
    first = chat.stream("there")
    list(first)
    ids = prompt(tokenizer, chat.messages[:-1])
    assert len(ids) > 1000 and first.speed.prefill_tokens == len(ids) - 1 and first.speed.reused_tokens == 0
    second = chat.stream("a little fox")
    text = "".join(piece.text for piece in second)
    more = prompt(tokenizer, chat.messages[:-1])
    assert more[: len(ids)] == ids
    assert second.speed.prefill_tokens + second.speed.reused_tokens == len(more) - 1
    assert second.speed.reused_tokens >= len(ids) - 1 and second.speed.prefill_tokens < 80
    assert text == fresh(long_model, tokenizer, chat.messages[:-1], **GREEDY)


def test_a_cache_grows_and_keeps_what_it_holds(long_model, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("llamajax.chat.chat.FIRST_SLOTS", 256)
    chat = Chat(long_model, tokenizer, **GREEDY)
    chat.send("Once upon a time")
    answer = chat.stream("a fox " * 120)
    text = "".join(piece.text for piece in answer)
    assert chat.context_used > 256 and answer.speed.reused_tokens >= len(prompt(tokenizer, chat.messages[:1])) - 1
    assert text == fresh(long_model, tokenizer, chat.messages[:-1], least_slots=512, **GREEDY)


def test_thinking_that_leaves_the_history_is_not_kept(model, tokenizer) -> None:
    """As with Qwen 3: the thinking of earlier turns is not part of the prompt."""
    template = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    assert template != CHATML
    chat = Chat(model, tokenizer_with(template), **GREEDY)
    for text in ("Once upon a time", "a fox"):
        answer = chat.stream(text)
        pieces = list(answer)
        ids = [*prompt(tokenizer, chat.messages[:-1]), *tokenizer.encode("<think>\n", bos=False)]
        expected = llamajax.generate(model, tokenizer.replying([0, tokenizer.id_of("<|im_end|>")]), ids, **GREEDY).text
        assert {piece.kind for piece in pieces} == {"thinking"}
        assert answer.message == Message("assistant", "", thinking=expected.strip("\n"))
    assert 0 < answer.speed.reused_tokens < len(ids) - 20


# ---- Models that say what a test wants -------------------------------------------------------------------------------


# Shared by all these models: with vocabularies of one size they share their programs.
CALL, BARE_CALL, NO_CALL = (
    '{"name": "add", "arguments": {"a": 1}}',
    '{"name": "add", "parameters": {"a": 1}}',
    '{"name": "add"}',
)
WORDS = (CALL, BARE_CALL, NO_CALL, "Let me add.", "<tool_call>", "</tool_call>", "<think>", "</think>")
WORDS += ("Hm.", "\n\n", "Three.")


def scripted(tokenizer: llamajax.Tokenizer, words: list[str]) -> llamajax.Llama:
    """Returns a model that says these words, each an added token, after a newline: each token follows from the last."""
    V = tokenizer.vocab_size
    config = llamajax.Config(
        vocab_size=V, width=V, ffn_width=8, num_layers=1, num_heads=1, num_kv_heads=1, head_size=8, context_length=512
    )
    chain = [tokenizer.encode("\n", bos=False)[-1], *map(tokenizer.id_of, words), tokenizer.id_of("<|im_end|>")]
    head_VD = np.zeros((V, V), np.float32)
    for last, following in itertools.pairwise(chain):
        head_VD[following, last] = 10
    weights = {}
    for name, leaf in llamajax.named_weights(llamajax.abstract_model(config)).items():
        fixed = {"embed_VD": np.eye(V), "head_VD": head_VD}.get(name)
        weights[name] = jnp.asarray(
            np.full(leaf.shape, "norm" in name, np.float32) if fixed is None else fixed, jnp.float32
        )
    return llamajax.model_from(weights, config)


HERMES = (
    "{% if tools %}{{'<|im_start|>system\n<tools>' + tools | tojson + '</tools><|im_end|>\n'}}{% endif %}"
    "{% for message in messages %}{{'<|im_start|>' + message.role + '\n' + message.content}}"
    "{% for call in message.tool_calls or [] %}"
    "{{'<tool_call>\n' + call.function | tojson + '\n</tool_call>'}}{% endfor %}"
    "{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
LLAMA3 = (
    HERMES.replace("<tool_call>\n", "")
    .replace("\n</tool_call>", "")
    .replace(
        "call.function | tojson",
        "'{\"name\": ' + call.function.name | tojson + ', \"parameters\": ' + call.function.arguments | tojson + '}'",
    )
)
ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}},
}


def test_tool_calls_come_back_as_calls() -> None:
    words = ["Let me add.", "<tool_call>", CALL, "</tool_call>"]
    tokenizer = tokenizer_with(HERMES, WORDS)
    chat = Chat(scripted(tokenizer, words), tokenizer, tools=[ADD], think=True, temperature=0)
    answer = chat.send("1 + 2?")
    call = ToolCall("add", {"a": 1})
    assert answer == Message("assistant", "Let me add.", tool_calls=(call,))
    result = Message("tool", "3", name="add")
    chat.send(result)
    assert chat.messages[:3] == [ask("1 + 2?"), answer, result]
    assert Chat(scripted(tokenizer, words), tokenizer, think=True, temperature=0).send("1 + 2?").content == "".join(
        words
    )


def test_a_mark_that_is_a_control_token_is_seen() -> None:
    words = ["<|python_tag|>", BARE_CALL]
    tokenizer = tokenizer_with(LLAMA3, WORDS)
    assert tokenizer.decode([tokenizer.id_of(words[0])]) == ""
    chat = Chat(scripted(tokenizer, words), tokenizer, tools=[ADD], think=True, temperature=0)
    assert chat.send("1 + 2?") == Message("assistant", "", tool_calls=(ToolCall("add", {"a": 1}),))


def test_what_is_no_call_is_said() -> None:
    words = ["<tool_call>", NO_CALL, "</tool_call>"]
    tokenizer = tokenizer_with(HERMES, WORDS)
    answer = Chat(scripted(tokenizer, words), tokenizer, tools=[ADD], think=True, temperature=0).stream("1 + 2?")
    assert "".join(piece.text for piece in answer) == answer.message.content == "".join(words)
    assert answer.note.startswith("what began as a tool call stays text: ") and "'arguments' is missing" in answer.note


def test_calls_are_read_where_a_template_has_no_place_for_tools() -> None:
    """Like DeepSeek's template, which has a place for calls but not for tools, and wants arguments as JSON."""
    words = ["<tool_call>", CALL, "</tool_call>"]
    calls = "{% for call in message.tool_calls or [] %}"
    written = "'<tool_call>{\"name\": \"' + call.function.name + '\", \"arguments\": ' + call.function.arguments + '}'"
    template = CHATML.replace(
        "message['content'] +", f"message['content']}}}}{calls}{{{{{written}}}}}{{% endfor %}}{{{{"
    )
    tokenizer = tokenizer_with(template, WORDS)
    chat = Chat(scripted(tokenizer, words), tokenizer, system="Call add.", temperature=0)
    call = ToolCall("add", {"a": 1})
    for _ in range(2):
        assert chat.send("1 + 2?") == Message("assistant", "", tool_calls=(call,))
    assert '"arguments": {"a": 1}' in tokenizer.decode(chat._encode(chat.messages))
    with pytest.raises(LlamaJaxError, match="tools are given, but .* has no place for them"):
        Chat(chat.model, tokenizer, tools=[ADD])


def test_calls_in_a_way_that_is_not_read_are_said(model, tokenizer) -> None:
    template = HERMES.replace("call.function | tojson", "call.function.name + '()'")
    notes: list[str] = []
    Chat(model, tokenizer_with(template), tools=[ADD], on_note=notes.append)
    assert len(notes) == 1 and notes[0].startswith("tool calls stay text: the chat template (the checkpoint's)")


def test_formats_without_tokens_end_an_answer_where_the_next_turn_begins(model, tokenizer) -> None:
    for template, stops in (
        ("{% for m in messages %}\n\n### {{m.role}}:\n{{m.content}}{% endfor %}\n\n### assistant:\n", ["### user:"]),
        ("{% for m in messages %}{{m.role | upper}}: {{m.content}}\n{% endfor %}ASSISTANT:", ["USER:"]),
        (CHATML, None),
    ):
        assert Chat(model, tokenizer_with(template))._options["stop"] == stops


def test_thinking_is_no_content() -> None:
    words = ["<think>", "Hm.", "</think>", "\n\n", "Three."]
    tokenizer = tokenizer_with(HERMES, WORDS)
    chat = Chat(scripted(tokenizer, words), tokenizer, temperature=0, think=True)
    assert [(piece.kind, piece.text) for piece in chat.stream("1 + 2?")] == [("thinking", "Hm."), ("content", "Three.")]
    assert chat.messages[1] == Message("assistant", "Three.", thinking="Hm.")


# ---- Several answers, and steps --------------------------------------------------------------------------------------


def test_the_likeliest_of_several_answers(model, tokenizer) -> None:
    knobs = {"temperature": 1.0, "seed": 3, "max_new_tokens": 12}
    chat = Chat(model, tokenizer, samples=4, **knobs)
    for text in ("Once upon a time", "a fox"):
        answer = chat.stream(text)
        pieces = list(answer)
        means = [np.mean(completion.log_probabilities) for completion in answer.completions]
        texts = [completion.text for completion in answer.completions]
        assert len(set(texts)) == 4 and answer.choice.index == np.argmax(means)
        assert [message.content for message in answer.samples] == texts
        assert "".join(piece.text for piece in pieces) == answer.message.content == texts[np.argmax(means)]
        assert chat.messages[-1] is answer.message and answer.completion is not None
        assert texts[0] == fresh(model, tokenizer, chat.messages[:-1], **knobs), "sample 0 is that of one sample"
    assert answer.speed.reused_tokens >= len(prompt(tokenizer, chat.messages[:1])) - 1


def test_several_answers_vote_without_their_thinking(model, tokenizer) -> None:
    chat = Chat(model, tokenizer, samples=3, vote=True)
    logs = ([-0.1], [-2.0], [-3.0])
    made = [Completion("", [5], each, 1, "stop") for each in logs]
    messages = [
        Message("assistant", f"The answer is {n}.", thinking="It may be 7. The answer is 7.") for n in (1, 2, 2)
    ]
    assert chat._choose(made, messages).index == 1
    chat.vote = False
    assert chat._choose(made, messages).index == 0


def test_steps_are_asked_for_where_nothing_thinks(model, tokenizer) -> None:
    chat = Chat(model, tokenizer, think=True, **GREEDY)
    for text in ("Once upon a time", "a fox"):
        answer = chat.send(text)
        asked = [
            ask(f"{message.content}\n\nLet's think step by step.") if message.role == "user" else message
            for message in chat.messages[:-1]
        ]
        assert answer.content == fresh(model, tokenizer, asked, **GREEDY)
        assert chat.messages[-2] == ask(text)


def test_a_template_is_told_whether_to_think() -> None:
    words = ["<think>", "Hm.", "</think>", "Three."]
    tokenizer = tokenizer_with(HERMES, WORDS)
    chat = Chat(scripted(tokenizer, words), tokenizer, temperature=0)
    marks = [tokenizer.id_of("<think>"), tokenizer.id_of("</think>")]
    assert [index for index in chat._encode([ask("1 + 2?")]) if index in marks] == marks
    chat.think = True
    assert not [index for index in chat._encode([ask("1 + 2?")]) if index in marks]


# ---- Against transformers --------------------------------------------------------------------------------------------


@pytest.mark.extras
def test_turns_are_those_of_transformers(tokenizer, tmp_path) -> None:
    reason = "compares with Hugging Face transformers: install the extra: pip install -e '.[parity]'"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    sizes = {"vocab_size": tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **ids, initializer_range=0.2)).eval()
    theirs.save_pretrained(tmp_path)
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.model_bytes.decode()),
        eos_token="<|im_end|>",
        chat_template=CHATML,
    )
    words.save_pretrained(tmp_path)
    chat, said = Chat(*llamajax.load(tmp_path), **GREEDY), []
    for text in ("Once upon a time", "there was a fox", "a little café"):
        said.append({"role": "user", "content": text})
        given = words.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            made = theirs.generate(**given, do_sample=False, max_new_tokens=12)[0, given["input_ids"].shape[1] :]
        said.append({"role": "assistant", "content": words.decode(made, skip_special_tokens=True)})
        answer = chat.stream(text)
        list(answer)
        assert [message.as_dict() for message in chat.messages] == said
    assert answer.speed.reused_tokens > 20


def test_programs_are_made_while_weights_are_read(model, tokenizer) -> None:
    chat = Chat(llamajax.abstract_model(model.config), tokenizer, **GREEDY)
    chat.compile_while(lambda: model)
    answer = chat.stream("a fox")
    text = "".join(piece.text for piece in answer)
    assert text == fresh(model, tokenizer, [ask("a fox")], **GREEDY)
    assert answer.speed.compilations == answer.speed.loads == 0
