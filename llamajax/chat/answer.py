"""One answer of a conversation, which is generated while it is iterated over."""

from collections.abc import Callable, Generator, Iterator, Sequence

from llamajax.chat.messages import Message
from llamajax.chat.reply import CONTENT, THINKING, Piece, Reply, ReplyForm
from llamajax.generation.choose import Choice
from llamajax.generation.request import Completion
from llamajax.generation.speed import Speed
from llamajax.generation.stream import TextStream


class Answer:
    """An iterator over the pieces of an answer; each piece is added to the conversation when it is generated.

    If an answer is closed, stopped or interrupted half way, its text so far stays in the conversation. If it fails
    before its first token, the conversation stays unchanged.

    Attributes:
        message: the answer so far; the whole answer once the iteration has ended.
        samples: the messages of all samples once the iteration has ended; `message` is one of them.
        choice: which of several samples was chosen as the message, and why; None if there is only one.
        note: why text that began as a tool call stays text, or None.
    """

    def __init__(
        self,
        stream: TextStream,
        form: ReplyForm,
        messages: list[Message],
        conversation: Sequence[Message],
        choose: Callable[[Sequence[Completion], Sequence[Message]], Choice],
    ):
        """Stores the request; runs nothing yet.

        Args:
            stream: the request.
            form: how the model marks the parts of its answers.
            messages: the list that is set to `conversation` and the answer once the iteration begins.
            conversation: the messages that are answered.
            choose: chooses one of several samples as the answer.
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
        """The answer's ids, log-probabilities and finish reason: "stop", "length" or "stopped"."""
        return self._stream.completions[self.choice.index if self.choice else 0]

    @property
    def completions(self) -> list[Completion]:
        """The completions of all samples."""
        return self._stream.completions

    @property
    def speed(self) -> Speed:
        """The cost of the answer so far."""
        return self._stream.speed

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def stop(self) -> None:
        """Ends the answer after the tokens in progress; a signal handler may call it."""
        self._stream.stop()

    def close(self) -> None:
        """Ends the answer now, if it has not ended."""
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
        """Completes the message; returns the pieces that were not shown yet."""
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
        """Updates the last message of the conversation to the answer so far, unless the caller has changed it."""
        shown, self.message = self.message, reply.message()
        if self._messages and self._messages[-1] is shown:
            self._messages[-1] = self.message
