"""`benchmarks/yardstick.py` on a tiny model, without llama.cpp: whose figures they are, and which are kept."""

import json
import math
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

import llamajax
from llamajax.evaluation.evaluate import compare_each
from llamajax.evaluation.windows import document_windows
from llamajax.quantization.quantize import quantize, read_recipe
from tests.scripts import script

RECIPE = """
[[rules]]
weights = "*norm*"
keep = true

[[rules]]
weights = "*"
scheme = "int4"
group_size = 8
"""


@pytest.fixture(scope="module")
def yardstick() -> Iterator[types.ModuleType]:
    """The script as a module, which finds those beside it."""
    with script("yardstick") as module:
        yield module


@pytest.fixture(scope="module")
def folder(tiny_model, tiny_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a text and a recipe."""
    folder = tmp_path_factory.mktemp("yardstick")
    llamajax.save_checkpoint(tiny_model, folder / "model", tokenizer=tiny_tokenizer)
    words = np.random.default_rng(0).choice(["one ", "day ", "the fox ", "saw ", "a little ", "bird. "], 6000)
    (folder / "text.txt").write_text("".join(words))
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def run(yardstick: types.ModuleType, folder: Path, *options: str) -> dict:
    values = flags.FlagValues()
    yardstick.define(values)
    given = {
        "model": folder / "model",
        "text": folder / "text.txt",
        "ours": folder / "recipe.toml",
        "json": folder / "y.json",
    }
    values(["yardstick", *(f"--{name}={value}" for name, value in given.items()), "--types=", "--windows=2", *options])
    yardstick.run(values)
    return json.loads((folder / "y.json").read_text())


def test_figures_are_those_of_the_evaluation(
    yardstick, folder: Path, tiny_model, tiny_tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = run(yardstick, folder)["rows"]
    ids = tiny_tokenizer.encode((folder / "text.txt").read_text())
    windows = document_windows(ids[len(ids) // 2 :][: 2 * 512 + 1], 512)
    windows.rows[:, 0] = tiny_tokenizer.bos_id
    packed = quantize(tiny_model, folder / "recipe.toml")
    divergence, agreement, losses, reference = compare_each(packed, tiny_model, windows)
    assert row["kl_divergence"] == pytest.approx(divergence.mean(), rel=1e-3)
    assert row["kl_standard_error"] == pytest.approx(divergence.std() / math.sqrt(1023), rel=1e-3)
    assert row["top1_agreement"] == pytest.approx(agreement.mean(), abs=2e-3)
    assert row["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert row["reference_perplexity"] == pytest.approx(math.exp(reference.mean()), rel=1e-4)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
    assert (row["bytes"], row["bits_per_weight"]) == (size, 8 * size / tiny_model.config.num_parameters)
    assert f"{row['kl_divergence']:.5f}" in capsys.readouterr().out


def test_pieces_behind_a_cache_are_one_text(yardstick, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(yardstick, folder)["rows"][0]
    monkeypatch.setattr(yardstick, "_PIECE", 200)
    (row,) = run(yardstick, folder, f"--again={folder / 'recipe.toml'}")["rows"]
    assert row["kl_divergence"] == pytest.approx(whole["kl_divergence"], rel=1e-3)
    assert row["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-4)
    assert row["date"] >= whole["date"] and row["evaluation_seconds"] != whole["evaluation_seconds"]


def test_a_row_is_measured_once(yardstick, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run(yardstick, folder)
    monkeypatch.setattr(yardstick.Bench, "figures", lambda *_: pytest.fail("measured again"))
    assert run(yardstick, folder) == before
    monkeypatch.undo()
    after = run(yardstick, folder, "--cache=float32,int8", "--activations=recipe,int8")["rows"]
    assert after[0] == before["rows"][0]
    settings = [(row["key"]["activations"], row["key"]["cache"]) for row in after]
    assert settings == [("recipe", "float32"), ("recipe", "int8"), ("int8", "float32"), ("int8", "int8")]
    assert len({row["kl_divergence"] for row in after}) == 4


def test_kept_figures_are_shown_and_drawn_without_a_model(yardstick, folder: Path, capsys) -> None:
    """The committed file of Gemma 3: the script prints its figures as they stand there, and draws them."""
    path = Path(yardstick.__file__).with_name("yardstick_gemma3.json")
    picture = folder / "drawn.svg"
    values = flags.FlagValues()
    yardstick.define(values)
    values(["yardstick", f"--draw={path}", f"--plot={picture}", "--model=there is none"])
    yardstick.run(values)
    printed = capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) > 10 and all(f"{row['kl_divergence']:.5f} ±" in printed for row in rows)
    assert "gemma3-distilled" in picture.read_text()
    for forged in ("[]", '{"models": {}, "rows": {}}', '{"models": {}, "rows": [{"key": {}}]}'):
        (folder / "forged.json").write_text(forged)
        values(["yardstick", f"--draw={folder / 'forged.json'}"])
        with pytest.raises(llamajax.LlamaJaxError, match="forged.json: is no file of this script"):
            yardstick.run(values)
    values(["yardstick", f"--draw={folder / 'none.json'}"])
    with pytest.raises(llamajax.LlamaJaxError, match="none.json: there is no such file"):
        yardstick.run(values)


def test_rows_of_other_targets_and_texts(yardstick) -> None:
    row = yardstick.Ours.parse("mixed-4.5bpw+bits=3.5+types=ggml+calibration=self")
    assert (row.recipe.target_bpw, row.own, row.options) == (3.5, True, {"types": "ggml"})
    assert yardstick.Ours.parse("target_bpw=4").recipe.target_bpw == 4
    assert yardstick.Ours.parse("bits=4.25+calibration").recipe.rules == read_recipe("calibrated").rules
    changed = yardstick.Ours.parse("bits=3.5+propagation=0+method=rtn+damping=0.01+descent=0+clip=null").recipe
    assert (changed.propagation, changed.rules[-1].method, changed.rules[-1].clip) == (0, "rtn", None)
    assert changed.rules[0] == read_recipe("calibrated").rules[0]  # norms, which are kept


def test_a_checkpoint_that_was_quantized_before_is_a_row(yardstick, folder: Path, tiny_model, tiny_tokenizer) -> None:
    """Its figures are those of the recipe that made it."""
    packed = llamajax.quantize(tiny_model, "int4-g32")
    llamajax.save_checkpoint(packed, folder / "made", tokenizer=tiny_tokenizer)
    by_recipe, made = run(yardstick, folder, f"--ours=int4-g32,checkpoint={folder / 'made'}")["rows"][-2:]
    assert made["kl_divergence"] == by_recipe["kl_divergence"] > 0 and made["bytes"] == by_recipe["bytes"]


def test_figures_of_other_weights_are_refused(yardstick, folder: Path, tiny_model, tiny_tokenizer) -> None:
    before = run(yardstick, folder)
    other = folder / "other"
    llamajax.save_checkpoint(jax.tree.map(lambda leaf: leaf * 1.5, tiny_model), other, tokenizer=tiny_tokenizer)
    (folder / "model").rename(folder / "kept")
    other.rename(folder / "model")
    with pytest.raises(llamajax.LlamaJaxError, match="y.json: holds figures of .* with other weights .*: remove it or"):
        run(yardstick, folder)
    (folder / "model").rename(other)
    (folder / "kept").rename(folder / "model")
    assert run(yardstick, folder) == before


def test_what_cannot_be_a_row_is_refused_before_any_work(yardstick, folder: Path) -> None:
    for row, said in (
        ("int5-g9", "recipe is 'int5-g9': expected"),
        ("int8+colour=red", "colour=red: expected a recipe"),
        ("propagation=2", "propagation is 2: expected"),
        ("checkpoint=/nowhere", "there is no such file or folder"),
    ):
        with pytest.raises(llamajax.LlamaJaxError, match=said):
            run(yardstick, folder, f"--ours={row}")
    with pytest.raises(llamajax.LlamaJaxError, match="--context=1024: .* is made for 512"):
        run(yardstick, folder, "--context=1024")
