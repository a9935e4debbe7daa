"""The conversation that the flags of `llamajax chat` describe, at a terminal or in a pipe."""

import dataclasses
import os

import jax
from absl import flags

from llamajax.chat.answer import Answer
from llamajax.chat.builtin import BUILT_IN
from llamajax.chat.chat import Chat
from llamajax.chat.messages import load_conversation
from llamajax.chat.template import Template
from llamajax.checkpoint import need_tokenizer
from llamajax.cli.model_flags import chosen_activations, chosen_dtype, open_named, read_model, say
from llamajax.cli.sampling_flags import chosen_cache_dtype, chosen_sampling
from llamajax.files import read_text
from llamajax.tokenizer import Tokenizer
from llamajax.words import CHAT_TEMPLATE

_LARGEST_TEMPLATE = 1 << 20


class Conversation:
    """A `Chat` whose weights are read when they are first needed.

    Attributes:
        chat: the messages so far, and the settings for answers.
    """

    def __init__(self, values: flags.FlagValues, name: str):
        """Opens the checkpoint; no weight is read yet.

        Args:
            values: the flags of the command.
            name: name or path of the checkpoint.

        Raises:
            LlamaJaxError: for the reasons of `Chat` and `open_checkpoint`.
        """
        self._opened = open_named(values, name)
        self._name = name
        self._dtype = chosen_dtype(values)
        self._options = {"backend": jax.default_backend(), "activations": chosen_activations(values)}
        self._has_weights = False
        tokenizer, template = _with_template(need_tokenizer(self._opened, values.tokenizer), values.template)
        self.chat = Chat(
            self._opened.outcome(self._dtype, **self._options),
            tokenizer,
            system=values.system,
            template=Template.of(tokenizer, name, template),
            max_new_tokens=values.max_new_tokens,
            cache_dtype=chosen_cache_dtype(values),
            speculate=values.speculate,
            think=values.think,
            samples=values.samples,
            vote=values.vote,
            seed=values.seed,
            on_note=say,
            **chosen_sampling(values, self._opened),
        )
        if values.load is not None:
            self.chat.messages = load_conversation(values.load)

    def stream(self, text: str) -> Answer:
        """Returns the answer to a message."""
        self.read_weights()
        return self.chat.stream(text)

    def retry(self) -> Answer:
        """Returns another answer to the last message."""
        self.read_weights()
        return self.chat.retry()

    def read_weights(self) -> None:
        """Reads the weights, unless they are read already, while programs are compiled."""
        if not self._has_weights:
            self.chat.compile_while(lambda: read_model(self._opened, self._dtype, **self._options))
            self._has_weights = True

    def described(self) -> str:
        """The model's name and its context length, as text."""
        return f"{self._name.rpartition('/')[2]}, {self.chat.context_length:,} tokens of context"

    def took(self, answer: Answer) -> str:
        """Tokens, speed and context use of an answer, and why it ended unless the model ended it, as text."""
        made, rate = len(answer.completion.tokens), answer.speed.decode_tokens_per_second
        used = f"{self.chat.context_used:,} of {self.chat.context_length:,} tokens of context"
        reasons = {
            "stopped": " (stopped)",
            "length": f" (stopped at the limit of {made:,} tokens: /max_new_tokens raises it)",
        }
        ended = reasons.get(answer.completion.finish_reason, "")
        return f"{made:,} token{'' if made == 1 else 's'}, {rate:.1f} tokens/s, {used}{ended}"


def _with_template(tokenizer: Tokenizer, wanted: str | None) -> tuple[Tokenizer, str | None]:
    """The tokenizer and the name of a template; if `wanted` is a file, a tokenizer with that chat template and None."""
    if wanted is None or wanted in (*BUILT_IN, *tokenizer.words.chat_templates) or not os.path.exists(wanted):
        return tokenizer, wanted
    files = {**tokenizer.words.files, CHAT_TEMPLATE: read_text(wanted, _LARGEST_TEMPLATE).encode()}
    return Tokenizer(tokenizer.model_bytes, words=dataclasses.replace(tokenizer.words, files=files)), None
