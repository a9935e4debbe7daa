// runners/runner.py and run_onnx.py for the browser: checks a bundle, converts text to ids and back, prefills, decodes.
// Bytes that are keys are strings of characters 0 to 255.

const latin1 = (bytes) => Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");

const SPACE = "\u2581"; // sentencepiece's sign for a space
const SPECIAL = 1, LSTRIP = 2, RSTRIP = 4, SINGLE_WORD = 8;
const utf8 = (text) => latin1(new TextEncoder().encode(text));
const bytesOf = (latin) => Uint8Array.from(latin, (character) => character.charCodeAt(0));
const unBase64 = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
const int32 = (text) => {
  const view = new DataView(unBase64(text).buffer);
  return Array.from({ length: view.byteLength / 4 }, (_, i) => view.getInt32(4 * i, true));
};
// The character (of one or two UTF-16 units) at a place, and the one that ends before it; "" outside of the text.
const characterAt = (text, place) => (place < text.length ? String.fromCodePoint(text.codePointAt(place)) : "");
const characterBefore = (text, place) => [...text.slice(Math.max(0, place - 2), place)].at(-1) ?? "";

// Finds the longest of several texts that begins at a place.
class Longest {
  constructor(texts) {
    this.texts = texts; // a Map
    this.lengths = new Map();
    for (const text of texts.keys()) {
      const first = characterAt(text, 0);
      if (!this.lengths.has(first)) this.lengths.set(first, new Set());
      this.lengths.get(first).add(text.length);
    }
    for (const [first, lengths] of this.lengths) this.lengths.set(first, [...lengths].sort((a, b) => b - a));
  }

  at(text, place) {
    for (const length of this.lengths.get(characterAt(text, place)) ?? []) {
      const found = text.slice(place, place + length);
      if (this.texts.has(found)) return found;
    }
    return "";
  }

  // Yields a text in parts: texts found, and single characters between them, each with its place.
  *cut(text) {
    for (let place = 0; place < text.length; ) {
      const found = this.at(text, place), part = found || characterAt(text, place);
      yield { place, part, found: found !== "" };
      place += part.length;
    }
  }
}

// The replacements of sentencepiece's normalizers: a double-array trie (darts.h of darts-clone), and texts.
class Replacements {
  constructor(blob) {
    const view = new DataView(blob.buffer), size = blob.length ? view.getUint32(0, true) : 0;
    this.units = Array.from({ length: size >> 2 }, (_, i) => view.getUint32(4 + 4 * i, true));
    this.texts = latin1(blob.slice(4 + size));
  }

  // The longest replacement at a place: the number of bytes replaced, and the bytes to put there. Bytes are characters.
  at(data, place) {
    const { units, texts } = this, jump = (unit) => (unit >>> 10) << ((unit & 512) >> 6);
    let found = { size: 0, instead: "" }, node = units.length ? jump(units[0]) : 0;
    for (let end = place; end < data.length; end++) {
      const byte = data.charCodeAt(end);
      node ^= byte;
      if (!(node < units.length) || (units[node] & 0x800000ff) !== byte) break;
      const leaf = units[node] & 256;
      node ^= jump(units[node]);
      if (!leaf || !(node < units.length)) continue;
      const begin = units[node] & 0x7fffffff;
      found = { size: end + 1 - place, instead: texts.slice(begin, texts.indexOf("\0", begin)) };
    }
    return found;
  }
}

// Converts text to ids and back by the tables of vocabulary.json, as runners/text.py does.
export class Text {
  constructor(vocabulary) {
    if (vocabulary.version === undefined) vocabulary = ofFirstReleases(vocabulary);
    if (vocabulary.version !== 2) throw new Error(`vocabulary.json: version ${vocabulary.version}: expected 1 or 2`);
    Object.assign(this, vocabulary); // bos, eos, stop, refusal, pieces, texts, classes, model
    this.spelt = new Set(vocabulary.spelt);
    if (this.refusal) return;
    const { blank, word } = vocabulary.added, tables = ["early", "late"];
    this.added = [false, true].map((special) => tables.map((name) => this.kept(vocabulary.added, name, special)));
    this.blank = blank;
    this.bits = new Map(tables.flatMap((name) => vocabulary.added[name].map(([id, , bits]) => [id, bits])));
    this.word = word === null ? null : new RegExp(`^${this.patternText([word])}$`, "u");
    [this.normalize, this.split] = ["normalize", "split"].map((key) => vocabulary[key].map((step) => this.step(step)));
    this.cache = new Map();
    const { kind } = this.model;
    if (kind === "merges") this.readMerges();
    else if (kind === "scores") this.readScores();
    else this.readUnigram();
  }

