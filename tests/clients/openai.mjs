// npm's openai client: chat, streams, tools, parsed answers, responses, errors.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const model = process.env.MODEL;
const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Describe Paris." }];
const City = z.object({ name: z.enum(["Paris", "Rome"]), is_capital: z.boolean() });

const answer = await client.chat.completions.create({ model, messages, max_tokens: 10 });
assert.ok(answer.choices[0].message.content.length > 0);

const parsed = await client.chat.completions.parse({
  model, messages, max_tokens: 200, response_format: zodResponseFormat(City, "city"),
});
City.parse(parsed.choices[0].message.parsed);

const stream = client.chat.completions.stream({
  model, messages, max_tokens: 200, tool_choice: "required", stream_options: { include_usage: true },
  tools: [{ type: "function", function: { name: "describe", parameters: z.toJSONSchema(City), strict: true } }],
});
const final = await stream.finalChatCompletion();
assert.equal(final.choices[0].finish_reason, "tool_calls");
City.parse(JSON.parse(final.choices[0].message.tool_calls[0].function.arguments));
assert.ok((await stream.totalUsage()).completion_tokens > 0);

const response = await client.responses.create({ model, input: "Say hello.", max_output_tokens: 10 });
assert.ok(response.output_text.length > 0);
const kinds = [];
for await (const event of await client.responses.create({ model, input: "Hi", max_output_tokens: 5, stream: true })) {
  kinds.push(event.type);
}
assert.equal(kinds[0], "response.created");
assert.match(kinds.at(-1), /^response\.(completed|incomplete)$/);

await assert.rejects(
  client.chat.completions.create({ model, messages, temperature: -1 }),
  (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
);
console.log("ok");
