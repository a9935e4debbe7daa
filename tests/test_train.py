"""Training: it learns, it resumes to the same bits, and it says what it cannot do."""

import csv
import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax import Config, Llama, LlamaJaxError, abstract_model
from llamajax.evaluation.evaluate import cross_entropy
from llamajax.parameters import named_arrays
from llamajax.tokenizer import Tokenizer
from llamajax.train import (
    HELDOUT_SEED,
    Progress,
    TrainOptions,
    draw_loss,
    file_texts,
    make_optimizer,
    sample_batch,
    schedule,
    story_texts,
    tokenizer_for,
    train,
)

CONFIG = Config(
    vocab_size=16, width=16, ffn_width=24, num_layers=2, num_heads=2, num_kv_heads=1, head_size=8, context_length=16
)
# A cycle of eleven tokens: each determines the next, except 3, which needs the token before it as well.
TOKENS = np.tile([1, 5, 3, 9, 4, 3, 7, 0, 12, 15, 2], 60)
OPTIONS = TrainOptions(steps=48, batch=4, sequence_length=16, learning_rate=2e-2, warmup=3, eval_every=16)


def _run(
    folder: Path, options: TrainOptions = OPTIONS, stop_at: int | None = None
) -> tuple[Llama | None, list[Progress]]:
    """Runs training; a run that is interrupted after step `stop_at` gives no model."""
    seen: list[Progress] = []

    def on_step(progress: Progress) -> None:
        seen.append(progress)
        if progress.step == stop_at:
            raise KeyboardInterrupt

    try:
        return train(CONFIG, TOKENS, TOKENS[:80], options, folder, on_step), seen
    except KeyboardInterrupt:
        return None, seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama, list[Progress], Path]:
    """A run of all steps without interruption."""
    folder = tmp_path_factory.mktemp("train") / "whole"
    model, seen = _run(folder)
    return model, seen, folder


def test_it_learns(whole: tuple[Llama, list[Progress], Path]) -> None:
    """The loss starts at log 16 = 2.77; counting tokens alone cannot go below the cycle's entropy, 2.27 nats."""
    model, seen, _ = whole
    assert seen[0].loss == pytest.approx(np.log(16), abs=0.3)
    assert seen[-1].loss < 0.3
    assert seen[-1].heldout_loss == pytest.approx(cross_entropy(model, TOKENS[:80], window=16), rel=1e-6)
    # After [.., 5, 3] comes 9, after [.., 4, 3] comes 7: only attention tells them apart.
    logits, _ = jax.jit(model)(np.array([[1, 5, 3], [9, 4, 3]]))
    assert np.argmax(logits[:, -1], axis=-1).tolist() == [9, 7]


def test_resuming_gives_the_same_bits(whole: tuple[Llama, list[Progress], Path], tmp_path: Path) -> None:
    """Runs are interrupted before the first checkpoint, between two, and right at one."""
    expected, seen, folder = whole
    for stop_at, first in ((5, 1), (20, 1), (32, 17)):
        model, again = _run(tmp_path, stop_at=stop_at)
        assert model is None and [progress.step for progress in again] == list(range(first, stop_at + 1))
        assert again == seen[first - 1 : stop_at]
    model, again = _run(tmp_path)
    assert again == seen[32:], "the run resumes after the last checkpoint"
    for name, leaf in named_arrays(expected).items():
        assert np.asarray(named_arrays(model)[name]).tobytes() == np.asarray(leaf).tobytes(), name
    assert (tmp_path / "loss.csv").read_bytes() == (folder / "loss.csv").read_bytes()


def test_resuming_what_is_finished(whole: tuple[Llama, list[Progress], Path]) -> None:
    expected, _, folder = whole
    log = (folder / "loss.csv").read_bytes()
    model, seen = _run(folder)
    assert seen == []
    for name, leaf in named_arrays(expected).items():
        np.testing.assert_array_equal(named_arrays(model)[name], leaf, name)
    assert (folder / "loss.csv").read_bytes() == log


