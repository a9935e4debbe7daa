"""Rules that make only what a type of ggml's holds without loss, so that llama.cpp runs it bit for bit."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llamajax.config import Config
from llamajax.parameters import Place, specs
from llamajax.quantization.quantize_weight import naming
from quant import Rule, ggml, quantize_rtn, with_offset


def for_ggml(rules: Mapping[Place, Rule], config: Config, bits_are_free: bool) -> dict[Place, Rule]:
    """The rules with what ggml has but one form of: scales in float16, offsets instead of zero points.

    Args:
        rules: of every weight.
        config: the architecture.
        bits_are_free: whether `choose_bits` will choose the number of bits of `int` and `uint` rules.

    Raises:
        LlamaJaxError: naming the weight and what comes nearest, for a rule that makes what no type holds.
    """
    made = {}
    for place, rule in rules.items():
        if rule.scheme is not None:
            scale_dtype = "float16" if rule.scale_dtype == "bfloat16" else rule.scale_dtype  # that is the default
            rule = dataclasses.replace(rule, scale_dtype=scale_dtype, offset=rule.scheme.startswith("uint"))
            candidates = [rule, *_others(rule)] if bits_are_free else [rule]
            with naming(f"{place}, by the rule for {rule.weights!r}"):
                if not any(is_held(each, place, config) for each in candidates):
                    raise ValueError(_problem(rule, place, config))
        made[place] = rule
    return made


def is_held(rule: Rule, place: Place, config: Config) -> bool:
    """Whether a type of ggml's holds what a rule makes of a weight."""
    if rule.scheme is None:
        return True
    return not rule.outliers and not rule.act_order and ggml.type_of(made_by(rule, place, config)) is not None


def made_by(rule: Rule, place: Place, config: Config) -> Any:
    """What a rule makes of a weight, with `jax.ShapeDtypeStruct` for arrays; without outliers and order."""
    spec = specs(config)[place]
    shape = spec.shape(config)
    rule = rule.for_inputs(shape[spec.axis])
    assert rule.scheme is not None  # a rule that quantizes
    return _made(rule.scheme, rule.group_size, rule.scale_dtype, rule.offset, shape, spec.axis)


@functools.lru_cache(maxsize=256)
def _made(scheme: str, group_size: Any, scale_dtype: str, offset: bool, shape: tuple[int, ...], axis: int) -> Any:
    def make(weight: jax.Array) -> Any:
        quantized = quantize_rtn(weight, scheme, group_size=group_size, axis=axis, scale_dtype=scale_dtype)
        return with_offset(quantized) if offset else quantized

    return jax.eval_shape(make, jax.ShapeDtypeStruct(shape, jnp.float32))


def _others(rule: Rule) -> list[Rule]:
    """The rule with other numbers of bits."""
    kind = str(rule.scheme).rstrip("0123456789")
    return [dataclasses.replace(rule, scheme=f"{kind}{bits}") for bits in (4, 5, 8)] if kind in ("int", "uint") else []


def _problem(rule: Rule, place: Place, config: Config) -> str:
    """Why no type holds what a rule makes, and which one comes nearest."""
    weight = made_by(rule, place, config)
    said = [ggml.described(weight)]
    said += [f"{rule.outliers} outliers"] if rule.outliers else []
    said += ["act_order"] if rule.act_order else []
    near = ggml.explained(ggml.nearest(weight, two_levels=False))
    return (
        f"{', '.join(said)}: no ggml type holds it, the nearest is {near}: change the rule, or let it keep the weight "
        "(keep = true)"
    )
