"""llamajax: one functional LLaMA in Flax, for CPU, GPU and TPU.

    import llamajax

    model, tokenizer = llamajax.load("box")
    logits_BTV, _ = model(tokens_BT)
    print(llamajax.generate(model, tokenizer, "Once upon a time", temperature=0).text)

Importing this defines no flag, reads no environment variable and touches no device.
"""

import os
import sys

if sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0]) in ("llamajax", "llamajax.exe"):
    # For the process of a command, `python -m llamajax` or `llamajax`: an interrupt prints one line, also during the
    # imports below, which take most of the time of many commands.
    from llamajax import process

    process.begin()

from llamajax import families, files, parameters, tokenizer
from llamajax.caches import KVCache, NoCache, Scores
from llamajax.chat import role_strings
from llamajax.chat.chat import Chat
from llamajax.chat.messages import Message, ToolCall
from llamajax.chat.template import Template
from llamajax.checkpoint import Opened, load, open_checkpoint, save_checkpoint
from llamajax.config import Config, preset, preset_names
from llamajax.errors import LlamaJaxError
from llamajax.evaluation.evaluate import cross_entropy, next_token_losses
from llamajax.evaluation.tasks import TaskResult, evaluate_task
from llamajax.export_types import register_export_types
from llamajax.generation.compilation import clear_programs, fresh_programs
from llamajax.generation.engine import Engine, Knobs
from llamajax.generation.kept import Kept
from llamajax.generation.programs import EngineState, Made, prefill
from llamajax.generation.request import Completion
from llamajax.generation.sampling import Sampler, make_sampler, sample
from llamajax.generation.stream import TextStream, generate, stream
from llamajax.layer import Layer
from llamajax.meshes import shardings
from llamajax.model import Block, Llama, abstract_model, model_from
from llamajax.parameters import leaves, named_arrays, named_weights, parts_of, rebuilt, unrolled, weights_of
from llamajax.plan import Plan, plan
from llamajax.prepare import prepare, with_activations
from llamajax.quantization.quantize import quantize, read_recipe, recipe_names
from llamajax.rope import Rope, RopeScaling
from llamajax.tokenizer import Tokenizer
from llamajax.trainable import trainable
from llamajax.words import Words

register_export_types()

__version__ = "0.1.0"

__all__ = [
    "Block",
    "Chat",
    "Completion",
    "Config",
    "Engine",
    "EngineState",
    "KVCache",
    "Kept",
    "Knobs",
    "Layer",
    "Llama",
    "LlamaJaxError",
    "Made",
    "Message",
    "NoCache",
    "Opened",
    "Plan",
    "Rope",
    "RopeScaling",
    "Sampler",
    "Scores",
    "TaskResult",
    "Template",
    "TextStream",
    "Tokenizer",
    "ToolCall",
    "Words",
    "abstract_model",
    "clear_programs",
    "cross_entropy",
    "evaluate_task",
    "families",
    "files",
    "fresh_programs",
    "generate",
    "leaves",
    "load",
    "make_sampler",
    "model_from",
    "named_arrays",
    "named_weights",
    "next_token_losses",
    "open_checkpoint",
    "parameters",
    "parts_of",
    "plan",
    "prefill",
    "prepare",
    "preset",
    "preset_names",
    "quantize",
    "read_recipe",
    "rebuilt",
    "recipe_names",
    "role_strings",
    "sample",
    "save_checkpoint",
    "shardings",
    "stream",
    "tokenizer",
    "trainable",
    "unrolled",
    "weights_of",
    "with_activations",
]
