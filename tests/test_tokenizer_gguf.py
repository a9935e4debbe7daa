"""Tokenizers in GGUF metadata: llama.cpp's rules for keys that are present or missing, and writing them back."""

import json
import random
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece

from llamajax import LlamaJaxError, Tokenizer
from llamajax.tokenizer.byte_level import CHARACTERS
from llamajax.tokenizer.gguf import from_metadata, to_metadata
from llamajax.tokenizer.pre_tokenizers import PATTERNS
from llamajax.words import AddedToken, Words
from tests.test_tokenizer_json import byte_level, spaces
from tests.texts import random_texts

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def bpe(*more: tuple[str, int], **keys: Any) -> dict[str, Any]:
    """Makes metadata of a byte-level vocabulary: 256 bytes, "he" and "hel", and more tokens with their types."""
    tokens = [*CHARACTERS.values(), "he", "hel", *(text for text, _ in more)]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * 258 + [kind for _, kind in more],
        "tokenizer.ggml.merges": ["h e", "he l"],
    } | {f"tokenizer.{name.replace('__', '.')}": value for name, value in keys.items()}


def spm(*more: tuple[str, int], **keys: Any) -> dict[str, Any]:
    """Makes metadata of a LLaMA-like vocabulary: unknown, BOS, EOS, 256 bytes, a few pieces, and more tokens."""
    pieces = ["▁", "h", "e", "l", "o", "he", "hel", "▁hel"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *(text for text, _ in more)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.asarray([0.0] * 259 + [-9.0] * 5 + [-1.0, -2.0, -3.0] + [0.0] * len(more), "f"),
        "tokenizer.ggml.token_type": np.asarray(
            [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 8, *(kind for _, kind in more)], np.int32
        ),
    } | {f"tokenizer.{name.replace('__', '.')}": value for name, value in keys.items()}


def read(metadata: dict[str, Any]) -> Tokenizer:
    data, words, keys = from_metadata(metadata)
    assert data is not None and keys == {key for key in metadata if key.startswith("tokenizer.")}
    return Tokenizer(data, words=words)


# ---- What a file says -----------------------------------------------------------------------------------------------


def test_a_byte_level_vocabulary() -> None:
    metadata = bpe(("<|im_end|>", CONTROL), ("<tool>", USER_DEFINED), ("[PAD260]", UNUSED))
    metadata["tokenizer.ggml.tokens"] = [token.encode() for token in metadata["tokenizer.ggml.tokens"]]
    tokenizer = read(metadata)
    assert tokenizer.form == "tokenizers" and tokenizer.vocab_size == 261
    ids = tokenizer.encode("hello<tool><|im_end|>é")
    assert [tokenizer.piece(index) for index in ids][:4] == ["hel", "l", "o", "<tool>"] and 258 not in ids
    assert tokenizer.decode(ids) == "hello<tool><|im_end|>é"
    assert tokenizer.encode("a<|im_end|>", special=True)[-1] == 258
    assert not tokenizer.add_bos and (tokenizer.eos_id, tokenizer.stop_ids) == (258, (258,))


