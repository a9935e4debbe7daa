"""Runners turn text into ids exactly as the tokenizer does, in Python and in the browser, or refuse it."""

import io
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

import export.vocabulary
import llamajax
from export.bundle import open_bundle, seal
from export.runners.runner import Text
from export.vocabulary import TEXTS, vocabulary_of
from llamajax.tokenizer import Tokenizer
from llamajax.words import AddedToken, Words
from tests.isolated import run_isolated

VERSION1 = Path(__file__).parent / "bundles" / "version1"
PAGE = Path(export.vocabulary.__file__).parent / "runners" / "web" / "llama.js"
STORY = "Once upon a time, there was a little fox named Ted.\nHe found 12 red apples; 'May I?' asked the café's owl. "
IDENTITY = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 340}
# Models of their own, each by what it has that is not as LLaMA's.
TRAINED: dict[str, dict] = {
    "as LLaMA's": {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    "spaces collapse": {"remove_extra_whitespaces": True},
    "no dummy prefix": {"add_dummy_prefix": False},
    "no byte fallback": {"byte_fallback": False, "vocab_size": 70},
    "no BOS": {"bos_id": -1},
    "whole symbols": {"user_defined_symbols": ["<|im_end|>", "<|im_end|>x", "the", "é"], "vocab_size": 345},
}


def trained(**options) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([STORY] * 20), model_writer=model, minloglevel=2, **{**IDENTITY, **options}
    )
    return Tokenizer(model.getvalue())


class Folder:
    """As much of a bundle as `Text` asks for."""

    def __init__(self, path: Path, values: dict):
        self.path = path
        (path / "vocabulary.json").write_text(json.dumps(values))

    def file(self, name: str) -> Path:
        return self.path / name


def drawn_texts() -> list[str]:
    """Short texts in which everything meets everything, by chance; another seed than that of the golden texts."""
    rng = np.random.default_rng(5)
    parts = [
        "a",
        "e",
        "aa",
        "the",
        " ",
        "  ",
        "▁",
        "<|im_end|>",
        "<s>",
        "é",
        "e\u0301",
        "日",
        "🦊",
        "\n",
        "\x00",
        "12",
        "Once",
    ]
    return ["".join(rng.choice(parts, rng.integers(1, 14))) for _ in range(300)] + [STORY, "  " + STORY + "  "]


def expected_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    begin = [processor.bos_id()] if processor.bos_id() >= 0 else []
    return [begin + processor.encode(text) for text in texts]


def assert_same(tokenizer: Tokenizer, folder: Path) -> None:
    """Python's and the page's `Text` against sentencepiece."""
    values = vocabulary_of(tokenizer).values
    assert values["refusal"] is None
    bundle, texts = Folder(folder, values), [*TEXTS, *drawn_texts()]
    runner, expected = Text(bundle), expected_ids(tokenizer, texts)
    for text, ids in zip(texts, expected, strict=True):
        assert runner.encode(text) == ids, text
    if shutil.which("node"):
        for text, ids, found in zip(texts, expected, by_node(folder, texts), strict=True):
            assert found == ids, text


def by_node(folder: Path, texts: list[str], method: str = "texts.map((text) => runner.encode(text))") -> list:
    (folder / "texts.json").write_text(json.dumps(texts))
    script = (
        f"import {{ readFileSync }} from 'node:fs'; import {{ Text }} from '{PAGE.as_uri()}';"
        "const [vocabulary, texts] = process.argv.slice(1).map((file) => JSON.parse(readFileSync(file)));"
        f"const runner = new Text(vocabulary); console.log(JSON.stringify({method}));"
    )
    command = ["node", "--no-warnings", "--input-type=module", "--experimental-default-type=module", "-e", script]
    files = [str(folder / name) for name in ("vocabulary.json", "texts.json")]
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", TRAINED)
def test_trained_tokenizers(name: str, tmp_path: Path) -> None:
    assert_same(trained(**TRAINED[name]), tmp_path)


