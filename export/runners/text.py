"""Converts text to ids and back by the tables of vocabulary.json, step by step like sentencepiece (normalizer.cc) and
tokenizers (added_vocabulary.rs, pre_tokenizers/). In a bundle this is part of each runner."""

import base64
import json
import re
import sys
import unicodedata

import numpy as np

from export.runners.text_models import MODELS, SPACE, Longest

SPECIAL, LSTRIP, RSTRIP, SINGLE_WORD = 1, 2, 4, 8
MOST_CACHED = 1 << 16


class Replacements:
    """The replacements of sentencepiece's normalizers: a double-array trie (darts.h of darts-clone), and texts."""

    def __init__(self, blob):
        size = int.from_bytes(blob[:4], "little")
        self.units, self.texts = np.frombuffer(blob[4 : 4 + size], "<u4").tolist(), blob[4 + size :]

    def at(self, data, place):
        """The longest replacement at a place: the number of bytes replaced, and the bytes to put there."""
        units, found = self.units, (0, b"")
        jump = lambda unit: (unit >> 10) << ((unit & 512) >> 6)  # noqa: E731
        node = jump(units[0]) if units else 0
        for end in range(place, len(data)):
            node ^= data[end]
            if node >= len(units) or units[node] & 0x800000FF != data[end]:
                break
            leaf, node = units[node] & 256, node ^ jump(units[node])
            if leaf and node < len(units):
                begin = units[node] & 0x7FFFFFFF
                found = end + 1 - place, self.texts[begin : self.texts.find(b"\0", begin)]
        return found


