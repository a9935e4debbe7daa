"""The flags that say how tokens are chosen, and what a checkpoint asks for where they are not given."""

from typing import Any

from absl import flags

from llamajax.caches import CACHE_DTYPES
from llamajax.checkpoint import Opened
from llamajax.cli.model_flags import say
from llamajax.errors import LlamaJaxError
from llamajax.generation.choose import STEP_BY_STEP
from llamajax.generation.sampling import make_sampler
from llamajax.words import SAMPLING


def define_sampling(values: flags.FlagValues, temperature: float = 0.8, top_p: float = 0.95) -> None:
    """--temperature, --top_k, --top_p, --min_p, --repetition_penalty and --seed, with our defaults for two of them."""
    flags.DEFINE_float(
        "temperature",
        temperature,
        "0 is greedy; higher is more surprising. This and the four flags below: as the checkpoint asks for, unless "
        "given (generation_config.json of a Hugging Face folder, general.sampling of a GGUF file)",
        flag_values=values,
    )
    flags.DEFINE_integer("top_k", None, "choose among the K likeliest tokens only", flag_values=values)
    flags.DEFINE_float(
        "top_p", top_p, "choose among the likeliest tokens that make up this probability", flag_values=values
    )
    flags.DEFINE_float(
        "min_p", None, "choose among tokens at least this fraction as likely as the likeliest", flag_values=values
    )
    flags.DEFINE_float(
        "repetition_penalty", None, "above 1: avoid tokens that the text already holds", flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "the same seed gives the same text", flag_values=values)


def define_kv_cache(values: flags.FlagValues) -> None:
    """--kv_cache."""
    flags.DEFINE_enum(
        "kv_cache",
        "auto",
        ["auto", *CACHE_DTYPES],
        "what keys and values are kept in; auto is the dtype that the model computes in. int8 takes about half the "
        "memory of 16-bit floats and hardly changes the text, int4 little more than a quarter and does. On a CPU "
        "bfloat16 is slow, int8 is not",
        flag_values=values,
    )


def chosen_cache_dtype(values: flags.FlagValues) -> str | None:
    """What --kv_cache asks for; None for the dtype that the model computes in."""
    return None if values.kv_cache == "auto" else values.kv_cache


def define_speculate(values: flags.FlagValues) -> None:
    """--speculate."""
    flags.DEFINE_integer(
        "speculate",
        0,
        "tokens that the text itself drafts for each forward pass to check, such as 4. The same text, sooner where it "
        "repeats itself or its prompt",
        flag_values=values,
    )


def define_samples(values: flags.FlagValues) -> None:
    """--think, --samples and --vote."""
    flags.DEFINE_boolean(
        "think",
        False,
        f"let the model answer step by step: by its own thinking if its chat template has any, else by asking: "
        f"{STEP_BY_STEP}",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "samples",
        1,
        "texts to make at once, of which the likeliest is taken: that of the best mean log probability a token",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "vote",
        False,
        "of several samples take one that comes to the answer most of them come to: what is boxed, what 'the answer "
        "is' names, or the last number",
        flag_values=values,
    )


def check_sampling(values: flags.FlagValues) -> None:
    """Refuses flags that are out of range, before anything is read.

    Raises:
        LlamaJaxError: naming the knob, or for a vote of one sample.
    """
    if values.vote and values.samples < 2:
        raise LlamaJaxError("--vote: there is one sample: expected several to choose from, such as --samples=8")
    given: dict[str, Any] = {name: values[name].value for name in SAMPLING}
    make_sampler(**given)


def chosen_sampling(values: flags.FlagValues, opened: Opened) -> dict[str, Any]:
    """How tokens are chosen: as the flags say; where none was given, as the checkpoint says, else by our defaults.

    Raises:
        LlamaJaxError: for several samples of greedy choice.
    """
    given = {name for name in SAMPLING if values[name].present}
    # What greedy choice ignores is not worth a line.
    greedy = "temperature" in given and values.temperature == 0
    used = {
        name: value
        for name, value in opened.words.sampling.items()
        if name not in given and (name == "repetition_penalty" or not greedy)
    }
    if used:
        settings = ", ".join(f"{name} {value:g}" for name, value in used.items())
        say(f"{values.model}: its files ask for {settings}: flags override this")
    chosen = {name: used.get(name, values[name].value) for name in SAMPLING}
    if values.samples > 1 and chosen["temperature"] == 0:
        raise LlamaJaxError("--samples: at temperature 0 all are the same: expected --temperature above 0, such as 0.7")
    return chosen
