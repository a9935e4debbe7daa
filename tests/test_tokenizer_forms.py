"""Tokenizers in all their file formats: the ids of llama.cpp's vectors, of sentencepiece and of tiktoken."""

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from llamajax import LlamaJaxError, Tokenizer
from llamajax.tokenizer.gguf import from_metadata, to_metadata
from tests.texts import random_texts, vectors

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)
# models/llama3/tokenizer.py of meta-llama/llama-models.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def bin_of(model: bytes) -> bytes:
    """Makes llama2.c's tokenizer.bin of a sentencepiece model, as `Tokenizer.export` of its tokenizer.py does."""
    pieces = []
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for index, piece in enumerate(proto.pieces):
        text = {1: "\n<s>\n", 2: "\n</s>\n"}.get(index, piece.piece).replace("▁", " ")
        pieces.append((piece.score, text.encode()))
    longest = max(len(data) for _, data in pieces)
    return struct.pack("<I", longest) + b"".join(struct.pack("<fI", score, len(data)) + data for score, data in pieces)


def through_gguf(tokenizer: Tokenizer, surplus: int = 3) -> Tokenizer:
    """Writes a tokenizer as GGUF metadata of a model with surplus embeddings, and reads it back."""
    metadata = to_metadata(tokenizer, tokenizer.vocab_size + surplus)
    data, words, keys = from_metadata(metadata)
    assert data is not None and keys == set(metadata)
    return Tokenizer(data, words=words)


@pytest.fixture(scope="module")
def files(shared: Path) -> Path:
    return shared / "data" / "tokenizers"


@pytest.fixture(scope="module")
def named(files: Path) -> Callable[[str], Tokenizer]:
    """Returns a function that gives a tokenizer by vocabulary and form, and makes each once."""
    made: dict[str, Tokenizer] = {}

    def make(name: str) -> Tokenizer:
        if name not in made:
            vocabulary, _, form = name.partition(" ")
            original = (files / f"{vocabulary}_tokenizer.model").read_bytes()
            if form == "gguf":
                made[name] = through_gguf(make(f"{vocabulary} file"))
            elif form == "at rest":
                made[name] = Tokenizer(make(f"{vocabulary} file").model_bytes)
            else:
                made[name] = Tokenizer(bin_of(original) if form == "tokenizer.bin" else original)
        return made[name]

    return make


LLAMA2 = ["llama2 file", "llama2 tokenizer.bin", "llama2 gguf"]
LLAMA3 = ["llama3 file", "llama3 at rest", "llama3 gguf"]
ALL = LLAMA2 + LLAMA3


# ---- Ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_vectors_of_llama_cpp(name: str, named, shared: Path) -> None:
    tokenizer = named(name)
    for text, ids in vectors(shared, "llama-spm" if name.startswith("llama2") else "llama-bpe"):
        assert tokenizer.encode(text, bos=False) == ids, text
        assert tokenizer.decode(ids) == text


def test_attributes(named) -> None:
    assert {named(name).form for name in LLAMA2} == {"sentencepiece"}
    assert {named(name).form for name in LLAMA3} == {"tokenizers"}
    for name in ALL:
        tokenizer = named(name)
        bos, eos, stops = (1, 2, {1, 2}) if name.startswith("llama2") else (128000, 128001, {128001, 128008, 128009})
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.add_eos) == (bos, eos, True, False)
        assert set(tokenizer.stop_ids) == stops and tokenizer.encode("")[:1] == [bos]
        surplus = 3 if name.endswith("gguf") else 0
        assert tokenizer.vocab_size == (32000 if name.startswith("llama2") else 128256) + surplus


def reference(vocabulary: str, files: Path) -> Callable[[str], list[int]]:
    """Returns the reference library's function from a text to ids without BOS."""
    path = files / f"{vocabulary}_tokenizer.model"
    if vocabulary == "llama2":
        return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode
    lines = (line.split() for line in path.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}).encode_ordinary


@pytest.mark.parametrize("names", [LLAMA2, LLAMA3], ids=["llama2", "llama3"])
@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.exhaustive)])
def test_random_texts_are_encoded_as_the_reference_does(count: int, names: list[str], named, files: Path) -> None:
    theirs = reference(names[0].split()[0], files)
    for text in random_texts(count, seed=count):
        ids = theirs(text)
        for name in names:
            assert named(name).encode(text, bos=False) == ids, (name, text)
            if "▁" not in text or "llama3" in name:  # sentencepiece takes ▁ for a space
                assert named(name).decode(ids) == text