def test_log(whole: tuple[Llama, list[Progress], Path]) -> None:
    _, seen, folder = whole
    with (folder / "loss.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "loss", "heldout_loss", "learning_rate"]
    assert [int(row[0]) for row in rows] == list(range(1, 49))
    assert [float(row[1]) for row in rows] == [progress.loss for progress in seen]
    assert [row[0] for row in rows if row[2]] == ["16", "32", "48"]


def test_schedule() -> None:
    rate = schedule(OPTIONS)
    assert float(rate(0)) == 0.0
    assert float(rate(3)) == pytest.approx(2e-2)
    assert float(rate(48)) == pytest.approx(2e-3)
    rates = [float(rate(step)) for step in range(3, 49)]
    assert rates == sorted(rates, reverse=True)


def test_only_matrices_are_decayed() -> None:
    """With a gradient of zero, only weight decay moves a weight."""
    model = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract_model(CONFIG))
    optimizer = make_optimizer(dataclasses.replace(OPTIONS, warmup=0))
    with jax.numpy_dtype_promotion("standard"):  # for optax's own arithmetic
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, model), optimizer.init(model), model)
    moved = {name for name, update in named_arrays(updates).items() if (np.asarray(update) != 0).all()}
    still = {name for name, update in named_arrays(updates).items() if (np.asarray(update) == 0).all()}
    assert len(still) == 3 and all("norm" in name for name in still)
    assert len(moved) == 9 and not any("norm" in name for name in moved)


# ---- Data -----------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    tokens = np.arange(1000)
    rows = sample_batch(tokens, 7, OPTIONS)
    assert rows.shape == (4, 17) and rows.dtype == np.int32
    np.random.default_rng().random(5)
    np.testing.assert_array_equal(rows, sample_batch(tokens, 7, OPTIONS))
    np.testing.assert_array_equal(np.diff(rows, axis=1), 1)  # consecutive tokens
    assert not np.array_equal(rows, sample_batch(tokens, 8, OPTIONS))
    assert not np.array_equal(rows, sample_batch(tokens, 7, dataclasses.replace(OPTIONS, seed=1)))
    longer = dataclasses.replace(OPTIONS, steps=999, learning_rate=1.0)
    np.testing.assert_array_equal(rows, sample_batch(tokens, 7, longer))


def test_every_place_of_the_text_is_reached() -> None:
    rows = sample_batch(np.arange(20), 0, dataclasses.replace(OPTIONS, batch=200))
    assert {int(row[0]) for row in rows} == {0, 1, 2, 3}
    assert rows.max() == 19


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("<|endoftext|>".join(f"document {i}" for i in range(250)))
    texts = file_texts(tmp_path / "text")
    assert texts.heldout == ["document 0", "document 100", "document 200"]
    assert len(texts.training) == 247 and not set(texts.training) & set(texts.heldout)
    stories = story_texts(30)
    assert (len(stories.training), len(stories.heldout)) == (30, 200)
    assert not set(stories.training) & set(stories.heldout)
    assert tokenizer_for(stories, 400).vocab_size == 400


def _damage(folder: Path, number: int) -> Path:
    """Changes one bit of the checkpoint that has `number` newer ones; returns its path."""
    file = sorted((folder / "checkpoints").glob("step-*"))[-1 - number]
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    return file


def test_an_older_intact_checkpoint_is_tried_with_a_line_said(
    whole: tuple[Llama, list[Progress], Path], tmp_path: Path
) -> None:
    expected, seen, folder = whole
    shutil.copytree(folder, tmp_path / "run")
    damaged = _damage(tmp_path / "run", 0)
    with pytest.warns(UserWarning, match="step-000000048.safetensors: damaged .*; continuing from step 32"):
        model, again = _run(tmp_path / "run")
    assert again == seen[32:] and damaged.exists(), "the damaged checkpoint must be made again"
    for name, leaf in named_arrays(expected).items():
        np.testing.assert_array_equal(named_arrays(model)[name], leaf, name)
    assert (tmp_path / "run" / "loss.csv").read_bytes() == (folder / "loss.csv").read_bytes()
    for number in range(2):
        _damage(tmp_path / "run", number)
    with (
        pytest.warns(UserWarning, match="continuing from step 32"),
        pytest.raises(LlamaJaxError, match="step-000000032.safetensors: damaged"),
    ):
        _run(tmp_path / "run")
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 2, "damaged checkpoints must be kept"


