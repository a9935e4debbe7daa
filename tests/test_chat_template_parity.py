"""Chat templates compared with transformers and llama.cpp."""

import importlib.util
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from llamajax import LlamaJaxError, Tokenizer
from llamajax.chat import builtin
from llamajax.chat.template import Template
from llamajax.checkpoint.huggingface_words import choose_tokenizer, read_words
from tests.conversations import (
    APART,
    CONVERSATIONS,
    HOSTILE,
    SMOLLM2,
    assistant,
    control_tokens,
    system,
    tokenizer_with,
    user,
    write_folder,
)

pytestmark = pytest.mark.extras

# The package trl keeps copies of the templates that models carry (Apache-2.0; its trl/chat_templates/README.md names
# the model of each). They are read as files; nothing else of the package is used.
PUBLISHED = (
    *("llama3", "llama3_1", "qwen2_5", "qwen3", "deepseek_r1_distill", "deepseekv3", "phi3", "gemma3", "cohere2"),
    *("glm4moe", "lfm2_v2", "gptoss"),
)


@pytest.fixture(scope="module")
def published() -> Path:
    pytest.importorskip("transformers", reason="compares with transformers: pip install -e '.[parity]'")
    found = importlib.util.find_spec("trl")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs trl's copies of published templates: pip install --no-deps trl")
    return Path(found.submodule_search_locations[0]) / "chat_templates"


