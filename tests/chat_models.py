"""A model for conversations whose every answer is known: it spells the alphabet and does not stop by itself."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tokenizers

import llamajax
from llamajax.tokenizer import Tokenizer
from llamajax.words import Words

# The default template that transformers used for models without one of their own.
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# After a newline the model says the first of these characters, after each character the next, after the last the first.
# Each character is one token.
CYCLE = "abcdefghijklmnopqrstuvwxyz "


def tokenizer_with(template: str | None, stop: tuple[int, ...] = (0,)) -> Tokenizer:
    """Returns a byte-level tokenizer whose first ids are ChatML's; by default `<|im_end|>` does not end a text."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(["Once upon a time there was a little fox. user assistant system"] * 9, trainer)
    files = {} if template is None else {"chat_template.jinja": template.encode()}
    return Tokenizer(library.to_str().encode(), words=Words(stop_ids=stop, files=files))


def random_model(vocab_size: int, context: int) -> llamajax.Llama:
    """Returns a small model with random weights."""
    config = llamajax.Config(
        vocab_size=vocab_size,
        width=32,
        ffn_width=64,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_size=16,
        context_length=context,
    )
    rng, weights = np.random.default_rng(0), llamajax.named_weights(llamajax.abstract_model(config))
    random = {name: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32) for name, leaf in weights.items()}
    return llamajax.model_from(random, config)


def answer(tokens: int) -> str:
    """Returns what the speller says in so many tokens."""
    return (CYCLE * (tokens // len(CYCLE) + 1))[:tokens]


def save_speller(path: Path, context_length: int) -> Path:
    """Writes the speller's checkpoint.

    Embeddings are one-hot, layers add nothing, and the head has a 1 where a token meets the next one of the cycle.
    """
    tokenizer = tokenizer_with(CHATML)
    size = tokenizer.vocab_size
    config = llamajax.Config(
        vocab_size=size,
        width=320,
        ffn_width=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_size=16,
        context_length=context_length,
    )
    weights = {
        name: np.zeros(leaf.shape, np.float32)
        for name, leaf in llamajax.named_weights(llamajax.abstract_model(config)).items()
    }
    weights["norm.weight_D"][:] = 1
    np.fill_diagonal(weights["embed_VD"], 1)
    ids = [tokenizer.encode(character, bos=False)[0] for character in CYCLE]
    for before, after in zip([*ids, *tokenizer.encode("\n", bos=False)], [*ids[1:], ids[0], ids[0]], strict=True):
        weights["head_VD"][after, before] = 1
    arrays = {name: jnp.asarray(array) for name, array in weights.items()}
    llamajax.save_checkpoint(llamajax.model_from(arrays, config), path, tokenizer=tokenizer)
    return path
