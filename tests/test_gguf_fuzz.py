"""GGUF files, mutated and forged: each is refused by our error or loads soundly, quickly and in little memory."""

import json
import pickle
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece

import llamajax
from llamajax import LlamaJaxError, Tokenizer, open_checkpoint
from llamajax.checkpoint.gguf.container import open_gguf
from tests.gguf_files import Kind, blocks, metadata_of, shapes
from tests.gguf_mutations import Document

ROOT = Path(__file__).parents[1]
CONFIG = llamajax.Config(
    vocab_size=320,
    width=32,
    ffn_width=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    context_length=64,
    tied_embeddings=True,
)
_TYPES = {bool: 7, str: 8, int: 4, float: 6}


def _typed(value: Any) -> tuple[int, Any]:
    """Returns the type in which converters write a value, and the value."""
    if isinstance(value, np.ndarray | list | tuple):
        values = value.tolist() if isinstance(value, np.ndarray) else list(value)
        inner = 8 if isinstance(values[0], str) else 6 if isinstance(values[0], float) else 5
        return 9, (inner, values)
    value = value.item() if isinstance(value, np.generic) else value
    return _TYPES[type(value)], value


def document(vocabulary: dict[str, Any], kinds: dict[str, Kind]) -> Document:
    """Returns a whole file: tensors whose name contains a key of `kinds` have its type, the others F32."""
    metadata = {"general.architecture": "llama", **metadata_of(CONFIG), **vocabulary}
    keys = [[key, *_typed(value)] for key, value in metadata.items()]
    tensors = []
    for number, (name, shape) in enumerate(shapes(CONFIG).items()):
        kind = next((kind for part, kind in kinds.items() if part in name), Kind.F32)
        data = np.ones(shape, "<f4") if len(shape) == 1 else blocks(kind, *shape, seed=number)
        tensors.append([name, list(shape[::-1]), int(kind), data.tobytes()])
    return Document(keys, tensors)


def _documents(tiny_tokenizer: Tokenizer) -> list[Document]:
    """Returns documents with SPM and BPE vocabularies and types of every form."""
    some = {
        "attn_q": Kind.Q4_0,
        "attn_v": Kind.Q5_1,
        "ffn_up": Kind.Q8_0,
        "ffn_gate": Kind.MXFP4,
        "token_embd": Kind.Q4_1,
    }
    halves = {"attn_": Kind.F16, "ffn_": Kind.BF16, "token_embd": Kind.F16}
    return [document(_sentencepiece(tiny_tokenizer), some), document(_byte_level(), halves)]


