"""Writes byte-level byte-pair encoding as a tokenizer.json, and lists the steps of the parts of such a file.

The format is that of Hugging Face's library tokenizers (github.com/huggingface/tokenizers, version "1.0").
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def byte_level_json(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str] | str],
    *,
    patterns: Sequence[str],
    ignore_merges: bool,
    special: Mapping[str, int],
    user_defined: Mapping[str, int],
    bos: str | None = None,
    eos: str | None = None,
) -> bytes:
    """Returns the bytes of a tokenizer.json.

    Args:
        vocabulary: ids by piece, in GPT-2's characters for bytes (`byte_level`).
        merges: pairs of pieces by priority, as tuples or joined by a space.
        patterns: regular expressions that split a text, one after the other, into parts that are encoded separately.
        ignore_merges: whether a part that equals a piece becomes that piece, whatever the merges.
        special: ids of special tokens, which have no text.
        user_defined: ids of added tokens that have text.
        bos: the special token that begins every text, or None.
        eos: the special token that ends every text, or None.
    """
    kinds = [(special, True), (user_defined, False)]
    added: list[dict[str, Any]] = [
        {
            "id": index,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": is_special,
        }
        for tokens, is_special in kinds
        for text, index in tokens.items()
    ]
    splits: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    value = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": _template(bos, eos, special),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _template(bos: str | None, eos: str | None, special: Mapping[str, int]) -> dict[str, Any] | None:
    """A post-processor that puts BOS before a text and EOS after it."""
    used = {text: special[text] for text in (bos, eos) if text is not None}
    if not used:
        return None
    token = lambda text, part: [] if text is None else [{"SpecialToken": {"id": text, "type_id": part}}]  # noqa: E731
    first = [*token(bos, 0), {"Sequence": {"id": "A", "type_id": 0}}, *token(eos, 0)]
    second = [*token(bos, 1), {"Sequence": {"id": "B", "type_id": 1}}, *token(eos, 1)]
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, *second],
        "special_tokens": {
            text: {"id": text, "ids": [index], "tokens": [text]} for text, index in sorted(used.items())
        },
    }


def steps_of(state: Any, name: str) -> Iterator[Mapping[str, Any]]:
    """Yields the steps of a part of a tokenizer.json, which is null, one step, or a sequence of steps in `name`."""
    if state is None:
        return
    if state.get("type") == "Sequence":
        for step in state[name]:
            yield from steps_of(step, name)
    else:
        yield state
