// What runners/runner.py and run_onnx.py do, for the browser: checks a bundle, turns text into ids and back, prefills,
// decodes. Bytes are kept as strings of characters 0 to 255 where they are keys.

const latin1 = (bytes) => Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");

// A pattern for the longest of the texts that begins at a place, in a group.
function oneOf(texts, otherwise) {
  const longestFirst = [...texts].sort((a, b) => b.length - a.length);
  const escaped = longestFirst.map((text) => text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"));
  return new RegExp((escaped.length ? `(${escaped.join("|")})` : "(?!)") + otherwise, "gu");
}

// Byte-pair encoding by the scores in vocabulary.json, as sentencepiece does it, and the bytes of each id.
export class Text {
  constructor(vocabulary) {
    const pieces = vocabulary.pieces.map((piece) => atob(piece));
    this.bos = vocabulary.bos;
    this.stop = vocabulary.stop;
    this.prefix = vocabulary.dummy_prefix ? " " : "";
    // Bundles of the first releases do not say these.
    this.collapse = vocabulary.collapse_spaces ?? false;
    this.unknown = vocabulary.unknown ?? null;
    this.refusal = vocabulary.refusal ?? null;
    this.bytes = pieces.map((piece) => Uint8Array.from(piece, (character) => character.charCodeAt(0)));
    this.merges = new Map();
    pieces.forEach((piece, id) => {
      if (vocabulary.merges[id]) this.merges.set(piece, { score: vocabulary.scores[id], id });
    });
    this.single = new Map(vocabulary.single_bytes.map((id) => [pieces[id], id]));
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    this.whole = new Set((vocabulary.never_split ?? []).map((id) => decoder.decode(this.bytes[id])).filter(Boolean));
    this.symbols = oneOf(this.whole, "|[^]");
    this.eos = vocabulary.eos ?? null;
    this.prefixParts = vocabulary.prefix_parts ?? false;
    this.added = (vocabulary.added ?? []).map((ids) => new Map(Object.entries(ids)));
  }

  encode(text) {
    if (this.refusal) throw new Error(`${this.refusal}, which this page does not know`);
    let parts = [text];
    for (const added of this.added) {
      const pattern = oneOf(added.keys(), "");
      parts = parts.flatMap((part) => (typeof part === "number" ? [part] : part.split(pattern)));
      parts = parts.map((part) => added.get(part) ?? part);
    }
    const ids = this.bos === null ? [] : [this.bos];
    parts.filter((part) => part !== "").forEach((part, index) => {
      const before = index === 0 || this.prefixParts ? this.prefix : "";
      ids.push(...(typeof part === "number" ? [part] : this.encodePart(part, before)));
    });
    return this.eos === null ? ids : [...ids, this.eos];
  }

  encodePart(text, before) {
    if (this.collapse) text = text.replace(/^ +/, "").replace(/ +/g, " ");
    text = (text && before) + text.replaceAll("\u2581", " "); // sentencepiece's own sign for a space
    if (this.collapse) text = text.replace(/ +$/, "");
    const ids = [];
    let known = true;
    for (const part of this.merged(text.match(this.symbols) ?? [])) {
      const merge = this.merges.get(part);
      const spelt = merge ? [merge.id] : Array.from(part, (byte) => this.single.get(byte));
      const found = !spelt.includes(undefined);
      if (found) ids.push(...spelt);
      else if (this.unknown === null) throw new Error("a character is not in the vocabulary");
      else if (known) ids.push(this.unknown); // one for all unknown characters in a row
      known = found;
    }
    return ids;
  }

  // Joins the two neighbours of the highest score, the first of equal ones, while there are any in the vocabulary.
  merged(symbols) {
    const encoder = new TextEncoder();
    const heap = new Heap((a, b) => a.score > b.score || (a.score === b.score && a.left < b.left));
    const parts = symbols.map((symbol) => latin1(encoder.encode(symbol)));
    const leftOf = parts.map((_, i) => i - 1), rightOf = parts.map((_, i) => i + 1);
    const offer = (left, right) => {
      if (left < 0 || right >= parts.length || this.whole.has(symbols[left]) || this.whole.has(symbols[right])) return;
      const joined = parts[left] + parts[right], merge = this.merges.get(joined);
      if (merge) heap.push({ score: merge.score, left, right, joined });
    };
    for (let left = 0; left + 1 < parts.length; left++) offer(left, left + 1);
    for (let best; (best = heap.pop()); ) {
      const { left, right, joined } = best;
      if (!parts[left] || !parts[right] || parts[left] + parts[right] !== joined) continue; // one was joined meanwhile
      parts[left] = joined;
      parts[right] = "";
      rightOf[left] = rightOf[right];
      if (rightOf[left] < parts.length) leftOf[rightOf[left]] = left;
      offer(leftOf[left], left);
      offer(left, rightOf[left]);
    }
    return parts.filter(Boolean);
  }

  // A function that gives the bytes of one id after another behind `ids`; an id without text is U+FFFD.
  // The first piece of a text lacks the space that encoding puts there.
  decoder(ids) {
    const bytesOf = (id) => this.bytes[id] ?? new TextEncoder().encode("\ufffd");
    const spelt = new Set([this.unknown, ...this.single.values(), ...this.added.flatMap((added) => [...added.values()])]);
    let started = ids.some((id) => bytesOf(id).length);
    return (id) => {
      const bytes = bytesOf(id), first = !started;
      started ||= bytes.length > 0;
      return first && this.prefix && !spelt.has(id) && bytes[0] === 32 ? bytes.slice(1) : bytes;
    };
  }
}

// A binary heap: `pop` gives the first by `before`, or undefined.
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

// Greedy for temperature 0, else a draw.
export function chooser(temperature) {
  return (logits) => {
    let best = 0, highest = -Infinity;
    logits.forEach((logit, id) => {
      const noisy = temperature ? logit - temperature * Math.log(-Math.log(Math.random())) : logit;
      if (noisy > highest) [best, highest] = [id, noisy];
    });
    return best;
  };
}

// Arrays of each dtype that a state may have here; of float16 onnxruntime takes the bits.
const ZEROS = { float32: Float32Array, float16: Uint16Array, int32: Int32Array, uint8: Uint8Array, uint32: Uint32Array };

export class Model {
  // `bundle` and `ort` are addresses that end in a slash: of the bundle, and of onnxruntime-web's files.
  static async open(bundle, ort) {
    const model = new Model();
    model.bundle = bundle;
    model.manifest = JSON.parse(new TextDecoder().decode(await model.file("manifest.json")));
    const { format, version, targets, cache } = model.manifest;
    if (format !== "llamajax-bundle" || version !== 1) throw new Error(`${bundle}: not a bundle of version 1`);
    if (!targets.onnx) throw new Error(`${bundle}: no ONNX programs: export it with the target onnx`);
    if (cache.batch !== 1) throw new Error(`${bundle}: batch ${cache.batch}: this page wants 1`);
    for (const { name, dtype } of model.declared) {
      if (!ZEROS[dtype]) throw new Error(`${bundle}: ${name} in ${dtype}: expected ${Object.keys(ZEROS).join(", ")}`);
    }
    model.text = new Text(JSON.parse(new TextDecoder().decode(await model.file("vocabulary.json"))));
    for (const { text, ids } of model.text.refusal ? [] : model.manifest.golden.texts ?? []) {
      const found = model.text.encode(text);
      if (`${found}` !== `${ids}`) throw new Error(`${JSON.stringify(text)} gives ids ${found}: expected ${ids}`);
    }
    model.ort = await import(ort + "ort.wasm.min.mjs");
    model.ort.env.wasm.wasmPaths = ort;
    model.sessions = {};
    model.weights = await model.file(model.onnx("weights.bin"));
    return model;
  }

  // The arrays that each program hands to the next. Bundles of the first releases do not say what they are.
  get declared() {
    const { cache, programs } = this.manifest;
    return cache.state ?? programs.decode.inputs.filter(({ name }) => name === "key" || name === "value");
  }

  onnx(name) {
    return this.manifest.targets.onnx.files.find((file) => file.endsWith("/" + name));
  }

  // A file's bytes. The manifest holds its SHA-256; browsers compute it for secure origins alone.
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

  // Runs a program: the state goes in and comes back. Its session is made when it is first wanted.
  async run(name, inputs) {
    this.sessions[name] ??= await this.ort.InferenceSession.create(await this.file(this.onnx(`${name}.onnx`)), {
      executionProviders: ["wasm"],
      externalData: [{ path: "weights.bin", data: this.weights }],
      // Folding would unpack those weights that the program dequantizes itself.
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

  // Prefills `ids`, then yields tokens, at most `limit`.
  async *steps(ids, limit, choose) {
    const { cache, buckets } = this.manifest;
    if (!(ids.length > 0 && ids.length < cache.slots)) {
      throw new Error(`${ids.length} tokens: expected 1 to ${cache.slots - 1}, for the cache has ${cache.slots} slots`);
    }
    const vocabulary = this.manifest.config.vocab_size;
    for (const id of ids) {
      if (!(id >= 0 && id < vocabulary)) throw new Error(`id ${id}: expected 0 to ${vocabulary - 1}`);
    }
    const row = (value) => ({ values: [value], shape: [1] });
    this.state = {};
    for (const { name, dtype, shape } of this.declared) {
      const size = shape.reduce((a, b) => a * b, 1);
      this.state[name] = new this.ort.Tensor(dtype, new ZEROS[dtype](size), shape);
    }
    let length = 0, logits;
    while (length < ids.length) {
      // The padding of a bucket must fit the cache too; what fits none is decoded token by token.
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