  // Added tokens of a table. A special token that is not to be encoded may still hide others that begin inside it.
  kept({ special_hides: hides, ...tables }, name, special) {
    const some = tables[name].filter(([, , bits]) => special || hides || !(bits & SPECIAL));
    return new Longest(new Map(some.map(([id, text, bits]) => [text, { id, bits }])));
  }

  // The bytes of an id; those of U+FFFD for an id without a text.
  bytesOf(id) {
    if (this.texts[id] !== undefined) return bytesOf(this.texts[id]);
    if (!(id < this.pieces.length)) return new TextEncoder().encode("\ufffd");
    const piece = this.pieces[id];
    return this.pieces_are_bytes ? bytesOf(piece) : new TextEncoder().encode(piece.replaceAll(SPACE, " "));
  }

  // A function that converts the ids after `ids`, one at a time, to bytes of complete characters; null gives the rest.
  // The space that encoding adds before a text is removed from the first piece.
  decoder(ids) {
    let started = ids.some((id) => this.bytesOf(id).length), held = new Uint8Array();
    return (id) => {
      if (id === null) return held;
      let bytes = this.bytesOf(id);
      if (bytes.length && !started) {
        if (this.first_space && !this.spelt.has(id) && bytes[0] === 32) bytes = bytes.slice(1);
        started = true;
      }
      const data = new Uint8Array([...held, ...bytes]), end = wholeCharacters(data);
      held = data.slice(end);
      return data.slice(0, end);
    };
  }

  encode(text, special = false) {
    if (this.refusal) throw new Error(`${this.refusal}, which this page does not know`);
    const ids = [...(this.bos === null ? [] : [this.bos]), ...this.encodePart(text, special, true)];
    return this.eos === null ? ids : [...ids, this.eos];
  }

  // Ids of a list of ids and texts. Adjacent texts are joined; special and control tokens in them are text.
  encodePieces(pieces, control) {
    const ids = [], isBlank = (character) => character !== undefined && this.blank.includes(character);
    let run = "";
    for (const piece of [...pieces, null]) {
      if (typeof piece === "string") {
        run += piece;
        continue;
      }
      let start = 0, end = run.length;
      if (this.bits.get(ids.at(-1)) & RSTRIP) while (start < end && isBlank(run[start])) start++;
      if (this.bits.get(piece) & LSTRIP) while (end > start && isBlank(run[end - 1])) end--;
      if (start < end) ids.push(...this.encodePart(run.slice(start, end), false, !ids.length, control));
      if (piece !== null) ids.push(piece);
      run = "";
    }
    return ids;
  }

  // Ids of a part of a text.
  *encodePart(text, special, first, control = []) {
    const [early, late] = this.added[+special];
    for (const { place, part, id } of this.aroundAdded(early, text, special, control)) {
      if (id !== undefined) {
        yield id;
        continue;
      }
      const normalized = this.normalize.reduce((part, step) => step([part], first && place === 0).join(""), part);
      for (const { place: later, part: inner, id } of this.aroundAdded(late, normalized, special, control)) {
        if (id !== undefined) {
          yield id;
          continue;
        }
        const atStart = first && place + later === 0;
        const words = this.split.reduce((words, step) => step(words, atStart).filter((word) => word !== ""), [inner]);
        for (const word of words) yield* this.encodeWord(word);
      }
    }
  }

  // Yields the parts of a text, each with its place: ids of added tokens, and the text between them.
  *aroundAdded(added, text, special, control = []) {
    let done = 0;
    for (const { place, part, found } of added.lengths.size ? added.cut(text) : []) {
      if (!found) continue;
      const { id, bits } = added.texts.get(part);
      let start = place, end = place + part.length;
      if ((bits & SPECIAL || control.includes(id)) && !special) continue;
      const beside = [characterBefore(text, start), characterAt(text, end)];
      if (bits & SINGLE_WORD && beside.some((character) => this.word.test(character))) continue;
      start = Math.max(start, done);
      while (bits & LSTRIP && start > done && this.blank.includes(text[start - 1])) start--;
      while (bits & RSTRIP && end < text.length && this.blank.includes(text[end])) end++;
      if (done < start) yield { place: done, part: text.slice(done, start) };
      yield { place: start, id };
      done = end;
    }
    if (done < text.length) yield { place: done, part: text.slice(done) };
  }

