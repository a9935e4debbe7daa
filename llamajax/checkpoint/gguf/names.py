"""What GGUF calls models and their weights: architectures, pairs or halves, names of tensors."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.families import tensors
from llamajax.files import shortened
from llamajax.parameters import Place

# How RoPE's two coordinates stand in the rows of q and k: neighbours (2i, 2i + 1), or (i, i + H/2). llama.cpp decides
# it by the architecture's name: `llama_model_rope_type` in src/llama-model.cpp, LLAMA_ROPE_TYPE_NORM and _NEOX, with
# the names of src/llama-arch.cpp. Its converter reorders the rows of a Hugging Face model for the former (`permute`).
_PAIRS = (
    "llama llama4 deci baichuan internlm2 minicpm xverse command-r cohere2 olmo arctic deepseek deepseek2 plm chatglm "
    "granite granitemoe granitehybrid chameleon bailingmoe smollm3 arcee ernie4_5 ernie4_5-moe mistral3 llama-embed"
)
_HALVES = (
    "falcon falcon-h1 grok dbrx bert nomic-bert stablelm bitnet qwen qwen2 dream qwen2moe qwen3 qwen3moe olmo2 olmoe "
    "phi2 phi3 phimoe plamo plamo2 gemma gemma2 gemma3 gemma3n gemma-embedding starcoder2 openelm gptneox codeshell "
    "orion nemotron exaone exaone4 minicpm3 bailingmoe2 dots1 hunyuan-moe hunyuan-dense gpt-oss lfm2 lfm2moe "
    "smallthinker seed_oss grovemoe apertus minimax-m2 cogvlm qwen3next"
)
ROPE_ROWS: Mapping[str, Literal["pairs", "halves"]] = MappingProxyType(
    dict.fromkeys(_PAIRS.split(), "pairs") | dict.fromkeys(_HALVES.split(), "halves")  # type: ignore[arg-type]
)


class Architecture(NamedTuple):
    """What there is to know of an architecture beside what its metadata say.

    Attributes:
        name: as in `general.architecture`, and what its keys begin with.
        rotated: names of the weights whose rows RoPE turns, with how many heads each: a field of `Config`.
    """

    name: str
    rotated: Mapping[str, str]

    @property
    def in_pairs(self) -> bool:
        """Whether rows of `rotated` are to be brought from pairs to halves."""
        return ROPE_ROWS[self.name] == "pairs"


# Those that are read: to add one is a row here, and in `config.KEYS` what its metadata say beside a LLaMA's.
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture(
            "llama", MappingProxyType({"attention.query_DQ": "num_heads", "attention.key_DM": "num_kv_heads"})
        ),
    }
)

HEAD = "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
# Inverse frequencies as Meta's own files have them: old converters wrote them, and nothing reads them (llama.cpp's
# MODEL_TENSOR_SKIP, gguf-py/gguf/constants.py).
UNUSED = ("attn_rot_embd.weight",)


def tensor_names(config: Config) -> dict[str, Place]:
    """The weight that each tensor of a model's files is, by the tensor's name."""
    return {name: place for name, (place,) in tensors(config, "gguf").items()}


def architecture_of(path: object, metadata: Mapping[str, object]) -> Architecture:
    """The architecture of a file that holds a model.

    Raises:
        LlamaJaxError: for a file that holds something else, and says what it is; and an architecture that is not read.
    """
    name, kind = metadata.get("general.architecture"), metadata.get("general.type")
    others = {
        "mmproj": "a multimodal projector (images or sound, for llama.cpp's --mmproj)",
        "adapter": f"an adapter ({shortened(metadata.get('adapter.type', 'lora'))}) for a model",
        "imatrix": "an importance matrix, statistics for llama.cpp's quantizer",
        "vocab": "a vocabulary",
        "clip": "a multimodal projector (images or sound, for llama.cpp's --mmproj)",
    }
    found = others.get(str(kind)) or others.get(str(name))
    if found is None and kind is not None and str(kind) != "model":
        found = f"of general.type {shortened(kind)}"
    if found is not None:
        raise LlamaJaxError(f"{path}: is {found}, not a language model: give the file of the model itself")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        what = f"architecture {shortened(name)} is not read" if name is not None else "names no architecture"
        raise LlamaJaxError(f"{path}: {what}: expected general.architecture to be one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]
