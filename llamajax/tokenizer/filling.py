r"""Makes the prompt from which a code model fills in the text between a prefix and a suffix.

    ids, tokenizer = infill(tokenizer, "def add(a, b):\n", "\n    return c\n")
    middle = llamajax.generate(model, tokenizer, ids).text

The order is prefix, suffix, middle (Bavarian et al. 2022, arXiv:2207.14255). Reference: `infilling_prompt_tokens` of
codellama's `llama/generation.py`. Transformers' `CodeLlamaTokenizer` does the same up to version 4; version 5 puts a
space before the suffix.
"""

from llamajax.errors import LlamaJaxError
from llamajax.tokenizer.tokenizer import Tokenizer

# The names of the tokens before the prefix, before the suffix, before the middle and after the middle: Code Llama,
# Qwen2.5 Coder, StarCoder 2, DeepSeek Coder (llama.cpp's `special_fim_pre_id` and its kin).
_MARKS = (
    ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),
    ("<PRE>", "<SUF>", "<MID>", "<EOT>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|endoftext|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<|endoftext|>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", "<|endoftext|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<｜end▁of▁sentence｜>"),
)
# No piece joins this character to what follows it, so a text encoded after it gets no space before it.
_BEFORE = "☺"


def infill(tokenizer: Tokenizer, prefix: str, suffix: str) -> tuple[list[int], Tokenizer]:
    """Returns the prompt from which a model writes the text between `prefix` and `suffix`.

    Args:
        tokenizer: the tokenizer of a code model.
        prefix: the text before the gap.
        suffix: the text after the gap.

    Returns:
        The ids, and a tokenizer that also stops at the token that ends the filled-in text.

    Raises:
        LlamaJaxError: for a vocabulary without the tokens for filling in, or a text that is not Unicode.
    """
    for marks in _MARKS:
        before, behind, middle, end = (tokenizer.id_of(mark) for mark in marks)
        if before is None or behind is None or middle is None:
            continue
        first = [] if tokenizer.first_id is None else [tokenizer.first_id]
        ids = [*first, before, *tokenizer.encode(prefix, bos=False, eos=False), behind, *_alone(tokenizer, suffix)]
        stops = tokenizer.stop_ids if end is None else (*tokenizer.stop_ids, end)
        return [*ids, middle], tokenizer.replying(dict.fromkeys(stops))
    raise LlamaJaxError(
        "the vocabulary has no tokens for filling in: expected those of a model that was trained for it, such as "
        f"{', '.join(' '.join(marks[:3]) for marks in _MARKS[:3])}: give no suffix to continue the text instead"
    )


def _alone(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encodes a text without the space that a sentencepiece model puts before a text."""
    before = tokenizer.encode(_BEFORE, bos=False, eos=False)
    return tokenizer.encode(_BEFORE + text, bos=False, eos=False)[len(before) :]