  // The regular expression of a pattern, in which numbers are classes of characters.
  patternText(pattern) {
    const code = (number) => `\\u{${number.toString(16)}}`;
    const classText = (ends) => {
      let text = "";
      for (let i = 0; i < ends.length; i += 2) text += `${code(ends[i])}-${code(ends[i + 1])}`;
      return text ? `[${text}]` : "(?!)";
    };
    return pattern.map((part) => (typeof part === "number" ? classText(this.classes[part]) : part)).join("");
  }

  pattern(parts) {
    return new RegExp(this.patternText(parts), "gu");
  }

  // A function of words, and of whether the first of them begins the text.
  step({ do: name, ...values }) {
    if (name === "bytes") return (words) => words.map(utf8);
    if (name === "replace") {
      const pattern = this.pattern(values.pattern);
      return (words) => words.map((word) => word.replace(pattern, () => values.text));
    }
    if (name === "form") {
      const pattern = this.pattern(values.pattern);
      return (words) => words.map((word) => word.replace(pattern, (found) => found.normalize(values.name)));
    }
    if (name === "prefix") {
      const { text, unless, first } = values;
      const bare = (word, index, atStart) => (first && (index || !atStart)) || (unless && word.startsWith(text));
      return (words, atStart) => words.map((word, index) => (bare(word, index, atStart) ? word : text + word));
    }
    if (name === "split") return this.splitter(values);
    if (name === "sentencepiece") return this.sentencepiece(values);
    throw new Error(`vocabulary.json: step ${name}: this page does not know it`);
  }

  splitter({ pattern, behavior, invert }) {
    const expression = this.pattern(pattern);
    const parts = (word) => {
      const some = [];
      let done = 0;
      for (const { 0: found, index } of word.matchAll(expression)) {
        if (done < index) some.push({ part: word.slice(done, index), matches: invert });
        some.push({ part: found, matches: !invert });
        done = index + found.length;
      }
      if (done < word.length) some.push({ part: word.slice(done), matches: invert });
      return some;
    };
    const joined = (word) => {
      const backwards = behavior === "merged_with_next", some = [];
      const all = backwards ? parts(word).reverse() : parts(word);
      if (behavior === "removed") return all.filter(({ matches }) => !matches).map(({ part }) => part);
      let before = null;
      for (const { part, matches } of all) {
        const joins = matches && before === false;
        if (behavior === "contiguous" ? matches === before : behavior !== "isolated" && joins) {
          some.push(backwards ? part + some.pop() : some.pop() + part);
        } else some.push(part);
        before = matches;
      }
      return backwards ? some.reverse() : some;
    };
    return (words) => words.flatMap(joined);
  }

  // Sentencepiece's normalizer. `prefix`: before which parts of a text a space is added.
  sentencepiece({ prefix, collapse, escape, suffix, charsmap, whole }) {
    const kept = new Longest(new Map(whole.map((piece) => [utf8(piece), piece]))), space = escape ? SPACE : " ";
    const replaced = new Replacements(unBase64(charsmap)), decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    const pieces = function* (text) {
      const data = utf8(text);
      for (let place = 0; place < data.length; ) {
        const found = kept.at(data, place);
        let { size, instead } = found ? { size: 0 } : replaced.at(data, place);
        if (!size) {
          const byte = data.charCodeAt(place);
          size = found.length || 1 + (byte >= 0xc0) + (byte >= 0xe0) + (byte >= 0xf0);
          instead = data.slice(place, place + size);
        }
        yield decoder.decode(bytesOf(instead));
        place += size;
      }
    };
    const normalized = (text, first) => {
      const some = whole.length || charsmap ? [...pieces(text)] : [...text];
      const begin = collapse ? some.findIndex((piece) => piece !== " ") : 0;
      if (begin < 0 || !some.length) return "";
      const dummy = prefix === "always" || (prefix === "first" && first);
      let made = dummy && !suffix ? " " : "", afterSpace = collapse;
      for (let piece of some.slice(begin)) {
        if (afterSpace) piece = piece.replace(/^ +/, "");
        made += piece;
        if (piece) afterSpace = collapse && piece.endsWith(" ");
      }
      if (escape) made = made.replaceAll(" ", SPACE);
      while (collapse && made.endsWith(space)) made = made.slice(0, -1);
      return dummy && suffix ? made + space : made;
    };
    return (words, first) => words.map((word) => normalized(word, first));
  }

