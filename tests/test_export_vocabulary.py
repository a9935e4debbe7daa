"""Runners turn text into ids exactly as the tokenizer does, in Python and in the browser, or refuse to."""

import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

import llamajax
from export.bundle import open_bundle, seal
from export.runners.text import Text
from export.vocabulary import TEXTS, vocabulary_of
from llamajax import Tokenizer
from llamajax.words import AddedToken, Words
from tests.encoded import STORY, Folder, assert_same, by_node, drawn_texts
from tests.isolated import run_isolated

VERSION1 = Path(__file__).parent / "bundles" / "version1"
IDENTITY = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 340}
# Models trained here, each named by its difference from LLaMA's.
TRAINED: dict[str, dict] = {
    "as LLaMA's": {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    "spaces collapse": {"remove_extra_whitespaces": True},
    "no dummy prefix": {"add_dummy_prefix": False},
    "no byte fallback": {"byte_fallback": False, "vocab_size": 70},
    "no BOS": {"bos_id": -1},
    "whole symbols": {"user_defined_symbols": ["<|im_end|>", "<|im_end|>x", "the", "é"], "vocab_size": 345},
    "spaces are symbols": {"user_defined_symbols": ["  ", "▁a", "a▁"], "vocab_size": 343},
    "spaces are suffixes": {"treat_whitespace_as_suffix": True},
    "normalized": {"normalization_rule_name": "nmt_nfkc"},
    "normalized, without case": {"normalization_rule_name": "nmt_nfkc_cf", "remove_extra_whitespaces": False},
    "unigram": {"model_type": "unigram", "vocab_size": 300},
    "unigram, normalized": {"model_type": "unigram", "vocab_size": 300, "normalization_rule_name": "nmt_nfkc"},
    "unigram, whole symbols": {
        **{"model_type": "unigram", "byte_fallback": False, "vocab_size": 48},
        "user_defined_symbols": ["<|im_end|>", "the", "the f", "é", "  "],
    },
}


def trained(**options) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([STORY] * 20), model_writer=model, minloglevel=2, **{**IDENTITY, **options}
    )
    return Tokenizer(model.getvalue())


def own_ids(tokenizer: Tokenizer) -> Callable[[str], Sequence[int]]:
    """Returns sentencepiece's own function from text to ids."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    begin = [processor.bos_id()] if processor.bos_id() >= 0 else []
    return lambda text: begin + processor.encode(text)


@pytest.mark.parametrize("name", TRAINED)
def test_trained_tokenizers(name: str, tmp_path: Path) -> None:
    tokenizer = trained(**TRAINED[name])
    assert_same(tokenizer, tmp_path, own_ids(tokenizer))


def changed(change: Callable[[Any], None], **options) -> Tokenizer:
    """Returns a model with a change that no trainer makes."""
    proto: Any = sentencepiece_model_pb2
    model = proto.ModelProto.FromString(trained(**options).model_bytes)
    change(model)
    return Tokenizer(model.SerializeToString())


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_unused_pieces(kind: str, tmp_path: Path) -> None:
    def unused(model) -> None:
        for piece in [piece for piece in model.pieces if piece.type == piece.NORMAL][::3]:
            piece.type = piece.UNUSED

    tokenizer = changed(unused, model_type=kind, vocab_size=300)
    assert_same(tokenizer, tmp_path, own_ids(tokenizer))


def test_spaces_that_stay_spaces(tmp_path: Path) -> None:
    def plain(model) -> None:
        model.normalizer_spec.escape_whitespaces = False
        for piece in model.pieces:
            piece.piece = piece.piece.replace("▁", " ")

    for collapse in (False, True):
        tokenizer = changed(plain, remove_extra_whitespaces=collapse)
        assert_same(tokenizer, tmp_path, own_ids(tokenizer))


@pytest.mark.parametrize("name", ["box", "stories260K", "mistral"])
def test_tokenizers_in_use(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if name == "box":
        tokenizer = llamajax.load("box")[1]
    else:
        data = request.getfixturevalue("shared") / "data"
        files = {"stories260K": "stories260K/tok512.model", "mistral": "tokenizers/mistral_tokenizer.model.v1"}
        tokenizer = Tokenizer.from_file(data / files[name])
    assert_same(tokenizer, tmp_path, own_ids(tokenizer), [*TEXTS, *drawn_texts(3000)])


@pytest.mark.parametrize("name", ["as LLaMA's", "unigram"])
def test_a_long_text_takes_no_time_in_its_square(name: str, tmp_path: Path) -> None:
    tokenizer = trained(**{**TRAINED[name], "split_by_whitespace": False})
    runner, text = Text(Folder(tmp_path, vocabulary_of(tokenizer).values)), STORY.replace(" ", "") * 99
    taken = 0

    class Counted(dict):
        def get(self, key, default=None):
            nonlocal taken
            taken += 1
            return super().get(key, default)

    model, of_kind = runner.model, "likely" if name == "unigram" else "scored"
    setattr(model, of_kind, Counted(getattr(model, of_kind)))
    assert len(text) > 8000 and runner.encode(text) == own_ids(tokenizer)(text)
    assert taken < 20 * len(text)


@pytest.mark.parametrize("kind", ["word", "char"])
def test_what_runners_cannot_encode_is_refused(kind: str, tmp_path: Path) -> None:
    values = vocabulary_of(trained(model_type=kind, byte_fallback=False, vocab_size=20)).values
    refusal = f"its tokenizer is a sentencepiece model of type {kind}"
    assert values["refusal"] == refusal
    with pytest.raises(SystemExit, match=rf"{refusal}, which this runner does not know: give ids with --ids"):
        Text(Folder(tmp_path, values)).encode("Once")


def test_a_difference_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Text, "step_sentencepiece", lambda self, **_: lambda words, _: words)
    assert re.search("encodes .* in a way of its own", vocabulary_of(trained()).values["refusal"])


def test_tokens_that_a_checkpoint_adds(tmp_path: Path) -> None:
    model, texts = (
        trained(remove_extra_whitespaces=False),
        [*TEXTS, *drawn_texts(), "<s>a<|im_end|> b <|im_end|>x", "<s>"],
    )
    added = [AddedToken(id=1, text="<s>", special=True), AddedToken(id=340, text="<|im_end|>", special=True)]
    added += [AddedToken(id=341, text="<|im_end|>x"), AddedToken(id=342, text="12", normalized=True)]
    for changes in ({}, {"space": "always"}, {"space": "never"}, {"add_bos": False, "add_eos": True}):
        tokenizer = Tokenizer(model.model_bytes, words=Words(added=tuple(added), **changes))
        assert_same(tokenizer, tmp_path, texts=texts)
    flags = [{}, {"lstrip": True}, {"rstrip": True, "lstrip": True}, {"single_word": True}]
    for flag in flags:
        around = [AddedToken(id=340, text="<|im_end|>", rstrip=True), AddedToken(id=341, text="12", **flag)]
        around += [
            AddedToken(id=342, text="<|im_end|>x", special=True),
            AddedToken(id=343, text="日", single_word=True),
        ]
        assert_same(Tokenizer(model.model_bytes, words=Words(added=tuple(around))), tmp_path)


def test_a_character_that_nothing_stands_for(tmp_path: Path) -> None:
    values = vocabulary_of(trained(byte_fallback=False, vocab_size=70)).values
    values["model"]["unknown"] = None
    with pytest.raises(SystemExit, match="'日' is not in the vocabulary"):
        Text(Folder(tmp_path, values)).encode("Once 日")


def test_vocabularies_of_the_first_releases(tmp_path: Path) -> None:
    values, texts = json.loads((VERSION1 / "vocabulary.json").read_bytes()), [*TEXTS, *drawn_texts()]
    tokenizer = Tokenizer.from_file(VERSION1 / "tokenizer.model")
    assert "version" not in values
    expected = [own_ids(tokenizer)(text) for text in texts]
    assert [Text(Folder(tmp_path, values)).encode(text) for text in texts] == expected
    assert not shutil.which("node") or by_node(tmp_path, texts) == expected
    runner = Text(Folder(tmp_path, values))
    assert [runner.bytes_of(i) for i in range(tokenizer.vocab_size)] == list(
        map(tokenizer.token_bytes, range(tokenizer.vocab_size))
    )
    with pytest.raises(SystemExit, match=r"vocabulary\.json: version 3: this runner reads 1 and 2"):
        Text(Folder(tmp_path, {"version": 3}))


@pytest.mark.parametrize("prompt", ["", "Once"])
def test_text_of_ids(prompt: str, tmp_path: Path) -> None:
    tokenizer = trained(**TRAINED["as LLaMA's"])
    folder, made = Folder(tmp_path, vocabulary_of(tokenizer).values), tokenizer.encode(" fox upon", bos=False)
    ids, stream = tokenizer.encode(prompt), tokenizer.stream()
    before = "".join(map(stream.add, ids))
    expected = "".join(map(stream.add, made))
    assert before + expected == prompt + "  fox upon"[not prompt :]
    decode = Text(folder).decoder(ids)
    # The model may have more ids than the tokenizer: `generate` shows each of them as U+FFFD.
    assert b"".join(map(decode, [*made, tokenizer.vocab_size, None])).decode() == expected + "\ufffd"
    if shutil.which("node"):
        method = f"[{made}, [{tokenizer.vocab_size}]].flat().map(runner.decoder(texts)).map((bytes) => [...bytes])"
        assert b"".join(map(bytes, by_node(tmp_path, ids, method))).decode() == expected + "\ufffd"


def test_a_bundle_whose_tokenizer_runners_lack(tmp_path: Path) -> None:
    shutil.copytree(VERSION1, tmp_path / "copy")
    bundle = open_bundle(tmp_path / "copy")
    values = vocabulary_of(trained(model_type="char", byte_fallback=False, vocab_size=20)).values
    bundle.file("vocabulary.json").write_text(json.dumps(values))
    seal(bundle.path, bundle.manifest)
    done = run_isolated(bundle.path, "--prompt=Once", runner="run_jax.py")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.endswith("type char, which this runner does not know: give ids with --ids\n")
