"""The model against Hugging Face transformers: tiny random models that one library saves and the other reads."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamajax
from llamajax import Config, Llama, RopeScaling, Tokenizer, make_sampler
from llamajax.families import config_from_hf
from llamajax.generation.sampling import filter_logits
from llamajax.rope import rope_frequencies
from llamajax.words import AddedToken, Words
from tests.reference import random_model

_REASON = "compares with Hugging Face transformers: install the extra: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=_REASON)
transformers = pytest.importorskip("transformers", reason=_REASON)
pytestmark = pytest.mark.extras

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 24))

# Many models are compiled for one call each; LLVM's optimizations would take most of the time.
_logits = jax.jit(lambda model: model(TOKENS)[0], compiler_options={"xla_backend_optimization_level": 0})


def _theirs(rope: dict | None = None, theta: float = 1e4, **fields) -> "transformers.LlamaForCausalLM":
    """Makes a random transformers model with uneven norms, and large weights so that attention is not uniform."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    # Without an end token, rows run to the requested length.
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "initializer_range": 0.2}
    rope = {"rope_type": "default"} if rope is None else rope
    config = transformers.LlamaConfig(**sizes | special | fields, rope_parameters=rope | {"rope_theta": theta})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def _their_logits(model, tokens: np.ndarray = TOKENS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def _save_theirs(model, folder: Path, **options) -> Path:
    model.save_pretrained(folder, safe_serialization=True, **options)
    return folder


def _assert_logits(actual, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    assert np.std(expected) > 0.3, "logits are too small for the tolerance to mean anything"
    assert np.max(np.abs(np.asarray(actual) - expected)) <= tolerance


# ---- Their models, read by us ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
        {"hidden_size": 48, "num_attention_heads": 6, "head_dim": 16, "rms_norm_eps": 1e-5, "theta": 5e5},
        {"rope": LLAMA3, "theta": 5e5, "tie_word_embeddings": True, "head_dim": 16},
        {"rope": LINEAR, "head_dim": 32, "num_hidden_layers": 3},
    ],
    ids=["mha", "mqa-tied-eps", "gqa-head_dim-theta", "llama3-tied", "linear-head_dim"],
)
def test_their_model_gives_their_logits(fields, tmp_path):
    theirs = _theirs(**fields)
    model, tokenizer = llamajax.load(_save_theirs(theirs, tmp_path / "theirs"))
    assert tokenizer is None and model.dtype == jnp.float32
    _assert_logits(_logits(model), _their_logits(theirs))


