"""Which part of a conversation a context of limited length still holds."""

import bisect
import dataclasses
from collections.abc import Callable, Sequence

from llamajax.chat.messages import Message
from llamajax.errors import LlamaJaxError

# Where a conversation no longer fits, turns leave until this part of the context is free. What stands behind them must
# be computed again, so it should not happen at every turn.
_FREED = 0.25


@dataclasses.dataclass(frozen=True)
class Window:
    """What the model is to see.

    Attributes:
        first: the message with which the oldest turn begins that it sees; a system message before it is seen, too.
        ids: of that part of the conversation.
        turns: how many turns left just now.
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
    """The window of a conversation that the model is to answer.

    A turn begins with a user's message, and ends before the next. Turns leave whole; the last one never does.

    Args:
        messages: all of them.
        first: the oldest message that was seen so far, a system message aside.
        encode: ids of a part of the conversation.
        context: most tokens of prompt and answer, but for the last of the answer, which nothing follows.
        most: tokens that an answer should have room for.
        least: tokens that it must have room for.

    Raises:
        LlamaJaxError: if the last turn does not fit by itself.
    """
    system = [message for message in messages[:1] if message.role == "system"]
    begins = [i for i in range(len(system), len(messages)) if messages[i].role == "user"]
    if len(messages) > len(system) and (not begins or begins[0] > len(system)):
        begins.insert(0, len(system))  # an assistant greeted, say
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
