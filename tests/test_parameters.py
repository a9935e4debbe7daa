"""Declarations of weights: they agree with the model's shapes, its computation, and the names of other formats."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamajax
from llamajax import Config, LlamaJaxError, abstract_model, preset, preset_names
from llamajax.families import tensors
from llamajax.layer_weights import LAYER
from llamajax.model import model_from
from llamajax.parameters import (
    Place,
    Stack,
    inputs,
    leaves,
    locate,
    named_weights,
    product_weights,
    specs,
    step_bytes,
    unrolled,
    weights_of,
)
from llamajax.quantization.calibrate import block_of, forward
from quant import Probe
from tests.reference import random_model

ROOT = Path(__file__).parents[1]
CONFIG = Config(
    vocab_size=48, width=16, ffn_width=40, num_layers=3, num_heads=4, num_kv_heads=2, head_size=8, context_length=32
)
TIED = Config.from_dict(CONFIG.to_dict() | {"tied_embeddings": True})

# ---- Counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.parametrize("name", preset_names())
def test_counts_are_those_of_the_tree(name: str) -> None:
    config = preset(name)
    model = abstract_model(config, jnp.bfloat16)
    named = named_weights(model)
    assert config.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(model))
    multiplied = sum(leaf.size for name, leaf in named.items() if len(leaf.shape) == 3)
    head = config.vocab_size * config.width
    assert product_weights(config, head=False) == multiplied and product_weights(config) == multiplied + head
    # A token reads all weights but the embedding table, unless the table is the head as well.
    table = 0 if config.tied_embeddings else head
    assert step_bytes(model) == 2 * (config.num_parameters - table)
    assert step_bytes(model, head=False) == 2 * (config.num_parameters - table - head)


def test_shapes_of_single_weights_are_those_of_the_tree() -> None:
    for config in (CONFIG, TIED):
        taken = weights_of(random_model(config))
        assert list(taken) == list(specs(config))
        assert all(taken[place].shape == spec.shape(config) for place, spec in specs(config).items())


# ---- Names -----------------------------------------------------------------------------------------------------------

# From transformers' modeling_llama.py, by hand: our name, their name and their shape [out, in].
THEIRS = {
    "attention_norm.weight_D": ("input_layernorm", (16,)),
    "attention.query_DQ": ("self_attn.q_proj", (32, 16)),
    "attention.key_DM": ("self_attn.k_proj", (16, 16)),
    "attention.value_DM": ("self_attn.v_proj", (16, 16)),
    "attention.out_QD": ("self_attn.o_proj", (16, 32)),
    "ffn_norm.weight_D": ("post_attention_layernorm", (16,)),
    "ffn.gate_DF": ("mlp.gate_proj", (40, 16)),
    "ffn.up_DF": ("mlp.up_proj", (40, 16)),
    "ffn.down_FD": ("mlp.down_proj", (16, 40)),
}


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_every_weight_has_its_foreign_name(config: Config) -> None:
    expected = {
        f"model.layers.{layer}.{theirs}.weight": Place(ours, layer)
        for layer in range(3)
        for ours, (theirs, _) in THEIRS.items()
    }
    expected |= {"model.embed_tokens.weight": Place("embed_VD"), "model.norm.weight": Place("norm.weight_D")}
    expected |= {} if config.tied_embeddings else {"lm_head.weight": Place("head_VD")}
    assert {name: place for name, (place,) in tensors(config, "huggingface").items()} == expected
    assert set(expected.values()) == set(specs(config))


def test_names_in_gguf_are_those_that_gguf_makes_of_theirs() -> None:
    gguf = pytest.importorskip("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.num_layers)
    for theirs, (place,) in tensors(CONFIG, "huggingface").items():
        ours = specs(CONFIG)[place].foreign["gguf"].format(place.layer)
        assert ours == names.get_name(theirs, (".weight",))


def test_foreign_shapes_are_ours_turned(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    model = random_model(CONFIG)
    llamajax.save_checkpoint(model, tmp_path / "hf", form="huggingface")
    tensors, ours = load_file(tmp_path / "hf" / "model.safetensors"), weights_of(model)
    for name, (theirs, shape) in THEIRS.items():
        tensor = tensors[f"model.layers.1.{theirs}.weight"]
        assert tensor.shape == shape
        np.testing.assert_array_equal(tensor.T, ours[Place(name, 1)])
    again, _ = llamajax.load(tmp_path / "hf")
    for place, weight in weights_of(again).items():
        np.testing.assert_array_equal(weight, ours[place], str(place))


def test_names_of_stacks_and_of_layers() -> None:
    one = leaves(CONFIG)
    assert [str(place) for place in one["layers.*.ffn.up_DF"].places] == [f"layers.{i}.ffn.up_DF" for i in range(3)]
    alone = leaves(CONFIG, unrolled(CONFIG.stacks))
    assert {"layers.0.ffn.up_DF", "layers.2.ffn.up_DF", "embed_VD"} < set(alone) and len(alone) == 3 * 9 + 3
    pattern = (Stack(0, ("full",), 1), Stack(1, ("full", "full"), 1))
    assert "layers.2.ffn.up_DF" in leaves(CONFIG, pattern)
    assert locate(pattern, 2) == (pattern[1], 1, 0)
    with pytest.raises(LlamaJaxError, match="layer 3: the model has layers 0 to 2"):
        locate(pattern, 3)


def test_a_model_is_made_of_its_weights_whatever_their_order() -> None:
    model = random_model(CONFIG)
    backwards = dict(reversed(named_weights(model).items()))
    jax.tree.map(np.testing.assert_array_equal, model_from(backwards, CONFIG), model)


# ---- Inputs ----------------------------------------------------------------------------------------------------------


def test_weights_that_share_an_input_are_multiplied_with_the_same_activations() -> None:
    """A block is traced with a probe per weight: weights of one group get the same traced value, others do not."""
    found: dict[str, int] = {}

    def traced(x_BTD: jax.Array) -> jax.Array:
        seen: dict[str, jax.Array] = {}
        weights = {place.name: weight for place, weight in weights_of(random_model(CONFIG)).items() if place.layer == 1}
        products = [name for name in weights if "norm" not in name]
        probes = {name: Probe(weights[name], name, seen) for name in products}
        y_BTD = forward(block_of(weights | probes, CONFIG, 1), x_BTD, CONFIG.numbers(1))
        assert set(seen) == set(products), "every weight is multiplied with an input"
        found.update({name: id(value) for name, value in seen.items()})
        return y_BTD

    assert jax.eval_shape(traced, jax.ShapeDtypeStruct((2, 5, 16), jnp.float32)).shape == (2, 5, 16)
    measured = {frozenset(name for name in found if found[name] == value) for value in found.values()}
    declared = {frozenset(names) for names in inputs(CONFIG, 1).values()}
    assert measured == declared and len(declared) == 4
    assert list(inputs(CONFIG, 1)) == ["attention", "out", "ffn", "down"], "inputs are listed in the order of their use"


def test_roles_are_what_the_model_does() -> None:
    """Only weights with the role head are multiplied with the last activations; only tables are looked up."""
    model, seen = random_model(CONFIG), {}
    named = named_weights(model)

    def head(x_TD: jax.Array) -> jax.Array:
        return model_from(named | {"head_VD": Probe(named["head_VD"], "head", seen)}, CONFIG).head(x_TD)

    jax.eval_shape(head, jax.ShapeDtypeStruct((5, 16), jnp.float32))
    assert seen["head"].shape == (5, 16)
    of = {config: {str(place): spec.roles for place, spec in specs(config).items()} for config in (CONFIG, TIED)}
    assert of[CONFIG]["embed_VD"] == ("table",) and of[CONFIG]["head_VD"] == ("head",)
    assert of[TIED]["embed_VD"] == ("table", "head") and "head_VD" not in of[TIED]
    looked_up = [str(place) for place, spec in specs(CONFIG).items() if spec.is_only_looked_up]
    assert looked_up == ["embed_VD"] and not any(spec.is_only_looked_up for spec in specs(TIED).values())


@pytest.mark.parametrize("name", [name for name, spec in LAYER.items() if spec.input])
def test_what_makes_an_input_can_undo_its_scale(name: str) -> None:
    """Scaling a channel down in its maker and up in all weights that share it leaves the layer's output unchanged.

    The maker of `out` is `value`, whose channels several heads share: there all channels get the same scale.
    """
    spec = LAYER[name]
    weights = {place.name: weight for place, weight in weights_of(random_model(CONFIG)).items() if place.layer == 1}
    members = inputs(CONFIG, 1)[spec.input]
    scale = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, weights[spec.maker].shape[-1]), jnp.float32)
    scale_K = scale if spec.input != "out" else jnp.full(weights[name].shape[0], 2.0)
    changed = weights | {spec.maker: weights[spec.maker] / (scale if spec.input != "out" else 2.0)}
    changed |= {member: weights[member] * scale_K[:, None] for member in members}
    x_BTD = jnp.asarray(np.random.default_rng(1).standard_normal((1, 6, 16)), jnp.float32)
    before, after = (forward(block_of(each, CONFIG, 1), x_BTD, {}) for each in (weights, changed))
    np.testing.assert_allclose(after, before, atol=1e-4)


# ---- Shardings -------------------------------------------------------------------------------------------------------

_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType
import llamajax
from llamajax import Config, LlamaJaxError, shardings
from llamajax.parameters import named_arrays
from llamajax.quantization.quantize import quantize
from quant.recipe import Rule
from tests.reference import random_model
config = Config(vocab_size=96, width=64, ffn_width=128, num_layers=2, num_heads=8, num_kv_heads=8, head_size=8,
                context_length=32)
rules = {"F": "model", "Q": "model", "M": "model", "V": "model", "D": None}
tokens = np.random.default_rng(0).integers(0, 96, (2, 9))
plain = random_model(config)
packed = quantize(plain, (Rule(weights="*norm*", keep=True), Rule(weights="*down*", layers=(0,), scheme="int8"),
                          Rule(weights="*", scheme="int4", group_size=32)))
logits = jax.jit(lambda model, tokens: model(tokens)[0])
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(kind,))
    for model in (plain, packed):
        spread = jax.device_put(model, shardings(model, mesh, rules))
        assert jax.tree.structure(spread) == jax.tree.structure(model)
        arrays = named_arrays(spread)
        for name, array in arrays.items():
            assert len(array.sharding.device_set) == 8, name
        part = lambda name: arrays[name].addressable_shards[0].data.shape
        if model is plain:
            assert part("layers.*.ffn.up_DF") == (2, 64, 16) and part("layers.*.ffn.down_FD") == (2, 16, 64)
            assert part("head_VD") == (12, 64) and part("norm.weight_D") == (64,)
            assert part("layers.*.attention.out_QD") == (2, 8, 64) and part("layers.*.attention.key_DM") == (2, 64, 8)
        else:
            assert part("layers.*.ffn.up_DF.planes.0") == (2, 32, 16) and part("layers.*.ffn.up_DF.scale") == (2, 2, 16)
            # Two types of one layer each; four groups along F are fewer than the devices, and stay whole.
            assert part("layers.*.ffn.down_FD.stacks.0.planes.0") == (1, 16, 64)
            assert part("layers.*.ffn.down_FD.stacks.1.planes.0") == (1, 8, 64)
            assert part("layers.*.ffn.down_FD.stacks.1.scale") == (1, 4, 64)
        np.testing.assert_allclose(np.asarray(logits(spread, tokens)), np.asarray(logits(model, tokens)), atol=1e-4)
mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
both = shardings(llamajax.abstract_model(config), mesh, {"D": "x", "F": "y"})
assert both.stacks[0][0].ffn.up_DF.get_value().spec == jax.sharding.PartitionSpec(None, "x", "y")
for wrong, what in (({"Z": "x"}, "rule 'Z': 'x': expected a letter of "), ({"F": "z"}, "and an axis of x, y")):
    try:
        shardings(plain, mesh, wrong)
    except LlamaJaxError as error:
        assert what in str(error), error
    else:
        raise AssertionError(wrong)
print("ok")
"""


def test_a_model_is_spread_by_the_letters_of_its_axes() -> None:
    """On 8 devices, shards have the shapes written here, and logits equal one device's; so for packed weights."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", _DEVICES], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr
