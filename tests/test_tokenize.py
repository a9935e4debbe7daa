"""`llamajax tokenize`, and special tokens in a prompt of `llamajax generate`."""

import io
import json
import sys
from pathlib import Path

import pytest

import llamajax
from llamajax.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    path = tmp_path_factory.mktemp("tokenize") / "model"
    llamajax.save_checkpoint(tiny_model, path, tokenizer=tiny_tokenizer)
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_ids_and_pieces(model: Path, tiny_tokenizer, capsys) -> None:
    ids = tiny_tokenizer.encode("the fox\n")
    code, out, err = run(capsys, "tokenize", f"--model={model}", "the fox\n")
    assert (code, err) == (0, "")
    width = max(len(str(index)) for index in ids)
    pieces = [tiny_tokenizer.piece(index).replace("\n", "\\n") for index in ids]
    assert out.splitlines() == [f"{index:>{width}}  {piece}" for index, piece in zip(ids, pieces, strict=True)]
    code, out, _ = run(capsys, "tokenize", f"--model={model}", "--text=the fox\n", "--nobos", "--json")
    pieces = [tiny_tokenizer.piece(index) for index in ids[1:]]
    assert json.loads(out) == {"text": "the fox\n", "ids": ids[1:], "pieces": pieces}
    code, out, _ = run(capsys, "tokenize", f"--model={model}", f"--ids={','.join(map(str, ids))}")
    assert (code, out) == (0, "the fox\n\n")
    assert run(capsys, "tokenize", f"--model={model}", "", "--nobos")[:2] == (0, "")


def test_standard_input_and_a_tokenizer_alone(tmp_path: Path, tiny_tokenizer, capsys, monkeypatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer.model_bytes)
    argv = ["tokenize", f"--tokenizer={tmp_path / 'tokenizer.model'}", "--json"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é fox".encode())))
    code, out, _ = run(capsys, *argv)
    assert code == 0 and json.loads(out)["ids"] == tiny_tokenizer.encode("é fox")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "") and "standard input: invalid start byte at byte 0: expected UTF-8 text" in err


def test_special_tokens(model: Path, capsys) -> None:
    text = "a<s>b</s>"
    argv = ["tokenize", f"--model={model}", "--json", text]
    assert not {1, 2} & set(json.loads(run(capsys, *argv)[1])["ids"][1:])
    ids = json.loads(run(capsys, *argv, "--parse_special")[1])["ids"]
    assert ids[-1] == 2 and ids.count(1) == 2
    argv = ["generate", f"--model={model}", f"--prompt={text}", "--json", "--max_new_tokens=1", "--temperature=0"]
    spelt, parsed = (json.loads(run(capsys, *argv, *more)[1]) for more in ([], ["--parse_special"]))
    assert parsed["prompt_tokens"] < spelt["prompt_tokens"] and parsed["prompt"] == spelt["prompt"] == text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ids=1,x"], "--ids contains 'x': expected whole numbers, separated by commas"),
        (["--ids=1,320"], "token 320 is outside the tokenizer's vocabulary: expected 0 to 319"),
        (["--ids=1", "a text"], "--ids and a text are both given: expected one of them"),
        (["--tokenizer=nowhere", "a"], "nowhere: no such file: expected a tokenizer.model or tokenizer.json"),
    ],
)
def test_refusals(argv: list[str], message: str, model: Path, capsys) -> None:
    code, out, err = run(capsys, "tokenize", *([] if "nowhere" in argv[0] else [f"--model={model}"]), *argv)
    assert (code, out) == (1, "") and message in err and err.count("\n") == 1
