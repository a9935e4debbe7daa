// What runners/runner.py and run_onnx.py do, for the browser: checks a bundle, turns text into ids and back, prefills,
// decodes. Bytes are kept as strings of characters 0 to 255 where they are keys.

const latin1 = (bytes) => Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");

// Byte-pair encoding by the scores in vocabulary.json, as sentencepiece does it, and the bytes of each id.
export class Text {
  constructor(vocabulary) {
    const pieces = vocabulary.pieces.map(atob);
    this.bos = vocabulary.bos;
    this.stop = vocabulary.stop;
    this.prefix = vocabulary.dummy_prefix ? " " : "";
    this.bytes = pieces.map((piece) => Uint8Array.from(piece, (character) => character.charCodeAt(0)));
    this.merges = new Map();
    pieces.forEach((piece, id) => vocabulary.merges[id] && this.merges.set(piece, { score: vocabulary.scores[id], id }));
    this.single = new Map(vocabulary.single_bytes.map((id) => [pieces[id], id]));
  }

  encode(text) {
    const encoder = new TextEncoder();
    const parts = Array.from(text ? this.prefix + text : "", (character) => latin1(encoder.encode(character)));
    for (;;) {
      let best = -1, highest = -Infinity;
      for (let i = 0; i + 1 < parts.length; i++) {
        const merge = this.merges.get(parts[i] + parts[i + 1]);
        if (merge && merge.score > highest) [best, highest] = [i, merge.score];
      }
      if (best < 0) break;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
    }
    const ids = parts.flatMap((part) =>
      this.merges.has(part) ? [this.merges.get(part).id] : Array.from(part, (byte) => this.single.get(byte)));
    return this.bos === null ? ids : [this.bos, ...ids];
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
    if (cache.dtype !== "float32") throw new Error(`${bundle}: cache of ${cache.dtype}: this page wants float32`);
    model.text = new Text(JSON.parse(new TextDecoder().decode(await model.file("vocabulary.json"))));
    model.ort = await import(ort + "ort.wasm.min.mjs");
    model.ort.env.wasm.wasmPaths = ort;
    model.sessions = {};
    model.weights = await model.file(model.onnx("weights.bin"));
    return model;
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
    this.state = { key: results.key_out, value: results.value_out };
    return results.logits.data;
  }

  // Prefills `ids`, then yields tokens, at most `limit`.
  async *steps(ids, limit, choose) {
    const { cache, buckets, programs } = this.manifest;
    if (!(ids.length > 0 && ids.length < cache.slots)) {
      throw new Error(`${ids.length} tokens: expected 1 to ${cache.slots - 1}, for the cache has ${cache.slots} slots`);
    }
    const vocabulary = this.manifest.config.vocab_size;
    for (const id of ids) {
      if (!(id >= 0 && id < vocabulary)) throw new Error(`id ${id}: expected 0 to ${vocabulary - 1}`);
    }
    const row = (value) => ({ values: [value], shape: [1] });
    this.state = {};
    for (const { name, shape } of programs.decode.inputs.filter(({ name }) => name === "key" || name === "value")) {
      const size = shape.reduce((a, b) => a * b);
      this.state[name] = new this.ort.Tensor("float32", new Float32Array(size), shape);
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