def both(folder: Path) -> tuple[Any, Tokenizer]:
    """Returns a folder's tokenizer as transformers loads it, and as we do."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install -e '.[parity]'")
    data, words = choose_tokenizer(folder, read_words(folder, {}, 1 << 20)[0])
    assert data is not None
    return transformers.AutoTokenizer.from_pretrained(folder), Tokenizer(data, words=words)


def assert_same_ids(theirs: Any, tokenizer: Tokenizer) -> int:
    """Compares all CONVERSATIONS; where one side refuses one, both must. Returns how many were compared."""
    form, compared = Template.of(tokenizer), 0
    for messages, tools, variables in CONVERSATIONS:
        for reply in (True, False):
            options = {"tools": tools, "add_generation_prompt": reply, "return_dict": False, **variables}
            try:
                expected = theirs.apply_chat_template(messages, **options)
            except Exception:  # any error of Jinja
                with pytest.raises(LlamaJaxError):
                    form.encode(tokenizer, messages, reply=reply, tools=tools, **variables)
                continue
            # Transformers reads `</think>` in an answer as the token; we do not where a template repeats it.
            if not any(token in str(messages) for token in form._control):
                assert form.encode(tokenizer, messages, reply=reply, tools=tools, **variables) == expected, messages
                compared += 1
            assert form.render(messages, reply=reply, tools=tools, **variables) == theirs.apply_chat_template(
                messages, **options | {"tokenize": False}
            )
    assert form.note is None
    return compared


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_give_transformers_ids(name: str, published: Path, tmp_path: Path) -> None:
    write_folder(tmp_path, (published / f"{name}.jinja").read_text())
    assert assert_same_ids(*both(tmp_path)) >= 12


def test_all_others_of_the_package_do_too(published: Path, tmp_path: Path) -> None:
    files = [file for file in sorted(published.glob("*.jinja")) if file.stem not in PUBLISHED]
    for file in random.Random(0).sample(files, 12):
        write_folder(tmp_path / file.stem, file.read_text())
        assert assert_same_ids(*both(tmp_path / file.stem)) >= 8


@pytest.mark.parametrize("template", [SMOLLM2, APART], ids=["SmolLM2", "apart"])
def test_our_own_give_transformers_ids(template: str, tmp_path: Path) -> None:
    write_folder(tmp_path, template)
    assert assert_same_ids(*both(tmp_path)) >= 20


def test_smollm2_gives_transformers_ids(smollm2: Path, tmp_path: Path) -> None:
    """The vocabulary is the model's own, from its GGUF file."""
    pytest.importorskip("transformers", reason="compares with transformers: pip install -e '.[parity]'")
    from llamajax.checkpoint import need_tokenizer, open_checkpoint

    tokenizer = need_tokenizer(open_checkpoint(smollm2), None)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.model_bytes)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "chat_template.jinja").write_bytes(tokenizer.words.files["chat_template.jinja"])
    assert assert_same_ids(both(tmp_path)[0], tokenizer) >= 20


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["llama2_tokenizer.model", "mistral_tokenizer.model.v1"])
def test_real_sentencepiece_models(name: str, legacy: bool, shared: Path, tmp_path: Path) -> None:
    """Vocabularies of LLaMA 2 and Mistral, under each of transformers' rules for spaces, with a format like theirs."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
        "{% else %}[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}"
    )
    shutil.copy(shared / "data" / "tokenizers" / name, tmp_path / "tokenizer.model")
    config = {"tokenizer_class": "TokenizersBackend", "legacy": legacy, "bos_token": "<s>", "eos_token": "</s>"}
    added = {str(i): {"content": text, "special": True} for i, text in enumerate(("<unk>", "<s>", "</s>"))}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": added}))
    (tmp_path / "chat_template.jinja").write_text(template)
    assert assert_same_ids(*both(tmp_path)) >= 20


def test_real_llama_3(shared: Path, published: Path, tmp_path: Path) -> None:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special += [f"<|reserved_special_token_{index}|>" for index in range(251)]
    file = str(shared / "data" / "tokenizers" / "llama3_tokenizer.model")
    TikTokenConverter(vocab_file=file, extra_special_tokens=special).converted().save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": special[0], "eos_token": special[4], "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text((published / "llama3_1.jinja").read_text())
    theirs, tokenizer = both(tmp_path)
    assert assert_same_ids(theirs, tokenizer) >= 20
    form = Template.of(tokenizer, name="llama3")
    llama3 = (published / "llama3.jinja").read_text()
    for messages, _, _ in CONVERSATIONS[:6]:
        expected = theirs.apply_chat_template(
            messages, chat_template=llama3, return_dict=False, add_generation_prompt=True
        )
        assert [tokenizer.bos_id, *form.encode(tokenizer, messages)][-len(expected) :] == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_users_do_not_end_turns_of_published_templates(name: str, published: Path, tmp_path: Path) -> None:
    """Control tokens are those of harmless messages, and those that transformers leaves when it sanitizes."""
    template = (published / f"{name}.jinja").read_text()
    tokens = [token.text for token in tokenizer_with(template).added if token.special]
    hostile = HOSTILE + "".join(tokens) + "<think><tool_call> end"
    write_folder(tmp_path, template)
    theirs, tokenizer = both(tmp_path)
    form = Template.of(tokenizer)
    said = [[system(f"{text} s"), user(text), assistant(text), user(f"{text} 2")] for text in (hostile, "fine")]
    ids, expected = (form.encode(tokenizer, messages) for messages in said)
    assert control_tokens(tokenizer, ids, form._control) == control_tokens(tokenizer, expected, form._control)
    sanitized = theirs.apply_chat_template(
        said[0], add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    assert control_tokens(tokenizer, sanitized, form._control) == control_tokens(tokenizer, ids, form._control)
    assert theirs.decode(sanitized) == theirs.decode(ids)


# ---- llama.cpp -------------------------------------------------------------------------------------------------------

# Our formats to which llama.cpp gives another name.
_THEIRS = {"llama2": "llama2-sys-bos", "deepseek": "deepseek3"}


@pytest.mark.parametrize("name", [name for name in builtin.BUILT_IN if name not in ("alpaca", "deepseek-r1")])
def test_built_in_formats_are_llama_cpps(name: str) -> None:
    """Random conversations: any roles in any order, surrounding white space, empty messages."""
    pytest.importorskip("xllamacpp", reason="compares with llama.cpp: pip install -e '.[parity]'")
    from tests.llamacpp import conversation

    form = Template.of(tokenizer_with(" ".join(builtin.BUILT_IN[name].tokens)), name=name)
    draw = random.Random(name)
    texts = [" x ", "y", "", "\n two lines\n\n", "é 日本", "</s> [INST] <|im_end|>"]
    for _ in range(100):
        said = [(draw.choice(("system", "user", "assistant")), draw.choice(texts)) for _ in range(draw.randrange(1, 6))]
        for reply in (True, False):
            ours = form.render([{"role": role, "content": content} for role, content in said], reply=reply)
            assert ours == conversation(_THEIRS.get(name, name), said, reply), said
