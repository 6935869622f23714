// Tokens of texts by llama.cpp, of files that hold a vocabulary alone: splitting.mjs FILE.gguf… < TEXTS.json > IDS.json
// Needs npm's node-llama-cpp; NODE_LLAMA_CPP says where its dist/index.js is, if node does not find it.

import { readFileSync } from "node:fs";

const texts = JSON.parse(readFileSync(0, "utf8"));
const { getLlama } = await import(process.env.NODE_LLAMA_CPP ?? "node-llama-cpp");
const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, logLevel: "disabled" });
const ids = [];
for (const modelPath of process.argv.slice(2)) {
  const model = await llama.loadModel({ modelPath, vocabOnly: true });
  ids.push(texts.map((text) => model.tokenize(text, false).map(Number)));
  await model.dispose();
}
console.log(JSON.stringify(ids));