def test_a_sentencepiece_vocabulary() -> None:
    tokenizer = read(spm(("<tool>", USER_DEFINED), ("<|eot_id|>", CONTROL), ("never", UNUSED)))
    assert (tokenizer.form, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == ("sentencepiece", 1, 2, 0)
    assert tokenizer.add_bos and not tokenizer.add_eos and tokenizer.stop_ids == (2, 268)
    pieces = [tokenizer.piece(index) for index in tokenizer.encode("hello<tool>hel")]
    assert pieces == ["<s>", "▁hel", "l", "o", "<tool>", "▁hel"]  # llama.cpp puts a space after every such token
    assert tokenizer.decode(tokenizer.encode("hello never")) == "hello never"
    without = read(spm(ggml__add_space_prefix=False, ggml__add_bos_token=False, ggml__add_eos_token=True))
    assert [without.piece(index) for index in without.encode("hel")] == ["hel", "</s>"]


@pytest.mark.parametrize(
    ("metadata", "bos", "eos", "stops"),
    [
        (spm(), (1, True), (2, False), (2,)),
        # stories260K.gguf says in this way that a token does not exist.
        (spm(ggml__padding_token_id=2**32 - 1, ggml__bos_token_id=2**32 - 1), (1, True), (2, False), (2,)),
        (spm(ggml__eos_token_id=260, ggml__eot_token_id=261, ggml__eom_token_id=262), (1, True), (260, False), None),
        (bpe(), (None, False), (None, False), ()),
        (bpe(ggml__pre="llama-bpe", ggml__bos_token_id=7), (7, True), (None, False), None),
        (bpe(ggml__pre="llama-bpe", ggml__add_bos_token=False), (None, False), (None, False), None),
        (bpe(ggml__bos_token_id=7, ggml__eos_token_id=8, ggml__add_eos_token=True), (7, False), (8, True), (8,)),
        (
            bpe(("<|file_sep|>", NORMAL), ("<PAD>", NORMAL), ggml__eos_token_id=8),
            (None, False),
            (8, False),
            (8, 258, 259),
        ),
        (bpe(("<|file_sep|>", NORMAL), ggml__fim_sep_token_id=9), (None, False), (9, False), (9,)),
        (
            bpe(("<|return|>", CONTROL), ("<|call|>", CONTROL), ("<|end|>", CONTROL), ggml__eos_token_id=258),
            (None, False),
            (258, False),
            (258, 259),
        ),
        (bpe(("<|fim_prefix|>", NORMAL), ("<EOT>", USER_DEFINED)), (None, False), (259, False), (259,)),
        (bpe(("</s>", NORMAL), ("<|tool_response>", CONTROL)), (None, False), (None, False), (259,)),
    ],
)
def test_beginnings_and_ends(metadata: dict[str, Any], bos: Any, eos: Any, stops: Any) -> None:
    tokenizer = read(metadata)
    assert (tokenizer.bos_id, tokenizer.add_bos) == bos
    if stops is not None:
        assert tokenizer.stop_ids == stops
    if eos[0] is not None:
        assert (tokenizer.eos_id, tokenizer.add_eos) == eos
    assert tokenizer.encode("", bos=True) == ([] if bos[0] is None else [bos[0]]) + ([eos[0]] if eos[1] else [])


def test_chat_templates_and_other_tokens() -> None:
    keys = {"chat_template": "{{ a }}", "chat_template.tool_use": "{{ b }}", "chat_templates": ["tool_use"]}
    keys |= {"ggml.padding_token_id": 3, "ggml.seperator_token_id": 4, "ggml.fim_pre_token_id": 5}
    data, words, _ = from_metadata(bpe() | {f"tokenizer.{name}": value for name, value in keys.items()})
    assert data and words.pad_id == 3
    assert words.files == {"chat_template.jinja": b"{{ a }}", "chat_template.tool_use.jinja": b"{{ b }}"}


def test_a_file_without_a_tokenizer() -> None:
    assert from_metadata({"general.name": "x"})[0] is None
    data, _, keys = from_metadata({"tokenizer.ggml.model": "none", "tokenizer.ggml.tokens": []})
    assert data is None and len(keys) == 2


def test_a_vocabulary_that_does_not_say_how_text_is_split() -> None:
    """As in llama.cpp, such a vocabulary works with a warning; digits are split into threes."""
    metadata = {key: value for key, value in bpe().items() if key != "tokenizer.ggml.pre"}
    with pytest.warns(UserWarning, match="tokenizer.ggml.pre is missing: text is split by llama.cpp's default"):
        tokenizer = read(metadata)
    assert to_metadata(tokenizer, 258)["tokenizer.ggml.pre"] == "default"


# ---- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (bpe(ggml__model="bert"), "tokenizer.ggml.model is 'bert': expected one of llama, gpt2, t5"),
        (bpe(ggml__pre="kimi-k2"), "tokenizer.ggml.pre is 'kimi-k2', an unknown pre-tokenizer: expected one"),
        (bpe(ggml__suppress_tokens=[3]), "tokenizer.ggml.suppress_tokens' is .3.: an unknown key of the tokenizer"),
        (bpe(other=1), "'tokenizer.other' is 1: an unknown key of the tokenizer"),
        (bpe(ggml__tokens=7), "tokenizer.ggml.tokens is 7: expected an array of texts"),
        (bpe(ggml__tokens=["a", b"\xff"]), r"tokenizer.ggml.tokens is b'\\xff': expected UTF-8"),
        (bpe(ggml__tokens=["a", "a"]), "tokenizer.ggml.tokens has 'a' twice: expected each token once"),
        (bpe(ggml__tokens=[]), "tokenizer.ggml.tokens is missing"),
        (bpe(ggml__merges=None), "tokenizer.ggml.merges is missing"),
        (bpe(ggml__token_type=[1]), "tokenizer.ggml.token_type has 1 values for 258 tokens: expected one for each"),
        (bpe(("<0x41>", BYTE)), "token_type has byte tokens .6.: expected none, as GPT-2 spells bytes"),
        (bpe(("a b", 9)), "tokenizer.ggml.token_type has 9: expected 1 to 6"),
        (bpe(ggml__add_bos_token=True), "add_bos_token is true, in the file or by default, but .*bos_token_id is miss"),
        (bpe(ggml__add_bos_token=7), "tokenizer.ggml.add_bos_token is 7: expected true or false"),
        (bpe(ggml__bos_token_id=-1), "tokenizer.ggml.bos_token_id is -1: expected a token's id"),
        (bpe(ggml__add_sep_token=True), "add_sep_token is true: expected false, as separators are not"),
        (bpe(**{"chat_template.a/b": "x"}), "names a chat template: expected a name of 1 to 40 letters, digits, _"),
        (bpe(chat_template=3), "tokenizer.chat_template is 3: expected a text"),
        (spm(("<0x00", BYTE)), "token 267 is '<0x00', but its type is byte .6.: expected <0x00> to <0xFF>"),
        (spm(("x", BYTE), ggml__scores=[0.0]), "tokenizer.ggml.scores has 1 values for 268 tokens|its type is byte"),
        (spm(("a b", USER_DEFINED), ("a▁b", NORMAL)), "tokens that differ only in a space and ▁"),
        (spm(ggml__precompiled_charsmap=[999]), "tokenizer.ggml.precompiled_charsmap: expected an array of bytes"),
    ],
)
def test_what_is_refused(metadata: dict[str, Any], message: str) -> None:
    metadata = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(LlamaJaxError, match=message) as raised:
        read(metadata)
    assert "\n" not in str(raised.value)