class Text:
    """Encodes text by the tables of a vocabulary, and gives the bytes of each id."""

    def __init__(self, bundle):
        with open(bundle.file("vocabulary.json"), "rb") as file:
            vocabulary = json.load(file)
        if "version" not in vocabulary:
            vocabulary = of_first_releases(vocabulary)
        if vocabulary["version"] != 2:
            sys.exit(f"vocabulary.json: version {vocabulary['version']}: this runner reads 1 and 2")
        self.bos, self.eos, self.stop, self.refusal = (vocabulary[key] for key in ("bos", "eos", "stop", "refusal"))
        self.first_space, self.spelt = vocabulary["first_space"], set(vocabulary["spelt"])
        self.pieces, self.texts, self.of_bytes = (vocabulary[key] for key in ("pieces", "texts", "pieces_are_bytes"))
        if not self.refusal:
            self.classes = vocabulary["classes"]
            self.read_added(**vocabulary["added"])
            self.normalize, self.split = (
                [self.step(**step) for step in vocabulary[key]] for key in ("normalize", "split")
            )
            self.model, self.cache = MODELS[vocabulary["model"]["kind"]](self.pieces, **vocabulary["model"]), {}

    def bytes_of(self, token):
        """The bytes of an id; those of U+FFFD for an id without a text."""
        if str(token) in self.texts:
            return self.texts[str(token)].encode("latin-1")
        if token >= len(self.pieces):
            return b"\xef\xbf\xbd"
        piece = self.pieces[token]
        return piece.encode("latin-1") if self.of_bytes else piece.replace(SPACE, " ").encode()

    def decoder(self, ids):
        """A function that converts the ids after `ids`, one at a time, to bytes of complete characters.

        The space that encoding adds before a text is removed from the first piece.
        """
        started, held = any(map(self.bytes_of, ids)), b""

        def decode(token):
            nonlocal started, held
            if token is None:
                return held  # the rest at the end
            data = self.bytes_of(token)
            if data and not started:
                data = data[1:] if self.first_space and token not in self.spelt and data[:1] == b" " else data
                started = True
            data, held = whole_characters(held + data)
            return data

        return decode

    # ---- Parts of a text ----

    def read_added(self, early, late, blank, word, special_hides):
        """Reads the added tokens: `early` ones are searched in a text itself, `late` ones after normalization.

        A special token that is not to be encoded may still hide others that begin inside it.
        """
        kept = lambda some, special: {  # noqa: E731
            text: (i, bits) for i, text, bits in some if special or special_hides or not bits & SPECIAL
        }
        self.added = {special: [Longest(kept(some, special)) for some in (early, late)] for special in (False, True)}
        self.bits = {i: bits for some in (early, late) for i, _, bits in some}
        self.blank, self.word = blank, re.compile(self.pattern_text([] if word is None else [word]))

    def encode(self, text, special=False):
        """Ids of a text. `special`: whether special tokens in it become their ids instead of being encoded as text."""
        if self.refusal:
            sys.exit(f"{self.refusal}, which this runner does not know: give ids with --ids")
        ids = [] if self.bos is None else [self.bos]
        ids += self.encode_part(text, special, True)
        return ids if self.eos is None else [*ids, self.eos]

    def encode_pieces(self, pieces, control):
        """Ids of a list of ids and texts. Adjacent texts are joined; special and control tokens in them are text."""
        ids, run = [], ""
        for piece in (*pieces, None):
            if isinstance(piece, str):
                run += piece
                continue
            run = run.lstrip(self.blank) if self.bits.get(ids[-1] if ids else None, 0) & RSTRIP else run
            run = run.rstrip(self.blank) if self.bits.get(piece, 0) & LSTRIP else run
            ids += self.encode_part(run, False, not ids, control) if run else []
            ids, run = ids if piece is None else [*ids, piece], ""
        return ids

    def encode_part(self, text, special, at_start, control=()):
        """Ids of a part of a text."""
        ids = []
        early, late = self.added[special]
        for place, part in self.around_added(early, text, special, control):
            if isinstance(part, int):
                ids.append(part)
                continue
            for step in self.normalize:
                part = "".join(step([part], at_start and place == 0))
            for later, inner in self.around_added(late, part, special, control):
                if isinstance(inner, int):
                    ids.append(inner)
                    continue
                words = [inner]
                for step in self.split:
                    words = [word for word in step(words, at_start and place + later == 0) if word]
                for word in words:
                    ids += self.encode_word(word)
        return ids

    def around_added(self, added, text, special, control=()):
        """Yields the parts of a text, each with its place: ids of added tokens, and the text between them."""
        done = 0
        for start, found in added.find(text):
            (token, bits), end = added.texts[found], start + len(found)
            if (bits & SPECIAL or token in control) and not special:
                continue
            beside = (text[start - 1 : start], text[end : end + 1])
            if bits & SINGLE_WORD and any(map(self.word.match, beside)):
                continue
            start = max(start, done)
            while bits & LSTRIP and start > done and text[start - 1] in self.blank:
                start -= 1
            while bits & RSTRIP and end < len(text) and text[end] in self.blank:
                end += 1
            if done < start:
                yield done, text[done:start]
            yield start, token
            done = end
        if done < len(text):
            yield done, text[done:]

    def encode_word(self, word):
        found = self.cache.get(word)
        if found is None:
            found = self.model.encode(word)
            if len(self.cache) < MOST_CACHED and len(word) < 64:
                self.cache[word] = found
        return found

    # ---- Steps: functions of words, and of whether these words begin a text ----

    def step(self, do, **values):
        return getattr(self, "step_" + do)(**values)

    def pattern_text(self, pattern):
        """The regular expression of a pattern, in which numbers are classes of characters."""
        text = []
        for part in pattern:
            if isinstance(part, int):
                ends = self.classes[part]
                ranges = "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in zip(ends[::2], ends[1::2]))
                part = f"[{ranges}]" if ranges else "(?!)"
            text.append(part)
        return "".join(text)

    def step_bytes(self):
        return lambda words, _: [word.encode().decode("latin-1") for word in words]

    def step_replace(self, pattern, text):
        found = re.compile(self.pattern_text(pattern))
        return lambda words, _: [found.sub(lambda _: text, word) for word in words]

    def step_form(self, name, pattern):
        """Unicode's normal forms, for the characters that the tokenizer's version of Unicode changes."""
        found = re.compile(self.pattern_text(pattern))
        made = lambda match: unicodedata.normalize(name, match.group())  # noqa: E731
        return lambda words, _: [found.sub(made, word) for word in words]

    def step_prefix(self, text, unless, first):
        def put(words, at_start):
            return [
                word if (first and (index or not at_start)) or (unless and word.startswith(text)) else text + word
                for index, word in enumerate(words)
            ]

        return put

    def step_split(self, pattern, behavior, invert):
        found = re.compile(self.pattern_text(pattern))

        def parts(word):
            """Yields matches and the parts between them, each with whether it counts as a match."""
            done = 0
            for match in found.finditer(word):
                if done < match.start():
                    yield word[done : match.start()], invert
                yield match.group(), not invert
                done = match.end()
            if done < len(word):
                yield word[done:], invert

        def joined(word):
            if behavior == "removed":
                return [part for part, matches in parts(word) if not matches]
            some: list = []
            before = None
            for part, matches in parts(word) if behavior != "merged_with_next" else reversed(list(parts(word))):
                if behavior == "contiguous" and matches == before:
                    some[-1] += part
                elif behavior == "merged_with_previous" and matches and before is False:
                    some[-1] += part
                elif behavior == "merged_with_next" and matches and before is False:
                    some[-1] = part + some[-1]
                else:
                    some.append(part)
                before = matches
            return some[::-1] if behavior == "merged_with_next" else some

        if behavior == "isolated" and not invert:
            return lambda words, _: [part for word in words for part, _ in parts(word)]
        return lambda words, _: [part for word in words for part in joined(word)]

    def step_sentencepiece(self, prefix, collapse, escape, suffix, charsmap, whole):
        """Sentencepiece's normalizer. `prefix`: before which parts of a text a space is added."""
        kept, replaced = Longest({piece.encode() for piece in whole}), Replacements(base64.b64decode(charsmap))
        space = SPACE if escape else " "

        def pieces(text):
            data, place = text.encode(), 0
            while place < len(data):
                found = kept.at(data, place)
                size, instead = (0, b"") if found else replaced.at(data, place)
                if not size:
                    size = len(found) or 1 + sum(data[place] >= least for least in (0xC0, 0xE0, 0xF0))
                    instead = data[place : place + size]
                yield instead.decode()
                place += size

        def normalized(text, first):
            some = list(pieces(text)) if kept.lengths or charsmap else [*text]
            begin = 0
            while collapse and begin < len(some) and some[begin] == " ":
                begin += 1
            if begin == len(some):
                return ""
            dummy, made, after_space = prefix == "always" or (prefix == "first" and first), [], collapse
            for piece in some[begin:]:
                piece = piece.lstrip(" ") if after_space else piece
                if piece:
                    made.append(piece)
                    after_space = collapse and piece.endswith(" ")
            text = " " * (dummy and not suffix) + "".join(made)
            text = text.replace(" ", SPACE) if escape else text
            while collapse and text.endswith(space):
                text = text[: -len(space)]
            return text + space * (dummy and suffix)

        return lambda words, first: [normalized(word, first) for word in words]