  encodeWord(word) {
    let found = this.cache.get(word);
    if (!found) {
      const { kind } = this.model;
      found = kind === "merges" ? this.byMerges(word) : kind === "scores" ? this.byScores(word) : this.byUnigram(word);
      if (this.cache.size < 65536 && word.length < 64) this.cache.set(word, found);
    }
    return found;
  }

  // Byte-pair encoding by a list of merges, the best first.
  readMerges() {
    const left = int32(this.model.left), right = int32(this.model.right), size = this.pieces.length;
    this.ranks = new Map(left.map((id, rank) => [id * size + right[rank], rank]));
    this.ids = new Map(this.pieces.map((piece, id) => [piece, id]));
    this.ids.delete(null);
    this.single = Array.from({ length: 256 }, (_, byte) =>
      this.ids.get(`<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`),
    );
  }

  byMerges(word) {
    const { ignore_merges: ignore, unknown, byte_fallback: fallback, fuse_unknown: fuse } = this.model;
    if (ignore && this.ids.has(word)) return [this.ids.get(word)];
    const symbols = [];
    let waiting = false; // if fused, consecutive unknown characters are one id
    for (const character of word) {
      const id = this.ids.get(character);
      if (id !== undefined) {
        if (waiting) symbols.push(unknown);
        symbols.push(id);
        waiting = false;
        continue;
      }
      const spelt = fallback ? Array.from(utf8(character), (byte) => this.single[byte.charCodeAt(0)]) : [undefined];
      if (!spelt.includes(undefined)) {
        symbols.push(...spelt);
      } else if (unknown !== null) {
        if (waiting && !fuse) symbols.push(unknown);
        waiting = true;
      }
    }
    if (waiting) symbols.push(unknown);
    const size = this.pieces.length;
    return merged(symbols, (left, right) => {
      const rank = this.ranks.get(left * size + right);
      return rank === undefined ? null : { order: rank, joined: this.ids.get(this.pieces[left] + this.pieces[right]) };
    });
  }

  // Sentencepiece's byte-pair encoding, by scores of pieces.
  readScores() {
    const { kinds, scores } = this.model;
    this.scored = new Map();
    this.reserved = new Map();
    this.single = new Map();
    this.unused = new Set();
    const whole = new Map();
    this.pieces.slice(0, kinds.length).forEach((piece, id) => {
      const kind = kinds[id];
      if ("nux".includes(kind)) this.scored.set(piece, { order: -scores[id], id });
      else this.reserved.set(piece, id);
      if (kind === "b") this.single.set(parseInt(piece.slice(3, 5), 16), id);
      if (kind === "x") this.unused.add(piece);
      if (kind === "u") whole.set(piece, id);
    });
    this.whole = new Longest(whole);
  }

  byScores(word) {
    const cut = [...this.whole.cut(word)], apart = new Map();
    const frozen = new Set(cut.flatMap(({ found }, index) => (found ? [index] : [])));
    const pair = (left, right) => {
      const joined = left + right, scored = this.scored.get(joined);
      if (!scored) return null;
      if (this.unused.has(joined)) apart.set(joined, [left, right]);
      return { order: scored.order, joined };
    };
    let made = merged(cut.map(({ part }) => part), pair, frozen);
    while (made.some((piece) => apart.has(piece))) made = made.flatMap((piece) => apart.get(piece) ?? [piece]);
    const idOf = (piece) => (this.unused.has(piece) ? undefined : this.scored.get(piece)?.id);
    return this.known(made.map((piece) => [piece, idOf(piece) ?? this.model.unknown]));
  }

  // Ids of pieces; an unknown piece gives the ids of its bytes, or consecutive unknown pieces give one id.
  known(pieces) {
    const ids = [], { unknown } = this.model;
    let before = false;
    for (const [piece, scored] of pieces) {
      const id = this.reserved.get(piece) ?? scored;
      if (id === unknown && this.single.size) {
        for (const byte of utf8(piece)) ids.push(this.single.get(byte.charCodeAt(0)));
      } else if (id === null) throw new Error("a character is not in the vocabulary");
      else if (!(before && id === unknown)) ids.push(id);
      before = id === unknown;
    }
    return ids;
  }

