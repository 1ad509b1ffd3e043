// npm's ollama client: chat, streams, tools, formats, embeddings, models, pulls, errors.
import assert from "node:assert/strict";
import { Ollama } from "ollama";

const model = process.env.MODEL;
const client = new Ollama({ host: process.env.BASE_URL.replace(/\/v1$/, "") });
const messages = [{ role: "user", content: "Describe Paris." }];
const options = { num_predict: 40, temperature: 0 };

const answer = await client.chat({ model, messages, options });
assert.ok(answer.message.content.length > 0 && answer.done && answer.eval_count <= 40);
assert.ok(answer.load_duration + answer.prompt_eval_duration + answer.eval_duration <= answer.total_duration);

let streamed = "";
let last;
for await (const part of await client.chat({ model, messages, options, stream: true })) {
  streamed += part.message.content;
  last = part;
}
assert.equal(streamed, answer.message.content);
assert.ok(last.done && last.eval_count === answer.eval_count);

const schema = {
  type: "object",
  properties: { name: { enum: ["Paris", "Rome"] }, is_capital: { type: "boolean" } },
  required: ["name", "is_capital"],
};
const parsed = JSON.parse((await client.chat({ model, messages, format: schema })).message.content);
assert.ok(["Paris", "Rome"].includes(parsed.name) && typeof parsed.is_capital === "boolean");

const tool = { type: "function", function: { name: "describe", description: "Describes a city.", parameters: schema } };
const called = await client.chat({ model, messages, tools: [tool], options });
for (const call of called.message.tool_calls ?? []) assert.equal(typeof call.function.arguments, "object");
const history = [
  ...messages,
  { role: "assistant", content: "", tool_calls: [{ function: { name: "describe", arguments: { name: "Paris" } } }] },
  { role: "tool", content: "A large city.", tool_name: "describe" },
];
assert.ok((await client.chat({ model, messages: history, tools: [tool], options })).message.content.length > 0);

const first = await client.generate({ model, prompt: "Say hello.", system: "Be brief.", options });
assert.ok(first.response.length > 0 && first.context.length > 0);
assert.ok((await client.generate({ model, prompt: "Again.", context: first.context, options })).response.length > 0);
assert.equal((await client.generate({ model, keep_alive: 0 })).done_reason, "unload");

const { embeddings } = await client.embed({ model, input: ["a cat", "a car"] });
assert.equal(embeddings.length, 2);
assert.ok(Math.abs(Math.hypot(...embeddings[0]) - 1) < 1e-3);

assert.deepEqual((await client.list()).models.map((one) => one.model), [`${model}:latest`]);
assert.equal((await client.ps()).models[0].context_length, 2048);
const shown = await client.show({ model });
assert.equal(shown.model_info["general.architecture"], "llama");
assert.equal(shown.details.parameter_size, "134.52M");
const statuses = [];
for await (const part of await client.pull({ model, stream: true })) statuses.push(part.status);
assert.equal(statuses.at(-1), "success");
assert.match((await client.version()).version, /^\d+\.\d+\.\d+$/);

await assert.rejects(client.chat({ model: "nope", messages }), (error) => error.status_code === 404);
await assert.rejects(client.delete({ model }), /not supported/);

const endless = await client.chat({ model, messages, stream: true, options: { num_predict: 2000 } });
const aborted = assert.rejects(async () => { for await (const _ of endless) endless.abort(); }, { name: "AbortError" });
await aborted;
console.log("ok");