def test_shards_and_both_spellings_of_rope(tmp_path):
    """transformers 5 writes `rope_parameters`, 4 `rope_theta` and `rope_scaling`; both load as the same model."""
    theirs = _theirs(rope=LLAMA3, theta=5e5)
    whole = _save_theirs(theirs, tmp_path / "whole")
    shards = _save_theirs(theirs, tmp_path / "shards", max_shard_size="16KB")
    assert len(list(shards.glob("*.safetensors"))) > 2 and (shards / "model.safetensors.index.json").is_file()
    config = json.loads((shards / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (shards / "config.json").write_text(json.dumps(config))
    first, second = (llamajax.load(folder)[0] for folder in (whole, shards))
    assert first.config == second.config
    assert first.config.rope_scaling == RopeScaling(kind="llama3", factor=8.0, original_context_length=64)
    _assert_logits(_logits(second), _their_logits(theirs))
    np.testing.assert_array_equal(_logits(first), _logits(second))


def test_bfloat16_folder(tmp_path):
    """The folder loads in its stored dtype; loaded in float32, it gives the logits of the rounded weights."""
    rounded = _theirs().to(torch.bfloat16)
    folder = _save_theirs(rounded, tmp_path / "theirs")
    stored, wide = llamajax.load(folder)[0], llamajax.load(folder, dtype=jnp.float32)[0]
    assert stored.dtype == stored.embed_VD.dtype == jnp.bfloat16
    embedding = rounded.model.embed_tokens.weight.detach().float().numpy()
    np.testing.assert_array_equal(np.asarray(stored.embed_VD[...], np.float32), embedding)
    # The model is read back, not widened: `to` also rounded the RoPE frequencies, which are not weights.
    exact = _their_logits(transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32))
    _assert_logits(_logits(wide), exact)
    _assert_logits(_logits(stored), exact, tolerance=0.1 * np.std(exact))


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 2e5}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 5e5}},
        {"rope_parameters": {}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "factor": 2.0}},
        {"rope_parameters": {"type": "linear", "factor": 2}},
        {"rope_parameters": LINEAR | {"original_max_position_embeddings": 64, "rope_theta": 5e5}},
        {"rope_parameters": LLAMA3, "rope_theta": 5e5},
        {"rope_parameters": LLAMA3, "original_max_position_embeddings": 32},
        {"rope_parameters": {key: LLAMA3[key] for key in list(LLAMA3)[:-1]}},
        {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3},
        {"rope_scaling": LLAMA3 | {"rope_theta": 5e5}, "rope_theta": 1e5},
    ],
)
def test_forms_of_rope(fields):
    """Our frequencies equal theirs for the same config.json."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 128}
    config = config_from_hf(json.loads(json.dumps(sizes | fields | {"model_type": "llama"})))
    theirs = transformers.LlamaConfig(**json.loads(json.dumps(sizes | fields)))
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    np.testing.assert_allclose(
        rope_frequencies(config.rope("full"), config.head_size), rotary.inv_freq.numpy(), rtol=1e-6
    )
    assert rotary.attention_scaling == 1


# ---- Our models, read by them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tied", "scaling", "dtype"),
    [
        (False, None, jnp.float32),
        (True, RopeScaling(kind="llama3", factor=8.0, original_context_length=64), jnp.float32),
        (False, RopeScaling(kind="linear", factor=2.0), jnp.bfloat16),
    ],
)
def test_our_model_gives_our_logits(tied, scaling, dtype, tmp_path):
    config = Config(
        vocab_size=64,
        width=32,
        ffn_width=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_size=16,
        context_length=128,
        norm_eps=1e-4,
        rope_theta=5e5,
        rope_scaling=scaling,
        tied_embeddings=tied,
    )
    model = random_model(config, dtype=dtype)
    llamajax.save_checkpoint(model, tmp_path / "ours", form="huggingface")
    theirs, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), f"missing, unexpected or mismatched: {report}"
    stored = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert (stored.model_type, stored.dtype) == ("llama", getattr(torch, jnp.dtype(dtype).name))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model)
    _assert_logits(_logits(wide), _their_logits(theirs))


# ---- Words ----------------------------------------------------------------------------------------------------------

# No text begins with a space: after the dummy prefix, transformers drops one of several spaces, sentencepiece none.
TEXTS = [
    "fox",
    "",
    "<|im_start|>user\nThe fox <|im_end|>\nfox",
    "a<tool>  fox",
    "the  fox",
    "é🙂<|im_end|>",
    "x<|im_end|>y",
]
ADDED = (
    AddedToken(id=320, text="<|im_start|>", special=True),
    AddedToken(id=321, text="<|im_end|>", special=True),
    AddedToken(id=322, text="<tool>", rstrip=True),
)


@pytest.mark.parametrize(
    "words",
    [
        Words(),
        Words(added=ADDED, stop_ids=(2, 321), eos_token="<|im_end|>"),
        Words(added=ADDED, add_bos=False, add_eos=True),
        Words(added=ADDED, space="always"),
    ],
    ids=["plain", "chat", "no-bos-eos", "legacy"],
)
def test_words_of_our_folder_are_theirs(words, tiny_tokenizer, tmp_path):
    """transformers reads our folder as we do: ids of texts, text of ids, and the ids that end generation."""
    tokenizer = Tokenizer(tiny_tokenizer.model_bytes, words=words)
    config = Config(
        vocab_size=328, width=8, ffn_width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_size=4, context_length=64
    )
    llamajax.save_checkpoint(random_model(config), tmp_path / "ours", tokenizer=tokenizer, form="huggingface")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    ours = llamajax.load(tmp_path / "ours")[1]
    assert ours is not None and (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, special=True) == tokenizer.encode(text, special=True) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    stops = transformers.GenerationConfig.from_pretrained(tmp_path / "ours").eos_token_id
    assert sorted(ours.stop_ids) == sorted(stops)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").eos_token_id == stops


def test_generation_ends_where_theirs_does(pair, tmp_path):
    """Generation ends at each id listed in generation_config.json, which takes precedence over config.json."""
    theirs, model = pair
    prompt = TOKENS[0, :5].tolist()
    free = llamajax.generate(model, None, prompt, temperature=0, max_new_tokens=12).tokens
    folder = _save_theirs(theirs, tmp_path / "theirs")
    generation = {"eos_token_id": [free[-1], free[4]], "repetition_penalty": 1.0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        whole = loaded.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0)
    stops = llamajax.open_checkpoint(folder).words.stop_ids
    assert stops == tuple(loaded.generation_config.eos_token_id)
    assert whole[0, len(prompt) :].tolist() == free[: min(free.index(stop) for stop in stops) + 1]


# ---- Generation -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple["transformers.LlamaForCausalLM", Llama]:
    """One model as transformers' and as ours."""
    theirs = _theirs()
    return theirs, llamajax.load(_save_theirs(theirs, tmp_path_factory.mktemp("pair") / "theirs"))[0]


