"""Checks the settings of a request, and keeps the host's side of each of its rows."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.files import shortened
from llamajax.generation.sampling import make_sampler, plain
from llamajax.tokenizer import Tokenizer

# The default of `max_new_tokens`, if the context has room for that many.
DEFAULT_NEW_TOKENS = 512

# A text, or ids: a sequence of whole numbers, or a NumPy or JAX array of them.
Prompt = str | Sequence[int] | np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class Completion:
    """The result of one row.

    Attributes:
        text: the new text, without the prompt and without a stop string.
        tokens: the new ids, without a stop token, but including the ids that spelt a stop string.
        log_probabilities: the log-probability of each of `tokens` under the model itself (before temperature and
            filters), in nats.
        prompt_tokens: the number of ids in the prompt, BOS included.
        finish_reason: "stop" for a stop token or string, "length" for `max_new_tokens`, "stopped" if the request was
            ended early (`TextStream.stop`).
    """

    text: str
    tokens: list[int]
    log_probabilities: list[float]
    prompt_tokens: int
    finish_reason: str


class Row:
    """The host's side of one row: decodes ids, finds stop strings, and holds back text that may still change."""

    def __init__(
        self,
        prompt: list[int],
        tokenizer: Tokenizer | None,
        stops: tuple[str, ...],
        stop_ids: Sequence[int] | None = None,
    ):
        """Starts a row without new tokens; `stop_ids` defaults to the tokenizer's."""
        self.prompt_tokens = len(prompt)
        self.tokens: list[int] = []
        self.log_probabilities: list[float] = []
        self.finish_reason: str | None = None
        self.not_finite = False
        self.cut = False  # whether a stop string ended the row, which only the host can see
        self._text, self._shown, self._stops = "", 0, stops
        self._stop_ids = frozenset((tokenizer.stop_ids if tokenizer else ()) if stop_ids is None else stop_ids)
        # Some models have more embeddings than their tokenizer has ids; such an id is shown as U+FFFD.
        self._known_ids = tokenizer.vocab_size if tokenizer else 0
        self._decoder = tokenizer.stream() if tokenizer else None
        if self._decoder:  # After a prompt the decoder keeps a space that begins the new text.
            for index in prompt:
                self._decoder.add(index)

    def take(self, tokens: np.ndarray, log_probabilities: np.ndarray, last: bool) -> tuple[str, int]:
        """Adds new ids; returns the text that has become final, and the number of ids that were added.

        At an id that was chosen from logits that are not finite, it sets `not_finite` and adds neither this id nor
        later ones.
        """
        if self.finish_reason:
            return "", 0
        before = len(self.tokens)
        for token, log_probability in zip(tokens.tolist(), log_probabilities.tolist(), strict=True):
            self.not_finite = not math.isfinite(log_probability)
            if self.not_finite:
                return self._release(), len(self.tokens) - before
            if token in self._stop_ids:
                self._end("stop")
                break
            self.tokens.append(token)
            self.log_probabilities.append(log_probability)
            if self._decoder and self._add(self._decoder.add(token) if token < self._known_ids else "\ufffd"):
                break
        if last and not self.finish_reason:
            self._end("length")
        return self._release(), len(self.tokens) - before

    def stop(self) -> str:
        """Ends the row if it has not ended; returns the text that was held back."""
        if self.finish_reason:
            return ""
        self._end("stopped")
        return self._release()

    def completion(self) -> Completion:
        """The result so far."""
        reason = self.finish_reason or "length"
        return Completion(self._text, self.tokens, self.log_probabilities, self.prompt_tokens, reason)

    def _release(self) -> str:
        """The text that has become certain since the last call."""
        held = 0 if self.finish_reason else overlap(self._text, self._stops)
        text = self._text[self._shown : len(self._text) - held]
        self._shown += len(text)
        return text

    def _add(self, piece: str) -> bool:
        """Appends text; if that completes a stop string, cuts before it, ends the row and returns True."""
        longest = max((len(stop) for stop in self._stops), default=0)
        searched = max(len(self._text) - longest, 0)
        self._text += piece
        hits = [at for stop in self._stops if (at := self._text.find(stop, searched)) >= 0]
        if hits:
            self._text = self._text[: min(hits)]
            self.finish_reason, self.cut = "stop", True
        return bool(hits)

    def _end(self, reason: str) -> None:
        self.finish_reason = reason
        if self._decoder:
            self._add(self._decoder.finish())


def as_prompts(prompts: Any) -> tuple[list[str | list[Any]], bool]:
    """The prompts as a list, and whether a single prompt (a text or a list of ids) was given; checks no elements."""
    prompts = plain(prompts)
    single = isinstance(prompts, str) or (
        isinstance(prompts, list) and bool(prompts) and not any(isinstance(item, str | list) for item in prompts)
    )
    if not single and not isinstance(prompts, list):
        raise LlamaJaxError(
            f"the prompt is {shortened(prompts)}: expected a text, a list of token ids, or a list of either"
        )
    return ([prompts] if single else prompts), single


