"""Samples a calibration text from the model itself, for use when no other text is available.

Liu et al. 2023, "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", arXiv:2305.17888: samples
from the model's own distribution have its vocabulary and its habits.
"""

from collections.abc import Callable

import numpy as np

from llamajax.generation.stream import generate
from llamajax.model import Llama
from llamajax.tokenizer import Tokenizer

# Number of texts that are sampled together.
_ROWS = 16


def own_text(
    model: Llama,
    tokenizer: Tokenizer,
    tokens: int,
    *,
    length: int = 512,
    seed: int = 0,
    on_tokens: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Samples texts from a model at temperature 1 and concatenates them.

    Args:
        model: a model with float weights.
        tokenizer: its BOS token begins each text; a randomly drawn token does if it has no BOS.
        tokens: number of tokens to return.
        length: the largest number of tokens of one text.
        seed: seed of the draws.
        on_tokens: called with (tokens done, tokens in all).

    Returns:
        int32 ids [tokens].
    """
    made: list[np.ndarray] = []
    count, draws = 0, np.random.default_rng(seed)
    while count < tokens:
        first = tokenizer.bos_id
        first = int(draws.integers(model.config.vocab_size)) if first is None else first
        texts = generate(
            model, tokenizer, [first], samples=_ROWS, max_new_tokens=length - 1, temperature=1.0, seed=seed + count
        )
        for text in texts:
            made.append(np.asarray([first, *text.tokens], np.int32))
            count += len(made[-1])
        on_tokens(min(count, tokens), tokens)
    return np.concatenate(made)[:tokens]
