"""The project's functions on other models than LLaMA: text, internals, training, folders, shardings, plans."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import llamajax
from llamajax import Llama, abstract_model, generate, load, named_weights, plan, preset, save_checkpoint, shardings
from llamajax.evaluation.evaluate import cross_entropy
from llamajax.evaluation.speed import random_model as random_weights
from llamajax.train import Progress, TrainOptions, train
from tests import reference
from tests.kin import BIASES, HEAD_NORMS, NORMS_AFTER, REST, WINDOWS
from tests.programs import QUICK
from tests.reference import random_model, switched_weights_of

PROMPT = [5, 17, 80, 3, 44, 9, 12, 61, 30, 2, 71]  # longer than a window
ROW = np.random.default_rng(2).integers(0, 96, 20).astype(np.int32)


@pytest.fixture(scope="module")
def model() -> Llama:
    """A model with window layers and full layers in two stacks."""
    return random_model(WINDOWS)


@pytest.fixture(scope="module")
def weights(model: Llama) -> reference.Weights:
    return switched_weights_of(model)


def test_text_of_windows_is_the_references(model: Llama, weights: reference.Weights) -> None:
    """The text spans several windows, with and without speculation; tokens that left the cache are not needed."""
    plain = generate(model, None, PROMPT, temperature=0, max_new_tokens=24)
    ids = [*PROMPT, *plain.tokens]
    logits_TV = reference.forward(WINDOWS, weights, ids)[len(PROMPT) - 1 : -1]
    assert plain.tokens == np.argmax(logits_TV, axis=-1).tolist()
    probability = reference.softmax(logits_TV)[np.arange(24), plain.tokens]
    np.testing.assert_allclose(plain.log_probabilities, np.log(probability), atol=1e-3)
    assert generate(model, None, PROMPT, temperature=0, max_new_tokens=24, speculate=4).tokens == plain.tokens


def test_the_inside_of_windows_is_the_references(model: Llama, weights: reference.Weights) -> None:
    """Captures from both stacks in the order of layers; a hook in a layer of the second stack; the logit lens."""
    zero = {("attention_out", 4): np.zeros(32, np.float32)}

    @jax.jit
    def run(model, tokens_BT):
        _, _, seen = model(tokens_BT, capture=("hidden", "attention", "ffn_out"))
        return seen, model.head(seen["hidden"][:, 0]), model(tokens_BT, hooks=zero)[0]

    seen, lens_LTV, hooked_BTV = run(model, ROW[None])
    expected = reference.trace(WINDOWS, weights, ROW)
    np.testing.assert_allclose(seen["hidden"][:, 0], expected.hidden, atol=2e-3)
    np.testing.assert_allclose(seen["attention"][:, 0], expected.attention, atol=1e-4)
    np.testing.assert_allclose(seen["ffn_out"][:, 0], expected.ffn_out, atol=2e-3)
    lens = [reference.head(WINDOWS, weights, hidden_TD) for hidden_TD in expected.hidden]
    np.testing.assert_allclose(lens_LTV, lens, atol=2e-3)
    without = {name: 0 * array if "layers.4.self_attn.o_proj" in name else array for name, array in weights.items()}
    without["model.layers.4.post_attention_layernorm.weight"] = -np.ones(32)  # 1 + w
    np.testing.assert_allclose(hooked_BTV[0], reference.forward(WINDOWS, without, ROW), atol=2e-3)


def test_perplexity_of_windows_is_the_references(model: Llama, weights: reference.Weights) -> None:
    assert cross_entropy(model, ROW, window=19) == pytest.approx(reference.loss(WINDOWS, weights, ROW[None]), rel=1e-4)


@pytest.mark.parametrize("config", [WINDOWS, REST, NORMS_AFTER], ids=["windows", "rest", "norms after"])
def test_folders_hold_every_weight(config: llamajax.Config, tmp_path: Path) -> None:
    """Our own folders hold any config, whether its family can express it or not."""
    model = random_model(config)
    save_checkpoint(model, tmp_path / "model")
    again, _ = load(tmp_path / "model")
    assert again.config == config
    for name, weight in named_weights(model).items():
        np.testing.assert_array_equal(named_weights(again)[name], weight, name)


def test_names_of_layers_in_two_stacks(model: Llama) -> None:
    found = {name.rpartition(".attention.")[0] for name in named_weights(model) if ".query_DQ" in name}
    assert found == {"layers.0:3:2", "layers.1:4:2", "layers.4"}
    assert "layers.0:3:2.attention.query_norm_H" in named_weights(model)


def test_shardings_of_biases_and_norms() -> None:
    """They are sharded like the outputs of their matrix; norms of heads are not sharded."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    rules = {"Q": "model", "M": "model", "F": "model"}
    spread = {}
    for config in (BIASES, HEAD_NORMS, NORMS_AFTER, REST):
        of_sinks = {"N": "model"} if config.sinks else {}
        spread |= named_weights(shardings(abstract_model(config), mesh, rules | of_sinks))
    specs = {name.partition(".")[2].partition(".")[2]: each.spec for name, each in spread.items()}
    for name in ("query_bias_Q", "key_bias_M", "value_bias_M", "query_norm_Q", "key_norm_M", "sinks_N"):
        assert specs[f"attention.{name}"] == PartitionSpec(None, "model"), name
    assert specs["ffn.up_bias_F"] == PartitionSpec(None, "model")
    for name in ("attention.query_norm_H", "attention.out_bias_D", "ffn.down_bias_D", "ffn_after_norm.weight_D"):
        assert specs[name] == PartitionSpec(None, None), name