# ---- Refusals -------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, learning_rate=1e30, warmup=0)
    with pytest.raises(LlamaJaxError, match=r"the loss is (nan|inf) at step \d+: lower learning_rate .1e\+30"):
        _run(tmp_path, options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-2}, "learning_rate is 0.02 there, 0.01 here"),
        ({"seed": 7}, "seed is 0 there, 7 here"),
        ({"batch": 8}, "batch is 4 there, 8 here"),
        ({"steps": 64}, "steps is 48 there, 64 here"),
        ({"tokens": TOKENS[::-1]}, "training text .sha256. is"),
        ({"heldout": TOKENS[:90]}, "held-out text .sha256. is"),
        ({"tokenizer": True}, "tokenizer .sha256. is None there"),
        ({"rope_theta": 5e5}, "rope_theta is 10000.0 there, 500000.0 here"),
    ],
)
def test_a_run_goes_on_only_with_what_it_was_begun_with(
    whole: tuple[Llama, list[Progress], Path], tiny_tokenizer: Tokenizer, change: dict, message: str
) -> None:
    change, texts = dict(change), {"tokens": TOKENS, "heldout": TOKENS[:80]}
    given = {name: change.pop(name, text) for name, text in texts.items()}
    tokenizer = tiny_tokenizer if change.pop("tokenizer", False) else None
    config = dataclasses.replace(CONFIG, **{name: change.pop(name) for name in ("rope_theta",) if name in change})
    options = dataclasses.replace(OPTIONS, **change)
    with pytest.raises(LlamaJaxError, match=f"checkpoints: holds parts of other work: {message}"):
        train(config, **given, options=options, folder=whole[2], tokenizer=tokenizer)


def test_folders_of_others(tmp_path: Path) -> None:
    (tmp_path / "a" / "checkpoints" / "16").mkdir(parents=True)
    with pytest.raises(LlamaJaxError, match="checkpoints: is not empty, and no work.json in it says"):
        _run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for text, where in (
        ("my,own\n1,2\n", "line 1 is 'my,own"),
        ("step,loss,heldout_loss,learning_rate\n1,x,,0.1\n", "line 2 is '1,x"),
        ("step,loss,heldout_loss,learning_rate\n2,1,,0.1\n1,1,,0.1\n", "line 3 is '1,1"),
        ("step,loss,heldout_loss,learning_rate\n٢\n", "line 2"),
    ):
        (tmp_path / "b" / "loss.csv").write_text(text, encoding="utf-8")
        with pytest.raises(LlamaJaxError, match=f"loss.csv: {where}.*correct the line or remove the file"):
            draw_loss(tmp_path / "b" / "loss.csv", tmp_path / "b" / "loss.svg")
    with pytest.raises(LlamaJaxError, match="loss.csv: line 2"):
        _run(tmp_path / "b")
    assert (tmp_path / "b" / "loss.csv").read_text(encoding="utf-8") == text, "the file must not be overwritten"


def test_a_full_disk_loses_no_checkpoint(
    whole: tuple[Llama, list[Progress], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    _run(tmp_path, stop_at=20)
    with monkeypatch.context() as patched:
        patched.setattr("llamajax.quantization.resume.save_file", full)
        with pytest.raises(LlamaJaxError, match="step-000000032.safetensors: cannot be written .*make room"):
            _run(tmp_path)
    _, again = _run(tmp_path)
    assert again == whole[1][16:]


def test_texts_that_are_too_short(tmp_path: Path) -> None:
    for tokens, heldout, name in ((TOKENS[:17], TOKENS, "training"), (TOKENS, TOKENS[:17], "held-out")):
        with pytest.raises(LlamaJaxError, match=f"the {name} text has 17 tokens: expected more than 17"):
            train(CONFIG, tokens, heldout, OPTIONS, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "text").write_text("<|endoftext|>".join(["x"] * 99))
    with pytest.raises(LlamaJaxError, match="text: 99 documents: expected at least 100, of which 1% are held out"):
        file_texts(tmp_path / "text")
    for count in (0, HELDOUT_SEED + 1):
        with pytest.raises(LlamaJaxError, match=f"stories is {count}: expected 1 to 1000000000"):
            story_texts(count)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0: expected at least 1"),
        ({"batch": -1}, "batch is -1: expected at least 1"),
        ({"sequence_length": 0}, "sequence_length is 0: expected at least 1"),
        ({"eval_every": 0}, "eval_every is 0: expected at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0: expected a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan: expected a positive number"),
        ({"clip": float("inf")}, "clip is inf: expected a positive number"),
        ({"warmup": -1}, "warmup is -1: expected 0 or more steps"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1: expected"),
        ({"weight_decay": float("nan")}, "weight_decay is nan: expected"),
        ({"seed": -1}, "seed is -1: expected"),
    ],
)
def test_refused_options(change: dict[str, float], message: str) -> None:
    with pytest.raises(LlamaJaxError, match=message):
        TrainOptions(**change)