  // Sentencepiece's unigram models: the likeliest sequence of pieces.
  readUnigram() {
    this.readScores();
    const { kinds, scores } = this.model, normal = scores.filter((_, id) => kinds[id] === "n");
    const least = normal.reduce((a, b) => Math.min(a, b), Infinity), tiny = 2 ** -126;
    const most = Math.fround(normal.reduce((a, b) => Math.max(a, b), tiny)); // sentencepiece starts with this
    this.unlikely = Math.fround(Math.fround(least) - 10);
    this.likely = new Map();
    for (const [piece, { id }] of this.scored) {
      if (kinds[id] === "x") continue;
      const bonus = Math.fround(utf8(piece).length * most) - 0.1;
      this.likely.set(piece, { score: kinds[id] === "u" ? bonus : Math.fround(scores[id]), id });
    }
    this.reach = new Longest(this.likely).lengths;
  }

  byUnigram(word) {
    const best = Array(word.length + 1).fill(null); // {score, in float32; begin of the last piece; its id}
    best[0] = { score: 0, begin: 0, id: 0 };
    const offer = (end, score, begin, id) => {
      if (best[end] === null || score > best[end].score) best[end] = { score: Math.fround(score), begin, id };
    };
    for (let begin = 0; begin < word.length; ) {
      const first = characterAt(word, begin), { score } = best[begin];
      let single = false;
      for (const length of [...(this.reach.get(first) ?? [])].reverse()) {
        const likely = begin + length <= word.length && this.likely.get(word.slice(begin, begin + length));
        if (!likely) continue;
        offer(begin + length, score + likely.score, begin, likely.id);
        single ||= length === first.length;
      }
      if (!single) offer(begin + first.length, score + this.unlikely, begin, this.model.unknown);
      begin += first.length;
    }
    const pieces = [];
    for (let end = word.length; end; ) {
      const { begin, id } = best[end];
      pieces.push([word.slice(begin, end), id]);
      end = begin;
    }
    return this.known(pieces.reverse());
  }
}

// Joins neighbours, the best pair first; of equal pairs the first. `pair(left, right)`: {order, joined} or null.
function merged(symbols, pair, frozen = new Set()) {
  const heap = new Heap((a, b) => a.order < b.order || (a.order === b.order && a.left < b.left));
  const parts = [...symbols], leftOf = parts.map((_, i) => i - 1), rightOf = parts.map((_, i) => i + 1);
  const offer = (left, right) => {
    if (left < 0 || right >= parts.length || frozen.has(left) || frozen.has(right)) return;
    const found = pair(parts[left], parts[right]);
    if (found) heap.push({ ...found, left });
  };
  for (let left = 0; left + 1 < parts.length; left++) offer(left, left + 1);
  for (let best; (best = heap.pop()); ) {
    const { left, joined } = best, right = rightOf[left];
    if (parts[left] === null || right >= parts.length) continue;
    if (pair(parts[left], parts[right])?.joined !== joined) continue; // one of the two has been joined since
    parts[left] = joined;
    parts[right] = null;
    rightOf[left] = rightOf[right];
    if (rightOf[left] < parts.length) leftOf[rightOf[left]] = left;
    offer(leftOf[left], left);
    offer(left, rightOf[left]);
  }
  return parts.filter((part) => part !== null);
}

// The number of bytes before an incomplete UTF-8 character at the end.
function wholeCharacters(data) {
  for (let back = 1; back < 4 && back <= data.length; back++) {
    const byte = data[data.length - back];
    const length = byte < 0xf8 ? 2 + (byte >= 0xe0) + (byte >= 0xf0) : 0;
    if (byte >= 0xc0) return back < length ? data.length - back : data.length;
    if (byte < 0x80) break;
  }
  return data.length;
}

// Converts a vocabulary of the first releases (sentencepiece's byte-pair encoding) to version 2.
function ofFirstReleases(old) {
  const data = old.pieces.map((piece) => atob(piece)), decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  const kinds = data.map((_, id) => (old.merges[id] ? "n" : "c")), texts = {};
  const pieces = data.map((piece) => decoder.decode(bytesOf(piece)).replaceAll(" ", SPACE));
  kinds.forEach((kind, id) => kind === "c" && (texts[id] = data[id]));
  for (const id of old.single_bytes) {
    kinds[id] = "b";
    pieces[id] = `<0x${data[id].charCodeAt(0).toString(16).toUpperCase().padStart(2, "0")}>`;
  }
  for (const id of old.never_split ?? []) kinds[id] = "u";
  const [early, late] = [0, 1].map((i) => Object.entries(old.added?.[i] ?? {}).map(([text, id]) => [id, text, 0]));
  const unknown = old.unknown ?? null;
  return {
    version: 2, refusal: old.refusal ?? null, bos: old.bos, eos: old.eos ?? null, stop: old.stop,
    pieces, texts, pieces_are_bytes: false, classes: [], normalize: [], first_space: old.dummy_prefix,
    spelt: [unknown, ...old.single_bytes, ...[...early, ...late].map(([id]) => id)],
    added: { early, late, blank: "", word: null, special_hides: false },
    split: [{
      do: "sentencepiece", prefix: !old.dummy_prefix ? "never" : old.prefix_parts ? "always" : "first",
      collapse: old.collapse_spaces ?? false, escape: true, suffix: false, charsmap: "",
      whole: pieces.filter((_, id) => kinds[id] === "u"),
    }],
    model: { kind: "scores", kinds: kinds.join(""), scores: old.scores, unknown },
  };
}

