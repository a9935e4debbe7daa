"""`llamajax generate`: text from a prompt."""

import dataclasses
import sys
from typing import Any

import jax
from absl import flags

from llamajax.caches import CACHE_DTYPES
from llamajax.cli.model_flags import (
    chosen_activations,
    chosen_dtype,
    define_activations,
    define_dtype,
    define_model,
    define_parse_special,
    define_threads,
    open_model,
    read_model,
)
from llamajax.cli.sampling_flags import check_sampling, chosen_sampling, define_sampling
from llamajax.cli.terminal import as_json, note, write
from llamajax.generation.request import Completion
from llamajax.generation.speculate import check_speculate
from llamajax.generation.speed import Speed
from llamajax.generation.stream import TextStream

SUMMARY = "continue a prompt, or several at once"
EXAMPLES = (
    "llamajax generate",
    "llamajax generate --prompt='Once upon a time' --temperature=0 --max_new_tokens=100",
    "llamajax generate --prompt='One day' --prompt='At night' --seed=7 --top_p=0.9 --stop='The end'",
    "llamajax generate --model=stories15M.bin --tokenizer=tokenizer.model --json",
)


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    define_model(values)
    define_dtype(values)
    define_activations(values)
    define_threads(values)
    flags.DEFINE_multi_string("prompt", [""], "text to continue; repeat the flag for a batch", flag_values=values)
    define_parse_special(values)
    flags.DEFINE_integer(
        "max_new_tokens",
        None,
        "most new tokens; 512, or what the context has room for, if not given",
        flag_values=values,
    )
    define_sampling(values)
    flags.DEFINE_multi_string("stop", [], "text at which to stop; repeat the flag for several", flag_values=values)
    flags.DEFINE_enum(
        "kv_cache",
        "auto",
        ["auto", *CACHE_DTYPES],
        "what keys and values are kept in; auto is the dtype that the model computes in. int8 takes about half the "
        "memory of 16-bit floats and hardly changes the text, int4 little more than a quarter and does. On a CPU "
        "bfloat16 is slow, int8 is not",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "speculate",
        0,
        "tokens that the text itself drafts for each forward pass to check, such as 4. The same text, sooner where it "
        "repeats itself or its prompt",
        flag_values=values,
    )
    flags.DEFINE_boolean("echo", True, "print the prompt before its continuation", flag_values=values)
    flags.DEFINE_boolean(
        "json", False, "print one JSON object a prompt, with ids and log probabilities", flag_values=values
    )


def run(values: flags.FlagValues) -> None:
    """Streams text to stdout and ends with the speed on stderr."""
    # Checked before the weights are read: a slip should not cost a minute.
    check_sampling(values)
    opened, tokenizer = open_model(values)
    knobs = chosen_sampling(values, opened)
    check_speculate(values.speculate)
    dtype = chosen_dtype(values)
    options = {"backend": jax.default_backend(), "activations": chosen_activations(values)}
    single = len(values.prompt) == 1
    prompts: list[Any] = values.prompt
    if values.parse_special:
        prompts = [tokenizer.encode(prompt, eos=False, special=True) for prompt in values.prompt]
    stream = TextStream(
        opened.outcome(dtype, **options),
        tokenizer,
        prompts[0] if single else prompts,
        max_new_tokens=values.max_new_tokens,
        **knobs,
        seed=values.seed,
        stop=values.stop,
        cache_dtype=None if values.kv_cache == "auto" else values.kv_cache,
        speculate=values.speculate,
        smooth=single and not values.json,
    )
    stream.compile_while(lambda: read_model(opened, dtype, **options))
    if single and not values.json:
        _write_stream(stream, values.prompt[0] if values.echo else "")
    else:
        for _ in stream:
            pass
        for prompt, completion in zip(values.prompt, stream.completions, strict=True):
            echo = prompt if values.echo else ""
            write(_as_json(prompt, completion) if values.json else echo + completion.text + "\n")
    note(describe_speed(stream.speed))


def _write_stream(stream: TextStream, echo: str) -> None:
    """Text as it comes. The newline at its end goes to a terminal, or to the log: a pipe gets the text alone."""
    write(echo, end="")
    for piece in stream:
        write(piece, end="")
    if sys.stdout.isatty():
        write("")
    else:
        note("")


def _as_json(prompt: str, completion: Completion) -> str:
    return as_json({"prompt": prompt, **dataclasses.asdict(completion)})


def describe_speed(speed: Speed) -> str:
    """Three aligned lines: prefill, decode, compilation. With speculation, what a forward pass made behind decode."""
    rows = (
        ("prefill", speed.prefill_tokens, speed.prefill_tokens_per_second, speed.prefill_gigabytes_per_second),
        ("decode", speed.decode_tokens, speed.decode_tokens_per_second, speed.decode_gigabytes_per_second),
    )
    lines = [
        f"{name:8}{count:6} tokens {rate:10.1f} tokens/s {gigabytes:7.2f} GB/s" for name, count, rate, gigabytes in rows
    ]
    if speed.row_steps:
        lines[1] += f" {speed.tokens_per_step:6.2f} tokens a step"
    programs = f"{speed.compilations} program{'' if speed.compilations == 1 else 's'}"
    if speed.loads:
        programs += f" and {speed.loads} kept by an earlier run"
    return "\n".join([*lines, f"compile {speed.compile_seconds:6.1f} s for {programs}, not counted above"])