def test_a_name_of_nothing_known_lists_those_that_are() -> None:
    with pytest.raises(LlamaJaxError) as raised:
        from_metadata(bpe(ggml__pre="?"))
    assert all(name in str(raised.value) for name in PATTERNS)


@pytest.mark.filterwarnings("ignore:tokenizer.ggml.pre is missing")
def test_mutations_give_our_error_or_a_tokenizer() -> None:
    draw, read_well = random.Random(0), 0
    values = [None, 0, -1, 2**32 - 1, True, "", "x", b"\xff", [], [1], ["a"], 1.5, float("nan"), {"a": 1}, np.zeros(3)]
    for _ in range(400):
        metadata = dict(
            draw.choice((bpe, spm))(("<tool>", USER_DEFINED), ggml__eos_token_id=5, chat_template="{{ a }}")
        )
        for _ in range(draw.choice((1, 2))):
            key = draw.choice(list(metadata))
            value = metadata[key]
            if isinstance(value, list | np.ndarray) and len(value) and draw.random() < 0.7:
                value = list(value)
                value[draw.randrange(len(value))] = draw.choice(values)
            else:
                value = draw.choice(values)
            metadata[key] = value
        try:
            data, words, _ = from_metadata(metadata)
            if data is not None:
                tokenizer = Tokenizer(data, words=words)
                tokenizer.decode([*tokenizer.encode("hello <tool>"), *range(tokenizer.vocab_size)])
            read_well += 1
        except LlamaJaxError as error:
            assert len(str(error)) < 1500
    assert 20 < read_well < 380


# ---- There and back -------------------------------------------------------------------------------------------------


def same(one: Any, other: Any) -> bool:
    return np.array_equal(one, other) if isinstance(one, list | np.ndarray) else one == other


@pytest.mark.parametrize(
    "make",
    [
        lambda: read(bpe(("<|im_end|>", CONTROL), ("<tool>", USER_DEFINED), ggml__eos_token_id=258, chat_template="x")),
        lambda: read(bpe(ggml__pre="llama-bpe", ggml__bos_token_id=7, ggml__eos_token_id=8, ggml__eot_token_id=9)),
        lambda: read(spm(("<to ol>", USER_DEFINED), ("<|eot_id|>", CONTROL), ggml__add_eos_token=True)),
        lambda: read(spm(ggml__remove_extra_whitespaces=True, **{"chat_template.tool": "{{ b }}"})),
        lambda: Tokenizer(byte_level().to_str().encode()),
        lambda: Tokenizer(spaces().to_str().encode()),
    ],
    ids=["byte-level", "llama 3", "spaces", "one space of several", "tokenizer.json", "tokenizer.json of llama 2"],
)
def test_metadata_give_the_tokenizer_back(make: Any) -> None:
    tokenizer = make()
    size = tokenizer.vocab_size
    metadata = to_metadata(tokenizer, size + 5)
    assert metadata["tokenizer.ggml.tokens"][size:] == [f"[PAD{index}]" for index in range(size, size + 5)]
    again = read(metadata)
    assert again.vocab_size == size + 5
    for text in [*random_texts(100), "a<tool>b hel<to ol>hello", " a"]:
        if text.startswith("▁"):  # Metaspace adds no second ▁, sentencepiece does
            continue
        assert again.encode(text) == tokenizer.encode(text), text
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text)), text
    said = ("bos_id", "eos_id", "add_bos", "add_eos", "form")
    if tokenizer.words != Words():
        assert [getattr(again, name) for name in said] == [getattr(tokenizer, name) for name in said]
        assert set(again.stop_ids) == set(tokenizer.stop_ids) and again.words.files == tokenizer.words.files
        twice = to_metadata(again, size + 5)
        assert set(metadata) == set(twice) and all(same(metadata[key], twice[key]) for key in metadata)


