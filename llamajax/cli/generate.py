"""`llamajax generate`: continues a prompt, or several at once."""

import contextlib
import dataclasses
import math
import sys
from typing import Any

import jax
from absl import flags

from llamajax.cli.flag_groups import COMMON, OUTPUT, group
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
    say,
)
from llamajax.cli.sampling_flags import (
    check_sampling,
    chosen_cache_dtype,
    chosen_sampling,
    define_kv_cache,
    define_samples,
    define_sampling,
    define_speculate,
)
from llamajax.cli.standard_input import read_standard_input
from llamajax.cli.terminal import as_json, note, spinner, write
from llamajax.errors import LlamaJaxError
from llamajax.files import read_text
from llamajax.generation.choose import Choice, best_of, vote, with_steps
from llamajax.generation.request import Completion
from llamajax.generation.speculate import check_speculate
from llamajax.generation.speed import Speed
from llamajax.generation.stream import TextStream
from llamajax.tokenizer import Tokenizer, infill

SUMMARY = "continue a prompt, or several at once"
EXAMPLES = (
    "llamajax generate --prompt='Once upon a time'",
    "llamajax generate --model=any-llama.gguf --prompt='The capital of France is' --temperature=0",
    "llamajax generate --prompt='One day' --prompt='At night' --seed=7 --stop='The end' --json",
)
# The value of --prompt_file that means standard input.
_STANDARD_INPUT = "-"


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    define_model(values)
    with group(values, COMMON):
        flags.DEFINE_multi_string(
            "prompt", [""], "Continues `TEXT`. Repeat the flag to continue several at once.", flag_values=values
        )
        flags.DEFINE_integer(
            "max_new_tokens",
            None,
            "Generates at most `N` tokens. Without this flag the limit is 512, or less if the model's context has less "
            "room.",
            flag_values=values,
        )
    define_sampling(values)
    with group(values, "Prompt and end"):
        flags.DEFINE_string(
            "prompt_file",
            None,
            "Continues the text in `FILE` (UTF-8), without the newline at its end. - is standard input, which is not "
            "read otherwise.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "suffix",
            None,
            "Fills the gap between the prompt and `TEXT`, with a model that was trained for this, such as Code Llama.",
            flag_values=values,
        )
        define_parse_special(values)
        flags.DEFINE_multi_string("stop", [], "Stops before `TEXT`. Repeat the flag for several.", flag_values=values)
    define_samples(values)
    define_dtype(values)
    define_activations(values)
    define_kv_cache(values)
    define_speculate(values)
    define_threads(values)
    with group(values, OUTPUT):
        flags.DEFINE_boolean("echo", True, "Prints the prompt before its continuation.", flag_values=values)
        flags.DEFINE_boolean(
            "json",
            False,
            "Prints one JSON object for each prompt: the text, its token ids, their log probabilities, and all "
            "samples.",
            flag_values=values,
        )


def run(values: flags.FlagValues) -> None:
    """Streams text to stdout and ends with the speed on stderr."""
    # Checked before the weights are read, so that a wrong flag does not cost a minute.
    check_sampling(values)
    check_speculate(values.speculate)
    prompts = _prompts(values)
    opened, tokenizer = open_model(values)
    knobs = chosen_sampling(values, opened)
    given, tokenizer = _given(values, tokenizer, prompts)
    dtype = chosen_dtype(values)
    options = {"backend": jax.default_backend(), "activations": chosen_activations(values)}
    streamed = len(prompts) == values.samples == 1 and not values.json
    stream = TextStream(
        opened.outcome(dtype, **options),
        tokenizer,
        given[0] if streamed else given,
        max_new_tokens=values.max_new_tokens,
        **knobs,
        seed=values.seed,
        samples=None if streamed else values.samples,
        stop=values.stop,
        cache_dtype=chosen_cache_dtype(values),
        speculate=values.speculate,
        smooth=streamed,
    )
    stream.compile_while(lambda: read_model(opened, dtype, **options))
    if streamed:
        _write_stream(stream, *((prompts[0], values.suffix or "") if values.echo else ("", "")))
    else:
        with spinner(f"{len(stream.completions)} texts") if values.samples > 1 else contextlib.nullcontext():
            for _ in stream:
                pass
        for prompt, samples in zip(prompts, stream.by_prompt, strict=True):
            _write_samples(values, prompt, samples, alone=len(prompts) == 1)
    note(describe_speed(stream.speed))