// A binary heap: `pop` returns the first element by `before`, or undefined.
class Heap {
  constructor(before) {
    this.before = before;
    this.items = [];
  }

  push(item) {
    const { items, before } = this;
    let at = items.push(item) - 1;
    for (let parent; at > 0 && before(item, items[(parent = (at - 1) >> 1)]); at = parent) items[at] = items[parent];
    items[at] = item;
  }

  pop() {
    const { items, before } = this, top = items[0], last = items.pop();
    if (items.length) {
      let at = 0;
      for (let child; (child = 2 * at + 1) < items.length; at = child) {
        if (child + 1 < items.length && before(items[child + 1], items[child])) child++;
        if (!before(items[child], last)) break;
        items[at] = items[child];
      }
      items[at] = last;
    }
    return top;
  }
}

// Which tokens may be drawn: of the k likeliest, and those as likely as the k-th, the fewest that together have the
// probability p; of equally likely tokens the lower ids come first. Logits are divided by the temperature already.
export function kept(logits, topK, topP) {
  const order = Array.from(logits, (_, id) => id).sort((a, b) => logits[b] - logits[a] || a - b);
  const least = logits[order[Math.min(topK || order.length, order.length) - 1]], highest = logits[order[0]];
  const some = order.filter((id) => logits[id] >= least);
  const chances = some.map((id) => Math.exp(logits[id] - highest)), total = chances.reduce((a, b) => a + b, 0);
  let before = 0;
  return new Set(some.filter((_, rank) => {
    const keeps = topP >= 1 || before < topP * total;
    before += chances[rank];
    return keeps;
  }));
}

// Returns a function that chooses a token: greedily at temperature 0, else at random.
export function chooser(temperature, topK = 0, topP = 1, random = Math.random) {
  return (logits) => {
    const divisor = Math.fround(temperature), filters = temperature && (topK || topP < 1);
    const may = filters ? kept(logits.map((logit) => Math.fround(logit / divisor)), topK, topP) : null;
    let best = 0, highest = -Infinity;
    logits.forEach((logit, id) => {
      const noisy = temperature ? logit - temperature * Math.log(-Math.log(random())) : logit;
      if (noisy > highest && (!may || may.has(id))) [best, highest] = [id, noisy];
    });
    return best;
  };
}

// Passes on a growing text up to the first stop text; a possible beginning of a stop text is held back.
export class Until {
  constructor(stops) {
    Object.assign(this, { stops, text: "", shown: 0, ended: false });
  }

  // Adds text, and returns what may be shown now. `last`: no more text follows.
  add(piece, last = false) {
    this.text += piece;
    const hits = this.stops.map((stop) => this.text.indexOf(stop, this.shown)).filter((place) => place >= 0);
    this.ended = hits.length > 0;
    if (this.ended) this.text = this.text.slice(0, Math.min(...hits));
    let held = 0;
    for (const stop of last || this.ended ? [] : this.stops) {
      for (let size = held + 1; size < stop.length; size++) if (this.text.endsWith(stop.slice(0, size))) held = size;
    }
    const end = this.text.length - held, shown = this.text.slice(this.shown, end);
    this.shown = end;
    return shown;
  }
}

// White space at both ends, as Python's `strip` removes it.
const strip = (text) => {
  const blank = "[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+";
  return text.replace(new RegExp(`^${blank}|${blank}$`, "g"), "");
};

