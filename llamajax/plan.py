"""Computes the memory that running a model takes, from shapes alone: no weight is read, and nothing is allocated.

    print(plan(preset("llama3-8b"), "int4-g32", context=8192, backend="cpu").total)

Weights and cache are exact, from abstract trees. The other numbers were measured on a CPU, as described below.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llamajax.caches import empty_cache, ring_slots
from llamajax.checkpoint import Opened
from llamajax.checkpoint.assemble import Finish, outcome
from llamajax.checkpoint.source import Source
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.generation.engine import Engine
from llamajax.generation.programs import plan_chunks
from llamajax.model import Llama
from llamajax.parameters import named_weights
from llamajax.quantization.foreseen import foreseen_weights
from quant import nbytes, quantized

# The context to plan for by default; most conversations are shorter.
DEFAULT_CONTEXT = 4096
_MIB = 1 << 20
# Measured on a CPU by `benchmarks/plan.py`. PROCESS: Python with JAX, this package and a backend that has started,
# before anything is loaded; half of it are mapped files. PROGRAMS_…: memory beside weights, cache and temporaries when
# compiled programs come from an earlier run: their code, JAX's data about them, and memory that the allocator does not
# return; for the built-in model in floats, and for TinyLlama 1.1B in int4-g32. COMPILED: what remains in addition if
# programs are compiled in the same process, for both models. COMPILING: additional memory during compilation, for
# TinyLlama; for the built-in model it is 230 MiB.
PROCESS = 230 * _MIB
PROGRAMS_OF_FLOATS, PROGRAMS_OF_PACKED = 60 * _MIB, 130 * _MIB
COMPILED = 50 * _MIB
COMPILING = 350 * _MIB
# Temporaries on a CPU, in float32 numbers. A prefill's chunk takes, per token, these multiples of the model's width, of
# its feed-forward width, and of its scores for a slab of slots, and a layer's keys and values in addition. A decode
# step takes, per row, this multiple of its logits, and sums of products in addition. The numbers were fitted to
# `memory_analysis()` of programs of TinyLlama 1.1B (a chunk with 1 and 8 rows, 512 and 2,048 slots; a step with 1 and 8
# rows, 512 slots) and Llama 2 7B (a chunk, 1 row, 1,024 slots) in int4-g32, and agree with it within 6%.
_WIDTHS, _FFN_WIDTHS, _SCORES = 4.0, 3.2, 1.7
_SLAB_SLOTS = 256
_LOGITS, _SUMS = 5, 3 << 17


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes that a model takes while it generates.

    Attributes:
        config: the architecture.
        recipe: the form of the weights: a recipe, or "as stored".
        backend: the backend whose layout the weights have.
        context: number of tokens of a row, prompt and new ones.
        batch: number of rows.
        cache_dtype: dtype of keys and values.
        dtype: the dtype that the model computes in.
        stored: weights at rest, in llamajax's own checkpoint or in the file.
        weights: in memory, in the backend's layout.
        cache: keys and values of all rows, with as many slots as the engine gives them.
        activations: the largest temporaries of a forward pass.
        programs: machine code, and JAX's data about it.
        compiled: additional bytes if programs were compiled in the same process: at the first start of a shape.
        compiling: additional bytes during compilation, while the weights are read.
        reading: the peak while weights are read: all of them, and the largest once more while its layout is made.
    """

    config: Config
    recipe: str
    backend: str
    context: int
    batch: int
    cache_dtype: str
    dtype: str
    stored: int
    weights: int
    cache: int
    activations: int
    programs: int
    compiled: int
    compiling: int
    reading: int

    @property
    def total(self) -> int:
        """The peak of a process while it generates, beyond its memory before it loaded the model."""
        return self.weights + self.cache + self.activations + self.programs

    @property
    def most(self) -> int:
        """The peak over the whole process, including reading the weights and compiling."""
        return max(self.total + self.compiled, self.reading + self.compiling)


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a plan, which several contexts share.

    Attributes:
        model: the model in the backend's layout, of `jax.ShapeDtypeStruct`s.
        recipe: as in `Plan`.
        backend: as in `Plan`.
        stored: as in `Plan`.
    """

    model: Llama
    recipe: str
    backend: str
    stored: int

    def plan(
        self, context: int, batch: int = 1, cache_dtype: jax.typing.DTypeLike | None = None, drafts: int = 0
    ) -> Plan:
        """Returns the plan for generating with these weights; arguments and errors as in the function `plan`."""
        config = self.model.config
        for name, number, most in (("context", context, config.context_length), ("batch", batch, None)):
            if number < 1:
                raise LlamaJaxError(f"{name} is {number}: expected at least 1")
            if most is not None and number > most:
                raise LlamaJaxError(f"{name} is {number} tokens: expected at most {most}, the model's context length")
        engine = Engine(self.model, batch, max(1, context - 1 + drafts), cache_dtype=cache_dtype, drafts=drafts)
        return Plan(
            config=config,
            recipe=self.recipe,
            backend=self.backend,
            context=context,
            batch=batch,
            cache_dtype=engine.cache_dtype,
            dtype=str(np.dtype(self.model.dtype)),
            stored=self.stored,
            weights=nbytes(self.model),
            cache=nbytes(jax.eval_shape(lambda: empty_cache(config, batch, engine.slots, engine.cache_dtype))),
            activations=_temporaries(self.model, batch, context, engine.slots),
            programs=PROGRAMS_OF_PACKED if quantized(self.model) else PROGRAMS_OF_FLOATS,
            compiled=COMPILED,
            compiling=COMPILING,
            reading=nbytes(self.model) + max(map(nbytes, named_weights(self.model).values())),
        )


def plan(
    model: Opened | Config,
    recipe: str | Path | None = None,
    *,
    context: int | None = None,
    batch: int = 1,
    cache_dtype: jax.typing.DTypeLike | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    activations: str | None = None,
    backend: str | None = None,
) -> Plan:
    """Computes the memory that generating text with a model takes.

    Args:
        model: a checkpoint with its header read (`open_checkpoint`), or an architecture.
        recipe: the recipe for its weights, a name or a file, or "float32", "bfloat16", "float16". By default, weights
            are as a checkpoint stores them, and bfloat16 for an architecture.
        context: number of tokens of a row, prompt and new ones; by default `DEFAULT_CONTEXT`, or the model's context
            length if that is less.
        batch: number of rows.
        cache_dtype: dtype of keys and values, one of `caches.CACHE_DTYPES`; the model's by default.
        dtype: the dtype that the model computes in; as stored by default.
        activations: the rounding of activations at quantized weights, as in `with_activations`.
        backend: the backend whose layout the weights get; `jax.default_backend()` by default.

    Raises:
        LlamaJaxError: for an argument out of range, or a recipe that does not fit or depends on a text.
    """
    weights = plan_weights(model, recipe, dtype=dtype, activations=activations, backend=backend)
    return weights.plan(default_context(weights.model.config) if context is None else context, batch, cache_dtype)


def plan_weights(
    model: Opened | Config,
    recipe: str | Path | None = None,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    activations: str | None = None,
    backend: str | None = None,
) -> Weights:
    """Computes the weights of a plan, which takes a second or two, most of `plan`'s time; arguments as in `plan`."""
    backend = backend or jax.default_backend()
    finish = Finish(dtype, activations, backend)
    if recipe is None and isinstance(model, Opened):
        source = model.source
        at_rest = [each.nbytes for each in source.stored.values()] or [nbytes(one) for one in source.abstract.values()]
        return Weights(outcome(source, finish), "as stored", backend, sum(at_rest))
    config, recipe = (model.config if isinstance(model, Opened) else model), recipe or "bfloat16"
    abstract = foreseen_weights(config, recipe, "bfloat16")
    source = Source("shapes", config, abstract, tuple(abstract), read=_nothing_to_read)
    return Weights(outcome(source, finish), str(recipe), backend, sum(map(nbytes, abstract.values())))


