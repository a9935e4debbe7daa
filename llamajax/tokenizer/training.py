"""A sentencepiece tokenizer learnt from texts, as LLaMA's own was."""

import io
from collections.abc import Iterable

from llamajax.errors import LlamaJaxError
from llamajax.tokenizer.tokenizer import Tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A LLaMA-style sentencepiece tokenizer learnt from `texts`: byte-pair encoding with byte fallback.

    Settings follow LLaMA's own model: identity normalization, digits split, whitespace kept, ids 0 <unk>, 1 <s>,
    2 </s>, 3–258 the bytes.

    Raises:
        LlamaJaxError: if the texts do not yield `vocab_size` pieces.
    """
    import sentencepiece  # here, because a machine for measuring may be without (benchmarks/device.py)

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
            f"vocab_size is {vocab_size}: the text does not support it: expected at least 259 plus its letters, and "
            f"no more pieces than it has ({str(error).splitlines()[-1][:200]})"
        ) from None
    return Tokenizer(model.getvalue())
