"""Tokens at which a text ends, by what they are called, for files that do not say it otherwise.

Source: `llama_vocab::impl::load` in src/llama-vocab.cpp of github.com/ggml-org/llama.cpp (`special_eog_ids`).
"""

from collections.abc import Iterable, Mapping

END_TEXTS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
        *("<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
        *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>"),
        *("<｜end▁of▁sentence｜>", "[e~["),
    )
)
# What a model of code writes behind a file that it was to fill in: `special_fim_pad_id`, `_rep_id` and `_sep_id`.
FIM_TEXTS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# Where a model of code is to fill in: no ends, and no text either.
_PLACES = frozenset(
    (
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>"),
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>"),
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>"),
        *("<|prefix|>", "<|suffix|>", "<|middle|>"),
    )
)
# Where the first are all there, the last is no end: channels of gpt-oss, calls of Solar, tools of Gemma 4.
_NO_END = (
    (("<|return|>", "<|call|>"), "<|end|>"),
    (("<|return|>", "<|calls|>"), "<|end|>"),
    (("<|call|>", "<|flush|>"), "<|end|>"),
    (("<|calls|>", "<|flush|>"), "<|end|>"),
    (("<|tool_response>",), "</s>"),
)


def ends_of(ids: Mapping[str, int], said: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """Where a vocabulary's texts end, as llama.cpp decides it.

    Args:
        ids: of every token by its text.
        said: ids by their part to play, as far as a file says them: "eos", "eot", "eom", and those of `FIM_TEXTS`.

    Returns:
        The ids, in order; and those that are control tokens by their text, whatever a file says of their types.
    """
    by_text = {index for text, index in ids.items() if text in END_TEXTS}
    ends = set(by_text)
    for part, texts in FIM_TEXTS.items():
        found = said.get(part, min((ids[text] for text in texts if text in ids), default=None))
        if found is not None:
            ends.add(found)
            by_text.add(found)
    ends |= {said[part] for part in ("eos", "eot", "eom") if part in said}
    for signs, text in _NO_END:
        if text in ids and all(sign in ids for sign in signs):
            ends.discard(ids[text])
            by_text.discard(ids[text])
    return sorted(ends), sorted(by_text | {index for text, index in ids.items() if text in _PLACES})


def with_first(first: int | None, ids: Iterable[int]) -> tuple[int, ...]:
    """Ids with one of them, or another, in front."""
    return tuple(dict.fromkeys([*([] if first is None else [first]), *ids]))
