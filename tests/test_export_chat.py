"""Bundles of models that chat: the manifest's strings, golden conversations, and answers by runners without Jinja."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import export.bundle
import export.verification
import llamajax
from export.bundle import Bundle, open_bundle, seal, write
from export.conversations import Chat, chat_of
from export.profiles import PROFILES, Spec
from export.runners import runner
from export.targets import add_target
from export.verification import verify
from export.vocabulary import Vocabulary, vocabulary_of
from llamajax import Message, Template, Tokenizer
from llamajax.cli import main
from llamajax.errors import LlamaJaxError
from llamajax.words import AddedToken
from tests import conversations
from tests.chat_tokenizers import tokenizer_with
from tests.isolated import run_isolated
from tests.test_role_strings import GEMMA, LLAMA2, MISTRAL, R1, SMOLLM2

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TOGETHER = "expected --ids without --chat and --stop, --chat without --parse_special, --system with --chat"
LINES = ("What is <|im_end|> the capital?", "And of\tItaly?", "Once upon a time")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_with(SMOLLM2)


@pytest.fixture(scope="module")
def bundle(tiny_int4: llamajax.Llama, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    spec = Spec(slots=256, buckets=(16,), profile=PROFILES["unrolled"])
    return write(tiny_int4, tokenizer, tmp_path_factory.mktemp("chat") / "bundle", spec)


@pytest.fixture(scope="module")
def answered(tiny_int4: llamajax.Llama, tokenizer: Tokenizer) -> str:
    """The model's answers to the lines, by `generate` and the template, 12 tokens at most."""
    template, said, shown = Template.of(tokenizer), [], ""
    words = dataclasses.replace(tokenizer.words, stop_ids=template.stop_ids(tokenizer))
    ending = Tokenizer(tokenizer.model_bytes, words=words)
    for line in LINES:
        said.append(Message("user", line))
        ids = template.encode(tokenizer, said)
        made = llamajax.generate(tiny_int4, ending, ids, temperature=0, max_new_tokens=12)
        said.append(Message("assistant", made.text))
        shown += made.text + "\n"
    return shown


def check_answers(bundle: Bundle, answered: str, name: str, hidden: tuple[str, ...] = ()) -> str:
    arguments = ("--chat", "--temperature=0", "--max_new_tokens=12")
    done = run_isolated(bundle.path, *arguments, runner=name, hidden=hidden, said="\n\n".join(LINES))
    assert done.returncode == 0, done.stderr
    assert done.stdout == answered.replace("\r", "\n")  # as Python reads the output of a process
    return done.stderr


def test_the_manifest_has_the_strings_and_golden_conversations(bundle: Bundle, tokenizer: Tokenizer) -> None:
    end = [2, "\n", 1]
    assert bundle.manifest["chat"] == {
        "bos": [],
        "begin": [1, f"system\n{SYSTEM}", *end, "user\n"],
        "system": [1, "system\n"],
        "behind_system": [*end, "user\n"],
        "answer": [*end, "assistant\n"],
        "next": [*end, "user\n"],
        "reply": [*end, "assistant\n"],
        **{"trims_answers": False, "thinking_end": None, "thinking_blank": ""},
        **{"control": [], "stop": [0, 2]},
    }
    golden = bundle.manifest["golden"]["conversations"]
    assert len(golden) == 12
    spelt = [entry for entry in golden if any("<|im_end|>" in content for _, content in entry["messages"])]
    assert spelt
    for entry in golden:
        begun = entry["messages"] if entry["messages"][0][0] == "system" else [["system", SYSTEM], *entry["messages"]]
        ids = []
        for role, content in begun:
            ids += [1, *tokenizer.encode(f"{role}\n{content}"), 2, *tokenizer.encode("\n")]
        assert entry["ids"] == [*ids, 1, *tokenizer.encode("assistant\n")]


def test_jax_alone_answers_as_generate_and_template_do(bundle: Bundle, answered: str) -> None:
    notes = check_answers(bundle, answered, "run_jax.py").splitlines()
    read = [int(line.split(" tokens read")[0]) for line in notes if "tokens read" in line]
    whole = [entry["ids"] for entry in bundle.manifest["golden"]["conversations"] if len(entry["messages"]) == 1]
    assert len(read) == 3 and max(read[1:]) < min(map(len, whole)), notes  # later turns do not read known tokens again


