// What `demask generate --mode ar --json` answered (on stdin), decoded again by llama.cpp from the same GGUF file:
//   demask generate --model M.gguf --mode ar --prompt TEXT --json | node llama_cpp_check.mjs M.gguf TEXT
// The prompt's token ids must be equal, and the answer's as far as --agree says (1: all). llama.cpp rounds activations
// to 8 bits before products with blocks, so that a file of such may part where two tokens are nearly as likely.

import { readFileSync } from "node:fs";

const [file, prompt, agree = "1"] = process.argv.slice(2);
if (!prompt) {
  console.error("usage: demask generate … --json | node llama_cpp_check.mjs M.gguf TEXT [AGREE]");
  process.exit(2);
}
const library = process.env.NODE_LLAMA_CPP ?? "node-llama-cpp";
const { getLlama } = await import(library).catch((e) => {
  console.error(`error: no ${library} (${e.code}); npm install node-llama-cpp, and NODE_LLAMA_CPP=…/dist/index.js`);
  process.exit(2);
});
const demask = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, logLevel: "error" });
const model = await llama.loadModel({ modelPath: file });
const context = await model.createContext({ contextSize: 512 });
const same = (a, b) => a.findIndex((token, i) => token !== b[i]);

const ids = model.tokenize(prompt, true).map(Number);
if (ids.length !== demask.prompt_token_ids.length || same(ids, demask.prompt_token_ids) >= 0) {
  console.error(`${file}: llama.cpp reads the prompt as ${ids}, demask as ${demask.prompt_token_ids}`);
  process.exit(1);
}
const answer = [];
for await (const token of context.getSequence().evaluate(demask.prompt_token_ids, { temperature: 0, yieldEogToken: true })) {
  answer.push(Number(token));
  if (answer.length === demask.token_ids.length) break;
}
const parted = same(demask.token_ids, answer);
const equal = parted < 0 ? answer.length : parted;
console.log(`${file}: ${ids.length} prompt tokens equal, ${equal} of ${answer.length} answered tokens equal`);
process.exit(equal < Number(agree) * answer.length ? 1 : 0);
