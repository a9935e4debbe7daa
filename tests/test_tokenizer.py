"""Tokenizer against sentencepiece itself and against llama.cpp's vectors; streaming never shows half a character."""

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import llamajax
from llamajax import LlamaJaxError, Tokenizer
from llamajax.tokenizer import train_tokenizer

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True, database=None)

# Characters of every UTF-8 length, whitespace of all kinds, and text that looks like tokens.
_parts = st.sampled_from(
    [
        "a",
        "Once upon",
        " ",
        "  ",
        "\n",
        "\t",
        "é",
        "ß",
        "日本",
        "한",
        "🙂",
        "👩‍👩‍👧",
        "<s>",
        "</s>",
        "<0x41>",
        "<unk>",
        "▁",
        "1234",
        "\0",
    ]
)
texts = st.one_of(st.lists(_parts, max_size=12).map("".join), st.text(max_size=30))


@pytest.fixture(scope="module")
def processor(tiny_tokenizer: Tokenizer) -> sentencepiece.SentencePieceProcessor:
    """The same model, read by sentencepiece itself."""
    return sentencepiece.SentencePieceProcessor(model_proto=tiny_tokenizer.model_bytes)


# ---- Against sentencepiece ------------------------------------------------------------------------------------------


@PROPERTY
@given(text=texts)
def test_encode_is_sentencepieces(text: str, tiny_tokenizer: Tokenizer, processor) -> None:
    assert tiny_tokenizer.encode(text) == [1, *processor.encode(text)]
    assert tiny_tokenizer.encode(text, bos=False) == processor.encode(text)


@PROPERTY
@given(text=texts)
def test_decode_is_sentencepieces(text: str, tiny_tokenizer: Tokenizer, processor) -> None:
    """Byte fallback restores every text, except that sentencepiece's own ▁ (U+2581) becomes a space."""
    decoded = tiny_tokenizer.decode(tiny_tokenizer.encode(text))
    assert decoded == processor.decode(processor.encode(text))
    assert decoded == text.replace("▁", " ")


@PROPERTY
@given(data=st.data())
def test_any_ids_decode(data: st.DataObject, tiny_tokenizer: Tokenizer) -> None:
    """Ids decode to their tokens' bytes, as decoded by Python: models make sequences that no text encodes to."""
    ids = data.draw(st.lists(st.integers(3, tiny_tokenizer.vocab_size - 1), max_size=20))
    joined = b"".join(map(tiny_tokenizer.token_bytes, ids))
    if ids and ids[0] >= 259:  # A space spelt as a byte is not the one that the tokenizer adds in front.
        joined = joined.removeprefix(b" ")
    assert tiny_tokenizer.decode(ids) == joined.decode("utf-8", errors="replace")


def test_every_single_id_decodes_as_sentencepieces(tiny_tokenizer: Tokenizer, processor) -> None:
    for index in range(tiny_tokenizer.vocab_size):
        assert tiny_tokenizer.decode([index]) == processor.decode([index]), processor.id_to_piece(index)


# ---- Streaming ------------------------------------------------------------------------------------------------------


@PROPERTY
@given(text=texts)
def test_stream_joined_is_decode(text: str, tiny_tokenizer: Tokenizer) -> None:
    ids, decoder = tiny_tokenizer.encode(text), tiny_tokenizer.stream()
    pieces = [decoder.add(index) for index in ids]
    assert "".join(pieces) + decoder.finish() == tiny_tokenizer.decode(ids)
    assert decoder.finish() == ""
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_an_emoji_comes_out_at_its_last_byte(tiny_tokenizer: Tokenizer) -> None:
    decoder = tiny_tokenizer.stream()
    ids = [3 + byte for byte in "🙂é🙂".encode()]
    assert [decoder.add(index) for index in ids] == ["", "", "", "🙂", "", "é", "", "", "", "🙂"]


def test_a_character_that_never_ends_is_replaced_once(tiny_tokenizer: Tokenizer) -> None:
    start = [3 + byte for byte in "🙂".encode()[:3]]
    assert tiny_tokenizer.decode(start) == "\N{REPLACEMENT CHARACTER}"
    decoder = tiny_tokenizer.stream()
    (letter,) = tiny_tokenizer.encode("a", bos=False)[-1:]
    assert [decoder.add(index) for index in start] == ["", "", ""]
    assert decoder.add(letter) in ("\N{REPLACEMENT CHARACTER}a", "\N{REPLACEMENT CHARACTER} a")


# ---- Spaces and control tokens --------------------------------------------------------------------------------------


def test_only_the_space_that_the_tokenizer_added_is_dropped(tiny_tokenizer: Tokenizer) -> None:
    for text in ("fox", " fox", "  fox", "\nfox", " "):
        assert tiny_tokenizer.decode(tiny_tokenizer.encode(text)) == text


def test_a_continuation_keeps_its_space(tiny_tokenizer: Tokenizer) -> None:
    """Prompt and new tokens pass through one decoder: the space between them belongs to the text."""
    whole = tiny_tokenizer.encode("the fox was happy")
    prompt = tiny_tokenizer.encode("the fox")
    assert whole[: len(prompt)] == prompt
    decoder = tiny_tokenizer.stream()
    assert "".join(map(decoder.add, prompt)) == "the fox"
    assert "".join(map(decoder.add, whole[len(prompt) :])) == " was happy"


def test_control_tokens_have_no_text_and_are_never_read_from_it(tiny_tokenizer: Tokenizer) -> None:
    for text in ("<s>", "</s>", "<unk>", "a<s>b</s>", "<0x0A>"):
        ids = tiny_tokenizer.encode(text, bos=False)
        assert not {0, 1, 2} & set(ids)
        assert tiny_tokenizer.decode(ids) == text
    ids = tiny_tokenizer.encode("fox", bos=False)
    assert tiny_tokenizer.decode([1, *ids, 2, 1]) == "fox"
    assert tiny_tokenizer.token_bytes(1) == tiny_tokenizer.token_bytes(2) == b""


def test_attributes(tiny_tokenizer: Tokenizer) -> None:
    assert (tiny_tokenizer.bos_id, tiny_tokenizer.eos_id, tiny_tokenizer.vocab_size) == (1, 2, 320)
    assert set(tiny_tokenizer.stop_ids) == {1, 2}


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [-1, 320, 2**31, 2**80])
def test_ids_outside_the_vocabulary(index: int, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(LlamaJaxError, match=rf"token {index} is outside the tokenizer's vocabulary: expected 0 to 319"):
        tiny_tokenizer.decode([index])


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: b"garbage" * 50, lambda data: data[: len(data) // 2]]
)
def test_files_that_are_no_model(damage, tiny_tokenizer: Tokenizer, tmp_path: Path, capfd) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damage(tiny_tokenizer.model_bytes))
    with pytest.raises(LlamaJaxError, match="tokenizer.model: not a sentencepiece model: expected a tokenizer.model"):
        Tokenizer.from_file(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(LlamaJaxError, match="nothing: no such file: expected a tokenizer.model or tokenizer.json"):
        Tokenizer.from_file(tmp_path / "nothing")


def test_file_that_is_too_large(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate((64 << 20) + 1)  # a sparse file takes no space on disk
    with pytest.raises(LlamaJaxError, match="67108865 bytes: expected a tokenizer of at most 64 MiB"):
        Tokenizer.from_file(tmp_path / "large")


# ---- Training -------------------------------------------------------------------------------------------------------


def test_trained_ids_are_those_of_llama(tiny_tokenizer: Tokenizer, processor) -> None:
    assert [processor.id_to_piece(index) for index in range(3)] == ["<unk>", "<s>", "</s>"]
    assert [processor.id_to_piece(3 + byte) for byte in range(256)] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert [tiny_tokenizer.token_bytes(3 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert all(processor.is_byte(index) == (3 <= index < 259) for index in range(320))
    # Digits are split, and characters that the text does not have are spelt in bytes.
    assert not [p for p in map(processor.id_to_piece, range(259, 320)) if sum(c.isdigit() for c in p) > 1]
    assert tiny_tokenizer.encode("語", bos=False)[-3:] == [3 + byte for byte in "語".encode()]


def test_training_is_deterministic(capfd: pytest.CaptureFixture[str]) -> None:
    texts = ["the quick brown fox jumps over the lazy dog"] * 3
    assert train_tokenizer(texts, 300).model_bytes == train_tokenizer(iter(texts), 300).model_bytes
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("size", [-1, 0, 100, 5000])
def test_sizes_that_the_text_does_not_support(size: int) -> None:
    with pytest.raises(
        LlamaJaxError, match=f"vocab_size is {size}: the text does not support it: expected at least 259"
    ):
        train_tokenizer(["the quick brown fox"], size)


# ---- Real tokenizers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text_first", [True, False], ids=["encode", "decode"])
def test_llama_2_vectors(text_first: bool, shared: Path) -> None:
    """Ids are those of llama.cpp's ggml-vocab-llama-spm, without BOS; a separator line stands between the texts."""
    tokenizer = Tokenizer.from_file(shared / "data" / "tokenizers" / "llama2_tokenizer.model")
    base = shared / "data" / "tokenizer_vectors" / "ggml-vocab-llama-spm.gguf"
    *cases, end = base.with_suffix(".gguf.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = base.with_suffix(".gguf.out").read_text("utf-8").splitlines()
    assert end == "" and len(cases) == len(lines) > 40
    for text, line in zip(cases, lines, strict=True):
        ids = [int(word) for word in line.split()]
        if text_first:
            assert tokenizer.encode(text, bos=False) == ids, text
        else:
            assert tokenizer.decode(ids) == text


def test_llama_2_attributes(shared: Path) -> None:
    tokenizer = llamajax.Tokenizer.from_file(shared / "data" / "tokenizers" / "llama2_tokenizer.model")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