@pytest.mark.parametrize("name", ["box", "stories260K", "llama2"])
def test_tokenizers_in_use(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if name == "box":
        tokenizer = llamajax.load("box")[1]
    else:
        data = request.getfixturevalue("shared") / "data"
        files = {"stories260K": "stories260K/tok512.model", "llama2": "tokenizers/llama2_tokenizer.model"}
        tokenizer = Tokenizer.from_file(data / files[name])
    assert_same(tokenizer, tmp_path)


def test_a_long_text_takes_no_time_in_its_square(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = trained()
    runner, text = Text(Folder(tmp_path, vocabulary_of(tokenizer).values)), STORY * 80
    taken = 0

    class Counted(dict):
        def __contains__(self, key) -> bool:
            nonlocal taken
            taken += 1
            return super().__contains__(key)

    runner.merges = Counted(runner.merges)
    assert len(text) > 8000 and [runner.encode(text)] == expected_ids(tokenizer, [text])
    assert taken < 5 * len(text)


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"model_type": "unigram", "vocab_size": 300}, "a sentencepiece model of type unigram"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"normalizes text \('nmt_nfkc'\)"),
        ({"treat_whitespace_as_suffix": True}, "treats spaces in a way of its own"),
        # A piece's "▁" is a space to runners, which no text has when sentencepiece looks for this symbol.
        ({"user_defined_symbols": ["  "], "remove_extra_whitespaces": False}, "encodes .* in a way of its own"),
    ],
)
def test_what_runners_cannot_encode_is_refused(options: dict, refusal: str, tmp_path: Path) -> None:
    values = vocabulary_of(trained(**options)).values
    assert re.search(refusal, values["refusal"]), values["refusal"]
    with pytest.raises(SystemExit, match=rf"{refusal}, which this runner does not know: give ids with --ids"):
        Text(Folder(tmp_path, values)).encode("Once")


def test_tokens_that_a_checkpoint_adds(tmp_path: Path) -> None:
    model, texts = (
        trained(remove_extra_whitespaces=False),
        [*TEXTS, *drawn_texts(), "<s>a<|im_end|> b <|im_end|>x", "<s>"],
    )
    added = [AddedToken(id=1, text="<s>", special=True), AddedToken(id=340, text="<|im_end|>", special=True)]
    added += [AddedToken(id=341, text="<|im_end|>x"), AddedToken(id=342, text="12", normalized=True)]
    for changes in ({}, {"space": "always"}, {"space": "never"}, {"add_bos": False, "add_eos": True}):
        tokenizer = Tokenizer(model.model_bytes, words=Words(added=tuple(added), **changes))
        values = vocabulary_of(tokenizer).values
        assert values["refusal"] is None
        runner, expected = Text(Folder(tmp_path, values)), [tokenizer.encode(text) for text in texts]
        assert [runner.encode(text) for text in texts] == expected
        assert not shutil.which("node") or by_node(tmp_path, texts) == expected
    rstrip = AddedToken(id=340, text="<|im_end|>", rstrip=True)
    values = vocabulary_of(Tokenizer(model.model_bytes, words=Words(added=(rstrip,)))).values
    assert values["refusal"] == "its tokenizer has a token that depends on what is around it, '<|im_end|>'"


def test_unused_pieces_are_refused() -> None:
    proto: Any = sentencepiece_model_pb2
    model = proto.ModelProto.FromString(trained().model_bytes)
    model.pieces[-1].type = proto.ModelProto.SentencePiece.UNUSED
    assert vocabulary_of(Tokenizer(model.SerializeToString())).values["refusal"] == "its tokenizer has unused pieces"


def test_a_character_that_nothing_stands_for(tmp_path: Path) -> None:
    # As the first bundles were: without the id of the unknown.
    values = vocabulary_of(trained(byte_fallback=False, vocab_size=70)).values
    del values["unknown"]
    with pytest.raises(SystemExit, match="'日' is not in the vocabulary"):
        Text(Folder(tmp_path, values)).encode("Once 日")


@pytest.mark.parametrize("prompt", ["", "Once"])
def test_text_of_ids(prompt: str, tmp_path: Path) -> None:
    tokenizer = trained(**TRAINED["as LLaMA's"])
    folder, made = Folder(tmp_path, vocabulary_of(tokenizer).values), tokenizer.encode(" fox upon", bos=False)
    ids, stream = tokenizer.encode(prompt), tokenizer.stream()
    before = "".join(map(stream.add, ids))
    expected = "".join(map(stream.add, made))
    assert before + expected == prompt + "  fox upon"[not prompt :]
    decode = Text(folder).decoder(ids)
    # Behind the tokenizer's ids there may be more in the model: `generate` shows one of those as U+FFFD.
    assert b"".join(map(decode, [*made, tokenizer.vocab_size])).decode() == expected + "\ufffd"
    if shutil.which("node"):
        method = f"[{made}, [{tokenizer.vocab_size}]].flat().map(runner.decoder(texts)).map((bytes) => [...bytes])"
        assert b"".join(map(bytes, by_node(tmp_path, ids, method))).decode() == expected + "\ufffd"


def test_a_bundle_whose_tokenizer_runners_lack(tmp_path: Path) -> None:
    shutil.copytree(VERSION1, tmp_path / "copy")
    bundle = open_bundle(tmp_path / "copy")
    values = vocabulary_of(trained(model_type="unigram", vocab_size=300)).values
    bundle.file("vocabulary.json").write_text(json.dumps(values))
    seal(bundle.path, bundle.manifest)
    done = run_isolated(bundle.path, "--prompt=Once", runner="run_jax.py")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.endswith("type unigram, which this runner does not know: give ids with --ids\n")
