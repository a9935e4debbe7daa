"""Encodes words as ids, in each runner of a bundle, like sentencepiece (bpe_model.cc, unigram_model.cc) and tokenizers
(bpe/model.rs, bpe/word.rs)."""

import base64
import heapq
import sys

import numpy as np

SPACE = "\u2581"  # sentencepiece's sign for a space


class Longest:
    """Finds the longest of several texts that begins at a place."""

    def __init__(self, texts):
        lengths: dict = {}
        for text in texts:
            lengths.setdefault(text[0], set()).add(len(text))
        self.texts, self.lengths = texts, {first: sorted(found, reverse=True) for first, found in lengths.items()}

    def at(self, text, place):
        for length in self.lengths.get(text[place], ()):
            if text[place : place + length] in self.texts:
                return text[place : place + length]
        return ""

    def find(self, text):
        """Yields the occurrences in a text, from left to right, as (place, text found)."""
        place = 0
        while place < len(text):
            found = self.at(text, place)
            if found:
                yield place, found
            place += len(found) or 1

    def cut(self, text):
        """Yields a text in parts: texts found, and single characters between them, each with whether it was found."""
        place = 0
        while place < len(text):
            found = self.at(text, place)
            yield found or text[place], bool(found)
            place += len(found) or 1


class Merges:
    """Byte-pair encoding by a list of merges, the best first."""

    def __init__(self, pieces, kind, left, right, ignore_merges, byte_fallback, fuse_unknown, unknown):
        left, right = (np.frombuffer(base64.b64decode(ids), "<i4").astype(np.int64) for ids in (left, right))
        self.pieces, self.size, self.unknown = pieces, len(pieces), unknown
        self.ignore, self.fallback, self.fuse = ignore_merges, byte_fallback, fuse_unknown
        self.ranks = dict(zip((left * self.size + right).tolist(), range(len(left))))
        self.ids = {piece: i for i, piece in enumerate(pieces) if piece is not None}
        self.single = [self.ids.get(f"<0x{byte:02X}>") for byte in range(256)]

    def encode(self, word):
        if self.ignore and word in self.ids:
            return [self.ids[word]]
        symbols: list = []
        unknown, waiting = self.unknown, False  # if fused, consecutive unknown characters are one id
        for character in word:
            token = self.ids.get(character)
            if token is not None:
                symbols += [unknown] * waiting
                symbols.append(token)
                waiting = False
                continue
            spelt = [self.single[byte] for byte in character.encode()] if self.fallback else [None]
            if None not in spelt:
                symbols += spelt
            elif unknown is not None:
                symbols += [unknown] * (waiting and not self.fuse)
                waiting = True
        symbols += [unknown] * waiting
        pieces, ids, ranks, size = self.pieces, self.ids, self.ranks, self.size

        def pair(left, right):
            rank = ranks.get(left * size + right)
            return None if rank is None else (rank, ids[pieces[left] + pieces[right]])

        return merged(symbols, pair)


class Scores:
    """Sentencepiece's byte-pair encoding, by scores of pieces."""

    def __init__(self, pieces, kind, kinds, scores, unknown):
        pieces, self.unknown = pieces[: len(kinds)], unknown
        self.scored = {piece: (-scores[i], i) for i, piece in enumerate(pieces) if kinds[i] in "nux"}
        self.reserved = {piece: i for i, piece in enumerate(pieces) if kinds[i] in "cb?"}
        self.single = {int(piece[3:5], 16): i for piece, i in self.reserved.items() if kinds[i] == "b"}
        self.unused = {piece for piece, (_, i) in self.scored.items() if kinds[i] == "x"}
        self.whole = Longest({piece: i for piece, (_, i) in self.scored.items() if kinds[i] == "u"})

    def encode(self, word):
        symbols, frozen, apart = [], set(), {}
        for symbol, found in self.whole.cut(word) if self.whole.lengths else ((character, False) for character in word):
            if found:
                frozen.add(len(symbols))
            symbols.append(symbol)

        def pair(left, right):
            scored = self.scored.get(left + right)
            if scored is None:
                return None
            if self.unused and left + right in self.unused:
                apart[left + right] = left, right
            return scored[0], left + right

        made = merged(symbols, pair, frozen)
        while apart and not apart.keys().isdisjoint(made):  # unused pieces are split again
            made = [part for piece in made for part in apart.get(piece, (piece,))]
        other = 0, self.unknown
        scored = [other if piece in self.unused else self.scored.get(piece, other) for piece in made]
        return self.known(zip(made, (token for _, token in scored)))

    def known(self, pieces):
        """Ids of pieces; an unknown piece gives the ids of its bytes, or consecutive unknown pieces give one id."""
        ids: list = []
        unknown, before = self.unknown, False
        for piece, token in pieces:
            token = self.reserved.get(piece, token)
            if token == unknown and self.single:
                ids += [self.single[byte] for byte in piece.encode()]
            elif token is None:
                sys.exit(f"{piece!r} is not in the vocabulary")
            elif not (before and token == unknown):
                ids.append(token)
            before = token == unknown
        return ids


