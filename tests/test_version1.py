"""Files of earlier releases: checkpoints of format version 1 and recipes, in `tests/checkpoints/version1`.

The last commit that wrote version 1, 4af1615, made all of it: four checkpoints of random weights, zipped as they are,
the logits that it gave for `TOKENS` in float32, and the scheme that it gave each weight of each of four layers by some
recipes.
"""

import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamajax
from llamajax import Config
from llamajax.parameters import Place, named_weights, specs, weights_of
from llamajax.quantization.quantize import assigned
from quant import Mixed, kinds
from quant.recipe import Rule
from tests.programs import forward

FOLDER = Path(__file__).parent / "checkpoints" / "version1"
TOKENS = np.random.default_rng(0).integers(0, 24, (2, 7))


def unpacked(name: str, folder: Path) -> Path:
    with zipfile.ZipFile(FOLDER / f"{name}.zip") as file:
        file.extractall(folder / name)
    return folder / name


@pytest.mark.parametrize("name", ["int4", "runs", "tied", "bfloat16"])
def test_checkpoints_give_the_logits_that_they_gave(name: str, tmp_path: Path) -> None:
    folder = unpacked(name, tmp_path)
    assert json.loads((folder / "manifest.json").read_text())["version"] == 1
    model, _ = llamajax.load(folder, dtype=jnp.float32)
    logits = forward(model, jnp.asarray(TOKENS))
    np.testing.assert_allclose(logits, np.load(FOLDER / f"{name}.npy"), rtol=1e-4, atol=1e-4)


def test_types_are_those_that_were_written(tmp_path: Path) -> None:
    """The checkpoint "runs" has the types of its recipe.

    Kept: norms, and `layers.ffn.down_FD` of layer 2. int8: `layers.attention*` of layers 0 and -1. nf4: `layers.ffn*`
    of layer 0. uint3: all other weights. Groups have 8 weights.
    """
    plain, runs, tied, half = (
        llamajax.load(unpacked(name, tmp_path))[0] for name in ("int4", "runs", "tied", "bfloat16")
    )
    assert {kind for weight in weights_of(plain).values() for kind in kinds(weight)} == {"int4-g8", "float32"}
    assert tied.head_VD is None and half.dtype == jnp.bfloat16
    found = {place: kinds(weight) for place, weight in weights_of(runs).items()}
    for layer in range(4):
        attention = "int8-g8" if layer in (0, 3) else "uint3-g8"
        ffn = "nf4-g8" if layer == 0 else "uint3-g8"
        assert found[Place("attention.query_DQ", layer)] == found[Place("attention.out_QD", layer)] == [attention]
        assert found[Place("ffn.up_DF", layer)] == [ffn]
        assert found[Place("ffn.down_FD", layer)] == ["float32" if layer == 2 else ffn]
        assert found[Place("ffn_norm.weight_D", layer)] == ["float32"]
    assert found[Place("embed_VD")] == found[Place("head_VD")] == ["uint3-g8"]
    assert isinstance(named_weights(runs)["layers.*.ffn.down_FD"], Mixed)


@pytest.mark.parametrize("name", ["int4", "runs", "tied", "bfloat16"])
def test_written_anew_they_are_the_same(name: str, tmp_path: Path) -> None:
    """Saved as version 2, weights stay; the manifest lists a weight once if all layers are alike, else each layer's."""
    model, _ = llamajax.load(unpacked(name, tmp_path))
    llamajax.save_checkpoint(model, tmp_path / "again")
    manifest = json.loads((tmp_path / "again" / "manifest.json").read_text())
    assert manifest["version"] == 2 and ("layers.3.ffn.down_FD" in manifest["weights"]) == (name == "runs")
    again = weights_of(llamajax.load(tmp_path / "again")[0])
    for place, weight in weights_of(model).items():
        for before, after in zip(_arrays(weight), _arrays(again[place]), strict=True):
            np.testing.assert_array_equal(before, after, str(place))


def _arrays(weight) -> list[np.ndarray]:

    return [np.asarray(leaf) for leaf in jax.tree.leaves(weight)]


@pytest.mark.parametrize("title", ["whole names and ends", "globs", "first rule wins", "both"])
def test_recipes_mean_what_they_meant(title: str) -> None:
    table = json.loads((FOLDER / "recipes.json").read_text())[title]
    config = Config(
        vocab_size=24, width=16, ffn_width=24, num_layers=4, num_heads=2, num_kv_heads=1, head_size=8, context_length=32
    )
    rules = [Rule(**rule | {"layers": tuple(rule["layers"])} if "layers" in rule else rule) for rule in table["rules"]]
    expected = {
        Place(name.removeprefix("layers."), layer if name.startswith("layers.") else None): scheme
        for name, schemes in table["schemes"].items()
        for layer, scheme in enumerate(schemes)
    }
    found = {place: "keep" if rule.keep else rule.scheme for place, rule in assigned(rules, config).items()}
    assert found == expected and set(found) == set(specs(config))
