"""The model's functions as StableHLO programs: weights are arguments, named and in one order, never constants.

    programs = lower(model, Spec(slots=512))
    programs["decode"].artifact          # portable artifact, for any runtime that reads StableHLO

They are the functions that generation uses (`Llama.blocks`, `Llama.head`, `sample`), traced with a model whose weights
are arguments. A `Profile` describes the needs of a runtime: layers in one loop or written out one after the other, and
codes extracted from bytes by shifts or by float arithmetic.

Every program takes all weights first, in the order of `parameters`, then its inputs, then the state (`empty_state`),
and returns its outputs, then the state. Shapes are static.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jaxlib.mlir import passmanager
from jaxlib.mlir.dialects import stablehlo

from export.lint import check, tidy
from export.profiles import PROFILES, Profile, Spec
from export.programs import bound, functions
from export.weights import parameters, taken_by
from llamajax import Llama, LlamaJaxError, model_from, named_weights, prepare, rebuilt
from quant import is_laid_out, quantized

# The oldest StableHLO with everything that the programs use (gathers with batch axes). StableHLO promises five years
# of backward and two years of forward compatibility.
STABLEHLO_VERSION = "1.1.0"


@dataclasses.dataclass(frozen=True)
class Value:
    """An argument or a result: its name, its dtype by NumPy's name, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, array: Any) -> "Value":
        """Describes an array, real or abstract."""
        return cls(name, str(np.dtype(array.dtype)), tuple(array.shape))


@dataclasses.dataclass(frozen=True)
class Program:
    """One lowered function.

    Attributes:
        inputs: its arguments after the weights.
        outputs: its results. A result with the name of an input is that state and may reuse the input's memory.
        weights: the weights that are its first arguments, used or not: "packed", "prepared" in a backend's layout, or
            "none".
        artifact: StableHLO portable artifact (MLIR bytecode) of a module with one public function, `main`.
        operations: the number of occurrences of each operation.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    weights: Literal["packed", "prepared", "none"]
    artifact: bytes
    operations: Mapping[str, int]


def lower(model: Llama, spec: Spec) -> dict[str, Program]:
    """Lowers all programs of a `spec`: `prefill_16`, …, `decode`, and the optional ones.

    Raises:
        LlamaJaxError: if the model cannot be exported in this form, or `check` refuses a program.
    """
    if is_laid_out(model):
        raise LlamaJaxError("the model is prepared for a backend: export the model from before `prepare`")
    # One scale per token, as in models trained with it (BitNet), can be exported. Scales per group, or channels that
    # are not rounded, need a kernel.
    asking = [weight for weight in quantized(model) if weight.activations]
    if kinds := {
        str(weight.activations) for weight in asking if weight.activations != "int8-token" or weight.outlier is not None
    }:
        raise LlamaJaxError(
            f"weights that round their activations ({', '.join(sorted(kinds))}): other runtimes cannot do this: "
            "export with --activations=float32, or llamajax.with_activations(model, 'float32')"
        )
    profile = spec.profile
    taken = taken_by(profile, model)
    weights = parameters(taken, profile)
    kind: Literal["packed", "prepared"] = "packed" if profile.backend is None else "prepared"
    programs = {}
    if profile.backend is not None:
        # Traced with the packed weights; it returns the weights that the other programs take.
        packed = parameters(model, PROFILES["scanned"])
        flat = _prepared(model, tuple(packed), profile)
        programs["prepare"] = lower_program("prepare", flat, packed, {}, tuple(weights), "packed", profile)
    for name, function, inputs, results, takes_model in functions(model, spec):
        flat = bound(function, tuple(weights) if takes_model else None, taken, profile)
        first = weights if takes_model else {}
        programs[name] = lower_program(name, flat, first, inputs, results, kind if takes_model else "none", profile)
    return programs


def _prepared(like: Llama, names: tuple[str, ...], profile: Profile) -> Callable[..., tuple]:
    """A function from the packed arrays of these names to the arrays in the layout of the profile's backend."""

    def flat(*arrays: Any) -> tuple:
        of = dict(zip(names, arrays, strict=True))
        weights = {name: rebuilt(name, weight, of) for name, weight in named_weights(like).items()}
        prepared = prepare(model_from(weights, like.config), profile.backend)
        return tuple(parameters(prepared, profile).values())

    return flat


def lower_program(
    name: str,
    flat: Callable[..., tuple],
    weights: Mapping[str, Any],
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    results: tuple[str, ...],
    kind: Literal["packed", "prepared", "none"],
    profile: Profile,
) -> Program:
    """Lowers a function of arrays (weights, then inputs). A result may reuse the memory of the input of its name."""
    flat.__name__ = name
    arguments = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (*weights.values(), *inputs.values())]
    # Donating does not do this: jax gives donated memory to the first result of the same shape and dtype.
    aliases = {len(weights) + i: results.index(value) for i, value in enumerate(inputs) if value in results}
    # Lowered for CPU: nothing in the programs depends on the platform. Unused weights stay arguments.
    lowered = jax.jit(flat, keep_unused=True).trace(*arguments).lower(lowering_platforms=("cpu",))
    module = lowered.compiler_ir("stablehlo")
    with module.context:
        passmanager.PassManager.parse("builtin.module(canonicalize,cse,symbol-dce)").run(module.operation)
        tidy(module, aliases)
        operations = check(module, profile, name)
        text = module.operation.get_asm(enable_debug_info=False)
        artifact = stablehlo.serialize_portable_artifact_str(text, STABLEHLO_VERSION)
    return Program(
        tuple(Value.of(input_name, array) for input_name, array in inputs.items()),
        tuple(Value.of(result, array) for result, array in zip(results, lowered.out_info, strict=True)),
        kind,
        artifact,
        operations,
    )
