"""Writes a tokenizer as the metadata of a GGUF: pieces by id, types, scores or merges, token ids and chat templates."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llamajax.errors import LlamaJaxError
from llamajax.files import parse_json, shortened
from llamajax.tokenizer.ends import ends_of
from llamajax.tokenizer.gguf_read import PARTS, TEMPLATE
from llamajax.tokenizer.json_form import steps_of
from llamajax.tokenizer.model_proto import BPE, CONTROL, UNIGRAM, UNKNOWN, UNUSED, USER_DEFINED, proto
from llamajax.tokenizer.pieces_of_json import pieces_of_json
from llamajax.tokenizer.pre_tokenizers import GPT2, PATTERNS
from llamajax.tokenizer.tokenizer import Tokenizer

# The score that llama.cpp's converter gives to tokens that only fill up the rows of the embedding.
_PAD_SCORE = -1000.0


@dataclasses.dataclass
class _Table:
    """Pieces by id, as a GGUF lists them.

    Attributes:
        tokens: the text of each piece.
        types: the GGUF type of each piece; the numbers are those of sentencepiece.
        scores: the score of each piece if the vocabulary has scores; else None.
        keys: further keys and values, without "tokenizer.ggml.".
    """

    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    keys: dict[str, Any]


def to_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Returns keys and values for a GGUF's metadata, from which `from_metadata` restores the tokenizer.

    Two properties for which GGUF has no key are left out, as llama.cpp's own converters do, and llama.cpp then ignores
    them: that text is first normalized to NFC (Qwen 2), and that white space around an added token belongs to it.

    Args:
        tokenizer: the tokenizer.
        vocab_size: V, the rows of the model's embedding; missing tokens up to it are written as unused.

    Returns:
        Values by key: str; bool; int, for UINT32; lists of str; NumPy arrays of float32, int32 and uint8.

    Raises:
        LlamaJaxError: for a tokenizer that a GGUF cannot hold, or one that has more ids than the model.
    """
    if tokenizer.vocab_size > vocab_size:
        raise LlamaJaxError(f"the tokenizer has {tokenizer.vocab_size} ids: expected at most the model's {vocab_size}")
    table = _of_sentencepiece(tokenizer) if tokenizer.form == "sentencepiece" else _of_json(tokenizer)
    _pad(table, vocab_size)
    keys = {f"tokenizer.ggml.{name}": value for name, value in table.keys.items()}
    keys["tokenizer.ggml.tokens"] = table.tokens
    keys["tokenizer.ggml.token_type"] = np.asarray(table.types, np.int32)
    if table.scores is not None:
        keys["tokenizer.ggml.scores"] = np.asarray(table.scores, np.float32)
    for part, index in _parts(tokenizer, table).items():
        keys[f"tokenizer.ggml.{PARTS[part]}_token_id"] = index
    keys["tokenizer.ggml.add_bos_token"] = tokenizer.add_bos
    keys["tokenizer.ggml.add_eos_token"] = tokenizer.add_eos
    return keys | _templates(tokenizer)


def _parts(tokenizer: Tokenizer, table: _Table) -> dict[str, int]:
    """Ids by role; stop ids that llama.cpp would not find by their text get the roles "eot" and "eom"."""
    said = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id, "pad": tokenizer.words.pad_id}
    parts = {part: index for part, index in said.items() if index is not None and index < len(table.tokens)}
    ids = {token: index for index, token in enumerate(table.tokens)}
    found, _ = ends_of(ids, parts)
    for part, index in zip(("eot", "eom"), [i for i in tokenizer.stop_ids if i not in found], strict=False):
        parts[part] = index
    return parts


def _of_sentencepiece(tokenizer: Tokenizer) -> _Table:
    """The table of a sentencepiece model and its added tokens."""
    model = proto().ModelProto.FromString(tokenizer.model_bytes)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (BPE, UNIGRAM):
        raise LlamaJaxError(
            f"the tokenizer is a sentencepiece model of type {trainer.model_type}, which GGUF cannot hold: expected "
            "unigram (1) or BPE (2)"
        )
    if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        raise LlamaJaxError("the tokenizer has its own rules for spaces, for which GGUF has no key")
    types = [piece.type for piece in model.pieces]
    spelt = {USER_DEFINED: lambda piece: piece.replace("▁", " ")}
    tokens = [spelt.get(piece.type, str)(piece.piece) for piece in model.pieces]
    keys: dict[str, Any] = {
        "model": "llama" if trainer.model_type == BPE else "t5",
        "pre": "default",
        "add_space_prefix": tokenizer.drops_first_space,
    }
    if normalizer.remove_extra_whitespaces:
        keys["remove_extra_whitespaces"] = True
    if normalizer.precompiled_charsmap:
        keys["precompiled_charsmap"] = np.frombuffer(normalizer.precompiled_charsmap, np.uint8)
    table = _Table(tokens, types, [piece.score for piece in model.pieces], keys)
    _pad(table, tokenizer.vocab_size)
    for token in tokenizer.added:
        table.tokens[token.id] = token.text
        if token.special and table.types[token.id] != UNKNOWN:
            table.types[token.id] = CONTROL
        elif not token.special:
            table.types[token.id] = USER_DEFINED
    return table


