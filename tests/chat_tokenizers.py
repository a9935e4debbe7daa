"""Byte-level tokenizers with a chat template and the control tokens of ChatML and of other formats."""

from collections.abc import Sequence

import tokenizers

from llamajax.tokenizer import Tokenizer
from llamajax.words import AddedToken, Words

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tokenizer_with(template: str | None, added: Sequence[AddedToken] = ()) -> Tokenizer:
    """Returns a tokenizer of 300 ids, of which the first three are ChatML's; by default only id 0 ends a text."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(CHATML),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(["Once upon a time there was a little fox. user assistant system"] * 9, trainer)
    files = {} if template is None else {"chat_template.jinja": template.encode()}
    return Tokenizer(library.to_str().encode(), words=Words(stop_ids=(0,), files=files, added=tuple(added)))