def whole_characters(data):
    """Splits bytes before an incomplete UTF-8 character at their end."""
    for back in range(1, min(4, len(data) + 1)):
        if data[-back] >= 0xC0:
            wanted = 2 + (data[-back] >= 0xE0) + (data[-back] >= 0xF0)
            return (data[:-back], data[-back:]) if back < wanted and data[-back] < 0xF8 else (data, b"")
        if data[-back] < 0x80:
            break
    return data, b""


def of_first_releases(old):
    """Converts a vocabulary of the first releases (sentencepiece's byte-pair encoding) to version 2."""
    data = [base64.b64decode(piece) for piece in old["pieces"]]
    kinds = ["n" if merges else "c" for merges in old["merges"]] + ["c"] * (len(data) - len(old["merges"]))
    pieces = [piece.decode(errors="replace").replace(" ", SPACE) for piece in data]
    texts = {str(i): piece.decode("latin-1") for i, piece in enumerate(data) if kinds[i] == "c"}
    for i in old["single_bytes"]:
        kinds[i], pieces[i] = "b", f"<0x{data[i][0]:02X}>"
    for i in old.get("never_split", []):
        kinds[i] = "u"
    unknown, prefix = old.get("unknown"), "always" if old.get("prefix_parts") else "first"
    early, late, *_ = [[[i, text, 0] for text, i in tokens.items()] for tokens in old.get("added", [])] + [[], []]
    step = {
        "do": "sentencepiece",
        "prefix": prefix if old["dummy_prefix"] else "never",
        "collapse": old.get("collapse_spaces", False),
        "escape": True,
        "suffix": False,
        "charsmap": "",
        "whole": [piece for piece, kind in zip(pieces, kinds) if kind == "u"],
    }
    return {
        **{"version": 2, "refusal": old.get("refusal"), "bos": old["bos"], "eos": old.get("eos"), "stop": old["stop"]},
        **{"pieces": pieces, "texts": texts, "pieces_are_bytes": False, "classes": [], "normalize": []},
        "first_space": old["dummy_prefix"],
        "spelt": [unknown, *old["single_bytes"], *(i for i, _, _ in early + late)],
        "added": {"early": early, "late": late, "blank": "", "word": None, "special_hides": False},
        "split": [step],
        "model": {"kind": "scores", "kinds": "".join(kinds), "scores": old["scores"], "unknown": unknown},
    }
