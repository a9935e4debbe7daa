"""Golden prompts: the tokens and logits of a bundle's programs, computed by the functions that are lowered.

The functions are jitted here, not read from the bundle. As in runners, prompts go through prefill in the bundle's
buckets, then through decode, with the bundle's cache.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from export.profiles import PROFILES, Spec
from export.programs import bound, empty_state, functions
from export.runners.answers import chooser, steps
from export.weights import parameters
from llamajax import Llama, LlamaJaxError, Tokenizer, prepare
from quant import compiler_options

GOLDEN_TOKENS = 64
GOLDEN_TEXTS = ("Once upon a time", "The little dog ran to the river. There he saw a big fish, and the fish said:")
# Golden tokens of models with more parameters are computed with this machine's weight layout and a loop over layers.
_LARGE_MODEL = 50_000_000


class _Programs:
    """A session, like those of runners, of the functions of a bundle's programs; each is compiled at its first call."""

    def __init__(self, model: Llama, spec: Spec) -> None:
        profile = spec.profile
        taken = model if profile.backend is None else prepare(model, profile.backend)
        weights = parameters(taken, profile)
        self._weights = list(weights.values())
        self._values = empty_state(model.config, spec).state.values()
        options = compiler_options(profile.backend) if profile.backend == jax.default_backend() else {}
        self._functions = {}
        for name, function, inputs, _, takes_model in functions(model, spec):
            if takes_model:
                last = len(weights) + len(inputs)
                self._functions[name] = jax.jit(
                    bound(function, tuple(weights), taken, profile),
                    donate_argnums=tuple(range(last - len(self._values), last)) if "length" in inputs else (),
                    compiler_options=options,
                )

    def reset(self) -> None:
        """Begins another text."""
        # Committed to a device, like the state that programs return: otherwise each program is compiled twice.
        zeros = [jnp.zeros(value.shape, value.dtype) for value in self._values]
        self._state = jax.device_put(zeros, jax.devices()[0])

    def run(self, name: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Calls a program and returns its logits."""
        logits_BV, *self._state = self._functions[name](*self._weights, *inputs.values(), *self._state)
        return np.asarray(logits_BV)


def golden_prompts(model: Llama, tokenizer: Tokenizer | None, spec: Spec) -> list[list[int]]:
    """Two prompts of different lengths that leave room for the continuation."""
    most = max(1, spec.slots - GOLDEN_TOKENS - 1)
    if tokenizer is not None:
        return [tokenizer.encode(text)[:most] for text in GOLDEN_TEXTS]
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 24)
    return [[int(i) for i in ids[:count]][:most] for count in (5, 24)]


def golden(model: Llama, prompts: Sequence[Sequence[int]], spec: Spec) -> dict[str, np.ndarray]:
    """The results of the programs of `spec` for each prompt: arrays `prompt_0`, `tokens_0`, `logits_0`, `prompt_1`, ….

    Args:
        model: the model in the bundle.
        prompts: ids, 1 to slots - 1 in each prompt.
        spec: the spec of the bundle.

    Returns:
        Prompts and greedy tokens, int32, and logits float32 [V] after each prompt.

    Raises:
        LlamaJaxError: for a prompt that does not fit the cache or the vocabulary; logits that are not finite.
    """
    if model.config.num_parameters > _LARGE_MODEL:
        spec = dataclasses.replace(
            spec, profile=dataclasses.replace(PROFILES["scanned"], backend=jax.default_backend())
        )
    manifest = {"config": {"vocab_size": model.config.vocab_size}, "buckets": spec.buckets}
    bundle: Any = SimpleNamespace(batch=spec.batch, slots=spec.slots, manifest=manifest)
    session, arrays = _Programs(model, spec), {}
    for index, ids in enumerate(prompts):
        limit = min(GOLDEN_TOKENS, spec.slots - len(ids))
        try:
            made = list(steps(session, bundle, list(ids), limit, chooser(0, 0)))
        except SystemExit as ended:  # runners end with SystemExit
            raise LlamaJaxError(f"golden prompt {index}: {ended.code}") from None
        arrays[f"prompt_{index}"] = np.asarray(ids, np.int32)
        arrays[f"tokens_{index}"] = np.asarray([token for token, _ in made], np.int32)
        arrays[f"logits_{index}"] = made[0][1]
    return arrays
