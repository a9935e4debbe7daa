"""`Chat`: a conversation with a model.

    chat = Chat(model, tokenizer, system="Answer in one sentence.", temperature=0)
    print(chat.send("What is the capital of France?").content)
    for piece in chat.stream("And of Japan?"):
        print(piece.text, end="", flush=True)

What the model sees at every turn is what the template makes of the messages, nothing else. The cache is kept from turn
to turn: only what lies behind the longest beginning that the new text shares with it is computed.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from llamajax.chat.abilities import in_terms_of, reply_form, thinking_switch, turn_beginnings
from llamajax.chat.answer import Answer
from llamajax.chat.messages import Message, as_messages
from llamajax.chat.reply import ReplyForm
from llamajax.chat.template import Template
from llamajax.chat.tool_calls import check_tools
from llamajax.chat.window import fit
from llamajax.errors import LlamaJaxError
from llamajax.generation.choose import Choice, best_of, vote, with_steps
from llamajax.generation.kept import Kept
from llamajax.generation.request import DEFAULT_NEW_TOKENS, Completion, stop_strings
from llamajax.generation.sampling import make_sampler, plain
from llamajax.generation.stream import TextStream
from llamajax.meshes import auto_mesh
from llamajax.model import Llama
from llamajax.tokenizer import Tokenizer
from llamajax.words import SAMPLING

# The cache of a conversation begins with so many slots, and doubles: few sizes, of which each needs programs.
FIRST_SLOTS = 1024
# What is written for oneself is longer than what is said: so many times as many tokens, unless a number is given.
_THINKING_LENGTH = 8


class Chat:
    """A conversation.

    Attributes:
        knobs: of `sampling.make_sampler`, by name; may be changed between turns.
        model: what answers. Its leaves may be abstract (`jax.ShapeDtypeStruct`) until `compile_while`.
        tokenizer: its tokenizer, which ends where the template ends a message.
        template: how messages become text.
        tools: what the model may call, as the template is given it; fixed when the chat is made.
        max_new_tokens: most tokens of an answer, its thinking included, or None.
        think: whether the model is to think before it answers.
        samples: how many answers are made at once, of which one is chosen.
        vote: whether the answer is the one on which most samples agree, rather than the likeliest.
        seed: of the draws of an answer.
        context_length: most tokens of a conversation.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        template: Template | str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_new_tokens: int | None = None,
        cache_dtype: jax.typing.DTypeLike | None = None,
        speculate: int = 0,
        think: bool = False,
        samples: int = 1,
        vote: bool = False,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        on_note: Callable[[str], None] = warnings.warn,
        **knobs: Any,
    ):
        """Checks; nothing runs yet.

        Args:
            model: see the attributes.
            tokenizer: that of the checkpoint, with which it brings its template.
            system: the system message; None for none, which is where some templates put in their own.
            template: one by itself, or the name of a built-in one; the checkpoint's unless given.
            tools: functions as JSON schemas, `{"type": "function", "function": {"name": …, "parameters": …}}`.
            max_new_tokens: 512 unless given, eight times as many with thinking, or a quarter of a small context.
            cache_dtype: as of `TextStream`.
            speculate: likewise.
            think: see the attributes: by the template's own switch, else by asking for steps.
            samples: see the attributes.
            vote: likewise.
            seed: likewise.
            stop: texts at which an answer ends, beside what the template says.
            on_note: told what a user should know, such as that turns have left the context.
            **knobs: temperature, top_k, top_p, min_p, repetition_penalty; what the checkpoint says unless given.

        Raises:
            LlamaJaxError: for a model without a template, tools for which it has no place, or a value out of range.
        """
        self.template = template if isinstance(template, Template) else Template.of(tokenizer, name=template)
        self.model, self.tools, self.on_note = model, check_tools(tools), on_note
        self.max_new_tokens, self.think, self.seed = max_new_tokens, think, seed
        self.samples, self.vote = samples, vote
        self.knobs = {**tokenizer.words.sampling, **knobs}
        self._messages = [] if system is None else [Message("system", system)]
        self.context_length = model.config.context_length
        self._switch = thinking_switch(self.template)
        self._forms = self._reply_forms(tokenizer)
        marks = [mark for form in self._forms.values() for mark in form.marks]
        self.tokenizer = tokenizer.replying(self.template.stop_ids(tokenizer), marks)
        stops = [*stop_strings(stop, tokenizer), *turn_beginnings(self.template, tokenizer)]
        self._options: dict[str, Any] = {"cache_dtype": cache_dtype, "speculate": speculate, "stop": stops or None}
        self._kept = Kept()
        self._first = 0  # the oldest message that is seen
        self._tries = 0  # of the last answer
        self._used = 0  # tokens of the last prompt
        self._answer: Answer | None = None
        self._is_noted = False
        self._check()

    # ---- Turns -------------------------------------------------------------------------------------------------------

    def stream(self, message: str | Message | Mapping[str, Any] | Sequence[Message | Mapping[str, Any]]) -> Answer:
        """The answer to a user's text, to one message, or to several, the last of which is no assistant's.

        An answer that has not ended does so now.

        Raises:
            LlamaJaxError: for what is no message, or does not fit the context; the conversation is as before.
        """
        self._tries = 0
        return self._begin(as_messages(message))

    def send(self, message: str | Message | Mapping[str, Any] | Sequence[Message | Mapping[str, Any]]) -> Message:
        """The whole answer; arguments and errors as of `stream`, and of `TextStream`."""
        self._tries = 0
        answer = self._begin(as_messages(message), smooth=False)
        for _ in answer:
            pass
        return answer.message

    def retry(self) -> Answer:
        """Another answer, of another seed, in the place of the last one.

        Raises:
            LlamaJaxError: if nothing was asked yet.
        """
        self.close()
        asked = list(self.messages)
        while asked and asked[-1].role == "assistant":
            asked.pop()
        if not asked or asked[-1].role == "system":
            raise LlamaJaxError("there is no answer to replace: expected a message first")
        self._tries += 1
        return self._begin([], asked)

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.close()
        self.messages = self.messages[:1] if self.system is not None else []
        self._used, self._answer = 0, None

    def close(self) -> None:
        """Ends an answer that has not ended."""
        if self._answer is not None:
            self._answer.close()

    def compile_while(self, read: Callable[[], Llama]) -> None:
        """Makes the programs of a first, short turn ready while `read`, in a thread of its own, makes the model."""
        stream = self._text_stream(self._encode([*self.messages, Message("user", "")]), 1, smooth=True)
        stream.compile_while(read)
        self.model = stream.model

    # ---- What may be asked and changed between turns -----------------------------------------------------------------

    @property
    def messages(self) -> list[Message]:
        """All messages so far, also those that have left the context; a system message first, if there is one.

        May be changed or set between turns, to a list of messages or of what `Message.of` reads.
        """
        return self._messages

    @messages.setter
    def messages(self, messages: Sequence[Message | Mapping[str, Any]]) -> None:
        read = as_messages(messages) if messages else []
        self.close()
        self._messages, self._first = read, 0

    @property
    def system(self) -> str | None:
        """The system message; another may be set."""
        return self.messages[0].content if self.messages and self.messages[0].role == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages if self.system is None else self.messages[1:]
        changed = rest if text is None else [Message("system", text), *rest]
        self._first = max(self._first + len(changed) - len(self.messages), 0)
        self.messages[:] = changed

    @property
    def context_used(self) -> int:
        """Tokens of the last prompt and its answer."""
        made = len(self._answer.completion.tokens) if self._answer is not None else 0
        return self._used + made

    # ---- Within ------------------------------------------------------------------------------------------------------

    def _begin(self, given: list[Message], asked: list[Message] | None = None, *, smooth: bool = True) -> Answer:
        self.close()
        self._check()
        conversation = [*self.messages, *given] if asked is None else asked
        if conversation[-1].role == "assistant":
            raise LlamaJaxError("the last message is by the assistant: expected one by the user or a tool to answer")
        most, least = self._room()
        window = fit(conversation, self._first, self._encode, self.context_length, most, least)
        if window.turns:
            self.on_note(
                f"the context holds {self.context_length} tokens: the oldest {window.turns} turns have left it"
                if window.turns > 1
                else f"the context holds {self.context_length} tokens: the oldest turn has left it"
            )
        if self.template.note and not self._is_noted:
            self.on_note(self.template.note)
            self._is_noted = True
        self._first, self._used = window.first, len(window.ids)
        limit = min(most, self.context_length - len(window.ids) + 1)
        stream = self._text_stream(window.ids, limit, smooth)
        self._answer = Answer(stream, self._forms[self.think], self.messages, conversation, self._choose)
        return self._answer

    def _room(self) -> tuple[int, int]:
        """Tokens that an answer should have room for, and must."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens, self.max_new_tokens
        usual = DEFAULT_NEW_TOKENS * (_THINKING_LENGTH if self._thinks else 1)
        return max(1, min(usual, self.context_length // 4)), 1

    def _text_stream(self, ids: list[int], limit: int, smooth: bool) -> TextStream:
        return TextStream(
            self.model,
            self.tokenizer,
            ids,
            max_new_tokens=limit,
            seed=(self.seed + self._tries) % (1 << 32),
            smooth=smooth,
            least_slots=min(FIRST_SLOTS, self.context_length),
            samples=None if self.samples == 1 else self.samples,
            kept=self._kept,
            **self._options,
            **self.knobs,
        )

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        if self.think and not self._thinks:
            messages = [
                dataclasses.replace(message, content=with_steps(message.content)) if message.role == "user" else message
                for message in messages
            ]
        said = in_terms_of(self.template, messages)
        return self.template.encode(self.tokenizer, said, tools=self.tools or None, **self._variables(self.think))

    def _reply_forms(self, tokenizer: Tokenizer) -> dict[bool, ReplyForm]:
        """How the model marks the parts of its answers, with thinking and without."""
        forms = {
            think: reply_form(self.template, tokenizer, self._variables(think), self.tools) for think in (False, True)
        }
        if self.tools and forms[True].calls is None:
            self.on_note(
                f"calls of tools stay text: the chat template ({self.template.name}) writes them in a way that is not "
                "read"
            )
        return forms

    @property
    def _thinks(self) -> bool:
        """Whether the model thinks by itself."""
        return self.template.thinking is not None and (self.think or self._switch is None)

    def _variables(self, think: bool) -> dict[str, Any]:
        """What the template is told."""
        return {self._switch: think} if self._switch else {}

    def _choose(self, completions: Sequence[Completion], messages: Sequence[Message]) -> Choice:
        """The answer of several, whose thinking has no vote."""
        return vote(completions, [message.content for message in messages]) if self.vote else best_of(completions)

    def _check(self) -> None:
        """Refuses attributes that are out of range: they may have been changed."""
        if unknown := sorted(set(self.knobs) - set(SAMPLING)):
            raise LlamaJaxError(f"unknown knob {unknown[0]}: expected some of {', '.join(SAMPLING)}")
        with auto_mesh():
            make_sampler(**self.knobs)
        for name in ("max_new_tokens", "samples"):
            value = plain(getattr(self, name))
            wanted = value is None and name == "max_new_tokens"
            if not wanted and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise LlamaJaxError(f"{name} is {value!r}: expected a whole number, at least 1")
