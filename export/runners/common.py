"""What every runner does: checks a bundle, turns text into ids and back, prefills, decodes. In a bundle a runner is one
file, this text before its own. It needs Python 3.9 or newer, NumPy and its runtime, and nothing of llamajax.
"""

import argparse
import base64
import hashlib
import heapq
import json
import os
import re
import sys
import time

import numpy as np


class Bundle:
    """The manifest; every file's SHA-256 is checked before anything is used."""

    def __init__(self, path):
        self.path = path
        try:
            with open(self.file("manifest.json"), "rb") as file:
                text = file.read()
            self.manifest = json.loads(text)
            if (self.manifest["format"], self.manifest["version"]) != ("llamajax-bundle", 1):
                raise ValueError(f"version {self.manifest['version']}: this runner reads version 1")
            before, key, digest = text.rpartition(b',\n "sha256": ')
            if not key or digest != b'"%s"\n}\n' % hashlib.sha256(before).hexdigest().encode():
                raise ValueError("manifest.json: its SHA-256, the last line, is another: damaged, or changed")
            for name, expected in self.manifest["files"].items():
                if hashlib.sha256(np.memmap(self.file(name), np.uint8, "r")).hexdigest() != expected["sha256"]:
                    raise ValueError(f"{name}: its SHA-256 is not the manifest's: damaged, or changed")
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"{path}: not a whole bundle: {error}")
        self.batch, self.slots = (self.manifest["cache"][key] for key in ("batch", "slots"))
        self.state = [v for v in self.manifest["programs"]["decode"]["inputs"] if v["name"] in ("key", "value")]

    def file(self, name):
        if os.path.isabs(name) or ".." in name.split("/"):
            raise ValueError(f"{name}: outside the bundle")
        return os.path.join(self.path, name)

    def tensors(self, name):
        """The arrays of a safetensors file, mapped into memory. bfloat16 is what ml_dtypes makes of it."""
        dtypes = {"F32": "float32", "F16": "float16", "U8": "uint8", "I32": "int32", "BF16": "bfloat16"}
        with open(self.file(name), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        data = np.memmap(self.file(name), np.uint8, "r", offset=8 + length)
        view = lambda entry: data[slice(*entry["data_offsets"])].view(dtypes[entry["dtype"]]).reshape(entry["shape"])  # noqa: E731
        return {key: view(entry) for key, entry in header.items() if key != "__metadata__"}


class Text:
    """Byte-pair encoding by the scores in vocabulary.json, as sentencepiece does it, and the bytes of each id."""

    def __init__(self, bundle):
        with open(bundle.file("vocabulary.json"), "rb") as file:
            vocabulary = json.load(file)
        self.bos, self.stop, self.prefix = (vocabulary[key] for key in ("bos", "stop", "dummy_prefix"))
        # Bundles of the first releases do not say these.
        self.collapse, self.unknown = vocabulary.get("collapse_spaces", False), vocabulary.get("unknown")
        self.refusal, never_split = vocabulary.get("refusal"), vocabulary.get("never_split", [])
        self.bytes = [base64.b64decode(piece) for piece in vocabulary["pieces"]]
        scored = zip(self.bytes, vocabulary["scores"], vocabulary["merges"])
        self.merges = {data: (-score, i) for i, (data, score, merges) in enumerate(scored) if merges}
        self.single = {self.bytes[i]: i for i in vocabulary["single_bytes"]}
        self.whole = {self.bytes[i].decode() for i in never_split} - {""}
        longest_first = sorted(map(re.escape, self.whole), key=len, reverse=True)
        self.symbols = re.compile("|".join([*longest_first, "."]), re.DOTALL)

    def encode(self, text):
        if self.refusal:
            sys.exit(f"{self.refusal}, which this runner does not know: give ids with --ids")
        if self.collapse:
            text = re.sub(" +", " ", text.lstrip(" "))
        text = " " * bool(self.prefix and text) + text.replace("\u2581", " ")  # sentencepiece's own sign for a space
        ids, known = [] if self.bos is None else [self.bos], True
        for part in self.merged(self.symbols.findall(text.rstrip(" ") if self.collapse else text)):
            spelt = None if part in self.merges else [self.single.get(bytes([byte])) for byte in part]
            if spelt is None:
                ids.append(self.merges[part][1])
            elif None not in spelt:
                ids += spelt
            elif self.unknown is None:
                sys.exit(f"{part.decode()!r} is not in the vocabulary")
            elif known:
                ids.append(self.unknown)  # one for all unknown characters in a row
            known = spelt is None or None not in spelt
        return ids

    def merged(self, symbols):
        """Joins the neighbours of the highest score, the first of equal ones, while any are in the vocabulary."""
        parts, heap = [symbol.encode() for symbol in symbols], []
        left_of, right_of = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))

        def offer(left, right):
            if (
                left >= 0
                and right < len(parts)
                and symbols[left] not in self.whole
                and symbols[right] not in self.whole
            ):
                joined = parts[left] + parts[right]
                if joined in self.merges:
                    heapq.heappush(heap, (self.merges[joined][0], left, right, joined))

        for left in range(len(parts) - 1):
            offer(left, left + 1)
        while heap:
            _, left, right, joined = heapq.heappop(heap)
            if parts[left] and parts[right] and parts[left] + parts[right] == joined:  # neither was joined meanwhile
                parts[left], parts[right], following = joined, b"", right_of[right]
                right_of[left] = following
                if following < len(parts):
                    left_of[following] = left
                offer(left_of[left], left)
                offer(left, following)
        return filter(None, parts)

    def decoder(self, ids):
        """A function that gives the bytes of one id after another behind `ids`; an id without text is U+FFFD.

        The first piece of a text lacks the space that encoding puts there.
        """
        text_of = lambda token: self.bytes[token] if token < len(self.bytes) else b"\xef\xbf\xbd"  # noqa: E731
        started, spelt = any(map(text_of, ids)), {self.unknown, *self.single.values()}

        def decode(token):
            nonlocal started
            data, first = text_of(token), not started
            started = started or bool(data)
            return data[1:] if first and self.prefix and token not in spelt and data[:1] == b" " else data

        return decode