def test_added_tokens_of_a_checkpoint_are_written(tiny_tokenizer: Tokenizer) -> None:
    added = (AddedToken(id=321, text="<|im_end|>", special=True), AddedToken(id=322, text="<tool>"))
    words = Words(added=added, stop_ids=(2, 321, 300), pad_id=0, files={"chat_template.jinja": b"{{ a }}"})
    metadata = to_metadata(Tokenizer(tiny_tokenizer.model_bytes, words=words), 328)
    assert metadata["tokenizer.ggml.tokens"][320:324] == ["[PAD320]", "<|im_end|>", "<tool>", "[PAD323]"]
    assert metadata["tokenizer.ggml.token_type"][320:324].tolist() == [UNUSED, CONTROL, USER_DEFINED, UNUSED]
    assert metadata["tokenizer.ggml.eot_token_id"] == 300 and metadata["tokenizer.ggml.padding_token_id"] == 0
    assert metadata["tokenizer.chat_template"] == "{{ a }}"
    again = read(metadata)
    assert set(again.stop_ids) == {2, 321, 300} and again.encode("<tool>", bos=False) == [322]
    assert 321 not in again.encode("<|im_end|>") and 321 in again.encode("<|im_end|>", special=True)
    config = {"chat_template": [{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}]}
    words = Words(files={"tokenizer_config.json": json.dumps(config).encode()})
    metadata = to_metadata(Tokenizer(tiny_tokenizer.model_bytes, words=words), 320)
    assert (metadata["tokenizer.chat_template"], metadata["tokenizer.chat_template.rag"]) == ("d", "r")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"normalizer": {"type": "Lowercase"}},
            "has the normalizer 'Lowercase', for which GGUF has no key: expected none, or",
        ),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "has the pre-tokenizer .*Whitespace.*, for which GGUF has no key"),
        (
            {"pre_tokenizer": {"type": "Digits", "individual_digits": True}},
            "splits text by .* with ignore_merges false, for",
        ),
    ],
)
def test_what_no_gguf_holds(changes: dict[str, Any], message: str) -> None:
    value = json.loads(byte_level().to_str()) | changes
    with pytest.raises(LlamaJaxError, match=message):
        to_metadata(Tokenizer(json.dumps(value).encode()), 500)
    with pytest.raises(LlamaJaxError, match="the tokenizer has 403 ids: expected at most the model's 402"):
        to_metadata(Tokenizer(byte_level().to_str().encode()), 402)


def test_a_unigram_model_and_its_normalizer(tmp_path: Path) -> None:
    """The model is like T5's, trained by sentencepiece itself."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog", "ﬁne ﬂow"] * 30),
        model_prefix=str(tmp_path / "unigram"),
        vocab_size=60,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    tokenizer = Tokenizer.from_file(tmp_path / "unigram.model")
    metadata = to_metadata(tokenizer, tokenizer.vocab_size)
    assert metadata["tokenizer.ggml.model"] == "t5" and metadata["tokenizer.ggml.precompiled_charsmap"].size > 1000
    again = read(metadata)
    for text in ["the ﬁne  fox", " quick", *random_texts(50)]:
        assert again.encode(text) == tokenizer.encode(text)


# ---- Real files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2_metadata(smollm2: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(smollm2).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}


def test_smollm2(smollm2_metadata: dict[str, Any]) -> None:
    begin = time.process_time()
    tokenizer = read(smollm2_metadata)
    assert time.process_time() - begin < 5  # 0.15 s on an idle machine
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.stop_ids) == (1, 2, False, (2, 0, 4))
    prompt = "<|im_start|>user\nHello 123<|im_end|>\n"
    ids = tokenizer.encode(prompt, special=True)
    assert ids[:1] == [1] and ids[-2:] == [2, 198] and tokenizer.decode(ids) == "user\nHello 123\n"
    assert not {1, 2} & set(tokenizer.encode(prompt)) and tokenizer.decode(tokenizer.encode(prompt)) == prompt
    assert "chat_template.jinja" in tokenizer.words.files
    written = to_metadata(tokenizer, tokenizer.vocab_size)
    # For a byte-level vocabulary, an unknown token and a space before text mean nothing.
    for key in set(smollm2_metadata) - {"tokenizer.ggml.unknown_token_id", "tokenizer.ggml.add_space_prefix"}:
        assert same(smollm2_metadata[key], written[key]), key


def test_stories260k(shared: Path) -> None:
    folder = shared / "data" / "stories260K"
    fields = gguf.GGUFReader(folder / "stories260K.gguf").fields
    tokenizer = read({key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")})
    theirs = Tokenizer.from_file(folder / "tok512.model")
    for text in random_texts(200):
        text = " ".join(text.replace("▁", " ").split())
        assert tokenizer.encode(text) == theirs.encode(text), text
