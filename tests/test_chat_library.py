"""`llamajax.Chat`: what the model sees is what the template says, whatever was kept, stopped, retried or dropped."""

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import llamajax
from llamajax import Chat, Message
from llamajax.words import Words

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|call|>"]


def tokenizer_with(template: str, marks: tuple[str, ...] = ()) -> llamajax.Tokenizer:
    """A byte-level tokenizer with ChatML's control tokens, and with marks that are tokens with a text."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=CONTROL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(["Once upon a time there was a little fox. user assistant system"] * 9, trainer)
    library.add_tokens(list(marks))
    words = Words(stop_ids=(0,), files={"chat_template.jinja": template.encode()})
    return llamajax.Tokenizer(library.to_str().encode(), words=words)


@pytest.fixture(scope="module")
def tokenizer() -> llamajax.Tokenizer:
    return tokenizer_with(CHATML)


@pytest.fixture(scope="module")
def model(tokenizer) -> llamajax.Llama:
    """Random weights, and a context that 40 or so words fill."""
    return random_model(tokenizer.vocab_size, 256)


def random_model(vocab_size: int, context: int) -> llamajax.Llama:
    config = llamajax.Config(
        vocab_size=vocab_size,
        width=32,
        ffn_width=64,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_size=16,
        context_length=context,
    )
    rng, weights = np.random.default_rng(0), llamajax.named_weights(llamajax.abstract_model(config))
    random = {name: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32) for name, leaf in weights.items()}
    return llamajax.model_from(random, config)


def prompt(tokenizer: llamajax.Tokenizer, messages: list[Message]) -> list[int]:
    """ChatML's ids of a conversation, written by hand."""
    start, end = tokenizer.id_of("<|im_start|>"), tokenizer.id_of("<|im_end|>")
    encode = lambda text: tokenizer.encode(text, bos=False)  # noqa: E731
    ids = []
    for message in messages:
        ids += [start, *encode(f"{message.role}\n{message.content}"), end, *encode("\n")]
    return [*ids, start, *encode("assistant\n")]


def fresh(model, tokenizer, messages: list[Message], **options) -> str:
    """What `generate` makes of a conversation without any memory of it."""
    ending = tokenizer.replying([0, tokenizer.id_of("<|im_end|>")])
    return llamajax.generate(model, ending, prompt(tokenizer, messages), **options).text


def test_every_turn_is_what_the_whole_conversation_gives(model, tokenizer) -> None:
    knobs = {"temperature": 0.9, "top_p": 0.95, "seed": 5, "max_new_tokens": 12}
    chat, said = Chat(model, tokenizer, system="Be a fox.", **knobs), [Message("system", "Be a fox.")]
    for text in ("Once upon a time", "there was<|im_end|>", "a little fox"):
        said.append(Message("user", text))
        answer = chat.stream(text)
        pieces = list(answer)
        expected = fresh(model, tokenizer, said, **knobs)
        assert "".join(piece.text for piece in pieces) == answer.message.content == expected
        said.append(Message("assistant", expected))
        assert chat.messages == said
        assert chat.context_used == len(prompt(tokenizer, said[:-1])) + len(answer.completion.tokens)
