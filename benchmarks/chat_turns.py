"""Time to the first text of an answer after a long history: of the first turn and of the second, in one process.

    python benchmarks/chat_turns.py --rounds=15                         # SmolLM2-135M-Instruct, 1,000 tokens
    python benchmarks/chat_turns.py --model=model.gguf --history=4000 --words=10

Each round opens a new chat with the same history. Its first turn prefills the whole history, its second turn only the
new message. The time is measured from the call of `Chat.stream` to the first text, and includes the template, the
encoding and the first decode step. Prompts are prefilled in chunks of 16, 32, 64 or 256 tokens: the second question is
one chunk of 16, or of 32 with some `--words`. Figures are medians over the rounds, after one round that is not counted;
the ratio is the median of the ratios of the rounds. The table also shows the number of tokens that each turn prefilled,
and the time per prefilled token.
"""

import json
import statistics
import time
from typing import NamedTuple

import jax
from absl import app, flags

from llamajax import Chat, Message, load
from llamajax.cli import smollm2

flags.DEFINE_string("model", None, "checkpoint with a chat template; SmolLM2 unless given")
flags.DEFINE_integer("history", 1000, "tokens of the conversation before the first turn", lower_bound=1)
flags.DEFINE_integer("words", 0, "words to add to the second question", lower_bound=0)
flags.DEFINE_integer("rounds", 15, "number of rounds, each with both turns", lower_bound=1)
flags.DEFINE_bool("json", False, "print JSON instead of a table")

_FACTS = "The river is {} kilometres long, and a town of {} people lies on it."
_QUESTIONS = ("How long is the river?", "How many people live there?")


class Turn(NamedTuple):
    """Seconds to the first text, the number of prefilled tokens, and the number of tokens reused from the cache."""

    seconds: float
    prefilled: int
    reused: int


def history(chat: Chat, length: int) -> list[Message]:
    """Returns a conversation of about `length` tokens."""
    said: list[Message] = []
    while len(chat.template.encode(chat.tokenizer, [*said, Message("user", "")])) < length:
        number = len(said)
        said += [Message("user", _FACTS.format(100 + number, 5000 + number)), Message("assistant", "I see.")]
    return said


def turn(chat: Chat, question: str) -> Turn:
    """Runs one turn to its end."""
    start = time.perf_counter()
    answer = chat.stream(question)
    next(answer)
    seconds = time.perf_counter() - start
    for _ in answer:
        pass
    return Turn(seconds, answer.speed.prefill_tokens, answer.speed.reused_tokens)


def main(argv: list[str]) -> None:
    """Measures all rounds and prints the medians."""
    values = flags.FLAGS
    # In the layout of the backend, as `llamajax chat` reads it.
    model, tokenizer = load(values.model or smollm2.fetch(), backend=jax.default_backend())

    def new() -> Chat:
        return Chat(model, tokenizer, temperature=0, max_new_tokens=16)

    said, longer = history(new(), values.history), _QUESTIONS[1] + " please" * values.words
    rounds = []
    for _ in range(values.rounds + 1):
        chat = new()
        chat.messages = list(said)
        rounds.append([turn(chat, question) for question in (_QUESTIONS[0], longer)])
    del rounds[0]  # the first round compiles
    seconds = [statistics.median(each[i].seconds for each in rounds) for i in range(2)]
    ratio = statistics.median(second.seconds / first.seconds for first, second in rounds)
    if values.json:
        print(json.dumps({"seconds": seconds, "ratio": ratio, "tokens": [each._asdict() for each in rounds[-1]]}))
        return
    print(f"{'turn':8}{'first text':>12}{'prefilled':>12}{'kept':>8}{'a token':>12}")
    for name, time_of, last in zip(("first", "second"), seconds, rounds[-1], strict=True):
        each = f"{time_of / max(last.prefilled, 1) * 1e3:.2f} ms"
        print(f"{name:8}{time_of * 1e3:9.1f} ms{last.prefilled:12}{last.reused:8}{each:>12}")
    print(f"second / first: {ratio:.3f}")


if __name__ == "__main__":
    app.run(main)
