"""GGUF files, mutated and forged: each is refused by our error or loads soundly, soon, in little memory."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece

import llamajax
from llamajax import Tokenizer, open_checkpoint
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
    """The type that converters write a value in, and the value."""
    if isinstance(value, np.ndarray | list | tuple):
        values = value.tolist() if isinstance(value, np.ndarray) else list(value)
        inner = 8 if isinstance(values[0], str) else 6 if isinstance(values[0], float) else 5
        return 9, (inner, values)
    value = value.item() if isinstance(value, np.generic) else value
    return _TYPES[type(value)], value


def document(vocabulary: dict[str, Any], kinds: dict[str, Kind]) -> Document:
    """A whole file: of every tensor whose name holds a key of `kinds` the type, F32 of the others."""
    metadata = {"general.architecture": "llama", **metadata_of(CONFIG), **vocabulary}
    keys = [[key, *_typed(value)] for key, value in metadata.items()]
    tensors = []
    for number, (name, shape) in enumerate(shapes(CONFIG).items()):
        kind = next((kind for part, kind in kinds.items() if part in name), Kind.F32)
        data = np.ones(shape, "<f4") if len(shape) == 1 else blocks(kind, *shape, seed=number)
        tensors.append([name, list(shape[::-1]), int(kind), data.tobytes()])
    return Document(keys, tensors)


def _documents(tiny_tokenizer: Tokenizer) -> list[Document]:
    """SPM and BPE vocabularies, types of every form."""
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
    """A vocabulary of LLaMA's kind, as llama.cpp's converter writes it: by the sentencepiece library."""
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
    """A vocabulary of GPT-2's kind: bytes, pairs of letters, special tokens."""
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


@pytest.mark.parametrize("count", [500, pytest.param(5000, marks=pytest.mark.exhaustive)])
def test_mutations(count: int, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """In a process of its own, which a mutation may end: more than 200 MiB, a second, or code that runs fail there."""
    for number, each in enumerate(_documents(tiny_tokenizer)):
        (tmp_path / f"{number}.document").write_bytes(pickle.dumps(each))
    command = [sys.executable, "-m", "tests.gguf_mutations", str(tmp_path), "0", str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["refused"] + counts["loaded"] == count
    assert counts["refused"] > count // 3 and counts["loaded"] > count // 20
