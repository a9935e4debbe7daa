"""BitNet against Hugging Face transformers: tiny random models, from masters rounded at run time, and packed."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import llamajax

_REASON = "compares with Hugging Face transformers: install the extra: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=_REASON)
transformers = pytest.importorskip("transformers", reason=_REASON)
with pytest.MonkeyPatch.context() as _patch:
    # Their layers are marked for torch.compile, which would call a C++ compiler.
    _patch.setattr(torch, "compile", lambda function: function)
    layers = pytest.importorskip("transformers.integrations.bitnet", reason=_REASON)
from safetensors.torch import load_file, save_file  # noqa: E402

pytestmark = pytest.mark.extras

VOCABULARY, LENGTH, NEW = 64, 12, 64
# Activations closer than this to a half may be rounded to either side: the two programs add in another order. 1e-4 of a
# code is some ten times what that changes.
MARGIN = 1e-4

_logits = jax.jit(lambda model, tokens: model(tokens)[0], compiler_options={"xla_backend_optimization_level": 0})


def _theirs(mode: str, linear: str = "autobitlinear", **fields):
    """A random model made by transformers with its own layers: large weights, uneven norms and scales."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "initializer_range": 0.2}
    config = transformers.BitNetConfig(**sizes | special | {"tie_word_embeddings": True} | fields)
    quantization = transformers.BitNetQuantConfig(linear_class=linear, quantization_mode=mode)
    config.quantization_config = quantization
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BitNetForCausalLM(config)
        floats = {name: value.clone() for name, value in model.state_dict().items()}
        for name, value in floats.items():
            if "norm" in name:
                torch.nn.init.uniform_(value, 0.5, 1.5)
        model = layers.replace_with_bitnet_linear(model, ["lm_head", "model.embed_tokens"], quantization)
        model.to_empty(device="cpu")
        held = {name: value for name, value in floats.items() if linear != "bitlinear" or "_proj" not in name}
        model.load_state_dict(held, strict=False)
        model.model.rotary_emb.__init__(config)
        for name, module in model.named_modules():
            if mode == "offline" and name.endswith("_proj"):
                scale = floats[f"{name}.weight"].abs().mean()
                codes = (floats[f"{name}.weight"] / scale).round().clamp(-1, 1)
                if linear == "bitlinear":
                    module.weight.copy_(layers.pack_weights(codes.clone()))
                    module.weight_scale.fill_(1 / scale)
                else:
                    module.weight.data.copy_(codes)
                    module.weight_scale.fill_(scale)
    return model.eval()


def _saved(model, folder: Path) -> Path:
    """Saves a folder like the published ones: offline weights are packed, which `save_pretrained` does not do."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    if model.config.quantization_config.quantization_mode == "offline":
        for name in state:
            if name.endswith("_proj.weight") and state[name].dtype != torch.uint8:
                state[name] = layers.pack_weights(state[name].clone())
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    config = model.config.to_dict()
    config["quantization_config"] = model.config.quantization_config.to_dict()
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


def _tokens_without_ties(model) -> np.ndarray:
    """Returns tokens for which no activation is near a value where its code changes."""
    nearest = [1.0]

    def look(module, arguments):
        (x,) = arguments
        codes = x * (127 / x.abs().amax(-1, keepdim=True))
        nearest[0] = min(nearest[0], float((codes - codes.floor() - 0.5).abs().min()))

    hooks = [m.register_forward_pre_hook(look) for name, m in model.named_modules() if name.endswith("_proj")]
    try:
        for seed in range(100):
            tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (1, LENGTH))
            nearest[0] = 1.0
            _their_logits(model, tokens)
            if nearest[0] > MARGIN:
                return tokens
    finally:
        for hook in hooks:
            hook.remove()
    raise AssertionError("every prompt has an activation near a tie")


def _their_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


@pytest.mark.parametrize(
    ("mode", "linear", "fields"),
    [
        ("online", "autobitlinear", {}),
        ("offline", "autobitlinear", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
        ("offline", "bitlinear", {}),
    ],
)
def test_logits_and_files_are_theirs(tmp_path: Path, mode: str, linear: str, fields: dict) -> None:
    """Logits agree within 1e-4, in float32; saved again, the codes are packed as transformers packs them."""
    theirs = _theirs(mode, linear, **fields)
    tokens = _tokens_without_ties(theirs)
    expected = _their_logits(theirs, tokens)
    assert np.std(expected) > 0.3
    folder = _saved(theirs, tmp_path / "theirs")
    model, _ = llamajax.load(folder)
    np.testing.assert_allclose(_logits(model, tokens), expected, atol=1e-4, rtol=0)
    llamajax.save_checkpoint(model, tmp_path / "ours", form="huggingface")
    ours, packed = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    for name, module in theirs.named_modules():
        if not name.endswith("_proj"):
            continue
        if mode == "online":
            scale = 1 / module.weight.abs().mean()
            packed[f"{name}.weight"] = layers.pack_weights((module.weight.data * scale).round().clamp(-1, 1))
            packed[f"{name}.weight_scale"] = 1 / scale[None]
        elif linear == "bitlinear":
            packed[f"{name}.weight_scale"] = 1 / packed[f"{name}.weight_scale"]
    assert sorted(ours) == sorted(packed)
    for name, tensor in packed.items():
        # Here the mean of magnitudes is summed in another order.
        torch.testing.assert_close(ours[name], tensor.data, rtol=1e-6 if name.endswith("weight_scale") else 0, atol=0)


def test_greedy_text_is_theirs(tmp_path: Path) -> None:
    """64 tokens agree, with packed weights prepared for a CPU; the rounding of activations near a tie may differ."""
    theirs = _theirs("offline")
    prompt = _tokens_without_ties(theirs)[0].tolist()
    model, _ = llamajax.load(_saved(theirs, tmp_path / "theirs"), backend="cpu")
    with torch.no_grad():
        whole = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    expected = whole[0, len(prompt) :].tolist()
    assert len(set(expected)) > 3, "a text that repeats one or two tokens would hide mistakes"
    assert llamajax.generate(model, None, prompt, temperature=0, max_new_tokens=NEW).tokens == expected