// Ids of a conversation. Messages are [role, text], the last is a user's; their text gives no control tokens.
export function conversation(text, form, messages) {
  const made = [];
  let before = messages[0][0] === "system" ? form.system : form.begin;
  for (let [role, said] of messages) {
    const { thinking_end: end, thinking_blank: blank } = form;
    if (role === "assistant" && end && said.includes(end)) {
      said = said.slice(said.lastIndexOf(end) + end.length);
      while (said && blank.includes(said[0])) said = said.slice(1);
    }
    made.push(...before, role !== "assistant" || form.trims_answers ? strip(said) : said);
    before = { system: form.behind_system, user: form.answer, assistant: form.next }[role];
  }
  return [...form.bos, ...text.encodePieces([...made, ...form.reply], form.control)];
}

// A conversation with a model. The cache keeps the longest prefix that the next turn shares.
export class Chat {
  constructor(model, system = "") {
    Object.assign(this, { model, first: strip(system) ? [["system", system]] : [], said: [], held: [], fewest: 0 });
    if (this.first.length && !this.form.system) throw new Error("the chat template has no place for a system message");
  }

  get form() {
    return this.model.manifest.chat;
  }

  // Answers a message: yields pieces of text. `note` is called with lines for the user.
  async *answer(message, limit, choose, stops = [], note = () => {}) {
    const { model, form, said } = this, { slots, spare = Infinity } = model.manifest.cache;
    const whole = said.push(["user", message]);
    const encoded = () => conversation(model.text, form, [...this.first, ...said]);
    let ids = encoded();
    while (ids.length + limit > slots && said.length > 2) {
      said.splice(0, 2);
      ids = encoded();
    }
    if (ids.length + limit > slots) {
      said.pop();
      throw new Error(`${ids.length} tokens and ${limit} to make: expected at most the cache's ${slots} slots in all`);
    }
    if (said.length < whole) note(`the window is full: the oldest ${whole - said.length} messages are forgotten`);
    let keep = 0;
    while (keep < ids.length - 1 && ids[keep] === this.held[keep]) keep++;
    if (keep < this.fewest) keep = 0; // newer tokens may have replaced what a shorter text needs
    const made = [], until = new Until(stops), bytesOf = model.text.decoder([]), decoder = new TextDecoder();
    let ended = false;
    try {
      for await (const token of model.steps(ids, limit, choose, keep)) {
        made.push(token);
        ended = form.stop.includes(token);
        if (!ended) yield until.add(decoder.decode(bytesOf(token), { stream: true }));
        ended ||= until.ended;
        if (ended) break;
      }
      if (!until.ended) yield until.add(decoder.decode(bytesOf(null)), true);
    } finally {
      this.held = made.length ? [...ids, ...made.slice(0, -1)] : []; // unknown if no token was made
      this.fewest = Math.max(Math.min(this.fewest, keep), ids.length + made.length - 1 - spare);
      said.push(["assistant", until.text]);
    }
    note(`${ids.length - keep} tokens read, ${made.length} made; ${this.held.length + 1} of ${slots} slots` +
      (ended ? "" : "; cut: a greater length allows more"));
  }
}

// Arrays for each dtype that the state may have here; onnxruntime takes float16 as bits.
const ZEROS = { float32: Float32Array, float16: Uint16Array, int32: Int32Array, uint8: Uint8Array, uint32: Uint32Array };

export class Model {
  // `bundle` and `ort` are the URLs of the bundle and of onnxruntime-web's files; both end in a slash.
  static async open(bundle, ort) {
    const model = new Model();
    model.bundle = bundle;
    model.manifest = JSON.parse(new TextDecoder().decode(await model.file("manifest.json")));
    const { format, version, targets, cache } = model.manifest;
    if (format !== "llamajax-bundle" || version !== 1) throw new Error(`${bundle}: not a bundle of version 1`);
    if (!targets.onnx) throw new Error(`${bundle}: no ONNX programs: export it with the target onnx`);
    if (cache.batch !== 1) throw new Error(`${bundle}: batch ${cache.batch}: expected 1`);
    for (const { name, dtype } of model.declared) {
      if (!ZEROS[dtype]) throw new Error(`${bundle}: ${name} in ${dtype}: expected ${Object.keys(ZEROS).join(", ")}`);
    }
    model.text = new Text(JSON.parse(new TextDecoder().decode(await model.file("vocabulary.json"))));
    for (const { text, ids, special = false } of model.text.refusal ? [] : model.manifest.golden.texts ?? []) {
      const found = model.text.encode(text, special);
      if (`${found}` !== `${ids}`) throw new Error(`${JSON.stringify(text)} gives ids ${found}: expected ${ids}`);
    }
    for (const { messages, ids } of model.manifest.golden.conversations ?? []) {
      const found = conversation(model.text, model.manifest.chat, messages);
      if (`${found}` !== `${ids}`) throw new Error(`${JSON.stringify(messages)} gives ids ${found}: expected ${ids}`);
    }
    model.ort = await import(ort + "ort.wasm.min.mjs");
    model.ort.env.wasm.wasmPaths = ort;
    model.sessions = {};
    model.weights = await model.file(model.onnx("weights.bin"));
    return model;
  }

