"""Trains a sentencepiece tokenizer on texts, with LLaMA's settings."""

import io
from collections.abc import Iterable

from llamajax.errors import LlamaJaxError
from llamajax.tokenizer.tokenizer import Tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a LLaMA-style sentencepiece tokenizer on `texts`: byte-pair encoding with byte fallback.

    The settings follow LLaMA's own model: identity normalization, digits split, whitespace kept; the ids are 0 <unk>,
    1 <s>, 2 </s>, 3–258 the bytes.

    Raises:
        LlamaJaxError: if the texts do not yield `vocab_size` pieces.
    """
    import sentencepiece  # imported here, because a machine for measuring may lack it (benchmarks/device.py)

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise LlamaJaxError(
            f"vocab_size is {vocab_size}: the text does not support it: expected at least 259 plus the text's letters, "
            f"and no more pieces than the text has ({str(error).splitlines()[-1][:200]})"
        ) from None
    return Tokenizer(model.getvalue())
