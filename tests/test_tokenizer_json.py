"""tokenizer.json against the library that it belongs to: what each part of the file does, and what is refused."""

import base64
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llamajax import LlamaJaxError, Tokenizer
from llamajax.words import AddedToken, Words
from tests.texts import random_texts

CORPUS = [
    "The quick brown fox jumps over 12 lazy dogs. \n",
    "Ça va? Ünïcode 日本語 and  two  spaces.",
    "don't we'll",
] * 20
CHAT = ["<|im_start|>", "<|im_end|>", "<tool>"]
START, END, TOOL = 400, 401, 402


def _train(model: Any, pre: Any, decoder: Any, normalizer: Any = None, **options: Any) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer, made.decoder = pre, decoder
    if normalizer is not None:
        made.normalizer = normalizer
    kind = trainers.UnigramTrainer if isinstance(model, models.Unigram) else trainers.BpeTrainer
    made.train_from_iterator(CORPUS, kind(show_progress=False, **options))
    return made


def byte_level() -> tokenizers.Tokenizer:
    """Makes a tokenizer like GPT-2's: after 400 pieces, two special tokens and one that is text."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = _train(models.BPE(), pre, decoders.ByteLevel(), vocab_size=400, initial_alphabet=alphabet)
    fill = [f"fill {index}" for index in range(made.get_vocab_size(), START)]
    made.add_tokens(fill)
    made.add_special_tokens(CHAT[:2])
    made.add_tokens([tokenizers.AddedToken(CHAT[2], normalized=False)])
    return made


def spaces(unigram: bool = False) -> tokenizers.Tokenizer:
    """Makes a tokenizer like Llama 2's: ▁ for a space, bytes for characters that are in no piece."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    if unigram:
        pre, decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        return _train(models.Unigram(), pre, decoder, vocab_size=80, special_tokens=["<unk>"], unk_token="<unk>")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    before = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    pre = pre_tokenizers.Split("\n\n\n\n", "isolated")  # the library trains within one split
    special = ["<unk>", "<s>", "</s>"]
    made = _train(
        model, pre, decoders.Sequence(steps), before, vocab_size=420, special_tokens=special, initial_alphabet=[]
    )
    made.pre_tokenizer = None
    value = json.loads(made.to_str())
    for token in bytes_:
        value["model"]["vocab"].setdefault(token, len(value["model"]["vocab"]))
    return tokenizers.Tokenizer.from_str(json.dumps(value))


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte-level": byte_level,
    "spaces": spaces,
    "unigram": lambda: spaces(unigram=True),
}


@pytest.fixture(scope="module")
def made() -> dict[str, tokenizers.Tokenizer]:
    return {name: make() for name, make in KINDS.items()}


def ours(theirs: tokenizers.Tokenizer, words: Words | None = None, **changes: Any) -> Tokenizer:
    """Makes our tokenizer from theirs, with parts of the file changed."""
    value = json.loads(theirs.to_str())
    for name, change in changes.items():
        value[name] = value[name] | change if name == "model" else change
    return Tokenizer(json.dumps(value).encode(), words=words)


# ---- Ids and text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_the_librarys(kind: str, made) -> None:
    theirs, tokenizer = made[kind], ours(made[kind])
    assert tokenizer.form == "tokenizers" and tokenizer.vocab_size == theirs.get_vocab_size()
    theirs.encode_special_tokens = True
    for text in [*random_texts(300), " a", "  a", "a ", "The fox <|im_end|> <tool> x</s>"]:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == theirs.decode(ids), text
        stream = tokenizer.stream()
        assert "".join([stream.add(index) for index in ids]) + stream.finish() == theirs.decode(ids)
    for index in range(tokenizer.vocab_size):
        assert tokenizer.piece(index) == theirs.id_to_token(index)


def test_added_tokens(made) -> None:
    tokenizer = ours(made["byte-level"])
    text = "a<|im_start|>b<tool>c"
    ids = tokenizer.encode(text)
    assert TOOL in ids and START not in ids and tokenizer.decode(ids) == text
    ids = tokenizer.encode(text, special=True)
    assert [index for index in ids if index >= START] == [START, TOOL] and tokenizer.decode(ids) == "ab<tool>c"
    assert {token.id: token.special for token in tokenizer.added if token.id >= START} == {
        START: True,
        END: True,
        TOOL: False,
    }


def test_a_checkpoint_adds_to_them(made) -> None:
    """Tokens listed in special_tokens_map.json and tokenizer_config.json are added to the file's own."""
    more = (AddedToken(id=TOOL, text="<tool>", special=True), AddedToken(id=403, text="<more>"))
    tokenizer = ours(made["byte-level"], Words(added=more, stop_ids=(403, 5), eos_token="<|im_end|>"))
    assert tokenizer.encode("<tool><more>", special=True) == [TOOL, 403] and tokenizer.vocab_size == 404
    assert TOOL not in tokenizer.encode("<tool>") and tokenizer.token_bytes(TOOL) == b""
    assert (tokenizer.stop_ids, tokenizer.eos_id) == ((403, 5), END)
    with pytest.raises(LlamaJaxError, match="added token '<more>' has id 403 in its tokenizer.json, but 999"):
        ours(made["byte-level"], Words(added=(AddedToken(id=999, text="<more>"),)))


