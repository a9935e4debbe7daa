// Runs the page of export/runners/web in a headless Chromium and checks that it writes a bundle's golden texts.
//
//     node benchmarks/export_web.mjs BUNDLE [chromium]
//
// The bundle has the target onnx. Installs onnxruntime-web and puppeteer-core into a folder of its own, which goes again.

import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";

const [bundle, chromium = "/usr/bin/chromium"] = process.argv.slice(2);
if (!bundle) throw new Error("usage: node export_web.mjs BUNDLE [chromium]");
const page = fileURLToPath(new URL("../export/runners/web", import.meta.url));
const types = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm" };

// As text, for Node would look for a package.json that says what kind of script it is.
const script = readFileSync(join(page, "llama.js"));
const { Text } = await import(`data:text/javascript;base64,${script.toString("base64")}`);

// The golden prompts and tokens as text, by the pieces of vocabulary.json.
function goldenTexts() {
  const vocabulary = JSON.parse(readFileSync(join(bundle, "vocabulary.json")));
  const text = new Text(vocabulary);
  const bytes = (ids) => ids.filter((id) => id !== vocabulary.bos).map((id) => text.bytesOf(id));
  const decoded = (ids) => Buffer.concat(bytes(ids)).toString();
  const file = readFileSync(join(bundle, "golden.safetensors"));
  const start = 8 + Number(file.readBigUInt64LE());
  const header = JSON.parse(file.subarray(8, start));
  const ids = (name) => {
    const [first, last] = header[name].data_offsets;
    return Array.from({ length: (last - first) / 4 }, (_, i) => file.readInt32LE(start + first + 4 * i));
  };
  const { prompts } = JSON.parse(readFileSync(join(bundle, "manifest.json"))).golden;
  return Array.from({ length: prompts }, (_, index) => {
    const tokens = ids(`tokens_${index}`), prompt = decoded(ids(`prompt_${index}`));
    const end = tokens.findIndex((id) => vocabulary.stop.includes(id)); // where the page stops
    const story = decoded(end < 0 ? tokens : tokens.slice(0, end));
    return { prompt: text.first_space ? prompt.slice(1) : prompt, tokens: tokens.length, text: story };
  });
}

const folder = mkdtempSync(join(tmpdir(), "export_web_"));
const roots = { page, bundle, ort: join(folder, "node_modules", "onnxruntime-web", "dist") };
const server = createServer((request, response) => {
  const [, root, ...rest] = normalize(new URL(request.url, "http://localhost").pathname).split("/");
  try {
    const body = readFileSync(join(roots[root], ...rest));
    response.writeHead(200, { "content-type": types[extname(request.url.split("?")[0])] ?? "application/octet-stream" });
    response.end(body);
  } catch {
    response.writeHead(404).end();
  }
});
let browser;
try {
  execFileSync("npm", ["install", "--no-audit", "--no-fund", "onnxruntime-web", "puppeteer-core"], { cwd: folder });
  const { default: puppeteer } = await import(createRequire(join(folder, "x.js")).resolve("puppeteer-core"));
  await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
  browser = await puppeteer.launch({ executablePath: chromium, args: ["--no-sandbox"] });
  const tab = await browser.newPage();
  tab.on("pageerror", (error) => console.error(error.message));
  await tab.goto(`http://localhost:${server.address().port}/page/index.html?bundle=/bundle/&ort=/ort/`);
  await tab.waitForFunction(() => document.getElementById("status").textContent !== "Loading …");
  for (const { prompt, tokens, text } of goldenTexts()) {
    await tab.$eval("#prompt", (element, value) => (element.value = value), prompt);
    await tab.$eval("#length", (element, value) => (element.value = value), tokens);
    await tab.click("#start");
    await tab.waitForFunction(() => !document.getElementById("start").disabled, { timeout: 120000 });
    const written = await tab.$eval("#text", (element) => element.textContent);
    const status = await tab.$eval("#status", (element) => element.textContent);
    console.log(JSON.stringify({ prompt, exact: written === prompt + text, status }));
    if (written !== prompt + text) {
      console.error(`expected ${JSON.stringify(prompt + text)}, the page has ${JSON.stringify(written)}`);
      process.exitCode = 1;
    }
  }
} finally {
  await browser?.close();
  server.close();
  rmSync(folder, { recursive: true, force: true });
}
