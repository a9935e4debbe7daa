"""`llamajax chat`: a conversation at a terminal, or an answer to each line of standard input."""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from llamajax.chat.answer import Answer
from llamajax.chat.reply import CONTENT
from llamajax.cli import smollm2, user_state
from llamajax.cli.conversation import Conversation
from llamajax.cli.flag_groups import COMMON, OUTPUT, group
from llamajax.cli.model_flags import define_activations, define_dtype, define_model, define_threads, say
from llamajax.cli.sampling_flags import (
    check_sampling,
    define_kv_cache,
    define_samples,
    define_sampling,
    define_speculate,
)
from llamajax.cli.terminal import as_json, harmless, is_terminal, write
from llamajax.errors import LlamaJaxError

SUMMARY = "chat with a model, at a terminal or with one message for each line of input"
EXAMPLES = (
    "llamajax chat",
    "echo 'What is the capital of France?' | llamajax chat --temperature=0",
    "llamajax chat --model=path/to/model.gguf --system='Answer in one sentence.'",
)

# The value of --model for the model that is fetched.
SMOLLM2 = "smollm2"
_LONGEST_LINE = 1 << 20


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    define_model(values, default=SMOLLM2)
    values["model"].help = (
        f"`MODEL` to chat with: a llamajax or Hugging Face folder, or a GGUF file, with a chat template. {SMOLLM2} is "
        "SmolLM2-135M-Instruct (98 MB), which is fetched once into the user's cache folder."
    )
    with group(values, COMMON):
        flags.DEFINE_string(
            "system",
            None,
            "System message `TEXT`. Without this flag the chat template decides.",
            flag_values=values,
        )
        flags.DEFINE_integer(
            "max_new_tokens",
            None,
            "Generates at most `N` tokens for an answer. Without this flag the limit is 512 tokens, or 4096 for a "
            "model that thinks, but at most a quarter of the context.",
            lower_bound=1,
            flag_values=values,
        )
    define_sampling(values, temperature=0.2, top_p=0.9)
    with group(values, "Conversation"):
        flags.DEFINE_string(
            "template",
            None,
            "Chat template: the `NAME` of a built-in one, or a Jinja file. Without this flag the model's own is used.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "load", None, "Continues the conversation in `FILE`, which /save has written.", flag_values=values
        )
        flags.DEFINE_boolean(
            "history",
            True,
            "Keeps what is typed at a terminal, for the arrow keys of later conversations, in a file that only the "
            "user can read.",
            flag_values=values,
        )
    define_samples(values)
    define_dtype(values)
    define_activations(values)
    define_kv_cache(values)
    define_speculate(values)
    define_threads(values)
    with group(values, OUTPUT):
        flags.DEFINE_boolean("markdown", True, "Shows answers as Markdown at a terminal.", flag_values=values)
        flags.DEFINE_boolean(
            "json",
            False,
            "Prints one JSON object for each line of input: the answer, its thinking, tool calls, token ids and speed.",
            flag_values=values,
        )


def run(values: flags.FlagValues) -> None:
    """Runs a conversation at a terminal; in a pipe, answers each line of standard input on standard output.

    Raises:
        LlamaJaxError: for a model that has no chat template, or a line that is not UTF-8 or too long.
    """
    check_sampling(values)
    if sys.stdin is None or sys.stdin.closed:
        raise LlamaJaxError("standard input is closed: expected messages, one in each line")
    name = str(smollm2.fetch(_say_fetching)) if values.model == SMOLLM2 else values.model
    conversation = Conversation(values, name)
    if is_terminal(sys.stdin) and is_terminal(sys.stdout) and not values.json:
        # Imported here, because a pipe needs none of the libraries for line editing and drawing.
        from llamajax.cli.chat_terminal import Session

        Session(conversation, values.markdown, user_state() / "chat_history" if values.history else None).run()
        return
    for line in _lines():
        answer = conversation.stream(line)
        if values.json:
            write(as_json(_described(answer)))
        else:
            _write(answer)
        if answer.completion.finish_reason == "length":
            say(
                f"the answer stopped at the limit of {len(answer.completion.tokens)} tokens: --max_new_tokens raises it"
            )


def _say_fetching() -> None:
    say(f"fetching {smollm2.FILE} ({smollm2.NBYTES / 1e6:.0f} MB, by Hugging Face, Apache-2.0); later runs reuse it")


def _write(answer: Answer) -> None:
    """Streams an answer's content, not its thinking; on a terminal with control characters escaped."""
    shown = harmless if is_terminal(sys.stdout) else str
    for piece in answer:
        if piece.kind == CONTENT:
            write(shown(piece.text), end="")
    write("")


def _described(answer: Answer) -> dict[str, Any]:
    """Waits for the end of an answer and returns it as a JSON object."""
    for _ in answer:
        pass
    message, completion, speed = answer.message, answer.completion, answer.speed
    return {
        "role": message.role,
        "content": message.content,
        "thinking": message.thinking,
        "tool_calls": [call.as_dict() for call in message.tool_calls],
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "speed": {
            **dataclasses.asdict(speed),
            "prefill_tokens_per_second": speed.prefill_tokens_per_second,
            "decode_tokens_per_second": speed.decode_tokens_per_second,
        },
    }


def _lines() -> Iterator[str]:
    """Yields the lines of standard input that are not blank."""
    if is_terminal(sys.stdin):
        say("type a message and press Enter; Ctrl-D ends")
    number = 0
    while data := sys.stdin.buffer.readline(_LONGEST_LINE + 1):
        number += 1
        if len(data) > _LONGEST_LINE:
            raise LlamaJaxError(
                f"line {number} of standard input is too long: expected at most {_LONGEST_LINE} bytes: split the "
                "message"
            )
        try:
            line = data.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise LlamaJaxError(
                f"line {number} of standard input: {error.reason} at byte {error.start}: expected UTF-8 text"
            ) from None
        if line:
            yield line
