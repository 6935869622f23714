// llama.cpp as a peer: node llama_cpp.mjs vulkan|cpu|reference. One JSON object a line in, one out; see src/peer.rs.
// The reference runs on the processor with weights and cache in f32, and says what else was likely at each position.

import { existsSync } from "node:fs";
import { availableParallelism } from "node:os";
import { createInterface } from "node:readline";

const device = process.argv[2];
// Under a runner that is a loader, Node takes the loader for itself.
if (process.env.DEMASK_PEERS_RUNNER) {
  process.execPath = new URL("node_under_runner.sh", import.meta.url).pathname;
}
const isReference = device === "reference";
const LIKELY = 8; // tokens named for each position
let llama, sequence, work, answer, likely;

async function setup(setup) {
  let library;
  try {
    library = await import(new URL(".cache/node_modules/node-llama-cpp/dist/index.js", import.meta.url));
  } catch (e) {
    return { skip: `node-llama-cpp is not installed (${e.code}); run benches/peers/prepare.sh` };
  }
  try {
    llama = await library.getLlama({
      gpu: device === "vulkan" ? "vulkan" : false,
      build: "never",
      skipDownload: true,
      progressLogs: false,
      logLevel: "error",
      maxThreads: availableParallelism(),
    });
  } catch (e) {
    return { skip: `no llama.cpp for ${device} here: ${e.message.split("\n")[0]}` };
  }
  const names = device === "vulkan" ? await llama.getGpuDeviceNames() : [`CPU, ${availableParallelism()} threads`];
  if (names.length === 0) return { skip: "llama.cpp sees no Vulkan adapter" };
  work = setup;
  const file = isReference ? work.f32_file : work.file;
  if (!existsSync(file)) return { skip: `no ${file}; run benches/peers/prepare.sh` };
  const model = await llama.loadModel({
    modelPath: file,
    gpuLayers: device === "vulkan" ? "max" : 0,
  });
  const context = await model.createContext({
    contextSize: work.prompt.length + work.tokens + 8,
    // More threads than processors spin against each other and never come to an end.
    threads: availableParallelism(),
    ...(isReference && { experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32" }),
  });
  sequence = context.getSequence();
  await run(1);
  return { device: names[0] };
}

// Seconds from the first token of the answer to its last, so the prompt's pass is left out.
async function run(times) {
  let seconds = 0;
  for (let i = 0; i < times; i++) {
    await sequence.clearHistory();
    answer = [];
    likely = [];
    let first = 0;
    const options = { temperature: 0, yieldEogToken: true };
    for await (const step of sequence.evaluateWithMetadata(work.prompt, { probabilities: isReference }, options)) {
      if (answer.length === 0) first = performance.now();
      answer.push(Number(step.token));
      if (isReference) {
        const most = [...step.probabilities].sort((a, b) => b[1] - a[1]).slice(0, LIKELY);
        likely.push(...most.flatMap(([token, p]) => [Number(token), Math.log(p)]));
      }
      if (answer.length === work.tokens) break;
    }
    seconds += (performance.now() - first) / 1e3;
  }
  return { seconds };
}

for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  let reply;
  try {
    if (request.setup) reply = await setup(request.setup);
    else if (request.run) reply = await run(request.run);
    else reply = { results: isReference ? { tokens: answer, likely } : { tokens: answer } };
  } catch (e) {
    reply = { error: String(e.message ?? e) };
  }
  process.stdout.write(JSON.stringify(reply) + "\n");
}
process.exit(0);