def test_bos_and_eos_of_the_post_processor(made) -> None:
    theirs = tokenizers.Tokenizer.from_str(made["byte-level"].to_str())
    tokens = [("<|im_start|>", START), ("<|im_end|>", END)]
    for single in ("$A", "<|im_start|> $A", "$A <|im_end|>", "<|im_start|> $A <|im_end|>"):
        used = [token for token in tokens if token[0] in single]
        template = processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=used)
        theirs.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
        tokenizer = ours(theirs)
        assert tokenizer.encode("fox") == theirs.encode("fox").ids
        assert (tokenizer.add_bos, tokenizer.add_eos) == ("start" in single, "end" in single)
        assert tokenizer.bos_id == (START if "start" in single else None)
        # Without an EOS in the template, a token whose name says so is the end.
        assert (tokenizer.eos_id, tokenizer.stop_ids) == (END, (END,))
    words = Words(add_bos=False, add_eos=False, bos_token="<tool>")
    assert ours(theirs, words).bos_id == TOOL and ours(theirs, words).encode("a") == theirs.encode("a").ids[1:-1]


def test_spaces_as_the_checkpoint_says(made) -> None:
    """transformers' LlamaTokenizer takes pieces and merges from such a file, and adds spaces by its own rules."""
    theirs = tokenizers.Tokenizer.from_str(made["spaces"].to_str())
    theirs.normalizer, theirs.encode_special_tokens = None, True
    for scheme in ("first", "always", "never"):
        theirs.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
        tokenizer = ours(made["spaces"], Words(space=scheme))
        assert tokenizer.drops_first_space == (scheme != "never")
        for text in random_texts(50):
            assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert made["spaces"].normalizer is not None


def test_what_is_for_training_is_left_out(made) -> None:
    """Padding, truncation and dropout are ignored: they would change ids, or take unlimited memory."""
    plain = ours(made["byte-level"])
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    changed = ours(made["byte-level"], padding=padding, truncation=truncation, model={"dropout": 0.5})
    for text in CORPUS[:3]:
        assert changed.encode(text) == plain.encode(text)


# ---- Refusals -------------------------------------------------------------------------------------------------------

_REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}
_DAMAGED = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\x10\0\0\0" + b"\xff" * 30).decode()}
_TOKEN = {"SpecialToken": {"id": "q", "type_id": 0}}
_TEXT = {"Sequence": {"id": "A", "type_id": 0}}
_SECOND = {"Sequence": {"id": "B", "type_id": 1}}


def _template(*single: Any, ids: Any) -> dict[str, Any]:
    tokens = {"q": {"id": "q", "ids": ids, "tokens": ["q"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": single, "pair": [_TEXT, _SECOND], "special_tokens": tokens}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [_REPLACE] * 9}}, "makes text up to 256 times as long"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 9000}}, "makes text up to 141 times as long: expected at"),
        ({"normalizer": _DAMAGED}, "cannot read .'Error while attempting to build Precompiled normalizer"),
        ({"normalizer": {"type": "Of another kind"}}, "that the library tokenizers cannot read"),
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "whose decoder .'WordPiece'. is unknown"),
        ({"decoder": None}, "whose decoder .'none'. is unknown: expected ByteLevel, Metaspace, or"),
        ({"post_processor": {"type": "BertProcessing", "sep": ["b", 1], "cls": ["a", 0]}}, "the post-processor 'BertP"),
        (
            {"post_processor": _template(_TOKEN, _TEXT, ids=[1]) | {"special_tokens": {}}},
            "names .*'q'.*: expected a token|that the library tokenizers cannot read",
        ),
        ({"post_processor": _template(_TOKEN, _TEXT, ids=[1, 2])}, "puts 2 tokens before every text: expected at most"),
        ({"post_processor": _template(_TEXT, _TOKEN, ids=[9999])}, "puts id 9999 behind every text: expected one of"),
        ({"model": {"vocab": {"a": 0, "b": 2**32 - 1}, "merges": []}}, "whose ids end at 4294967295: expected 0 to"),
        ({"model": {"merges": ["no such"]}}, "that the library tokenizers cannot read"),
        ({"model": {"type": "Unigram", "vocab": [], "unk_id": 0}}, "that the library tokenizers cannot read"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str, made) -> None:
    with pytest.raises(LlamaJaxError, match=message) as raised:
        ours(made["byte-level"], **changes)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_a_pattern_that_takes_too_long(made) -> None:
    """The library gives up with a panic of its Rust code, which becomes a one-line error."""
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = ours(made["byte-level"], pre_tokenizer=pattern)
    with pytest.raises(LlamaJaxError, match="the text cannot be encoded: .*retry-limit-in-match over"):
        tokenizer.encode("a" * 40 + "b")
    assert tokenizer.encode("a") == made["byte-level"].encode("a").ids


def test_ids_that_no_piece_has(made) -> None:
    tokenizer = ours(made["byte-level"], model={"vocab": {"a": 0, "b": 5}, "merges": []}, added_tokens=[])
    assert (tokenizer.vocab_size, tokenizer.piece(3), tokenizer.decode([0, 3, 5])) == (6, "", "a\ufffdb")


def test_any_byte_changed_gives_our_error_or_a_tokenizer(made) -> None:
    draw, data = random.Random(0), made["byte-level"].to_str().encode()
    read = 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(draw.choice((1, 1, 8))):
            damaged[draw.randrange(len(damaged))] = draw.choice(b"0123456789abn {}[],:")
        try:
            tokenizer = Tokenizer(bytes(damaged))
            tokenizer.decode([*tokenizer.encode("the fox <|im_end|>"), *range(min(tokenizer.vocab_size, 500))])
            read += 1
        except LlamaJaxError as error:
            assert len(str(error)) < 400
    assert read > 5