  // The arrays of the state, which each program returns for the next. Manifests of the first releases lack them.
  get declared() {
    const { cache, programs } = this.manifest;
    return cache.state ?? programs.decode.inputs.filter(({ name }) => name === "key" || name === "value");
  }

  onnx(name) {
    return this.manifest.targets.onnx.files.find((file) => file.endsWith("/" + name));
  }

  // Reads a file and checks its SHA-256 from the manifest, which browsers compute only for secure origins.
  async file(name) {
    const entry = this.manifest?.files[name];
    if (this.manifest && !entry) throw new Error(`${name}: the manifest has no such file`);
    const response = await fetch(this.bundle + name);
    if (!response.ok) throw new Error(`${this.bundle}${name}: ${response.status} ${response.statusText}`);
    const bytes = new Uint8Array(await response.arrayBuffer());
    if (this.manifest && crypto.subtle) {
      const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
      const found = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
      if (found !== entry.sha256) throw new Error(`${name}: damaged, or changed`);
    }
    return bytes;
  }

  // Runs a program on the state and keeps the new state. The program's session is made at its first run.
  async run(name, inputs) {
    this.sessions[name] ??= await this.ort.InferenceSession.create(await this.file(this.onnx(`${name}.onnx`)), {
      executionProviders: ["wasm"],
      externalData: [{ path: "weights.bin", data: this.weights }],
      // Constant folding would unpack the weights that the program itself dequantizes.
      extra: { optimization: { disable_specified_optimizers: "ConstantFolding" } },
    });
    const feeds = { ...this.state };
    for (const [key, { values, shape }] of Object.entries(inputs)) {
      feeds[key] = new this.ort.Tensor("int32", Int32Array.from(values), shape);
    }
    const results = await this.sessions[name].run(feeds);
    this.state = Object.fromEntries(this.declared.map(({ name }) => [name, results[`${name}_out`]]));
    return results.logits.data;
  }

  // Prefills `ids`, of which the cache holds the first `keep` already, then yields at most `limit` tokens.
  async *steps(ids, limit, choose, keep = 0) {
    const { cache, buckets } = this.manifest;
    if (!(ids.length > 0 && ids.length < cache.slots)) {
      throw new Error(`${ids.length} tokens: expected 1 to ${cache.slots - 1}, because the cache has ${cache.slots} slots`);
    }
    const vocabulary = this.manifest.config.vocab_size;
    for (const id of ids) {
      if (!(id >= 0 && id < vocabulary)) throw new Error(`id ${id}: expected 0 to ${vocabulary - 1}`);
    }
    const row = (value) => ({ values: [value], shape: [1] });
    if (!keep) this.state = {};
    for (const { name, dtype, shape } of keep ? [] : this.declared) {
      const size = shape.reduce((a, b) => a * b, 1);
      this.state[name] = new this.ort.Tensor(dtype, new ZEROS[dtype](size), shape);
    }
    let length = keep, logits;
    while (length < ids.length) {
      // The padding of a bucket must fit the cache too; if no bucket fits, the ids are decoded token by token.
      const fitting = buckets.filter((bucket) => length + bucket <= cache.slots);
      const bucket = fitting.find((bucket) => bucket >= ids.length - length) ?? fitting.at(-1) ?? 1;
      const part = ids.slice(length, length + bucket);
      if (fitting.length) {
        const tokens = { values: [...part, ...Array(bucket - part.length).fill(0)], shape: [1, bucket] };
        logits = await this.run(`prefill_${bucket}`, { tokens, count: row(part.length), length: row(length) });
      } else {
        logits = await this.run("decode", { token: row(part[0]), length: row(length) });
      }
      length += part.length;
    }
    for (let made = 1; made <= limit; made++) {
      if (!logits.every(Number.isFinite)) throw new Error("logits that are not finite: weights or browser are at fault");
      const token = choose(logits);
      yield token;
      if (made === limit) break;
      if (length === cache.slots) throw new Error(`the cache's ${cache.slots} slots are full: ${made} of ${limit} tokens`);
      logits = await this.run("decode", { token: row(token), length: row(length++) });
    }
  }
}
