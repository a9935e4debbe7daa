"""The code that all runners share: checks a bundle, converts text to ids and back, prefills, decodes. In a bundle, each
runner is one file: this code, then its own. It needs Python 3.9 or newer, NumPy and its runtime, and no llamajax.
"""

import os
import sys

# ruff: noqa: E402
# Python would import modules beside the script first, such as a numpy.py that someone has added to a bundle.
_HERE = {os.path.realpath(os.path.dirname(__file__)), os.path.dirname(os.path.realpath(__file__))}
sys.path[:] = [place for place in sys.path if os.path.realpath(place) not in _HERE]

import argparse
import hashlib
import json
import mmap
import re
import signal
import stat
import time

import numpy as np

from export.runners.answers import chooser, conversation, converse, steps, write_until
from export.runners.text import Text

# In bytes: 30 times the manifest of a model of 126 layers.
LARGEST_MANIFEST = 16 << 20
# Relative error of one rounding, by dtype.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def line_of(error):
    """An error as one line, without control characters: its text may be from a bundle."""
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else "?" for c in text)[:300]


def say(kind, error, _):
    """Prints one line instead of a traceback."""
    print(f"{os.path.basename(sys.argv[0])}: {kind.__name__}: {line_of(error)}", file=sys.stderr)


if __name__ == "__main__":
    sys.excepthook = say