def default_context(config: Config) -> int:
    """The number of tokens to plan for by default."""
    return min(DEFAULT_CONTEXT, config.context_length)


def longest_context(weights: Weights, memory: int, batch: int, cache_dtype: Any = None) -> int:
    """Returns the largest number of tokens per row for which a process takes at most `memory` bytes; 0 if none fits."""
    low, high = 0, weights.model.config.context_length
    while low < high:
        middle = (low + high + 1) // 2
        fits = weights.plan(middle, batch, cache_dtype).most <= memory
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _temporaries(model: Llama, batch: int, context: int, slots: int) -> int:
    """Returns the bytes of the largest temporaries of a prefill's chunk or of a decode step."""
    c = model.config
    tokens = batch * max(plan_chunks(context - 1), default=1)
    floats = _WIDTHS * c.width + _FFN_WIDTHS * c.ffn_width + _SCORES * c.num_heads * _SLAB_SLOTS
    layer = batch * _most_slots(c, slots) * 2 * c.num_kv_heads * c.head_size
    many = 4 * int(tokens * floats + layer)
    few = 4 * (_LOGITS * batch * c.vocab_size + _SUMS)
    return max(many, few)


def _most_slots(config: Config, slots: int) -> int:
    """Returns the largest number of slots of any layer: layers that see only a part of the text have a ring."""
    rings = ("window", "chunk")
    return min(slots, max(ring_slots(getattr(config, kind)) if kind in rings else slots for kind in config.layer_kinds))


def _nothing_to_read(place: Any) -> Any:
    raise AssertionError(f"{place} of a plan has a shape alone")
