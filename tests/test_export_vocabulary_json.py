"""Runners turn text into ids as the library tokenizers does with a tokenizer.json, or refuse to."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from export.bundle import open_bundle, seal
from export.runners.text import Text
from export.vocabulary import TEXTS, vocabulary_of
from llamajax import Tokenizer
from llamajax.checkpoint import need_tokenizer, open_checkpoint
from llamajax.tokenizer.pre_tokenizers import PATTERNS
from tests.encoded import STORY, Folder, assert_same, by_node, drawn_texts
from tests.isolated import run_isolated

VERSION1 = Path(__file__).parent / "bundles" / "version1"
TEXT = [STORY + "Ünïcödé 日本語 🦊 e\u0301 don't DON'T 1234567 \n\n  x▁y "] * 20
(LLAMA3,) = PATTERNS["llama-bpe"].expressions
SPACES = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPACED = normalizers.Replace(" ", "▁")
LLAMA2 = normalizers.Sequence([normalizers.Prepend("▁"), SPACED])


def split(pattern: str, behavior: str = "isolated", invert: bool = False):
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


def byte_level(*before, normalizer=None, added=(), **options) -> tokenizers.Tokenizer:
    """Returns byte-level BPE, trained after these pre-tokenizers."""
    library = tokenizers.Tokenizer(models.BPE(**options))
    library.pre_tokenizer = pre_tokenizers.Sequence([*before, BYTES])
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    return finished(library, trainer, normalizer, added)


def of_characters(pre_tokenizer=None, normalizer=None, added=(), pieces=(), **options) -> tokenizers.Tokenizer:
    """Returns BPE over characters, with replacements for unknown characters and spaces."""
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", **options))
    library.decoder = SPACES
    if pre_tokenizer:
        library.pre_tokenizer = pre_tokenizer
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256) if options.get("byte_fallback")), *pieces]
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 90, special_tokens=special, limit_alphabet=50, show_progress=False
    )
    return finished(library, trainer, normalizer, added)


def finished(library: tokenizers.Tokenizer, trainer, normalizer, added) -> tokenizers.Tokenizer:
    if normalizer:
        library.normalizer = normalizer
    library.train_from_iterator(TEXT, trainer)
    # The trainer makes all given tokens added tokens; here they must be pieces.
    data = json.loads(library.to_str())
    data["added_tokens"] = []
    library = tokenizers.Tokenizer.from_str(json.dumps(data))
    for token in added:
        (library.add_special_tokens if token.special else library.add_tokens)([token])
    return library


ADDED = (
    AddedToken("<|im_end|>", special=True, normalized=False),
    AddedToken("<|im_end|>x", normalized=False, lstrip=True),
    AddedToken("é", normalized=True, rstrip=True),
    AddedToken("the", single_word=True, normalized=False),
    AddedToken("12", normalized=True, lstrip=True, rstrip=True),
    AddedToken("end|> b", normalized=False),
)
METASPACE = pre_tokenizers.Metaspace
# Named by their steps: those of the families' files, and further options of these steps.
MADE = {
    "GPT-2": lambda: plain_gpt2(),
    "Llama 3": lambda: byte_level(split(LLAMA3), ignore_merges=True, added=ADDED),
    "digits": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), split(LLAMA3)),
    "runs of digits": lambda: byte_level(pre_tokenizers.Digits(individual_digits=False)),
    "composed": lambda: byte_level(split(LLAMA3), normalizer=normalizers.NFC(), added=ADDED),
    "decomposed": lambda: byte_level(split(LLAMA3), normalizer=normalizers.NFD()),
    "compatible": lambda: byte_level(split(LLAMA3), normalizer=normalizers.NFKC()),
    "compatible, decomposed": lambda: byte_level(split(LLAMA3), normalizer=normalizers.NFKD()),
    "removed": lambda: byte_level(split(r"\s+", "removed"), split("Once", "removed", True)),
    "merged": lambda: byte_level(split(r"\p{P}", "merged_with_next"), split("[aeiou]", "merged_with_previous")),
    "contiguous": lambda: byte_level(split(r"\d", "contiguous"), split("[a-z]", "contiguous", True)),
    "Llama 2": lambda: of_characters(normalizer=LLAMA2, byte_fallback=True, fuse_unk=True, added=ADDED),
    "Metaspace": lambda: of_characters(METASPACE(prepend_scheme="first"), byte_fallback=True, added=ADDED),
    "Metaspace, always": lambda: of_characters(METASPACE(prepend_scheme="always", split=False), added=ADDED),
    "Metaspace, never": lambda: of_characters(METASPACE(prepend_scheme="never"), fuse_unk=True),
    "Gemma": lambda: of_characters(split(" ", "merged_with_previous"), SPACED, byte_fallback=True),
    "replaced": lambda: of_characters(normalizer=normalizers.Replace(Regex(r"\s{2,}|'"), "▁▁"), byte_fallback=True),
}


def plain_gpt2() -> tokenizers.Tokenizer:
    library = byte_level()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    return library


@pytest.mark.parametrize("name", MADE)
def test_every_step(name: str, tmp_path: Path) -> None:
    assert_same(Tokenizer(MADE[name]().to_str().encode()), tmp_path)


def test_how_the_classes_of_a_pattern_are_kept(tmp_path: Path) -> None:
    values = vocabulary_of(Tokenizer(MADE["digits"]().to_str().encode())).values
    assert [step["do"] for step in values["split"]] == ["split", "split", "bytes"]
    (digits,) = values["split"][0]["pattern"]
    assert list(values["classes"][digits][:4]) == [ord("0"), ord("9"), ord("²"), ord("³")]
    of_s = [ord(letter) for letter in "SSssſſ"]  # equal when case is ignored
    assert of_s in map(list, values["classes"])


def changed(change: Mapping[str, Any], name: str = "Llama 3") -> Tokenizer:
    data = json.loads(MADE[name]().to_str())
    for key, value in change.items():
        part, _, inner = key.partition(".")
        if inner:
            data[part][inner] = value
        else:
            data[part] = value
    return Tokenizer(json.dumps(data).encode())


BEHIND = {"type": "Split", "pattern": {"Regex": r"(?<!a)b"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"normalizer": {"type": "Lowercase"}}, r"normalizes text \('Lowercase'\)"),
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, r"splits text in a way of its own \('WhitespaceSplit'\)"),
        ({"model.dropout": 0.5}, r"has a model with dropout '0\.5'"),
        (
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": r"(?<!a)b"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            },
            r"has a regular expression with \(\?<! \(\(\?<!a\)b\)",
        ),
    ],
)
def test_what_runners_cannot_encode_is_refused(change: dict, refusal: str, tmp_path: Path) -> None:
    values = vocabulary_of(changed(change)).values
    assert re.fullmatch(f"its tokenizer {refusal}", values["refusal"]), values["refusal"]
    with pytest.raises(SystemExit, match=rf"{refusal}, which this runner does not know: give ids with --ids"):
        Text(Folder(tmp_path, values)).encode("Once")


# ---- Tokenizers in use ----------------------------------------------------------------------------------------------


def llama2_as_json(model: bytes) -> bytes:
    """Returns a sentencepiece BPE model as transformers' converter writes it (`generate_merges`, `LlamaConverter`)."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = {processor.id_to_piece(index): index for index in range(processor.vocab_size())}
    merges = []
    for piece in ids:
        pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        merges += [(processor.get_score(ids[piece]), *pair) for pair in pairs if set(pair) <= ids.keys()]
    merges = [pair for _, *pair in sorted(merges, key=lambda merge: (-merge[0], ids[merge[1]], ids[merge[2]]))]
    library = tokenizers.Tokenizer(
        models.BPE(ids, [tuple(pair) for pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    library.normalizer, library.decoder = LLAMA2, decoders.Sequence([SPACES, decoders.Strip(" ", 1, 0)])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library.to_str().encode()


@pytest.mark.parametrize(
    ("name", "vectors"),
    [("llama3_tokenizer.model", "bpe"), ("llama2_tokenizer.model", "spm"), ("llama2 as JSON", "spm")],
)
def test_tokenizers_in_use(name: str, vectors: str, shared: Path, tmp_path: Path) -> None:
    """Compared with the library, and with llama.cpp's ids of its test texts, which are without BOS."""
    folder = shared / "data" / "tokenizers"
    if name == "llama2 as JSON":
        tokenizer = Tokenizer(llama2_as_json((folder / "llama2_tokenizer.model").read_bytes()))
    else:
        tokenizer = Tokenizer.from_file(folder / name)
    assert_same(tokenizer, tmp_path, texts=[*TEXTS, *drawn_texts(3000)])
    base = f"ggml-vocab-llama-{vectors}.gguf"
    given, expected = ((shared / "data/tokenizer_vectors" / f"{base}.{end}").read_text() for end in ("inp", "out"))
    texts = given.split("\n__ggml_vocab_test__\n")[:-1]
    ids = [list(map(int, line.split())) for line in expected.splitlines()]
    runner = Text(Folder(tmp_path, json.loads((tmp_path / "vocabulary.json").read_bytes())))
    begin = [] if runner.bos is None else [runner.bos]
    assert len(texts) > 40 and [runner.encode(text) for text in texts] == [begin + line for line in ids]


def test_smollm2(smollm2: Path, tmp_path: Path) -> None:
    assert_same(need_tokenizer(open_checkpoint(smollm2)), tmp_path, texts=[*TEXTS, *drawn_texts(3000)])


def test_a_stream_never_splits_a_character(tmp_path: Path) -> None:
    tokenizer = Tokenizer(MADE["GPT-2"]().to_str().encode())
    runner, text = Text(Folder(tmp_path, vocabulary_of(tokenizer).values)), " 日本語 🦊\u0301 \U0010ffff é"
    made = tokenizer.encode(text)
    assert len(made) > len(text)
    decode, stream = runner.decoder([]), tokenizer.stream()
    for token in made:
        assert decode(token).decode() == stream.add(token)
    # Bytes that cannot become a character come out as soon as that is certain, or at the end.
    single = {data: i for i in range(tokenizer.vocab_size) if len(data := tokenizer.token_bytes(i)) == 1}
    cut = [single[bytes([byte])] for byte in "🦊".encode()[:3]]
    assert [*map(runner.decoder(made), [*cut, None])] == [b"", b"", b"", b"\xf0\x9f\xa6"]
    assert [*map(runner.decoder(made), [*cut, single[b"x"], None])] == [b"", b"", b"", b"\xf0\x9f\xa6x", b""]
    assert [*map(runner.decoder(made), [single[b"\xa6"], single[b"\xff"], None])] == [b"\xa6", b"\xff", b""]
    if shutil.which("node"):
        method = f"((decode) => [{made}, [null]].flat().map(decode).map((bytes) => [...bytes]))(runner.decoder([]))"
        parts = [bytes(part).decode() for part in by_node(tmp_path, [], method)]
        assert "".join(parts) == text and parts[-1] == ""


def test_a_bundle_with_a_tokenizer_json(tmp_path: Path) -> None:
    """The runner as users have it, one file in a process of its own, encodes the golden texts."""
    shutil.copytree(VERSION1, tmp_path / "copy")
    bundle, made = open_bundle(tmp_path / "copy"), vocabulary_of(Tokenizer(MADE["Llama 3"]().to_str().encode()))
    special = [entry for entry in made.texts if entry.get("special")]
    assert special and any(set(entry["ids"]) & {340, 341} for entry in special)
    bundle.file("vocabulary.json").write_text(json.dumps(made.values))
    manifest = {**bundle.manifest, "golden": {**bundle.manifest["golden"], "texts": made.texts}}
    seal(bundle.path, manifest)
    done = run_isolated(bundle.path, "--golden", runner="run_jax.py", hidden=("tokenizers", "sentencepiece", "regex"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["texts"] == len(made.texts) > len(TEXTS) + 12
    special[-1]["ids"].append(0)
    seal(bundle.path, manifest)
    done = run_isolated(bundle.path, "--golden", runner="run_jax.py")
    assert done.returncode == 1 and "gives ids" in done.stderr