@pytest.mark.parametrize("penalty", [None, 1.3])
def test_greedy_generation_is_theirs(pair, penalty):
    """Our batch of prompts of different lengths gives what transformers gives for each prompt alone."""
    theirs, model = pair
    prompts = [TOKENS[0, :19].tolist(), TOKENS[1, :3].tolist()]
    options = {} if penalty is None else {"repetition_penalty": penalty}
    ours = llamajax.generate(model, None, prompts, temperature=0, max_new_tokens=20, **options)
    for prompt, completion in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            whole = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=0, **options
            )
        expected = whole[0, len(prompt) :].tolist()
        assert len(set(expected)) > 3, "a loop over one or two tokens would hide mistakes"
        assert completion.tokens == expected
        # Log-probabilities are compared with one pass of transformers over the whole text.
        log_probability = torch.log_softmax(torch.tensor(_their_logits(theirs, whole.numpy()))[0], dim=-1).numpy()
        at = np.arange(len(prompt) - 1, len(prompt) + 19)
        np.testing.assert_allclose(completion.log_probabilities, log_probability[at, expected], atol=1e-4)


# ---- Sampling filters -----------------------------------------------------------------------------------------------

PROCESSORS = {
    "repetition_penalty": (1.3, transformers.RepetitionPenaltyLogitsProcessor),
    "temperature": (0.7, transformers.TemperatureLogitsWarper),
    "top_k": (9, transformers.TopKLogitsWarper),
    "top_p": (0.8, transformers.TopPLogitsWarper),
    "min_p": (0.1, transformers.MinPLogitsWarper),
}


@pytest.mark.parametrize(
    "names", [*([name] for name in PROCESSORS), list(PROCESSORS), ["top_p", "min_p"]], ids="+".join
)
@pytest.mark.parametrize("seed", [0, 1])
def test_filters_are_theirs(names, seed):
    """Filters keep the same tokens with the same values; they apply in the order of `PROCESSORS`."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((32, 64)) * 3).astype(np.float32)
    ids = rng.integers(0, 64, (32, 20))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    expected = torch.tensor(logits)
    for name in names:
        value, processor = PROCESSORS[name]
        expected = processor(value)(torch.tensor(ids), expected)
    expected = expected.numpy()
    sampler = make_sampler(**{name: PROCESSORS[name][0] for name in names})
    actual = np.asarray(filter_logits(jnp.asarray(logits), sampler, jnp.asarray(seen)))
    kept = np.isfinite(expected)
    np.testing.assert_array_equal(actual > -1e29, kept)
    np.testing.assert_allclose(actual[kept], expected[kept], rtol=1e-6)
    cuts = {"top_k", "top_p", "min_p"} & set(names)
    assert kept.all() != bool(cuts) and not np.array_equal(actual, logits)


def test_top_p_keeps_as_many_of_equally_likely_tokens_as_theirs():
    """Their sort leaves open which of equally likely tokens are kept; ours keeps those with the lowest ids."""
    logits = np.random.default_rng(0).integers(-3, 4, (64, 64)).astype(np.float32)
    expected = np.isfinite(transformers.TopPLogitsWarper(0.8)(None, torch.tensor(logits)).numpy())
    actual = np.asarray(filter_logits(jnp.asarray(logits), make_sampler(top_p=0.8))) > -1e29
    np.testing.assert_array_equal(actual.sum(axis=1), expected.sum(axis=1))
    assert (actual != expected).any() and not actual.all()
