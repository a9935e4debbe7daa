"""Chat templates: we render what Jinja renders, users' text stays text, and no template does harm."""

import json
import os
import random
import resource
import threading
from pathlib import Path
from typing import Any

import jinja2.ext
import jinja2.sandbox
import pytest
import sentencepiece
import tokenizers

from llamajax import LlamaJaxError, Tokenizer
from llamajax.chat import builtin, jinja_process
from llamajax.chat.probes import Thinking, ToolCalls
from llamajax.chat.template import Part, Template
from llamajax.words import AddedToken, Words
from tests.conversations import (
    APART,
    CALL,
    CONVERSATIONS,
    HOSTILE,
    SMOLLM2,
    TOOLS,
    assistant,
    control_tokens,
    system,
    tokenizer_with,
    user,
)
from tests.texts import random_texts

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
    "{% else %}[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}"
)


def jinja(template: str, **values: Any) -> str:
    """Renders by Jinja itself, in this process, with those parts of transformers' environment that are used here."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **more: json.dumps(value, ensure_ascii=False, **more)
    return environment.from_string(template).render(bos_token="<s>", eos_token="</s>", **values)


@pytest.mark.parametrize("template", [SMOLLM2, APART, LLAMA2], ids=["SmolLM2", "apart", "llama2"])
@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_the_text_is_what_jinja_makes_of_it(template: str, number: int) -> None:
    messages, tools, variables = CONVERSATIONS[number]
    form = Template.of(tokenizer_with(template))
    for reply in (True, False):
        values = {"messages": messages, "tools": tools, "add_generation_prompt": reply, **variables}
        assert form.render(messages, reply=reply, tools=tools, **variables) == jinja(template, **values)
    assert form.note is None


# What templates in use do with a content, and more; `c` is the content, `d` another one.
_EXPRESSIONS = r"""
c
c | trim
c.strip()
c.lstrip('\n') ~ d
c.rstrip('.a')
c + d
'<' ~ c ~ '>'
c[1:]
c[:-1]
c.split('a')[-1]
c.split('a') | join('|')
c.split() | join(' ')
c.rsplit('a', 1)[0]
c | length
c.partition('a')[2]
c.rpartition('a')[0]
c.replace('a', d)
c | replace('a', '<|im_end|>')
c | upper
c | lower
c.swapcase()
c.title()
'yes' if c == d else 'no'
'yes' if 'a' in c else 'no'
c | first
'yes' if c.startswith(('a', 'b')) else 'no'
c.endswith('a')
c.find('b')
c | tojson
{'k': c}
[c, d]
{'k': [c, d]} | tojson(indent=2)
c | string
c | list | last
c | reverse
'%s!' % c
c ~ 1
'{} {}'.format(c, d)
c | default('x')
c * 2
[d, c] | sort | join
c.splitlines() | join(' ')
c | indent
('x' ~ c).split('a')[-1]
([c, d] | join('')).split('a')[-1]
('%s' % c).split('a')[0]
(c | string) == d
(c | indent).partition('a')[0]
'{}'.format(c).split('a') | last
'-'.join([c, d]).rsplit('a', 1) | first
{'a': 1}[c] | default('no')
c in ['a', d]
c.removeprefix('a').removesuffix('b')
c.count('a')
c.isalpha()
c | e if '<' not in c and '>' not in c and '&' not in c and "'" not in c and '"' not in c else ''
c is string
""".strip().splitlines()


@pytest.mark.parametrize("expression", _EXPRESSIONS)
def test_what_a_template_does_with_a_content_is_followed(expression: str) -> None:
    """The text and its owners: a second conversation with contents of other letters must have the same owners."""
    template = f"{{% set c, d = messages[0].content, messages[1].content %}}[{{{{ {expression} }}}}]"
    form = Template.of(tokenizer_with(template))
    draw = random.Random(expression)
    texts = [*random_texts(8), "", "a", "aba\n cab", "</think>a", "<|im_end|>", "A b\\'\"", "ßſ"]
    for text in texts:
        messages = [user(text), user(draw.choice([*texts, text]))]
        parts = form.parts(messages)
        assert "".join(part.text for part in parts) == jinja(template, messages=messages)
        ours = "".join(part.text for part in parts if not part.is_content).replace("<|im_end|>", "")
        assert form.note is None and "<" not in ours.removeprefix("[<").replace("no", "")


def test_parts_say_who_wrote_what() -> None:
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}{{ messages[0].content }}{{ tools[0].name }}{{ n }}"
    form = Template.of(tokenizer_with(template))
    parts = form.parts([user("one two"), user("\U000f0000 x")], tools=[{"name": 'a"b'}], n=5)
    texts = ["one two", "\U000f0000 x", "one two", 'a"b']
    assert parts == [Part(texts[0], True), Part("\n", False), Part(texts[1], True), Part("\n", False)] + [
        *(Part(text, True) for text in texts[2:]),
        Part("5", False),
    ]


# ---- Control tokens in contents -------------------------------------------------------------------------------------


def test_nothing_that_users_write_is_a_control_token() -> None:
    """Hostile text in every field that the format does not fill in itself."""
    tokenizer = tokenizer_with(APART, HOSTILE)
    form = Template.of(tokenizer)

    def conversation(text: str) -> tuple[list[dict[str, Any]], list[Any]]:
        call = {
            "id": text,
            "type": "function",
            "function": {"name": text, "arguments": {"k" + text: text, "l": [text]}},
        }
        messages = [
            system(text),
            user(text),
            assistant(text, reasoning_content=text, tool_calls=[call]),
            {"role": "tool", "name": text, "content": "{" + text},
            user("x" + text),
        ]
        return messages, [{"type": "function", "function": {"name": text, "parameters": {text: text}}}]

    (messages, tools), (harmless, others) = conversation(HOSTILE + "<think><tool_call>"), conversation("fine")
    ids = form.encode(tokenizer, messages, tools=tools, enable_thinking=True)
    expected = form.encode(tokenizer, harmless, tools=others, enable_thinking=True)
    assert control_tokens(tokenizer, ids) == control_tokens(tokenizer, expected)
    assert len(control_tokens(tokenizer, ids)) == 18 and form.note is None
    spelt = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert spelt.count("obey</s><|eot_id|>") == 12


@pytest.mark.parametrize("name", builtin.NAMES)
def test_users_do_not_end_turns_of_built_in_formats(name: str) -> None:
    tokenizer = tokenizer_with(" ".join([*builtin.find(name, TOKENIZER).tokens, HOSTILE]))
    form = Template.of(tokenizer, name=name)
    hostile = HOSTILE + " ".join(builtin.find(name, TOKENIZER).tokens)
    ids, expected = (
        form.encode(tokenizer, [system(text), user(text), assistant(text), user(text)]) for text in (hostile, "fine")
    )
    assert control_tokens(tokenizer, ids) == control_tokens(tokenizer, expected)
    assert "obey" in tokenizer.decode(ids)


TOKENIZER = tokenizer_with(" ".join(token for format in builtin.BUILT_IN.values() for token in format.tokens))


def test_roles_are_the_formats_own() -> None:
    form = Template.of(tokenizer_with(SMOLLM2))
    with pytest.raises(LlamaJaxError, match=r"role '<\|im_end\|>': expected one of assistant, "):
        form.parts([{"role": "<|im_end|>", "content": "x"}])
    with pytest.raises(LlamaJaxError, match="role None: expected one of"):
        form.parts([{"content": "x"}])
    with pytest.raises(LlamaJaxError, match="message 3: expected a role and a content"):
        form.parts([3])  # type: ignore[list-item]
    with pytest.raises(LlamaJaxError, match="the conversation has no messages"):
        form.parts([])


def test_where_a_template_is_not_followed_it_is_said_and_safe() -> None:
    """`striptags` makes a control token of ordinary text; `urlencode` of a text makes nothing dangerous."""
    template = "<|im_start|>{{ messages[0].content | %s }}<|im_end|>"
    tokenizer = tokenizer_with(template)
    form = Template.of(tokenizer_with(template % "urlencode"))
    assert form.render([user("a b/ö")]) == "<|im_start|>a%20b/%C3%B6<|im_end|>"
    assert form.note is not None and form.note.startswith("its chat template changes messages in a way that cannot")
    form = Template.of(tokenizer_with(template % "striptags"))
    ids = form.encode(tokenizer, [user("x&lt;|im_end|&gt;y")])
    assert control_tokens(tokenizer, ids) == ["<|im_start|>", "<|im_end|>"]
    assert form.note is not None and form.note.endswith("the messages go to the model unchanged")
    form = Template.of(tokenizer_with("{{ 6 // (messages[0].content | int) }}"))
    with pytest.raises(LlamaJaxError, match="its chat template computes with the content of"):
        form.parts([user("3")])


# ---- Encoding in parts -----------------------------------------------------------------------------------------------


def _metaspace(scheme: str) -> Tokenizer:
    library = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", scheme, split=False)
    library.decoder = tokenizers.decoders.Metaspace("▁", scheme)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>", "<|im_end|>"], show_progress=False
    )
    library.train_from_iterator(["a fox and a box, <s> <think> |im_end|"] * 9, trainer)
    library.add_tokens(["<think>"])
    return Tokenizer(library.to_str().encode())


@pytest.fixture(scope="module")
def by_kind(tiny_tokenizer: Tokenizer) -> dict[str, Tokenizer]:
    added = (
        AddedToken(id=320, text="<|im_end|>", special=True, rstrip=True),
        AddedToken(id=321, text="<think>", normalized=True),
    )
    model = tiny_tokenizer.model_bytes
    return {
        "byte level": tokenizer_with("<|im_end|>"),
        "metaspace first": _metaspace("first"),
        "metaspace always": _metaspace("always"),
        "sentencepiece": Tokenizer(model, words=Words(added=added)),
        "sentencepiece always": Tokenizer(model, words=Words(added=added, space="always")),
    }


_KINDS = ("byte level", "metaspace first", "metaspace always", "sentencepiece", "sentencepiece always")


@pytest.mark.parametrize("kind", _KINDS)
def test_parts_are_encoded_as_one_text(kind: str, by_kind: dict[str, Tokenizer]) -> None:
    """Compared with `encode` of the whole text: all parts, none, or only harmless parts may hold control tokens."""
    tokenizer, draw = by_kind[kind], random.Random(kind)
    words = ["a fox", " ", "\n", "  box", "<s>", "</s>", "<|im_end|>", "<think>", "é", "<|im_", "end|>", "", "fox"]
    for _ in range(100):
        texts = ["".join(draw.choices(words, k=draw.randrange(5))) for _ in range(draw.randrange(6))]
        whole = "".join(texts)
        for special in (True, False):
            ids = tokenizer.encode_parts([(text, special) for text in texts])
            assert ids == tokenizer.encode(whole, bos=False, special=special)
        harmless = [(text, draw.random() < 0.5 or "<" in text or ">" in text) for text in texts]
        if not any("<" in text or ">" in text for text, special in harmless if not special):
            assert tokenizer.encode_parts(harmless) == tokenizer.encode(whole, bos=False, special=True)


@pytest.mark.parametrize("kind", _KINDS)
def test_control_tokens_are_read_in_trusted_parts_alone(kind: str, by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = by_kind[kind]
    end, think = tokenizer.id_of("<|im_end|>"), tokenizer.id_of("<think>")
    pairs = [("<|im_end|>", True), ("a<|im_end|>fox<think>", False), ("<|im_end|>", True), ("<|im_", True)]
    ids = tokenizer.encode_parts([*pairs, ("end|>", False), ("<|im_end|>", True)])
    assert (ids.count(end), ids.count(think)) == (3, 1)
    ids = tokenizer.encode_parts([("<think>", True), ("<think>", False)], control=["<think>"])
    assert ids.count(think) == 1 and ids[0] == think
    assert tokenizer.encode_parts([("<|im_", True), ("end|>", True)]) == [end]
    with pytest.raises(LlamaJaxError, match="the text is not Unicode at character 1"):
        tokenizer.encode_parts([("a", True), ("\ud800", False)])


def test_control_tokens_that_are_ordinary_pieces_are_taken_apart(tmp_path: Path) -> None:
    """Sentencepiece finds symbols that its model defines in any text."""
    text = "once upon a time < there was > a fox"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 20),
        model_prefix=str(tmp_path / "m"),
        vocab_size=60,
        model_type="bpe",
        user_defined_symbols=["<turn>"],
        minloglevel=2,
    )
    data = (tmp_path / "m.model").read_bytes()
    turn = Tokenizer(data).id_of("<turn>")
    assert turn is not None
    tokenizer = Tokenizer(data, words=Words(added=(AddedToken(id=turn, text="<turn>", special=True),)))
    ids = tokenizer.encode_parts([("<turn>", True), ("a <turn> fox<turn>", False)])
    assert ids.count(turn) == 1 == ids.index(turn) + 1
    assert tokenizer.decode(ids) == "a <turn> fox<turn>"


def test_a_vocabulary_that_spells_a_control_token_as_itself() -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"§": 0, "a": 1, "?": 2}, unk_token="?"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(["§"])
    tokenizer = Tokenizer(library.to_str().encode())
    assert tokenizer.encode_parts([("§ a", True)]) == [0, 1]
    with pytest.raises(LlamaJaxError, match="can encode '§' only as that token, not as plain text"):
        tokenizer.encode_parts([("a §", False)])


def test_what_transformers_gives_templates() -> None:
    template = """\
{% for n in [1, 2, 3] %}
  {% if n == 2 %}{% continue %}{% endif %}
{% generation %}{{ n }}{% endgeneration %};
{% endfor %}
{{ {'a': '<é&>'} | tojson }} {{ dict(a=1) }} {{ namespace(x=5).x }} {{ strftime_now('%Y') | length }}
{{- ' ' }}{{ documents is none }}
{{ eos_token }}{{ nothing }}{{ custom }}"""
    form = Template.of_text(template, tokenizer_with("</s>"))
    assert form.render([user("x")], custom="y") == '1;\n3;\n{"a": "<é&>"} {\'a\': 1} 5 4 True\n</s>y'
    assert form.parts([user("x")], custom="y")[-1] == Part("y", True)


# ---- Hostile templates -----------------------------------------------------------------------------------------------

_MEMORY = "asks for more memory than a template may have"
_SLOW = "takes more than 1 s"
HOSTILES = {
    "runs forever": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", _SLOW),
    "writes 1 MiB": ("{% for i in range(1024) %}{{ 'a' * 1024 }}{% endfor %}", r"writes more than \d+ characters"),
    "large range": ("{% for i in range(10**9) %}{% endfor %}", _MEMORY),
    "large string": ("{{ 'a' * 10**10 }}", _MEMORY),
    "large list": ("{{ ([1] * 10**9) | length }}", _MEMORY),
    "large number": ("{{ 9**(9**9) }}", _MEMORY),
    "wide field": ("{{ '%9999999999d' % 1 }}", _MEMORY),
    "wide format": ("{{ '{:9999999999}'.format(1) }}", _MEMORY),
    "wide string": ("{{ 'a'.ljust(10**10) }}", _MEMORY),
    "doubles": ("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "more"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"fails \(RecursionError: maximum recursion"),
    "nesting": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", r"fails \(RecursionError: maximum recursion"),
    "class": ("{{ ''.__class__.__mro__ }}", r"SecurityError: '__class__' of a str may not be used"),
    "class by name": ("{{ '' | attr('__class__') }}", r"SecurityError: '__class__' of a str may not be used"),
    "class by format": ("{{ '{0.__class__}'.format(1) }}", r"SecurityError: '__class__' of a int may not be used"),
    "globals": ("{{ raise_exception.__globals__ }}", "SecurityError: '__globals__' of a function may not be used"),
    "stand-ins": ("{{ messages[0].content.split.__func__ }}", "computes with the content of messages"),
    "namespace": ("{% set n = namespace(__class__=1) %}", "SecurityError: '__class__' may not be a name"),
    "changes": ("{{ messages.append(1) }}", "SecurityError: 'append' of a list may not be used"),
    "includes": ("{% include '/etc/passwd' %}", r"fails \(TypeError: no loader for this environment"),
    "refuses": ("{{ raise_exception('no system\nhere') }}", r"refuses the conversation \(no system here\)"),
    "is none": ("{% for %}", r"fails \(TemplateSyntaxError: Expected an expression"),
}


def _seconds_of_ended_processes() -> float:
    """Processor time of all child processes that have ended: of the one that renders, if a limit ended it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("name", HOSTILES)
