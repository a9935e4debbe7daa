"""Chooses the part of a conversation that fits into a context of limited length."""

import bisect
import dataclasses
from collections.abc import Callable, Sequence

from llamajax.chat.messages import Message
from llamajax.errors import LlamaJaxError

# If a conversation does not fit, turns leave until this fraction of the context is free. The tokens after them must be
# computed again, so this should not happen at every turn.
_FREED = 0.25


@dataclasses.dataclass(frozen=True)
class Window:
    """The part of a conversation that the model sees.

    Attributes:
        first: the index of the message that begins the oldest turn in the window; a system message is seen, too.
        ids: the ids of that part of the conversation.
        turns: the number of turns that left the window in this call.
    """

    first: int
    ids: list[int]
    turns: int


def fit(
    messages: Sequence[Message],
    first: int,
    encode: Callable[[Sequence[Message]], list[int]],
    context: int,
    most: int,
    least: int,
) -> Window:
    """Returns the window of a conversation for the next answer.

    A turn begins with a user's message, and ends before the next one. Only whole turns leave; the last one never does.

    Args:
        messages: all messages.
        first: the index of the oldest message in the window so far, not counting a system message.
        encode: returns the ids of a part of the conversation.
        context: the most tokens of prompt and answer together, without the last token of the answer.
        most: the number of tokens that an answer should have room for.
        least: the number of tokens that it must have room for.

    Raises:
        LlamaJaxError: if the last turn does not fit by itself.
    """
    system = [message for message in messages[:1] if message.role == "system"]
    begins = [i for i in range(len(system), len(messages)) if messages[i].role == "user"]
    if len(messages) > len(system) and (not begins or begins[0] > len(system)):
        begins.insert(0, len(system))  # for example, an assistant's greeting comes first
    begins = [begin for begin in begins if begin >= first] or begins or [len(system)]

    def ids_from(turn: int) -> list[int]:
        return encode([*system, *messages[begins[turn] :]])

    ids = ids_from(0)
    if len(ids) - 1 + most <= context:
        return Window(begins[0], ids, 0)
    last = len(begins) - 1
    allowed = int(context * (1 - _FREED))
    turns = bisect.bisect_left(range(last), True, key=lambda turn: len(ids_from(turn)) - 1 + most <= allowed)
    ids = ids_from(turns)
    if len(ids) - 1 + (least if turns == last else most) > context:
        raise LlamaJaxError(
            f"the last turn, with what must precede it, has {len(ids)} tokens, and its answer up to {least}: expected "
            f"at most {context} together, the model's context: shorten the turn, or lower max_new_tokens"
        )
    return Window(begins[turns], ids, turns)