class Unigram(Scores):
    """Sentencepiece's unigram models: the likeliest sequence of pieces."""

    def __init__(self, pieces, kind, kinds, scores, unknown):
        super().__init__(pieces, kind, kinds, scores, unknown)
        scores = np.float32(scores)
        normal = [score for score, kind in zip(scores.tolist(), kinds) if kind == "n"]
        self.unlikely = float(np.float32(min(normal, default=0.0)) - np.float32(10))
        most = max([float(np.finfo(np.float32).tiny), *normal])  # sentencepiece starts with the least positive number
        self.likely = {}
        for piece, (_, i) in self.scored.items():
            if kinds[i] != "x":
                length = float(np.float32(len(piece.encode())) * np.float32(most))
                self.likely[piece] = (length - 0.1 if kinds[i] == "u" else float(scores[i]), i)
        self.reach = Longest(self.likely).lengths

    def encode(self, word):
        best: list = [None] * (len(word) + 1)  # (log probability, in float32; begin of the last piece; its id)
        best[0] = 0.0, 0, 0

        def offer(end, score, begin, token):
            if best[end] is None or score > best[end][0]:
                best[end] = float(np.float32(score)), begin, token

        for begin, first in enumerate(word):
            so_far, single = best[begin][0], False
            for length in reversed(self.reach.get(first, ())):
                likely = self.likely.get(word[begin : begin + length]) if begin + length <= len(word) else None
                if likely:
                    offer(begin + length, so_far + likely[0], begin, likely[1])
                    single = single or length == 1
            if not single:
                offer(begin + 1, so_far + self.unlikely, begin, self.unknown)
        pieces: list = []
        end = len(word)
        while end:
            _, begin, token = best[end]
            pieces.append((word[begin:end], token))
            end = begin
        return self.known(reversed(pieces))


MODELS = {"merges": Merges, "scores": Scores, "unigram": Unigram}


def merged(symbols, pair, frozen=()):
    """Joins neighbours, the best pair first; of equal pairs the first. `pair(left, right)`: (order, joined) or None."""
    heap: list = []
    parts, count = list(symbols), len(symbols)
    left_of, right_of = list(range(-1, count - 1)), list(range(1, count + 1))

    def offer(left, right):
        if left >= 0 and right < count and left not in frozen and right not in frozen:
            found = pair(parts[left], parts[right])
            if found is not None:
                heapq.heappush(heap, (found[0], left, found[1]))

    for left in range(count - 1):
        offer(left, left + 1)
    while heap:
        _, left, joined = heapq.heappop(heap)
        right = right_of[left]
        if parts[left] is None or right >= count:
            continue
        found = pair(parts[left], parts[right])
        if found is None or found[1] != joined:  # one of the two has been joined since
            continue
        parts[left], parts[right], following = joined, None, right_of[right]
        right_of[left] = following
        if following < count:
            left_of[following] = left
        offer(left_of[left], left)
        offer(left, following)
    return [part for part in parts if part is not None]