def open_regular(path, most):
    """Opens a file of at most `most` bytes. Raises an error, without opening, for a link, folder, FIFO or device."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode) or found.st_size > most:
        kind = stat.filemode(found.st_mode)
        raise ValueError(f"{path}: {kind}, {found.st_size} bytes: expected a regular file of at most {most} bytes")
    return open(path, "rb")


def check_entries(path, files):
    """Checks that a folder holds the manifest and `files`, with the sizes in the manifest, and nothing else.

    Links are refused wherever they lead. No file is opened.
    """
    folders = {name[:i] for name in files for i in range(len(name)) if name[i] == "/"}
    folders |= {"targets", "targets/savedmodel/assets"}  # these may be empty
    found, todo = {"manifest.json"}, [""]
    while todo:
        folder = todo.pop()
        with os.scandir(os.path.join(path, folder)) as opened:
            entries = list(opened)
        for entry in entries:
            name = folder + entry.name
            if name in folders and entry.is_dir(follow_symlinks=False):
                todo.append(name + "/")
            elif not entry.is_file(follow_symlinks=False):
                raise ValueError(f"{name}: expected regular files that the manifest names, no links: copy by cp -RL")
            elif name in files:
                found.add(name)
                if entry.stat(follow_symlinks=False).st_size != files[name]["bytes"]:
                    raise ValueError(f"{name}: not as large as the manifest says: damaged, or changed")
            elif name != "manifest.json":
                raise ValueError(f"{name}: the manifest does not name this file: remove it")
    for name in files:
        if name not in found:
            raise ValueError(f"{name}: no such file, though the manifest names it")


class Bundle:
    """A checked bundle: reads the manifest, then checks kinds and sizes of all files, then every file's SHA-256."""

    def __init__(self, path):
        self.path = path
        try:
            self._read_manifest()
            check_entries(path, self.manifest["files"])
            for name, expected in self.manifest["files"].items():
                with open_regular(self.file(name), expected["bytes"]) as file:
                    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if expected["bytes"] else b""
                    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
                        raise ValueError(f"{name}: its SHA-256 is not the manifest's: damaged, or changed")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            sys.exit(f"{path}: not a whole bundle: {line_of(error)}")
        self.batch, self.slots = (self.manifest["cache"][key] for key in ("batch", "slots"))
        inputs = self.manifest["programs"]["decode"]["inputs"]
        # Manifests of the first releases do not describe the state.
        self.state = self.manifest["cache"].get("state") or [v for v in inputs if v["name"] in ("key", "value")]

    def _read_manifest(self):
        with open_regular(os.path.join(self.path, "manifest.json"), LARGEST_MANIFEST) as file:
            text = file.read(LARGEST_MANIFEST)
        try:
            manifest = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"manifest.json: {error}") from None
        if (manifest["format"], manifest["version"]) != ("llamajax-bundle", 1):
            raise ValueError(f"version {manifest['version']}: this runner reads version 1")
        before, key, digest = text.rpartition(b',\n "sha256": ')
        if not key or digest != b'"%s"\n}\n' % hashlib.sha256(before).hexdigest().encode():
            raise ValueError("manifest.json: its SHA-256 is not the one in its last line: damaged, or changed")
        for name in manifest["files"]:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name, re.ASCII) or {".", ".."} & set(name.split("/")):
                raise ValueError(f"{name!r}: expected the path of a file inside the bundle")
        self.manifest = manifest

    def file(self, name):
        """Path of a file that the manifest lists."""
        if name not in self.manifest["files"]:
            raise ValueError(f"{name!r}: the manifest has no such file")
        return os.path.join(self.path, name)

    def tensors(self, name):
        """The arrays of a safetensors file, mapped into memory. bfloat16 needs ml_dtypes."""
        dtypes = {"F32": "float32", "F16": "float16", "U8": "uint8", "I32": "int32", "BF16": "bfloat16"}
        with open(self.file(name), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        data = np.memmap(self.file(name), np.uint8, "r", offset=8 + length)
        view = lambda entry: data[slice(*entry["data_offsets"])].view(dtypes[entry["dtype"]]).reshape(entry["shape"])  # noqa: E731
        return {key: view(entry) for key, entry in header.items() if key != "__metadata__"}


def check_texts(bundle):
    """Checks the ids of the golden texts and conversations, unless the tokenizer is refused; returns their numbers."""
    kinds = {kind: bundle.manifest["golden"].get(kind, []) for kind in ("texts", "conversations")}
    text = Text(bundle) if kinds["texts"] else None
    if text is None or text.refusal:
        return {kind: 0 for kind in kinds}
    form = bundle.manifest.get("chat")
    encoded = [(e["text"], text.encode(e["text"], e.get("special", False)), e["ids"]) for e in kinds["texts"]]
    encoded += [(e["messages"], conversation(text, form, e["messages"]), e["ids"]) for e in kinds["conversations"]]
    for said, ids, expected in encoded:
        if ids != expected:
            sys.exit(f"{said!r} gives ids {ids}: expected {expected}")
    return {kind: len(entries) for kind, entries in kinds.items()}


def tolerance(session, bundle, logits):
    """The largest difference from these golden logits that rounding explains: four standard deviations.

    A layer rounds its activations about 14 times, keys and values once each. A sum of K float32 products has an error
    of about sqrt(K) roundings. Relative errors add up like a random walk. The box and stories260K stay below a quarter.
    """
    config, dtypes = bundle.manifest["config"], {v["name"]: v["dtype"] for v in bundle.manifest["weights"]}
    activations, cache = ROUNDING[dtypes["norm.weight_D"]], ROUNDING[bundle.manifest["cache"]["dtype"]]
    products = config["width"] * ROUNDING["float32"] ** 2 + getattr(session, "product", 0.0) ** 2
    variance = config["num_layers"] * (14 * (activations**2 + products) + 2 * cache**2)
    if bundle.manifest.get("activations") == "int8-token":  # in each of four inputs one code near a tie, of 2.5 sigma
        variance += config["num_layers"] * 4 * (2.5 / 127) ** 2 / config["width"]
    return float(4 * np.sqrt(np.mean(np.square(logits)) * variance))


def check_device(session, bundle):
    """Decodes the shortest golden prompt: a module for another device, or a faulty device, gives other logits.

    Errors up to a fiftieth of the logits' size pass, since they change few tokens; --golden is strict.
    """
    arrays = bundle.tensors("golden.safetensors")
    index = min(range(bundle.manifest["golden"]["prompts"]), key=lambda i: len(arrays[f"prompt_{i}"]))
    ids, expected = arrays[f"prompt_{index}"].tolist(), arrays[f"logits_{index}"]
    # A short prompt is decoded without prefill, because the program `decode` is needed anyway.
    ((_, logits),) = steps(session, bundle, ids, 1, chooser(0, 0), whole=len(ids) > 16)
    error, size = float(np.max(np.abs(logits - expected))), float(np.sqrt(np.mean(np.square(expected))))
    most = max(tolerance(session, bundle, expected), size / 50)
    if not error <= most:
        fault = f"logits of a golden prompt are off by {error:.1e}: expected at most {most:.1e}"
        sys.exit(f"{session.name}: {fault}: the programs are for another device, or this one is faulty")


def golden(session, bundle, start):
    """Runs the golden prompts, encodes the golden texts, prints one JSON object. Returns what failed, or None."""
    arrays, prompts, steps_made, seconds = bundle.tensors("golden.safetensors"), [], 0, 0.0
    list(steps(session, bundle, [0], 2, chooser(0, 0)))  # compilation at the first run counts as loading
    load_seconds = time.perf_counter() - start
    for index in range(bundle.manifest["golden"]["prompts"]):
        ids, expected, logits = (arrays[f"{name}_{index}"] for name in ("prompt", "tokens", "logits"))
        made = list(steps(session, bundle, ids.tolist(), len(expected), chooser(0, 0)))
        tokens, error = [token for token, _ in made], float(np.max(np.abs(made[0][1] - logits)))
        # The logit gap to the golden token at the first difference; later positions are not comparable.
        first = next((i for i, token in enumerate(expected.tolist()) if tokens[i : i + 1] != [token]), None)
        gap = 0.0 if first is None else float(np.ptp(made[first][1][[tokens[first], expected[first]]]))
        most = tolerance(session, bundle, logits)
        prompt = {"tokens": tokens, "exact": first is None, "largest_logit_error": str(error), "tolerance": str(most)}
        prompts.append({**prompt, "held": error <= most and gap <= 2 * most})
        steps_made, seconds = steps_made + session.count, seconds + session.seconds
    with open("/proc/self/status" if os.path.exists("/proc/self/status") else os.devnull) as lines:
        resident = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
    speed = {"decode_steps": steps_made, "decode_seconds": seconds, "load_seconds": load_seconds}
    counts = {**check_texts(bundle), "resident_bytes": resident}
    print(json.dumps({"runtime": session.name, "prompts": prompts, **speed, **counts}))
    failed = [str(index) for index, prompt in enumerate(prompts) if not prompt["held"]]
    return f"{session.name}: golden prompt {', '.join(failed)}: not the golden tokens or logits" if failed else None


def options_of(description):
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=description)
    flag = parser.add_argument
    flag("bundle", nargs="?", default=os.path.dirname(os.path.abspath(__file__)))
    flag("--prompt", help="text to continue, or the only message to answer with --chat")
    flag("--parse_special", action="store_true", help="encode special tokens in the prompt as their ids")
    flag("--ids", help="ids to continue instead of a prompt, separated by commas; prints ids")
    flag("--chat", action="store_true", help="answer each line of standard input")
    flag("--system", default="", help="system message for --chat; the template's own unless given")
    flag("--max_new_tokens", type=int, default=64, help="maximum number of tokens of the text, or of each answer")
    flag("--temperature", type=float, default=0.0, help="0 is greedy")
    flag("--top_k", type=int, default=0, help="choose among the K likeliest tokens only; 0: among all")
    flag("--top_p", type=float, default=1.0, help="choose among the likeliest tokens that make up this probability")
    flag("--stop", action="append", default=[], help="end before this text; may be repeated")
    flag("--seed", type=int, default=0)
    flag("--golden", action="store_true", help="run the golden prompts; print JSON")
    options = parser.parse_args()
    if min(options.max_new_tokens, options.seed + 1) < 1 or not 0 <= options.temperature < np.inf:
        sys.exit("expected --max_new_tokens of 1 or more, --seed and --temperature of 0 or more")
    if options.top_k < 0 or not 0 < options.top_p <= 1 or "" in options.stop:
        sys.exit("expected --top_k of 0 or more, --top_p above 0 and at most 1, --stop of a character or more")
    with_ids, chat = options.ids is not None, options.chat
    if (with_ids and (chat or options.stop)) or (chat and options.parse_special) or (options.system and not chat):
        sys.exit("expected --ids without --chat and --stop, --chat without --parse_special, --system with --chat")
    return options