def _of_json(tokenizer: Tokenizer) -> _Table:
    """The table of a tokenizer.json."""
    value = parse_json(tokenizer.model_bytes, "the tokenizer")
    model = value["model"]
    if model.get("type", "BPE") != "BPE":
        raise LlamaJaxError(
            f"the tokenizer.json has a model of type {shortened(model.get('type'))}, which GGUF cannot hold: expected "
            "BPE"
        )
    if any(model.get(flag) for flag in ("continuing_subword_prefix", "end_of_word_suffix")):
        raise LlamaJaxError("the tokenizer.json marks where words begin or end, for which GGUF has no key")
    table = pieces_of_json(tokenizer, model)
    if any(step.get("type") == "ByteLevel" for step in steps_of(value.get("decoder"), "decoders")):
        merges = list(map(" ".join, table.merges))
        keys: dict[str, Any] = {"model": "gpt2", "pre": _pre_tokenizer(value), "merges": merges}
        return _Table(table.tokens, table.types, None, keys)
    _check_spaces(value)
    keys = {"model": "llama", "pre": "default", "add_space_prefix": tokenizer.drops_first_space}
    return _Table(table.tokens, table.types, table.scores(), keys)


def _check_spaces(value: Mapping[str, Any]) -> None:
    """Refuses a tokenizer.json that changes text other than by writing ▁ for spaces and before the text."""
    prefix, spaced = {"type": "Prepend", "prepend": "▁"}, {"String": " "}
    for step in steps_of(value.get("normalizer"), "normalizers"):
        replaced = step.get("type") == "Replace" and (step.get("pattern"), step.get("content"))
        # The second replacement accompanies Metaspace, which puts no ▁ before a text that begins with one.
        if step != prefix and replaced not in ((spaced, "▁"), ({"Regex": r"\A▁"}, "▁▁")):
            raise LlamaJaxError(
                f"the tokenizer.json has the normalizer {shortened(json.dumps(step))}, for which GGUF has no key"
            )
    for step in steps_of(value.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") != "Metaspace" or step.get("replacement") != "▁":
            raise LlamaJaxError(
                f"the tokenizer.json has the pre-tokenizer {shortened(json.dumps(step))}, for which GGUF has no key"
            )


def _pre_tokenizer(value: Mapping[str, Any]) -> str:
    """GGUF's name of the pre-tokenizer of a byte-level tokenizer.json."""
    for step in steps_of(value.get("normalizer"), "normalizers"):
        if step.get("type") != "NFC":
            raise LlamaJaxError(
                f"the tokenizer.json has the normalizer {shortened(step.get('type'))}, for which GGUF has no key: "
                "expected none, or NFC"
            )
    expressions = tuple(_expressions(value.get("pre_tokenizer")))
    ignores = bool(value["model"].get("ignore_merges"))
    for name, known in PATTERNS.items():
        if expressions == tuple(map(_escaped, known.expressions)) and known.ignore_merges == ignores:
            return name
    raise LlamaJaxError(
        f"the tokenizer.json splits text by {shortened(expressions)} with ignore_merges {str(ignores).lower()}, for "
        "which GGUF has no known name"
    )


def _expressions(state: Any) -> Iterator[str]:
    """The regular expressions of a pre-tokenizer, in the order in which they are applied."""
    for step in steps_of(state, "pretokenizers"):
        kind = step.get("type")
        pattern = step.get("pattern", {}).get("Regex") if kind == "Split" else None
        how = (step.get("behavior"), step.get("invert"))
        if pattern is not None and how in (("Isolated", False), ("Removed", True)):
            yield _escaped(pattern)
        elif kind == "Digits":
            yield r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            if step.get("use_regex", True):
                yield GPT2
        else:
            raise LlamaJaxError(
                f"the tokenizer.json has the pre-tokenizer {shortened(json.dumps(step))}, for which GGUF has no key"
            )


def _escaped(pattern: str) -> str:
    """A pattern with line ends written as escapes, because files have both spellings."""
    return pattern.replace("\r", r"\r").replace("\n", r"\n")


def _pad(table: _Table, size: int) -> None:
    """Adds unused tokens up to `size` tokens, named as llama.cpp's converter names them."""
    for index in range(len(table.tokens), size):
        table.tokens.append(f"[PAD{index}]")
        table.types.append(UNUSED)
        if table.scores is not None:
            table.scores.append(_PAD_SCORE)


def _templates(tokenizer: Tokenizer) -> dict[str, str]:
    """The chat templates by key."""
    return {
        TEMPLATE if name == "default" else f"{TEMPLATE}.{name}": text
        for name, text in tokenizer.words.chat_templates.items()
    }