def encode_prompts(tokenizer: Tokenizer | None, prompts: list[str | list[Any]], config: Config) -> list[list[int]]:
    """Encodes every prompt that is a text, and checks the ids of all prompts."""
    if not prompts:
        raise LlamaJaxError("no prompt was given: expected at least one")
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str):
            if tokenizer is None:
                raise LlamaJaxError("the model was loaded without a tokenizer: give one, or prompts as lists of ids")
            ids = tokenizer.encode(prompt, eos=False)  # the model continues the prompt: no EOS
        else:
            ids = prompt if isinstance(prompt, list) else [prompt]
            wrong = [index for index in ids if isinstance(index, bool) or not isinstance(index, int)]
            if wrong:
                raise LlamaJaxError(f"{shortened(wrong[0])} in a prompt: expected a text, or a list of whole numbers")
        if not ids:
            raise LlamaJaxError("a prompt has no tokens, and no BOS is put before it: expected at least one token")
        outside = [index for index in ids if not 0 <= index < config.vocab_size]
        if outside:
            raise LlamaJaxError(f"token {outside[0]} in a prompt: expected ids from 0 to {config.vocab_size - 1}")
        if len(ids) > config.context_length:
            raise LlamaJaxError(
                f"the prompt has {len(ids)} tokens, but the model's context only {config.context_length}: "
                "shorten the prompt"
            )
        encoded.append(ids)
    return encoded


def new_token_limit(prompts: list[list[int]], wanted: int | None, config: Config) -> int:
    """The number of tokens to generate: `wanted`, or the default if None. The last token needs no slot.

    Raises:
        LlamaJaxError: for a number out of range, or more than the context has room for.
    """
    room = config.context_length - max(len(prompt) for prompt in prompts) + 1
    wanted = plain(wanted)
    if wanted is None:
        return min(DEFAULT_NEW_TOKENS, room)
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise LlamaJaxError(f"max_new_tokens is {wanted!r}: expected a whole number, at least 1")
    if wanted > room:
        raise LlamaJaxError(
            f"max_new_tokens is {wanted}: expected at most {room}, the room in the context of {config.context_length} "
            "tokens after the longest prompt: ask for fewer, or shorten the prompt"
        )
    return wanted


def check_knobs(knobs: Mapping[str, Any], rows: int) -> None:
    """Checks knobs of `make_sampler`.

    Raises:
        LlamaJaxError: for a value out of range, or a knob that has neither one value nor one for each prompt.
    """
    make_sampler(**knobs)
    for name, knob in knobs.items():
        shape = np.shape(plain(knob)) if knob is not None else ()
        if shape and shape != (rows,):
            raise LlamaJaxError(
                f"{name} has values of shape {shape}: expected one value, or one for each of {rows} prompts"
                if len(shape) > 1
                else f"{name} has {shape[0]} values: expected one, or one for each of {rows} prompts"
            )


def by_prompt(values: Mapping[str, Any], prompts: int) -> list[dict[str, Any]]:
    """The values of each prompt, from one value for all prompts or a list with one for each."""
    plainly = {name: plain(value) for name, value in values.items()}
    return [
        {name: value[i] if isinstance(value, list) else value for name, value in plainly.items()}
        for i in range(prompts)
    ]


def check_samples(samples: Any) -> int:
    """Checks and returns the number of samples of each prompt; 1 for None."""
    samples = plain(samples)
    if samples is None:
        return 1
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise LlamaJaxError(f"samples is {samples!r}: expected a whole number, at least 1")
    return samples


def check_ids(ids: Sequence[int], config: Config) -> tuple[int, ...]:
    """Checks stop ids and returns them as a tuple."""
    ids = plain(ids)
    known = range(config.vocab_size)
    wrong = [index for index in ids if isinstance(index, bool) or not isinstance(index, int) or index not in known]
    if wrong:
        raise LlamaJaxError(
            f"{shortened(wrong[0])} in stop_ids: expected whole numbers from 0 to {config.vocab_size - 1}"
        )
    return tuple(ids)


def row_seeds(seed: Any, rows: int) -> list[int]:
    """Checks one seed, or a list of seeds, and returns one seed for each prompt."""
    seed = plain(seed)
    seeds = seed if isinstance(seed, list) else [seed] * rows
    if len(seeds) != rows:
        raise LlamaJaxError(f"{len(seeds)} seeds were given: expected one, or one for each of {rows} prompts")
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
            raise LlamaJaxError(f"seed is {value!r}: expected a whole number from 0 to {(1 << 32) - 1}")
    return seeds


def row_keys(seeds: Sequence[int], samples: Sequence[int] | None = None) -> jax.Array:
    """Returns one PRNG key for each row: the seed's own key for sample 0, a key by `fold_in` for any other sample."""
    key_B = jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))
    if not samples or not any(samples):
        return key_B
    sample_B = np.asarray(samples, np.uint32)
    return jax.numpy.where(sample_B > 0, jax.vmap(jax.random.fold_in)(key_B, sample_B), key_B)


def stop_strings(stop: str | Sequence[str] | None, tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """Checks the stop strings and returns them as a tuple."""
    if stop is None:
        return ()
    stops = tuple(stop) if isinstance(stop, Sequence) and not isinstance(stop, str) else (stop,)
    if any(not isinstance(text, str) or not text for text in stops):
        raise LlamaJaxError(f"stop is {stop!r}: expected texts of at least one character")
    if stops and tokenizer is None:
        raise LlamaJaxError("stop strings need a tokenizer, and the model was loaded without one: give a tokenizer")
    return stops


def overlap(text: str, marks: Sequence[str]) -> int:
    """The length of the longest suffix of `text` that is a proper prefix of a mark, such as a stop string."""
    longest = 0
    for mark in marks:
        sizes = range(min(len(text), len(mark) - 1), longest, -1)
        longest = next((size for size in sizes if text.endswith(mark[:size])), longest)
    return longest