def steps(session, bundle, ids, limit, choose):
    """Prefills `ids`, then yields (token, logits it was chosen from), at most `limit`. All rows hold the same text."""
    if not 0 < len(ids) < bundle.slots:
        sys.exit(f"{len(ids)} tokens: expected 1 to {bundle.slots - 1}, for the cache has {bundle.slots} slots")
    rows = lambda value: np.full(bundle.batch, value, np.int32)  # noqa: E731
    session.reset()
    session.seconds, session.count, length = 0.0, 0, 0
    while length < len(ids):
        # The padding of a bucket must fit the cache too; what fits none is decoded token by token.
        fitting = [bucket for bucket in bundle.manifest["buckets"] if length + bucket <= bundle.slots]
        bucket = next((bucket for bucket in fitting if bucket >= len(ids) - length), fitting[-1] if fitting else 1)
        part = ids[length : length + bucket]
        tokens = np.tile(np.array(part + [0] * (bucket - len(part)), np.int32), (bundle.batch, 1))
        inputs = {"tokens": tokens, "count": rows(len(part))} if fitting else {"token": tokens[:, 0]}
        logits = session.run(f"prefill_{bucket}" if fitting else "decode", {**inputs, "length": rows(length)})
        length += len(part)
    for made in range(1, limit + 1):
        token = choose(logits[0])
        yield token, logits[0]
        if made == limit or length == bundle.slots:
            break
        start = time.perf_counter()
        logits = session.run("decode", {"token": rows(token), "length": rows(length)})
        session.seconds, session.count, length = session.seconds + time.perf_counter() - start, made, length + 1


def chooser(temperature, seed):
    """Greedy for temperature 0, else a draw: adding Gumbel noise and taking the largest is one."""
    noise = np.random.default_rng(seed).gumbel
    return lambda logits: int(np.argmax(logits + temperature * noise(size=logits.shape)))


def check_texts(bundle):
    """Encodes the golden texts, unless this tokenizer is refused; how many there were."""
    texts = bundle.manifest["golden"].get("texts", [])
    text = Text(bundle) if texts else None
    if text is None or text.refusal:
        return 0
    for entry in texts:
        ids = text.encode(entry["text"])
        if ids != entry["ids"]:
            sys.exit(f"{entry['text']!r} gives ids {ids}: expected {entry['ids']}")
    return len(texts)


def golden(session, bundle, start):
    """Runs the golden prompts and encodes the golden texts; prints one JSON object."""
    arrays, prompts, steps_made, seconds = bundle.tensors("golden.safetensors"), [], 0, 0.0
    list(steps(session, bundle, [0], 2, chooser(0, 0)))  # what compiles when it is first run belongs to loading
    load_seconds = time.perf_counter() - start
    for index in range(bundle.manifest["golden"]["prompts"]):
        ids, expected, logits = (arrays[f"{name}_{index}"] for name in ("prompt", "tokens", "logits"))
        made = list(steps(session, bundle, ids.tolist(), len(expected), chooser(0, 0)))
        tokens, error = [token for token, _ in made], float(np.max(np.abs(made[0][1] - logits)))
        prompts.append({"tokens": tokens, "exact": tokens == expected.tolist(), "largest_logit_error": str(error)})
        steps_made, seconds = steps_made + session.count, seconds + session.seconds
    with open("/proc/self/status" if os.path.exists("/proc/self/status") else os.devnull) as lines:
        resident = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
    speed = {"decode_steps": steps_made, "decode_seconds": seconds, "load_seconds": load_seconds}
    counts = {"texts": check_texts(bundle), "resident_bytes": resident}
    print(json.dumps({"runtime": session.name, "prompts": prompts, **speed, **counts}))


def main(open_session, description):
    """The command line. `open_session(bundle)` has name, reset() and run(program, inputs) -> logits [B, V]."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("bundle", nargs="?", default=os.path.dirname(os.path.abspath(__file__)))
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--ids", help="ids with commas between, instead of a prompt; prints ids")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--golden", action="store_true", help="run the golden prompts; print JSON")
    options, start = parser.parse_args(), time.perf_counter()
    bundle = Bundle(options.bundle)
    session = open_session(bundle)
    if options.golden:
        return golden(session, bundle, start)
    load_seconds = time.perf_counter() - start
    text = None if options.ids else Text(bundle)
    ids = text.encode(options.prompt) if text else [int(token) for token in options.ids.split(",")]
    out, choose = sys.stdout.buffer, chooser(options.temperature, options.seed)
    out.write(options.prompt.encode() if text else b"")
    decode = text.decoder(ids) if text else lambda token: b"%d " % token
    for token, _ in steps(session, bundle, ids, options.max_new_tokens, choose):
        if text and token in text.stop:
            break
        out.write(decode(token))
        out.flush()
    rate = session.count / max(session.seconds, 1e-9)
    print(f"\n{session.name}: {rate:.1f} tokens/s, loaded in {load_seconds:.1f} s", file=sys.stderr)
