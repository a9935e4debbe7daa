"""The flags that set how tokens are chosen, and the checkpoint's settings for flags that are not given."""

from typing import Any

from absl import flags

from llamajax.caches import CACHE_DTYPES
from llamajax.checkpoint import Opened
from llamajax.cli.flag_groups import COMMON, SPEED, group
from llamajax.cli.model_flags import say
from llamajax.errors import LlamaJaxError
from llamajax.generation.choose import STEP_BY_STEP
from llamajax.generation.sampling import make_sampler
from llamajax.words import SAMPLING


def define_sampling(values: flags.FlagValues, temperature: float = 0.8, top_p: float = 0.95) -> None:
    """--temperature, --top_k, --top_p, --min_p, --repetition_penalty and --seed, with defaults for two of them."""
    with group(values, COMMON):
        flags.DEFINE_float(
            "temperature",
            temperature,
            "0 always takes the likeliest token; higher values give more varied text. The model's files may set "
            "another default for this flag and for those under Sampling.",
            flag_values=values,
        )
        flags.DEFINE_integer("seed", 0, "The same seed gives the same text.", flag_values=values)
    with group(values, "Sampling"):
        flags.DEFINE_float(
            "top_p",
            top_p,
            "Samples from the smallest set of likeliest tokens whose probabilities sum to at least `P`.",
            flag_values=values,
        )
        flags.DEFINE_integer("top_k", None, "Samples from the `K` likeliest tokens only.", flag_values=values)
        flags.DEFINE_float(
            "min_p",
            None,
            "Samples from the tokens that are at least `P` times as likely as the likeliest token.",
            flag_values=values,
        )
        flags.DEFINE_float(
            "repetition_penalty",
            None,
            "Values above 1 make tokens that are already in the text less likely.",
            flag_values=values,
        )


def define_kv_cache(values: flags.FlagValues) -> None:
    """--kv_cache."""
    with group(values, SPEED):
        flags.DEFINE_enum(
            "kv_cache",
            "auto",
            ["auto", *CACHE_DTYPES],
            "Keeps the KV cache in numbers of this `TYPE`. auto is the type that the model computes in. int8 takes "
            "about half the memory of 16-bit floats and hardly changes the text. int4 takes little more than a "
            "quarter and changes the text. On a CPU bfloat16 is slow, int8 is not.",
            flag_values=values,
        )


def chosen_cache_dtype(values: flags.FlagValues) -> str | None:
    """The value of --kv_cache; None for the dtype that the model computes in."""
    return None if values.kv_cache == "auto" else values.kv_cache


def define_speculate(values: flags.FlagValues) -> None:
    """--speculate."""
    with group(values, SPEED):
        flags.DEFINE_integer(
            "speculate",
            0,
            "Drafts `N` tokens, such as 4, from earlier text and checks them in one step. The text stays the same, and "
            "is generated faster where it repeats itself or the prompt.",
            flag_values=values,
        )


def define_samples(values: flags.FlagValues) -> None:
    """--think, --samples and --vote."""
    with group(values, "Several samples"):
        flags.DEFINE_integer(
            "samples",
            1,
            "Generates `N` texts and prints the one with the highest mean log probability per token.",
            lower_bound=1,
            flag_values=values,
        )
        flags.DEFINE_boolean(
            "vote",
            False,
            "Prints a sample whose answer most samples agree on. The answer is a boxed value, what follows 'the "
            "answer is', or the last number.",
            flag_values=values,
        )
        flags.DEFINE_boolean(
            "think",
            False,
            f"Lets the model reason before it answers: by its chat template if that supports thinking, otherwise by "
            f"adding: {STEP_BY_STEP}",
            flag_values=values,
        )


def check_sampling(values: flags.FlagValues) -> None:
    """Checks the ranges of sampling flags, before anything is read.

    Raises:
        LlamaJaxError: for a value out of range, by its name, or for a vote of one sample.
    """
    if values.vote and values.samples < 2:
        raise LlamaJaxError("--vote is given for one sample: expected several, such as --samples=8")
    given: dict[str, Any] = {name: values[name].value for name in SAMPLING}
    make_sampler(**given)


def chosen_sampling(values: flags.FlagValues, opened: Opened) -> dict[str, Any]:
    """The sampling parameters: from the flags that are given, else from the checkpoint, else the defaults.

    Raises:
        LlamaJaxError: for several samples at temperature 0, which would all be equal.
    """
    given = {name for name in SAMPLING if values[name].present}
    # Settings that have no effect at temperature 0 are not reported.
    greedy = "temperature" in given and values.temperature == 0
    used = {
        name: value
        for name, value in opened.words.sampling.items()
        if name not in given and (name == "repetition_penalty" or not greedy)
    }
    if used:
        settings = ", ".join(f"{name} {value:g}" for name, value in used.items())
        say(f"{values.model} sets {settings} in its files: flags override this")
    chosen = {name: used.get(name, values[name].value) for name in SAMPLING}
    if values.samples > 1 and chosen["temperature"] == 0:
        raise LlamaJaxError(
            f"--samples={values.samples}: at temperature 0 all samples are equal: expected --temperature above 0, such "
            "as 0.7"
        )
    return chosen