def test_windows_learn(tmp_path: Path) -> None:
    """A window of 2 determines the next token of the cycle; otherwise as in `test_train.py`."""
    config = llamajax.Config(
        vocab_size=16,
        width=16,
        ffn_width=24,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_size=8,
        context_length=16,
        layer_kinds=("window", "full"),
        window=2,
        norms="both",
        norm_offset=1.0,
        qkv_bias=True,
        query_key_norm="head",
    )
    tokens = np.tile([1, 5, 3, 9, 4, 3, 7, 0, 12, 15, 2], 60)
    options = TrainOptions(steps=48, batch=4, sequence_length=16, learning_rate=2e-2, warmup=3, eval_every=48)
    seen: list[Progress] = []
    train(config, tokens, tokens[:80], options, tmp_path, seen.append)
    assert seen[0].loss == pytest.approx(np.log(16), abs=0.3) and seen[-1].heldout_loss < 0.5


def test_plans_count_windows_at_their_size() -> None:
    """Only 4 of Gemma 3 1B's 26 layers keep more than a window of 512."""
    config = preset("gemma3-1b")
    short, long = (plan(config, "int4-g32", context=context, backend="cpu") for context in (4096, 32768))
    token = 2 * config.num_kv_heads * config.head_size * 2  # keys and values in bfloat16
    of_full = (long.cache - short.cache) / (4 * token)
    assert of_full == pytest.approx(32768 - 4096, abs=256)
    of_windows = (short.cache / token - 4 * 4096) / 22
    assert 512 <= of_windows <= 512 + 2 * 512, "a window, plus the tokens that one step may write"
    without = plan(preset("llama3.2-1b"), "int4-g32", context=4096, backend="cpu")
    assert without.cache == pytest.approx(16 * 4096 * 2 * 8 * 64 * 2, rel=0.05)


def test_random_weights_of_kin() -> None:
    """As `bench` measures presets: norms that change nothing, no biases, and all other weights packed."""
    made = random_weights(WINDOWS, "int4-g32")
    for name, weight in named_weights(made).items():
        if "norm" in name:
            np.testing.assert_array_equal(weight, 0, name)
    assert np.isfinite(jax.jit(lambda model, row: model(row)[0], compiler_options=QUICK)(made, ROW[None])).all()