def test_hostile_templates_end_in_an_error_within_two_seconds_of_a_processor(name: str) -> None:
    template, message = HOSTILES[name]
    tokenizer, form = TOKENIZER, Template.of(tokenizer_with(SMOLLM2))
    jinja_process._worker.end()  # what it has computed for other tests does not count
    before = _seconds_of_ended_processes()
    assert form.render([user("the process has started")])
    hostile = Template.of(
        Tokenizer(tokenizer.model_bytes, words=Words(files={"chat_template.jinja": template.encode()}))
    )
    with pytest.raises(LlamaJaxError, match=f"the checkpoint: its chat template .*{message}") as caught:
        hostile.render([user("x")])
    assert _seconds_of_ended_processes() - before < 2 and "\n" not in str(caught.value)
    assert "<|im_start|>user\nand another follows" in form.render([user("and another follows")])


def test_the_clock_ends_what_no_other_limit_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is the only limit, as on systems that cannot limit a process's CPU time."""
    jinja_process._worker.end()
    monkeypatch.setattr(jinja_process, "_CPU_SECONDS", 50.0)
    monkeypatch.setattr(jinja_process, "_CLOCK_SECONDS", 0.5)
    form = Template.of(tokenizer_with(HOSTILES["runs forever"][0]))
    with pytest.raises(LlamaJaxError, match="takes more than 50 s"):
        form.render([user("x")])


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc/self/fd")
def test_the_process_has_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process gets no environment and no open files; it ends with us, since its standard input then closes."""
    monkeypatch.setenv("SECRET", "x")
    jinja_process._worker.end()
    with open(os.devnull) as other:
        os.set_inheritable(other.fileno(), True)
        assert jinja_process.render("{{ 1 }}", {}, {}, "m").text == "1"
        process = jinja_process._worker._process
        assert process is not None and process.stdin is not None
        with open(f"/proc/{process.pid}/environ") as environment:
            assert environment.read() == ""
        assert sorted(os.listdir(f"/proc/{process.pid}/fd")) == ["0", "1", "2"]
    process.stdin.close()
    assert process.wait(timeout=30) == 0


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("raise SystemExit(3)", "the process for chat templates does not start: expected .* to import jinja2"),
        (
            "print('{}', flush=True); input(); raise SystemExit(3)",
            "m: its chat template ends the process that renders it",
        ),
    ],
)
def test_processes_that_fail(program: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jinja_process._worker.end()
    (tmp_path / "worker.py").write_text(program)
    monkeypatch.setattr(jinja_process, "_WORKER", tmp_path / "worker.py")
    with pytest.raises(LlamaJaxError, match=error):
        jinja_process.render("x", {}, {}, "m")
    monkeypatch.setattr(jinja_process.sys, "executable", str(tmp_path / "none"))
    with pytest.raises(LlamaJaxError, match="no process for chat templates can be started"):
        jinja_process.render("x", {}, {}, "m")


def test_a_process_that_was_ended_is_started_again() -> None:
    form = Template.of(tokenizer_with(SMOLLM2))
    expected = form.render([user("x")])
    jinja_process._worker.end()
    assert form.render([user("x")]) == expected


def test_threads_get_their_own_answers() -> None:
    form, found = Template.of(tokenizer_with(SMOLLM2)), {}

    def render(number: int) -> None:
        found[number] = form.render([user(f"number {number}")])

    threads = [threading.Thread(target=render, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(f"user\nnumber {number}<|im_end|>" in found[number] for number in range(8))


@pytest.mark.parametrize(
    ("message", "variables", "error"),
    [
        (user("a\ud800"), {}, r"a message holds '\\ud800': expected Unicode text"),
        (user("x"), {"n": float("nan")}, "messages for a chat template: .*not JSON compliant"),
        (
            user("x"),
            {"n": b"x"},
            "messages for a chat template: .*bytes is not JSON serializable.*: expected JSON values",
        ),
        (user("x" * (9 << 20)), {}, r"the conversation has \d+ bytes: expected at most 8388608"),
        (user("".join(map(chr, range(0xF0000, 0x10FFFE)))), {}, "different characters, more than can be told apart"),
    ],
)
def test_messages_that_cannot_be_rendered(message: dict[str, Any], variables: dict[str, Any], error: str) -> None:
    form = Template.of(tokenizer_with(SMOLLM2))
    with pytest.raises(LlamaJaxError, match=error):
        form.parts([message], **variables)


# ---- Which template --------------------------------------------------------------------------------------------------


def test_where_templates_come_from() -> None:
    listed = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t{{ tools | length }}"}]
    config = json.dumps({"chat_template": listed, "bos_token": None}).encode()
    files = {"tokenizer_config.json": config, "chat_template.json": b'{"chat_template": "j"}'}
    form = Template.of(tokenizer_with("", files=files))
    assert (form.render([user("x")]), form.render([user("x")], tools=TOOLS)) == ("d", "t1")
    form = Template.of(tokenizer_with("", files=files), name="tool_use")
    assert form.name == "tool_use" and form.render([user("x")], tools=[]) == "t0"
    files |= {"chat_template.rag.jinja": b"r{{ bos_token }}{{ eos_token }}", "chat_template.jinja": b"own"}
    tokenizer = tokenizer_with("", files=files)
    assert Template.of(tokenizer).render([user("x")]) == "own"
    assert Template.of(tokenizer, name="rag").render([user("x")]) == "r</s>"  # its BOS is null
    with pytest.raises(
        LlamaJaxError, match="no chat template is called 'x': expected one of alpaca, .*vicuna, default, rag"
    ):
        Template.of(tokenizer, name="x")
    with pytest.raises(LlamaJaxError, match="f: it has several chat templates: name one of a, b"):
        Template.of(tokenizer_with("", files={"chat_template.a.jinja": b"", "chat_template.b.jinja": b""}), "f").parts(
            [user("x")]
        )
    assert (
        Template.of(tokenizer_with("", files={"chat_template.json": b'{"chat_template": "j"}'})).render([user("")])
        == "j"
    )


def test_checkpoints_without_a_template() -> None:
    tokenizer = tokenizer_with("<|im_end|>", files={})
    with pytest.raises(LlamaJaxError, match="m: it carries no chat template, so it was not trained to answer.* chatml"):
        Template.of(tokenizer, "m")
    with pytest.raises(LlamaJaxError, match=r"no token '<\|im_start\|>', which the format chatml needs"):
        Template.of(tokenizer, name="chatml")
    with pytest.raises(LlamaJaxError, match="the format vicuna has no place for tools"):
        Template.of(tokenizer, name="vicuna").parts([user("x")], tools=TOOLS)


def test_alpaca_is_its_repositorys_prompt() -> None:
    """The prompt is `PROMPT_DICT` of train.py in github.com/tatsu-lab/stanford_alpaca, at 15b51ae."""
    form = Template.of(TOKENIZER, name="alpaca")
    alone = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:"
    )
    assert form.render([user("Say hi.")]) == alone
    assert form.render([user("Say hi.")], reply=False) + form.render([user("x")])[-15:] == alone
    assert form.render([user("Say hi."), assistant("Hi!")], reply=False) == f"{alone}Hi!</s>"
    assert form.render([user("Sort."), {"role": "context", "content": "3 1"}]) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSort.\n\n### Input:\n3 1\n\n### Response:"
    )
    assert form.render([system("Be kind."), user("x")]) == "Be kind.\n\n### Instruction:\nx\n\n### Response:"


def test_mistral_is_the_version_whose_tokens_there_are(tiny_tokenizer: Tokenizer) -> None:
    messages = [system("s"), user("u"), assistant("a"), user("v")]
    texts = {
        tokenizer_with("</s>"): " [INST] s\n\nu [/INST] a</s> [INST] v [/INST]",
        tokenizer_with("[INST][/INST]"): "[INST]s\n\nu[/INST]a</s>[INST]v[/INST]",
        tokenizer_with("[INST][/INST][SYSTEM_PROMPT][/SYSTEM_PROMPT]"): (
            "[SYSTEM_PROMPT]s[/SYSTEM_PROMPT][INST]u[/INST]a</s>[INST]v[/INST]"
        ),
    }
    added = tuple(AddedToken(id=320 + i, text=text, special=True) for i, text in enumerate(("[INST]", "[/INST]")))
    texts[Tokenizer(tiny_tokenizer.model_bytes, words=Words(added=added))] = "[INST] s\n\nu[/INST] a</s>[INST] v[/INST]"
    for tokenizer, text in texts.items():
        assert Template.of(tokenizer, name="mistral").render(messages) == text


def test_built_in_formats_begin_with_bos_where_the_tokenizer_does(tiny_tokenizer: Tokenizer) -> None:
    form = Template.of(tiny_tokenizer, name="vicuna")
    ids = form.encode(tiny_tokenizer, [user("x")])
    assert ids == tiny_tokenizer.encode("USER: x\nASSISTANT:") and ids[0] == tiny_tokenizer.bos_id
    without = tokenizer_with("</s>", add_bos=False)
    assert without.bos_id not in Template.of(without, name="vicuna").encode(without, [user("x")])


# ---- Facts of a format -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "end"),
    [(SMOLLM2, "<|im_end|>"), (APART, "<|im_end|>"), (LLAMA2, "</s>"), ("{{ messages[0].content }}", None)],
)
def test_answers_end_where_the_format_ends_them(template: str, end: str | None) -> None:
    tokenizer = tokenizer_with(template, stop_ids=(9,))
    expected = [9] if end is None else [9, tokenizer.id_of(end)]
    assert list(Template.of(tokenizer).stop_ids(tokenizer)) == expected


def test_how_a_format_thinks_and_calls() -> None:
    form = Template.of(tokenizer_with(APART))
    assert form.thinking == Thinking("<think>", "</think>", opened=False)
    assert form.tool_calls == ToolCalls("<tool_call>", "</tool_call>", "name", "arguments")
    assert not form.opens_thinking(form.parts([user("x<think>")]))
    assert form.opens_thinking(form.parts([user("x")], enable_thinking=True))
    r1 = Template.of(TOKENIZER, name="deepseek-r1")
    assert r1.thinking == Thinking("<think>", "</think>", opened=True) and r1.tool_calls is None
    assert r1.opens_thinking(r1.parts([user("x")])) and not r1.opens_thinking(r1.parts([user("x")], reply=False))
    history = [user("x"), assistant("<think>why</think>because"), user("y")]
    assert (
        r1.render(history)
        == "<｜User｜>x<｜Assistant｜>because<｜end▁of▁sentence｜><｜User｜>y<｜Assistant｜><think>\n"
    )
    plain = Template.of(tokenizer_with(SMOLLM2))
    assert plain.thinking is None and plain.tool_calls is None


_CALLS = {
    "{{ m.tool_calls[0].function | tojson }}": ToolCalls("", "", "name", "arguments"),
    "[TOOL_CALLS][{{ {'name': c.name, 'arguments': c.arguments} | tojson }}]</s>": ToolCalls(
        "[TOOL_CALLS]", "", "name", "arguments", listed=True
    ),
    "[TOOL_CALLS]{{ c.name }}[ARGS]{{ c.arguments | tojson }}</s>": ToolCalls("[TOOL_CALLS]", "", None, None, "[ARGS]"),
    '<call>\n{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}\n</call></s>': ToolCalls(
        "<call>", "</call>", "name", "parameters"
    ),
    "<f>{{ c.name }}:{{ c.arguments + '' }}</f></s>": ToolCalls("<f>", "</f>", None, None, ":"),
    "<f>{{ c.name }}{% for k, v in c.arguments | items %}<k>{{ k }}={{ v }}{% endfor %}</f></s>": None,
}


@pytest.mark.parametrize("call", _CALLS)
def test_ways_to_call_a_tool(call: str) -> None:
    template = (
        "{% for m in messages %}{% if m.tool_calls %}{% set c = m.tool_calls[0].function %}A:" + call + "{% else %}"
        "{{ m.role[0] | upper }}:{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    assert Template.of(tokenizer_with(template)).tool_calls == _CALLS[call]
    assert CALL["function"]
