"""Declares the weights of a layer: those of a LLaMA, and those that a config's switches add, move or remove."""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
from flax import nnx

from llamajax.config import Config
from llamajax.parameters import Role, Spec, begin, foreign, new, norm, with_offset


def _product(axes: str, input: str, maker: str, huggingface: str, gguf: str, init: Any = "normal") -> Spec:
    return Spec(
        axes=axes,
        over=axes[0],
        roles=("product",),
        input=input,
        maker=maker,
        init=init,
        foreign=foreign(f"model.layers.{{}}.{huggingface}.weight", f"blk.{{}}.{gguf}.weight"),
    )


def _vector(axes: str, role: Role, huggingface: str, gguf: str) -> Spec:
    """Declares a norm or a bias of a layer that some families have; norms begin at 1, biases at 0."""
    return Spec(
        axes=axes,
        roles=(role,),
        init="ones" if role == "norm" else "zeros",
        foreign=foreign(f"model.layers.{{}}.{huggingface}", f"blk.{{}}.{gguf}"),
    )


# The weights of a LLaMA's layer, in the order of their use.
LAYER: Mapping[str, Spec] = MappingProxyType(
    {
        "attention_norm.weight_D": norm("model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
        "attention.query_DQ": _product("DQ", "attention", "attention_norm.weight_D", "self_attn.q_proj", "attn_q"),
        "attention.key_DM": _product("DM", "attention", "attention_norm.weight_D", "self_attn.k_proj", "attn_k"),
        "attention.value_DM": _product("DM", "attention", "attention_norm.weight_D", "self_attn.v_proj", "attn_v"),
        "attention.out_QD": _product("QD", "out", "attention.value_DM", "self_attn.o_proj", "attn_output", "residual"),
        "ffn_norm.weight_D": norm("model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
        "ffn.gate_DF": _product("DF", "ffn", "ffn_norm.weight_D", "mlp.gate_proj", "ffn_gate"),
        "ffn.up_DF": _product("DF", "ffn", "ffn_norm.weight_D", "mlp.up_proj", "ffn_up"),
        "ffn.down_FD": _product("FD", "down", "ffn.up_DF", "mlp.down_proj", "ffn_down", "residual"),
    }
)

# Weights that families have in addition, or instead of the norms before.
_BIASES_QKV = {
    "attention.query_bias_Q": _vector("Q", "bias", "self_attn.q_proj.bias", "attn_q.bias"),
    "attention.key_bias_M": _vector("M", "bias", "self_attn.k_proj.bias", "attn_k.bias"),
    "attention.value_bias_M": _vector("M", "bias", "self_attn.v_proj.bias", "attn_v.bias"),
}
_BIAS_OUT = {"attention.out_bias_D": _vector("D", "bias", "self_attn.o_proj.bias", "attn_output.bias")}
_BIASES_FFN = {
    "ffn.gate_bias_F": _vector("F", "bias", "mlp.gate_proj.bias", "ffn_gate.bias"),
    "ffn.up_bias_F": _vector("F", "bias", "mlp.up_proj.bias", "ffn_up.bias"),
    "ffn.down_bias_D": _vector("D", "bias", "mlp.down_proj.bias", "ffn_down.bias"),
}
_QUERY_KEY_NORMS = {
    "head": {
        "attention.query_norm_H": _vector("H", "norm", "self_attn.q_norm.weight", "attn_q_norm.weight"),
        "attention.key_norm_H": _vector("H", "norm", "self_attn.k_norm.weight", "attn_k_norm.weight"),
    },
    "width": {
        "attention.query_norm_Q": _vector("Q", "norm", "self_attn.q_norm.weight", "attn_q_norm.weight"),
        "attention.key_norm_M": _vector("M", "norm", "self_attn.k_norm.weight", "attn_k_norm.weight"),
    },
}
_SINKS = {"attention.sinks_N": _vector("N", "bias", "self_attn.sinks", "attn_sinks.weight")}
_SUB_NORMS = {
    "attention.sub_norm_Q": _vector("Q", "norm", "self_attn.attn_sub_norm.weight", "attn_sub_norm.weight"),
    "ffn.sub_norm_F": _vector("F", "norm", "mlp.ffn_sub_norm.weight", "ffn_sub_norm.weight"),
}
_NORMS_AFTER = {
    "attention_after_norm.weight_D": _vector(
        "D", "norm", "post_attention_layernorm.weight", "post_attention_norm.weight"
    ),
    "ffn_after_norm.weight_D": _vector("D", "norm", "post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
}
_BIAS_OF = {
    "attention.query_DQ": "attention.query_bias_Q",
    "attention.key_DM": "attention.key_bias_M",
    "attention.value_DM": "attention.value_bias_M",
    "attention.out_QD": "attention.out_bias_D",
    "ffn.gate_DF": "ffn.gate_bias_F",
    "ffn.up_DF": "ffn.up_bias_F",
    "ffn.down_FD": "ffn.down_bias_D",
}
# With `sub_norms`, the norms that make the input of these weights.
_MAKERS_OF_SUB_NORMS = {"attention.out_QD": "attention.sub_norm_Q", "ffn.down_FD": "ffn.sub_norm_F"}


@functools.lru_cache(maxsize=64)
def layer_specs(config: Config) -> Mapping[str, Spec]:
    """Returns the weights of a layer by their path in its `Block`: a LLaMA's, changed by the config's switches."""
    specs = dict(LAYER)
    if config.norms == "after":
        del specs["attention_norm.weight_D"], specs["ffn_norm.weight_D"]
    if config.norms != "before":
        specs |= _NORMS_AFTER
    if config.qkv_bias:
        specs |= _BIASES_QKV
    if config.out_bias:
        specs |= _BIAS_OUT
    if config.ffn_bias:
        specs |= _BIASES_FFN
    specs |= _QUERY_KEY_NORMS.get(config.query_key_norm, {})
    if config.sinks:
        specs |= _SINKS
    if config.sub_norms:
        specs |= _SUB_NORMS
    made = {}
    for name, spec in specs.items():
        bias = _BIAS_OF.get(name, "")
        spec = dataclasses.replace(spec, maker=_maker(name, spec, config), bias=bias if bias in specs else "")
        made[name] = with_offset(spec, config)
    return MappingProxyType(made)


def _maker(name: str, spec: Spec, config: Config) -> str:
    """Returns the weight that makes a weight's input channel by channel; "" if the input is the residual stream."""
    if config.sub_norms and name in _MAKERS_OF_SUB_NORMS:
        return _MAKERS_OF_SUB_NORMS[name]
    without_norm = config.norms == "after" and spec.maker in ("attention_norm.weight_D", "ffn_norm.weight_D")
    return "" if without_norm else spec.maker


def params(prefix: str, names: tuple[str, ...], config: Config, key: jax.Array, dtype: Any, kind: str = "full") -> Any:
    """Makes a module's parameters with initial values by its specs; `prefix` is the module's path in its block."""
    full = tuple(f"{prefix}.{name}" if prefix else name for name in names)
    return (nnx.Param(array) for array in new(full, kind, config, key, dtype))


def optional(module: nnx.Module, prefix: str, config: Config, dtype: Any) -> None:
    """Sets a module's declared norms and biases to their initial values, and to None if its config has none."""
    specs = layer_specs(config)
    for name in type(module).__annotations__:
        spec = specs.get(f"{prefix}.{name}")
        setattr(module, name, None if spec is None else nnx.Param(begin(spec, config, jax.random.key(0), dtype)))