def test_llama2c_s_own_file(shared: Path) -> None:
    """llama2.c's own tok512.bin does not say that its model merges several spaces into one."""
    folder = shared / "data" / "stories260K"
    ours, theirs = Tokenizer.from_file(folder / "tok512.bin"), Tokenizer.from_file(folder / "tok512.model")
    assert [ours.token_bytes(i) for i in range(1, 512)] == [theirs.token_bytes(i) for i in range(1, 512)]
    for text in random_texts(300):
        text = " ".join(text.replace("▁", " ").split())
        assert ours.encode(text) == theirs.encode(text), text


def test_special_tokens_in_a_text_are_text_unless_asked_for(named) -> None:
    for name in ALL:
        tokenizer = named(name)
        control = "<|eot_id|>" if name.startswith("llama3") else "</s>"
        index = tokenizer.id_of(control)
        ids = tokenizer.encode(f"a{control}b", bos=False)
        assert index not in ids and tokenizer.decode(ids) == f"a{control}b"
        ids = tokenizer.encode(f"a{control}b", bos=False, special=True)
        assert ids.count(index) == 1 and tokenizer.decode(ids).replace(" ", "") == "ab"
        assert tokenizer.token_bytes(index) == b"" and tokenizer.piece(index) == control


# ---- Streaming ------------------------------------------------------------------------------------------------------


@PROPERTY
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("name", ["llama2 file", "llama2 gguf", "llama3 file"])
def test_a_stream_is_whole_characters_and_their_text(name: str, seed: int, named) -> None:
    tokenizer = named(name)
    (text,) = random_texts(1, seed)
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.add(index) for index in ids]
    assert stream.finish() == "" and "".join(pieces) == tokenizer.decode(ids)
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")
    if "▁" not in text or name.startswith("llama3"):
        assert "".join(pieces) == text


@PROPERTY
@given(ids=st.lists(st.integers(0, 31999), max_size=20))
@pytest.mark.parametrize("name", ["llama2 file", "llama3 file"])
def test_any_ids_stream_as_their_bytes_decode(name: str, ids: list[int], named) -> None:
    tokenizer = named(name)
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace")
    stream = tokenizer.stream()
    streamed = "".join([stream.add(index) for index in ids]) + stream.finish()
    assert streamed == tokenizer.decode(ids) and joined in (streamed, f" {streamed}")


# ---- Damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"IQ== 0\nIg== x\n", "tiktoken ranks, damaged in line 2: expected the base64 of a token and its rank"),
        (b"IQ== 0\nIg== 2\n", "tiktoken ranks that are not 0 to 1, each once: they are damaged"),
        (b"IQ== 0\nIg== 1\n", "tiktoken ranks without a token for each byte: they are damaged"),
        (struct.pack("<IfI", 5, 0.0, 5) + b"<unk>" + b"\0", "tokenizer.bin, damaged in piece 1 .*: expected the score"),
        (struct.pack("<IfI", 5, 0.0, 4) + b"\xff\xfe\0\0", "tokenizer.bin, damaged in piece 0 .*: expected the score"),
        (struct.pack("<IfI", 5, 0.0, 5) + b"<unk>", "tokenizer.bin that does not begin with the expected <unk>, <s>"),
        (b"{}", "a tokenizer.json that the library tokenizers cannot read"),
        (b'{"model": ' + b"[" * 5000, "a tokenizer.json that the library tokenizers cannot read"),
    ],
)
def test_damaged_files(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(LlamaJaxError, match=message):
        Tokenizer.from_file(tmp_path / "file")


def test_ranks_are_kept_as_a_tokenizer_json(named) -> None:
    """Ranks are kept in the format of the library tokenizers, which reads it by itself."""
    import tokenizers

    data = named("llama3 file").model_bytes
    theirs = tokenizers.Tokenizer.from_str(data.decode())
    assert theirs.encode("Hello <|eot_id|>").ids == [128000, 9906, 220, 128009]
    assert theirs.decode([128000, 9906, 220, 128009]) == "Hello "
    assert len(json.loads(data)["added_tokens"]) == 256
