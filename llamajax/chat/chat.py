"""`Chat`: a conversation with a model.

    chat = Chat(model, tokenizer, system="Answer in one sentence.", temperature=0)
    print(chat.send("What is the capital of France?").content)
    for piece in chat.stream("And of Japan?"):
        print(piece.text, end="", flush=True)

At every turn the model sees exactly the text that the template makes of the messages. The cache is kept from turn to
turn: only the tokens after the longest prefix that the new text shares with it are computed.
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

# The first number of slots of a conversation's cache. It doubles when needed, for few sizes: each size needs programs.
FIRST_SLOTS = 1024
# The factor by which the default of `max_new_tokens` grows for a model that thinks.
_THINKING_LENGTH = 8


class Chat:
    """A conversation.

    Attributes:
        knobs: the arguments of `sampling.make_sampler`, by name; may be changed between turns.
        model: the model that answers. Its leaves may be abstract (`jax.ShapeDtypeStruct`) until `compile_while`.
        tokenizer: the tokenizer, with the stop ids of the template.
        template: the format in which messages become text.
        tools: the functions that the model may call, as passed to the template; fixed when the chat is made.
        max_new_tokens: the most tokens of an answer, its thinking included, or None.
        think: whether the model should think before it answers.
        samples: the number of answers generated at once, of which one is chosen.
        vote: whether the answer is the one on which most samples agree, rather than the likeliest one.
        seed: the seed of an answer's random draws.
        context_length: the most tokens of a conversation.
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
        """Checks the settings; runs nothing yet.

        Args:
            model: see the attributes.
            tokenizer: the checkpoint's tokenizer, which holds the checkpoint's template.
            system: the system message; without one, some templates write their own.
            template: a template, or the name of a built-in format or of one of the checkpoint's templates; defaults to
                the checkpoint's choice.
            tools: functions as JSON schemas, `{"type": "function", "function": {"name": …, "parameters": …}}`.
            max_new_tokens: the most tokens of an answer; defaults to 512, or eight times as many with thinking, but at
                most a quarter of the context.
            cache_dtype: see `TextStream`.
            speculate: likewise.
            think: whether to think first, by the template's own switch; without one, by asking for steps.
            samples: see the attributes.
            vote: likewise.
            seed: likewise.
            stop: texts at which an answer ends, in addition to those of the template.
            on_note: called with notes for the user, such as that turns have left the context.
            **knobs: temperature, top_k, top_p, min_p, repetition_penalty; default to the checkpoint's settings.

        Raises:
            LlamaJaxError: for a model without a template, tools for which the template has no place, or a value out of
                range.
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
        self._first = 0  # the index of the oldest message in the context
        self._tries = 0  # how often the last answer was retried
        self._used = 0  # the number of tokens of the last prompt
        self._answer: Answer | None = None
        self._is_noted = False
        self._check()

    # ---- Turns -------------------------------------------------------------------------------------------------------

    def stream(self, message: str | Message | Mapping[str, Any] | Sequence[Message | Mapping[str, Any]]) -> Answer:
        """Returns the answer to a user's text, a message, or several messages; the last must not be an assistant's.

        An earlier answer that still runs is ended first.

        Raises:
            LlamaJaxError: for an invalid message, or one that does not fit the context; the conversation stays
                unchanged.
        """
        self._tries = 0
        return self._begin(as_messages(message))

    def send(self, message: str | Message | Mapping[str, Any] | Sequence[Message | Mapping[str, Any]]) -> Message:
        """Returns the whole answer; arguments as in `stream`, errors as in `stream` and `TextStream`."""
        self._tries = 0
        answer = self._begin(as_messages(message), smooth=False)
        for _ in answer:
            pass
        return answer.message

    def retry(self) -> Answer:
        """Returns another answer, from another seed, which replaces the last one.

        Raises:
            LlamaJaxError: if there is no message to answer.
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
        """Compiles or loads the programs of a first, short turn while another thread calls `read` for the model."""
        stream = self._text_stream(self._encode([*self.messages, Message("user", "")]), 1, smooth=True)
        stream.compile_while(read)
        self.model = stream.model

    # ---- Properties that may be read and set between turns -----------------------------------------------------------

    @property
    def messages(self) -> list[Message]:
        """All messages so far, including those that have left the context; a system message, if any, comes first.

        The list may be changed or set between turns. The new value is a list of messages, or of mappings that
        `Message.of` reads.
        """
        return self._messages

    @messages.setter
    def messages(self, messages: Sequence[Message | Mapping[str, Any]]) -> None:
        read = as_messages(messages) if messages else []
        self.close()
        self._messages, self._first = read, 0

    @property
    def system(self) -> str | None:
        """The text of the system message, or None; it may be set."""
        return self.messages[0].content if self.messages and self.messages[0].role == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages if self.system is None else self.messages[1:]
        changed = rest if text is None else [Message("system", text), *rest]
        self._first = max(self._first + len(changed) - len(self.messages), 0)
        self.messages[:] = changed

    @property
    def context_used(self) -> int:
        """The number of tokens of the last prompt and its answer."""
        made = len(self._answer.completion.tokens) if self._answer is not None else 0
        return self._used + made

    # ---- Internals ---------------------------------------------------------------------------------------------------

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
        """The number of tokens that an answer should have room for, and the number that it must have room for."""
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
                f"tool calls stay text: the chat template ({self.template.name}) writes them in a form that is not "
                "supported"
            )
        return forms

    @property
    def _thinks(self) -> bool:
        """Whether the model thinks by itself."""
        return self.template.thinking is not None and (self.think or self._switch is None)

    def _variables(self, think: bool) -> dict[str, Any]:
        """The variables that are passed to the template."""
        return {self._switch: think} if self._switch else {}

    def _choose(self, completions: Sequence[Completion], messages: Sequence[Message]) -> Choice:
        """Chooses one of several samples; a vote looks at their contents without thinking."""
        return vote(completions, [message.content for message in messages]) if self.vote else best_of(completions)

    def _check(self) -> None:
        """Checks the attributes, which the caller may have changed.

        Raises:
            LlamaJaxError: for a value out of range.
        """
        if unknown := sorted(set(self.knobs) - set(SAMPLING)):
            raise LlamaJaxError(f"unknown knob {unknown[0]}: expected some of {', '.join(SAMPLING)}")
        with auto_mesh():
            make_sampler(**self.knobs)
        for name in ("max_new_tokens", "samples"):
            value = plain(getattr(self, name))
            wanted = value is None and name == "max_new_tokens"
            if not wanted and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise LlamaJaxError(f"{name} is {value!r}: expected a whole number, at least 1")
