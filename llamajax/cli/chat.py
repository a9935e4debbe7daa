"""`llamajax chat`: a conversation, a line of input at a time."""

import contextlib
import sys
from collections.abc import Iterator

import jax
from absl import flags

from llamajax.chat.chatml import ChatML, Message
from llamajax.checkpoint import Opened, need_tokenizer
from llamajax.cli import smollm2
from llamajax.cli.model_flags import (
    chosen_activations,
    chosen_dtype,
    define_activations,
    define_dtype,
    define_model,
    define_threads,
    open_named,
    read_model,
    say,
)
from llamajax.cli.sampling_flags import check_sampling, chosen_sampling, define_sampling
from llamajax.cli.terminal import note, write
from llamajax.errors import LlamaJaxError
from llamajax.generation.stream import TextStream
from llamajax.model import Llama
from llamajax.tokenizer import Tokenizer

SUMMARY = "answer each line of input, with a model that was trained to"
EXAMPLES = (
    "llamajax chat",
    "echo 'What is the capital of France?' | llamajax chat --temperature=0",
    "llamajax chat --model=path/to/model.gguf --system='Answer in one sentence.'",
)

# The name of the model that is fetched.
SMOLLM2 = "smollm2"
_MOST_NEW_TOKENS = 512
# The cache of a conversation begins with so many slots, and doubles: few sizes, of which each needs programs.
_FIRST_SLOTS = 1024
_LONGEST_LINE = 1 << 20


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    define_model(values, default=SMOLLM2)
    values["model"].help = (
        f"checkpoint: a llamajax or Hugging Face folder, or a GGUF file, that carries a chat template in ChatML; "
        f"{SMOLLM2} is SmolLM2-135M-Instruct, 98 MB, which is fetched once into the user's cache folder"
    )
    define_dtype(values)
    define_activations(values)
    define_threads(values)
    flags.DEFINE_string("system", None, "system message; what the chat template says unless given", flag_values=values)
    flags.DEFINE_integer(
        "max_new_tokens",
        None,
        f"most tokens of an answer; {_MOST_NEW_TOKENS}, or a quarter of a small context, unless given",
        lower_bound=1,
        flag_values=values,
    )
    define_sampling(values, temperature=0.2, top_p=0.9)


def run(values: flags.FlagValues) -> None:
    """Answers on standard output as the answers come; a person gets a prompt, a pipe the answers alone.

    Raises:
        LlamaJaxError: for a model that carries no chat template in ChatML, or a line that is not UTF-8 or does not fit.
    """
    check_sampling(values)
    name = str(smollm2.fetch(_say_fetching)) if values.model == SMOLLM2 else values.model
    opened = open_named(values, name)
    tokenizer = need_tokenizer(opened, values.tokenizer)
    form = ChatML.of(tokenizer, name)
    conversation = Conversation(values, opened, form.ending(tokenizer), form)
    for line in _lines():
        conversation.answer(line)


def _say_fetching() -> None:
    say(f"fetching {smollm2.FILE}, {smollm2.NBYTES / 1e6:.0f} MB, once (Hugging Face, Apache-2.0)")


class Conversation:
    """The messages so far, and the model that answers them; its weights are read for the first answer."""

    def __init__(self, values: flags.FlagValues, opened: Opened, tokenizer: Tokenizer, form: ChatML):
        """Nothing said but the system message, if one is given."""
        self._values, self._opened, self._tokenizer, self._form = values, opened, tokenizer, form
        self._knobs = chosen_sampling(values, opened)
        self._first = [] if values.system is None else [Message("system", values.system)]
        self._said: list[Message] = []
        self._model: Llama | None = None
        context = opened.config.context_length
        self._limit = values.max_new_tokens or min(_MOST_NEW_TOKENS, context // 4)

    def answer(self, line: str) -> None:
        """Writes the answer to a line, and remembers both."""
        self._said.append(Message("user", line))
        stream = self._stream(self._fitting())
        for piece in stream:
            write(piece, end="")
        write("")
        (made,) = stream.completions
        if made.finish_reason == "length":
            say(f"the answer was cut at {self._limit} tokens: --max_new_tokens allows more")
        self._said.append(Message("assistant", made.text))

    def _fitting(self) -> list[int]:
        """Ids of the conversation; messages at its beginning are given up where the context has no room for them."""
        context, dropped = self._opened.config.context_length, 0
        while True:
            ids = self._form.encode(self._tokenizer, [*self._first, *self._said])
            if len(ids) + self._limit <= context:
                break
            if len(self._said) == 1:
                raise LlamaJaxError(
                    f"the line and what stands before it are {len(ids)} tokens, and an answer may have {self._limit}: "
                    f"expected {context} together, the model's context: shorten it, or lower --max_new_tokens"
                )
            del self._said[:2]
            dropped += 2
        if dropped:
            say(f"the context holds {context} tokens: the oldest {dropped} messages are forgotten")
        return ids

    def _stream(self, ids: list[int]) -> TextStream:
        """The answer to come."""
        values, dtype, slots = self._values, chosen_dtype(self._values), _FIRST_SLOTS
        options = {"backend": jax.default_backend(), "activations": chosen_activations(values)}
        while slots < len(ids) + self._limit:
            slots *= 2
        stream = TextStream(
            self._opened.outcome(dtype, **options) if self._model is None else self._model,
            self._tokenizer,
            ids,
            max_new_tokens=self._limit,
            **self._knobs,
            seed=values.seed,
            least_slots=min(slots, self._opened.config.context_length),
        )
        if self._model is None:
            stream.compile_while(lambda: read_model(self._opened, dtype, **options))
            self._model = stream.model
        return stream


def _lines() -> Iterator[str]:
    """Lines of standard input that hold something; a terminal shows that one is waited for."""
    if sys.stdin is None or sys.stdin.closed:
        raise LlamaJaxError("standard input is closed: expected lines to answer")
    if sys.stdin.isatty():
        yield from _typed()
        return
    number = 0
    while data := sys.stdin.buffer.readline(_LONGEST_LINE + 1):
        number += 1
        if len(data) > _LONGEST_LINE:
            raise LlamaJaxError(f"line {number} is longer than {_LONGEST_LINE} bytes: expected a line to answer")
        try:
            line = data.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise LlamaJaxError(f"line {number} is not UTF-8 text ({error.reason} at byte {error.start})") from None
        if line:
            yield line


def _typed() -> Iterator[str]:
    """Lines as a person types them, until the end of input."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  # arrow keys edit the line

    note("Each line is answered; Ctrl-D ends.")
    prompt = "> " if sys.stdout.isatty() else ""  # which Python writes to standard output
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            note("")
            return
        if line:
            yield line
