"""Adapts rules so that a ggml type holds each quantized weight without loss, and llama.cpp runs it bit for bit."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llamajax.config import Config
from llamajax.parameters import Place, specs
from llamajax.quantization.bit_search import bits_are_free
from llamajax.quantization.quantize_weight import by_rounding, naming
from quant import Rule, ggml

# Forms that the search for bits chooses from, as (scheme, group_size, scale_scheme): Q2_K, Q3_K, Q4_K, Q5_K, Q6_K and
# Q8_0; for rows whose length is no multiple of 256, Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.
_Form = tuple[str, int, str | None]
_SUPERBLOCK = 256
_FORMS: tuple[_Form, ...] = (
    *(("uint2", 16, "uint4"), ("int3", 16, "int6"), ("uint4", 32, "uint6"), ("uint5", 32, "uint6")),
    *(("int6", 16, "int8"), ("int8", 32, None)),
)
_FORMS_OF_32: tuple[_Form, ...] = (
    *(("int4", 32, None), ("uint4", 32, None), ("int5", 32, None), ("uint5", 32, None), ("int8", 32, None)),
)


def for_ggml(rules: Mapping[Place, Rule], config: Config, search: bool) -> dict[Place, Rule]:
    """Returns the rules in ggml's forms: scales in float16, offsets instead of zero points.

    Args:
        rules: the rule for each weight.
        config: the architecture.
        search: whether a search will choose among `candidates` where the bits of a rule are free.

    Raises:
        LlamaJaxError: if no ggml type holds the result of a rule; names the weight and the nearest type.
    """
    made = {}
    for place, rule in rules.items():
        if rule.scheme is not None:
            with naming(f"{place}, by the rule for {rule.weights!r}"):
                rule = _in_float16(rule)
                if not (search and bits_are_free(rule) and candidates(place, rule, config)):
                    _check_held(rule, place, config)
        made[place] = rule
    return made


def candidates(place: Place, rule: Rule, config: Config) -> list[Rule]:
    """Returns what a search for bits may choose: the rule in each ggml type's form, or the rule if its bits are fixed.

    The list is empty for a weight that none of these types holds.
    """
    if not bits_are_free(rule):
        return [rule]
    spec = specs(config)[place]
    length = spec.shape(config)[spec.axis]
    if length % 32 or rule.outliers or rule.act_order:
        return []
    forms = _FORMS_OF_32 if length % 256 or rule.method == "hqq" else _FORMS
    made = []
    for scheme, group_size, scale_scheme in forms:
        is_uint = scheme.startswith("uint")
        if rule.method != "hqq" or is_uint:
            changes: dict[str, Any] = {"scheme": scheme, "group_size": group_size, "scale_scheme": scale_scheme}
            changes["scale_group"] = _SUPERBLOCK
            made.append(dataclasses.replace(rule, **changes, offset=is_uint and scale_scheme is None))
    return made


def _in_float16(rule: Rule) -> Rule:
    """Returns the rule with float16 scales, as in ggml's types, in place of bfloat16, which is the default of rules."""
    scale_dtype = "float16" if rule.scale_dtype == "bfloat16" else rule.scale_dtype
    offset = rule.scale_scheme is None and str(rule.scheme).startswith("uint")
    return dataclasses.replace(rule, scale_dtype=scale_dtype, offset=offset)


def _check_held(rule: Rule, place: Place, config: Config) -> None:
    """Refuses a rule whose result no ggml type holds.

    Raises:
        ValueError: with a description of the result, and the nearest type.
    """
    weight = _made_by(rule, place, config)
    if not rule.outliers and not rule.act_order and ggml.type_of(weight) is not None:
        return
    said = [ggml.described(weight)]
    said += [f"{rule.outliers} outliers"] if rule.outliers else []
    said += ["act_order"] if rule.act_order else []
    raise ValueError(
        f"{', '.join(said)}: no ggml type holds it, the nearest is {ggml.explained(ggml.nearest(weight))}: change the "
        "rule, or leave the weight unquantized (keep = true)"
    )


def _made_by(rule: Rule, place: Place, config: Config) -> Any:
    """Returns the weight quantized by a rule, as `jax.ShapeDtypeStruct`s; without outliers and channel order."""
    spec = specs(config)[place]
    shape = spec.shape(config)
    rule = rule.for_inputs(shape[spec.axis])
    names = "scheme", "group_size", "scale_dtype", "scale_scheme", "scale_group", "offset"
    form = {name: getattr(rule, name) for name in names}
    return _made(Rule(weights="*", **form), shape, spec.axis)


@functools.lru_cache(maxsize=256)
def _made(rule: Rule, shape: tuple[int, ...], axis: int) -> Any:
    return jax.eval_shape(lambda weight: by_rounding(weight, rule, axis), jax.ShapeDtypeStruct(shape, jnp.float32))
