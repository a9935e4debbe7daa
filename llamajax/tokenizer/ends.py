"""Finds the tokens at which a text ends by their names, for files that do not list them.

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
# What a code model writes after it has filled in a file: `special_fim_pad_id`, `_rep_id` and `_sep_id`.
FIM_TEXTS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# Tokens that mark where a code model fills in. They do not end a text, but they are control tokens.
_PLACES = frozenset(
    (
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>"),
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>"),
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>"),
        *("<|prefix|>", "<|suffix|>", "<|middle|>"),
    )
)
# If a vocabulary has all tokens of the first group, then the last token does not end a text: gpt-oss uses it for
# channels, Solar for calls, Gemma 4 for tools.
_NO_END = (
    (("<|return|>", "<|call|>"), "<|end|>"),
    (("<|return|>", "<|calls|>"), "<|end|>"),
    (("<|call|>", "<|flush|>"), "<|end|>"),
    (("<|calls|>", "<|flush|>"), "<|end|>"),
    (("<|tool_response>",), "</s>"),
)


def ends_of(ids: Mapping[str, int], said: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """Returns the ids at which texts of a vocabulary end, by llama.cpp's rules.

    Args:
        ids: the id of every token by its text.
        said: the ids that a file gives, by their role: "eos", "eot", "eom", and the keys of `FIM_TEXTS`.

    Returns:
        The ids in ascending order; and the ids that are control tokens because of their text, whatever types the file
        gives them.
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
    """The ids without duplicates, with `first` in front unless it is None."""
    return tuple(dict.fromkeys([*([] if first is None else [first]), *ids]))
