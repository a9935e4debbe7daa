"""One answer of a conversation, running while it is iterated over."""

from collections.abc import Callable, Generator, Iterator, Sequence

from llamajax.chat.messages import Message
from llamajax.chat.reply import CONTENT, THINKING, Piece, Reply, ReplyForm
from llamajax.generation.choose import Choice
from llamajax.generation.request import Completion
from llamajax.generation.speed import Speed
from llamajax.generation.stream import TextStream


class Answer:
    """An iterator over the pieces of an answer, which stand in the conversation as they come.

    An answer that is given up half way, that is stopped or interrupted, leaves what was said in the conversation. One
    that fails before anything was said leaves the conversation as it was.

    Attributes:
        message: the answer so far; all of it once the iteration has ended.
        samples: all of several samples, in the order of their making; the message is one of them.
        choice: which of several samples the message is, and why; None of one.
        note: why what began as a tool call stays text, or None.
    """

    def __init__(
        self,
        stream: TextStream,
        form: ReplyForm,
        messages: list[Message],
        conversation: Sequence[Message],
        choose: Callable[[Sequence[Completion], Sequence[Message]], Choice],
    ):
        """Nothing runs yet.

        Args:
            stream: the request.
            form: how the model marks parts of what it writes.
            messages: the list that becomes `conversation` and the answer when this begins to run.
            conversation: what is answered.
            choose: which of several samples is the answer.
        """
        self.message = Message("assistant", "")
        self.samples: list[Message] = []
        self.note: str | None = None
        self._stream, self._form, self._choose = stream, form, choose
        self._messages, self._conversation = messages, list(conversation)
        self.choice: Choice | None = None
        self._pieces = self._run()

    @property
    def completion(self) -> Completion:
        """The answer's ids, probabilities, and why it ended: "stop", "length" or "stopped"."""
        return self._stream.completions[self.choice.index if self.choice else 0]

    @property
    def completions(self) -> list[Completion]:
        """Those of all samples."""
        return self._stream.completions

    @property
    def speed(self) -> Speed:
        """What it took so far."""
        return self._stream.speed

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def stop(self) -> None:
        """Ends the answer after the tokens that are being computed; may be called by a signal handler."""
        self._stream.stop()

    def close(self) -> None:
        """Ends the answer where it is, if it has not ended."""
        self._pieces.close()

    def _run(self) -> Generator[Piece, None, None]:
        before = list(self._messages)
        self._messages[:] = [*self._conversation, self.message]
        replies = [Reply(self._form) for _ in self.completions]
        try:
            for texts in self._stream:
                texts = texts if isinstance(texts, list) else [texts]
                for reply, text in zip(replies, texts, strict=True):
                    pieces = reply.add(text)
                    if len(replies) == 1:
                        self._keep(reply)
                        yield from pieces
            yield from self._end(replies)
        except GeneratorExit:
            self._end(replies)
            raise
        except BaseException:
            if any(completion.tokens for completion in self.completions):
                self._end(replies)
            else:
                self._messages[:] = before
            raise

    def _end(self, replies: list[Reply]) -> list[Piece]:
        """Completes the message; returns the pieces that were not shown."""
        pieces = [reply.finish() for reply in replies]
        self.samples = [reply.message() for reply in replies]
        if len(replies) > 1:
            self.choice = self._choose(self.completions, self.samples)
        index = self.choice.index if self.choice else 0
        self.note = replies[index].note
        self._keep(replies[index])
        if len(replies) == 1:
            return pieces[0]
        shown = (Piece(THINKING, self.message.thinking or ""), Piece(CONTENT, self.message.content))
        return [piece for piece in shown if piece.text]

    def _keep(self, reply: Reply) -> None:
        """Puts the answer so far where it stands in the conversation, unless that was changed meanwhile."""
        shown, self.message = self.message, reply.message()
        if self._messages and self._messages[-1] is shown:
            self._messages[-1] = self.message