def _sentencepiece(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns a vocabulary of LLaMA's kind, as llama.cpp's converter writes it: by the sentencepiece library."""
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    ids = range(model.vocab_size())
    types = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": np.asarray([model.get_score(i) for i in ids], np.float32),
        "tokenizer.ggml.token_type": np.asarray(types, np.int32),
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


def _byte_level() -> dict[str, Any]:
    """Returns a vocabulary of GPT-2's kind: bytes, pairs of letters, special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = sorted(ByteLevel.alphabet())
    merges = [f"{first} {second}" for first in "aeinot" for second in "nrstdl"]
    tokens += [merge.replace(" ", "") for merge in merges] + ["<|im_start|>", "<|im_end|>"]
    tokens += [f"<|unused{number}|>" for number in range(CONFIG.vocab_size - len(tokens))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.asarray([3 if token[:2] == "<|" else 1 for token in tokens], np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }


def test_documents_are_files_that_the_gguf_package_reads(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    for each in _documents(tiny_tokenizer):
        path = tmp_path / "m.gguf"
        path.write_bytes(each.bytes())
        theirs = gguf.GGUFReader(path)
        assert [tensor.name for tensor in theirs.tensors] == [tensor[0] for tensor in each.tensors]
        opened = open_checkpoint(path)
        assert opened.config == CONFIG and opened.tokenizer_problem is None
        assert opened.read(shardings="host") is not None
        assert llamajax.checkpoint.read_tokenizer(opened) is not None


@pytest.mark.filterwarnings("ignore:tokenizer.ggml.pre is missing")
@pytest.mark.parametrize("count", [500, pytest.param(5000, marks=pytest.mark.exhaustive)])
def test_mutations(count: int, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Fails if a mutation takes more than 200 MiB or a second, or runs code; its own process may crash."""
    for number, each in enumerate(_documents(tiny_tokenizer)):
        (tmp_path / f"{number}.document").write_bytes(pickle.dumps(each))
    command = [sys.executable, "-m", "tests.gguf_mutations", str(tmp_path), "0", str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["refused"] + counts["loaded"] == count
    assert counts["refused"] > count // 3 and counts["loaded"] > count // 20


# ---- Forgeries -------------------------------------------------------------------------------------------------------


def _head(num_tensors: int, num_keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys)


def _text(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def _key(name: bytes, kind: int, value: bytes) -> bytes:
    return _text(name) + struct.pack("<I", kind) + value


def _array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def _tensor(name: bytes, sizes: tuple[int, ...], kind: int, offset: int) -> bytes:
    return _text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


_DEEP = _array(9, 1) * 5 + _array(0, 1, b"\0")
_TWO = _tensor(b"a", (64,), 0, 0) + _tensor(b"b", (64,), 0, 0)

FORGERIES = {
    "shorter than a header": (b"GGUF\3\0\0\0", "8 bytes: expected a GGUF file"),
    "tensors without end": (_head(1 << 63, 0), "9223372036854775808 tensors and 0 keys in 424 bytes: expected fewer"),
    "keys without end": (_head(0, (1 << 64) - 1), "keys in 424 bytes: expected fewer"),
    "more keys than bytes": (_head(0, 60), "0 tensors and 60 keys in 424 bytes: expected fewer"),
    "a key without a name": (_head(0, 1) + _key(b"", 0, b"\0"), "a key's name has 0 bytes"),
    "a key's name without end": (_head(0, 1) + _text(b"k", 1 << 40), "a key's name has 1099511627776 bytes"),
    "a key's name that is no text": (_head(0, 1) + _key(b"\xff", 0, b"\0"), "expected UTF-8 text"),
    "a key twice": (_head(0, 2) + _key(b"k", 0, b"\0") * 2, "key 'k' occurs twice"),
    "a type that is none": (_head(0, 1) + _key(b"k", 13, b""), "'k' is of type 13: expected one from 0 to 12"),
    "a bool of 2": (_head(0, 1) + _key(b"k", 7, b"\2"), "'k' is a bool of 2: expected 0 or 1"),
    "bools of 2": (_head(0, 1) + _key(b"k", 9, _array(7, 2, b"\1\2")), "'k' has bools of 2"),
    "a string without end": (_head(0, 1) + _key(b"k", 8, _text(b"", 1 << 62)), "'k' has 4611686018427387904 bytes"),
    "an array without end": (_head(0, 1) + _key(b"k", 9, _array(4, 1 << 61)), "'k' has 2305843009213693952 elements"),
    "strings without end": (_head(0, 1) + _key(b"k", 9, _array(8, 1 << 40)), "'k' has 1099511627776 elements"),
    "a string of an array without end": (
        _head(0, 1) + _key(b"k", 9, _array(8, 2, _text(b"a") + _text(b"", 1 << 50))),
        "bytes behind the file: truncated or damaged",
    ),
    "an array of no text": (
        _head(0, 1) + _key(b"tokenizer.k", 9, _array(8, 2, _text(b"a") + _text(b"\xc0"))),
        "element 1 is .*: expected UTF-8 text",
    ),
    "arrays in arrays": (_head(0, 1) + _key(b"k", 9, _DEEP), "arrays in arrays, 5 deep: expected 4 at most"),
    "arrays of what is no type": (_head(0, 1) + _key(b"k", 9, _array(13, 1)), "'k' has elements of type 13"),
    "an alignment of 24": (
        _head(0, 1) + _key(b"general.alignment", 4, struct.pack("<I", 24)),
        "general.alignment is 24: expected a power of two",
    ),
    "an alignment of 0": (_head(0, 1) + _key(b"general.alignment", 4, bytes(4)), "general.alignment is 0"),
    "an alignment of another type": (_head(0, 1) + _key(b"general.alignment", 8, _text(b"32")), "alignment is '32'"),
    "tensors of one name": (_head(2, 0) + _tensor(b"a", (64,), 0, 0) * 2, "tensor 'a' occurs twice"),
    "tensors over each other": (_head(2, 0) + _TWO, "tensors 'a' and 'b' overlap"),
    "a tensor behind the end": (_head(1, 0) + _tensor(b"a", (64,), 0, 1 << 40), "tensor 'a' ends at byte"),
    "a tensor at the largest place": (_head(1, 0) + _tensor(b"a", (64,), 0, (1 << 64) - 32), "tensor 'a' ends at byte"),
    "a tensor at no place of the alignment": (_head(1, 0) + _tensor(b"a", (8,), 0, 4), "expected a multiple of the"),
    "a tensor too large": (_head(1, 0) + _tensor(b"a", (1 << 40, 1 << 40), 0, 0), "tensor 'a' ends at byte"),
    "a tensor of the largest sizes": (_head(1, 0) + _tensor(b"a", ((1 << 64) - 1,) * 4, 0, 0), "ends at byte"),
    "a tensor of five axes": (_head(1, 0) + _tensor(b"a", (1, 1, 1, 1, 1), 0, 0), "tensor 'a' has 5 axes"),
    "a tensor of no axes": (_head(1, 0) + _tensor(b"a", (), 0, 0), "tensor 'a' has 0 axes"),
    "rows that are no blocks": (
        _head(1, 0) + _tensor(b"a", (33,), 2, 0),
        "rows of 33 in Q4_0: expected a multiple of 32",
    ),
    "a type of the future": (_head(1, 0) + _tensor(b"a", (32,), 500, 0), "tensor 'a': ggml type 500: expected one of"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries(name: str, tmp_path: Path) -> None:
    data, message = FORGERIES[name]
    path = tmp_path / "forged.gguf"
    path.write_bytes(data if len(data) < 24 else data + bytes(424 - len(data)))
    tracemalloc.start()
    try:
        with pytest.raises(LlamaJaxError, match=message):
            open_gguf(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_every_truncation_is_refused_or_whole(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The file is cut at many places of the header and of the tensors."""
    path = tmp_path / "cut.gguf"
    data = document(_sentencepiece(tiny_tokenizer), {"": Kind.Q8_0}).bytes()
    path.write_bytes(data)
    header = min(tensor.start for tensor in open_gguf(path).tensors.values())
    for length in [*range(0, 700), *range(700, header, 97), *range(header, len(data) - 32, 2503)]:
        path.write_bytes(data[:length])
        with pytest.raises(LlamaJaxError):
            open_gguf(path)


def test_more_strings_than_any_vocabulary(tmp_path: Path) -> None:
    """A string takes six times its bytes in memory, so that the number of strings is limited."""
    count = (1 << 21) + 1
    path = tmp_path / "strings.gguf"
    path.write_bytes(_head(0, 1) + _key(b"k", 9, _array(8, count, bytes(8 * count))))
    with pytest.raises(LlamaJaxError, match="'k': 2097153 strings: expected at most 2097152"):
        open_gguf(path)


def test_a_vocabulary_of_another_size_is_no_tokenizer(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The weights are read; callers that need a tokenizer are told why there is none, unless they name one."""
    path = tmp_path / "m.gguf"
    for change, message in (
        (
            lambda words: words | {"tokenizer.ggml.tokens": words["tokenizer.ggml.tokens"][:-20]},
            "its vocabulary cannot",
        ),
        (lambda words: words | {"tokenizer.ggml.scores": words["tokenizer.ggml.scores"][:-1]}, "its vocabulary cannot"),
        (lambda words: words | {"tokenizer.ggml.new_rule": True}, "tokenizer.ggml.new_rule"),
        (lambda words: words | {"tokenizer.ggml.model": "wordpiece"}, "tokenizer.ggml.model is 'wordpiece'"),
    ):
        path.write_bytes(document(change(_sentencepiece(tiny_tokenizer)), {}).bytes())
        (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer.model_bytes)
        opened = open_checkpoint(path)
        assert opened.tokenizer_problem is not None and message in opened.tokenizer_problem
        assert llamajax.checkpoint.read_tokenizer(opened) is None
        assert opened.read(shardings="host") is not None
        assert llamajax.checkpoint.read_tokenizer(opened, tmp_path / "tokenizer.model") is not None
    opened = open_checkpoint(path, ignore_keys=["tokenizer.ggml.model"])
    assert opened.tokenizer_problem is None