def _prompts(values: flags.FlagValues) -> list[str]:
    """The prompts to continue.

    Raises:
        LlamaJaxError: for flags that contradict each other, or a file that cannot be read as text.
    """
    prompts: list[str] = values.prompt
    if values.suffix is not None and (values.parse_special or values.think):
        raise LlamaJaxError("--suffix cannot be combined with --parse_special or --think: expected one of them")
    if (file := values.prompt_file) is not None:
        if values["prompt"].present:
            raise LlamaJaxError("--prompt and --prompt_file are both given: expected one of them")
        text = read_standard_input("expected a prompt") if file == _STANDARD_INPUT else read_text(file)
        prompts = [text.removesuffix("\n").removesuffix("\r")]
    return [with_steps(prompt) for prompt in prompts] if values.think else prompts


def _given(values: flags.FlagValues, tokenizer: Tokenizer, prompts: list[str]) -> tuple[list[Any], Tokenizer]:
    """The prompts as the request takes them, and the tokenizer that decodes the answers.

    The prompts are texts; with --parse_special or --suffix they are token ids.
    """
    if values.suffix is not None:
        made = [infill(tokenizer, prompt, values.suffix) for prompt in prompts]
        return [ids for ids, _ in made], made[0][1]
    if values.parse_special:
        return [tokenizer.encode(prompt, eos=False, special=True) for prompt in prompts], tokenizer
    return prompts, tokenizer


def _write_samples(values: flags.FlagValues, prompt: str, samples: list[Completion], alone: bool) -> None:
    """Writes the only or the chosen sample of one prompt, or all as JSON; the reason for the choice goes to stderr."""
    choice = (vote if values.vote else best_of)(samples) if len(samples) > 1 else None
    chosen = samples[choice.index if choice else 0]
    if values.json:
        write(_samples_as_json(prompt, samples, choice) if choice else _as_json(prompt, chosen))
    else:
        before, behind = (prompt, values.suffix or "") if values.echo else ("", "")
        write(before + chosen.text + behind, end="" if alone else "\n\n")
        if alone:
            _end_line()
    if choice:
        say(str(choice))


def _write_stream(stream: TextStream, before: str, behind: str) -> None:
    """Streams the text, with the prompt `before` it and the suffix `behind` it.

    The final newline goes to stdout if that is a terminal, otherwise to stderr, so that a pipe gets only the text.
    """
    write(before, end="")
    for piece in stream:
        write(piece, end="")
    write(behind, end="")
    _end_line()


def _end_line() -> None:
    if sys.stdout.isatty():
        write("")
    else:
        note("")


def _as_json(prompt: str, completion: Completion) -> str:
    return as_json({"prompt": prompt, **dataclasses.asdict(completion)})


def _samples_as_json(prompt: str, samples: list[Completion], choice: Choice) -> str:
    """The samples, each with its score (null for a sample without tokens) and answer, and the index of the chosen."""
    rows = [
        {
            **dataclasses.asdict(sample),
            "mean_log_probability": score if math.isfinite(score) else None,
            **({"answer": choice.answers[i]} if choice.answers else {}),
        }
        for i, (sample, score) in enumerate(zip(samples, choice.scores, strict=True))
    ]
    votes = {"votes": dict(choice.votes)} if choice.answers else {}
    return as_json({"prompt": prompt, "chosen": choice.index, **votes, "samples": rows})


def describe_speed(speed: Speed) -> str:
    """Three aligned lines: prefill, decode, compilation. With speculation, decode includes tokens per forward pass."""
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