@pytest.mark.extras
def test_onnx_runtime_answers_as_generate_and_template_do(bundle: Bundle, answered: str, tmp_path: Path) -> None:
    for module in ("onnx", "onnxruntime"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install {module}")
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    target = add_target(open_bundle(copy), "onnx")
    check_answers(target, answered, "run_onnx.py", hidden=("jax",))
    (result,) = verify(target, ["onnx"])
    assert result.held and result.conversations == 12, result


def test_runners_encode_the_golden_conversations(bundle: Bundle, tmp_path: Path) -> None:
    counts = runner.check_texts(runner.Bundle(str(bundle.path)))
    assert counts == {"texts": len(bundle.manifest["golden"]["texts"]), "conversations": 12}
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["golden"]["conversations"][1]["ids"][-1] += 1
    seal(copy, manifest)
    with pytest.raises(SystemExit, match=r"'Be brief\.'.* gives ids \[1, .*: expected \[1, "):
        runner.check_texts(runner.Bundle(str(copy)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reply": [1.5]}, "chat.reply"),
        ({"next": [-1]}, "chat.next"),
        ({"stop": ["x"]}, "chat.stop"),
        ({"extra": 1}, "chat: Additional properties are not allowed"),
    ],
)
def test_forged_strings(change: dict, message: str, bundle: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["chat"] |= change
    seal(copy, manifest)
    with pytest.raises(LlamaJaxError, match="the manifest is damaged, or forged") as error:
        open_bundle(copy)
    assert message in str(error.value)


def test_the_command_passes_everything_on(bundle: Bundle, capfd, monkeypatch) -> None:
    """`llamajax run` with a script in its place that prints its arguments."""
    script = "import json, sys; print(json.dumps(sys.argv[2:]))"
    monkeypatch.setattr(export.verification, "standalone_runner", lambda name: script)
    arguments = ["--system=Be brief.", "--top_k=5", "--top_p=0.5", "--stop=a", "--stop=b,c", "--seed=3", "--prompt=x y"]
    assert main(["run", str(bundle.path), "--chat", *arguments]) == 0
    passed = json.loads(capfd.readouterr().out)
    assert sorted(passed) == sorted([*arguments, "--chat", "--max_new_tokens=64", "--temperature=0.0"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--chat",), "no chat in this bundle"),
        (("--chat", "--ids=1"), TOGETHER),
        (("--stop=a", "--ids=1"), TOGETHER),
        (("--chat", "--parse_special"), TOGETHER),
        (("--system=x",), TOGETHER),
        (("--top_p=0",), "expected --top_k of 0 or more, --top_p above 0 and at most 1, --stop of a character or more"),
        (("--stop=",), "expected --top_k of 0 or more, --top_p above 0 and at most 1, --stop of a character or more"),
    ],
)
def test_what_runners_refuse(arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = Path(__file__).parent / "bundles" / "version1"
    monkeypatch.setattr("sys.argv", ["run_jax.py", str(old), *arguments])
    with pytest.raises(SystemExit) as ended:
        runner.main(lambda bundle: pytest.fail("nothing is loaded"), None)
    assert ended.value.code == message


def test_a_system_message_without_a_place(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["chat"] |= {"system": None, "behind_system": None}
    seal(copy, manifest)
    monkeypatch.setattr("sys.argv", ["run_jax.py", str(copy), "--chat", "--system=x"])
    with pytest.raises(SystemExit, match="--system: the chat template has no place for it"):
        runner.main(lambda bundle: pytest.fail("nothing is loaded"), None)


# ---- Templates that become strings -----------------------------------------------------------------------------------


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    words = dataclasses.replace(tokenizer.words, files={"chat_template.jinja": template.encode()})
    return Tokenizer(tokenizer.model_bytes, words=words)


def chat(tokenizer: Tokenizer, name: str | None = None) -> Chat:
    """Returns the chat section of a tokenizer; its vocabulary is made once for all templates."""
    key = (tokenizer.model_bytes, tokenizer.words.added)
    if key not in VOCABULARIES:
        VOCABULARIES[key] = vocabulary_of(tokenizer)
    return chat_of(tokenizer, VOCABULARIES[key], name, "x.gguf")


VOCABULARIES: dict[tuple, Vocabulary] = {}


def section(tokenizer: Tokenizer, name: str | None = None) -> SimpleNamespace:
    made = chat(tokenizer, name)
    assert made.section is not None, made.refusal
    return SimpleNamespace(**made.section, golden=made.golden)


def test_llama_2_with_sentencepiece(tiny_tokenizer: Tokenizer) -> None:
    tokenizer = with_template(tiny_tokenizer, LLAMA2)
    found = section(tokenizer)
    assert (found.begin, found.answer, found.next) == ([1, "[INST] "], [" [/INST] "], [" ", 2, 1, "[INST] "])
    assert (found.system, found.behind_system) == ([1, "[INST] <<SYS>>\n"], ["\n<</SYS>>\n\n"])
    assert found.trims_answers and found.stop[0] in (1, 2)
    assert section(tokenizer) == found  # the same each time


def test_a_built_in_format_by_name(tiny_tokenizer: Tokenizer) -> None:
    found, template = section(tiny_tokenizer, "llama2"), Template.of(tiny_tokenizer, name="llama2")
    assert found.bos == [1] and found.begin == ["[INST] "]
    assert found.golden[0]["ids"] == template.encode(
        tiny_tokenizer, [Message("user", "What is the capital of France?")]
    )
    with pytest.raises(LlamaJaxError, match="no chat template is called 'x'"):
        chat(tiny_tokenizer, "x")


def test_tokens_of_a_format_that_are_no_special_ones() -> None:
    """As in DeepSeek's format: any other text is read as these tokens, but a message is not."""
    texts = ("<s>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜end▁of▁sentence｜>", "<other>")
    added = [AddedToken(id=300 + i, text=text, special=text == "<s>") for i, text in enumerate(texts)]
    tokenizer = tokenizer_with(R1.replace("bos_token", "'<s>'"), added)
    found = section(tokenizer)
    assert (found.begin, found.reply) == ([300, 301], [302, 303, "\n"])
    assert set(found.control) == {301, 302, 303, 304, 305} and found.thinking_end == "</think>"
    assert tokenizer.encode("<｜User｜>") == [301]
    spelt = next(entry for entry in found.golden if "<｜User｜>" in entry["messages"][0][1])
    assert spelt["ids"].count(301) == sum(role == "user" for role, _ in spelt["messages"])


def test_a_format_without_a_place_for_a_system_message(tiny_tokenizer: Tokenizer) -> None:
    for template in (GEMMA, MISTRAL):
        found = section(with_template(tiny_tokenizer, template))
        assert found.system is None and all(messages["messages"][0][0] == "user" for messages in found.golden)


@pytest.mark.parametrize(
    ("template", "refusal"),
    [
        (None, "x.gguf: it carries no chat template"),
        (SMOLLM2 + "{{ strftime_now('%d') }}", "its chat template says the day's date: a built-in format may be named"),
        (SMOLLM2 + "{{ messages|length }}", "its chat template is not of the usual form: the text around a message"),
    ],
)
def test_why_a_bundle_has_no_chat_is_said(template: str | None, refusal: str) -> None:
    tokenizer = tokenizer_with(template)
    made = chat(tokenizer)
    assert (made.section, made.golden) == (None, []) and made.refusal.startswith(refusal)
    assert chat_of(None, None, None, "x.gguf").refusal == "it has no tokenizer"


def test_write_says_why_there_is_no_chat(tiny_int4: llamajax.Llama, tmp_path: Path, monkeypatch) -> None:
    def enough(*_) -> None:
        raise LlamaJaxError("enough")

    notes: list[str] = []
    monkeypatch.setattr(export.bundle, "lower", enough)
    with pytest.raises(LlamaJaxError, match="enough"):
        write(
            tiny_int4,
            tokenizer_with(None),
            tmp_path / "x",
            Spec(slots=96, buckets=(16,)),
            source="x.gguf",
            on_note=notes.append,
        )
    assert len(notes) == 1 and notes[0].startswith("no --chat in this bundle: x.gguf: it carries no chat template")


@pytest.mark.extras
@pytest.mark.parametrize("name", ["llama3", "llama3_1", "qwen3", "deepseek_r1_distill", "gemma3", "phi3", "llama3_2"])
def test_published_templates(name: str) -> None:
    """The templates are trl's copies; test_chat_template_parity.py compares their ids with transformers'."""
    found = importlib.util.find_spec("trl")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs trl's copies of published templates: pip install --no-deps trl")
    template = (Path(found.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text()
    made = chat(conversations.tokenizer_with(template))
    if name == "llama3_2":
        assert made.refusal.startswith("its chat template says the day's date")
        return
    assert made.section is not None, made.refusal
    assert made.section["system"] is not None and len(made.golden) == 12
    assert made.section["thinking_end"] == ("</think>" if name in ("qwen3", "deepseek_r1_distill") else None)