def main(open_session, description):
    """Runs a bundle. `open_session(bundle)` has name, reset(), run(program, inputs) -> logits [B, V] and, if the device
    rounds the factors of float32 products, product: the relative error of that rounding."""
    start, options = time.perf_counter(), options_of(description)
    ids = None if options.ids is None else [int(token) for token in options.ids.split(",")]
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the reader of the output may leave
    bundle = Bundle(options.bundle)
    if ids is None and not options.golden and "vocabulary.json" not in bundle.manifest["files"]:
        sys.exit(f"{options.bundle}: exported without a tokenizer: expected --ids")
    form = bundle.manifest.get("chat", {"system": None})
    if options.chat and ("begin" not in form or (options.system and form["system"] is None)):
        sys.exit("--system: the chat template has no place for it" if "begin" in form else "no chat in this bundle")
    text, prompt = None if ids is not None or options.golden else Text(bundle), b""
    if text and not options.chat:
        prompt = "Once upon a time" if options.prompt is None else options.prompt
        ids, prompt = text.encode(prompt, options.parse_special), prompt.encode()
    session = open_session(bundle)
    if options.golden:
        sys.exit(golden(session, bundle, start))
    check_device(session, bundle)
    loaded = f"loaded in {time.perf_counter() - start:.1f} s"
    out, choose = sys.stdout.buffer, chooser(options.temperature, options.seed, options.top_k, options.top_p)
    stops, most = [stop.encode() for stop in options.stop], options.max_new_tokens
    if options.chat:
        print(f"{session.name}: {loaded}", file=sys.stderr)
        return converse(session, bundle, text, options, choose, stops, out)
    decode = text.decoder(ids) if text else lambda token: b"" if token is None else b"%d " % token
    generated = steps(session, bundle, ids, most, choose)
    made, _, ended = write_until(generated, decode, text.stop if text else (), stops, out, prompt)
    if not ended and len(made) < most:
        print(f"\nthe cache's {bundle.slots} slots are full: {len(made)} of {most} tokens", file=sys.stderr)
    rate = f"{session.count / session.seconds:.1f} tokens/s, " if session.seconds else ""
    print(f"\n{session.name}: {rate}{loaded}", file=sys.stderr)
