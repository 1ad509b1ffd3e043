// npm's Anthropic client: messages, streams, tools, counts, models, errors.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";

const model = process.env.MODEL;
const baseURL = process.env.BASE_URL.replace(/\/v1$/, "");
const client = new Anthropic({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Describe Paris." }];
const schema = {
  type: "object",
  properties: { name: { enum: ["Paris", "Rome"] }, is_capital: { type: "boolean" } },
  required: ["name", "is_capital"],
  additionalProperties: false,
};
const tools = [{ name: "describe", description: "Describe a city.", input_schema: schema, strict: true }];

function checkCity(city) {
  assert.ok(["Paris", "Rome"].includes(city.name) && typeof city.is_capital === "boolean");
}

const answer = await client.messages.create({ model, messages, max_tokens: 10, system: "Be brief." });
assert.ok(answer.content[0].text.length > 0);
assert.ok(["max_tokens", "end_turn"].includes(answer.stop_reason));

const kinds = [];
const stream = client.messages.stream({ model, messages, tools, tool_choice: { type: "any" }, max_tokens: 200 });
stream.on("streamEvent", (event) => kinds.push(event.type));
const called = await stream.finalMessage();
assert.equal(called.stop_reason, "tool_use");
assert.deepEqual([kinds[0], kinds.at(-1)], ["message_start", "message_stop"]);
const use = called.content.find((block) => block.type === "tool_use");
checkCity(use.input);

const result = { type: "tool_result", tool_use_id: use.id, content: [{ type: "text", text: "saved" }] };
const history = [...messages, { role: "assistant", content: called.content }, { role: "user", content: [result] }];
const last = await client.messages.create({ model, messages: history, tools, max_tokens: 10 });
assert.ok(last.usage.cache_read_input_tokens > 0);

const formed = await client.messages.create({
  model, messages, max_tokens: 200, output_config: { format: { type: "json_schema", schema } },
});
checkCity(JSON.parse(formed.content[0].text));

const { input_tokens: count } = await client.messages.countTokens({ model, messages });
const { usage } = await client.messages.create({ model, messages, max_tokens: 1 });
assert.equal(count, usage.input_tokens + usage.cache_read_input_tokens);
const ids = [];
for await (const each of client.models.list()) ids.push(each.id);
assert.deepEqual(ids, [model]);

await assert.rejects(
  client.messages.create({ model, messages, max_tokens: -1 }),
  (error) => error instanceof Anthropic.BadRequestError && /max_tokens/.test(error.message) && Boolean(error.requestID),
);
await assert.rejects(client.messages.create({ model: "none", messages, max_tokens: 1 }), Anthropic.NotFoundError);
console.log("ok");
