// Vercel's AI SDK: streamed text, generated objects, a tool loop.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "tinyvllm", baseURL: process.env.BASE_URL, apiKey: "none", supportsStructuredOutputs: true, includeUsage: true,
});
const model = provider(process.env.MODEL);
const City = z.object({ name: z.enum(["Paris", "Rome"]), is_capital: z.boolean() });

const text = streamText({ model, prompt: "Say hello.", maxOutputTokens: 10, maxRetries: 0 });
let said = "";
for await (const piece of text.textStream) said += piece;
assert.ok(said.length > 0);
assert.ok((await text.usage).outputTokens > 0);

const { object } = await generateObject({
  model, schema: City, prompt: "Describe Paris.", maxOutputTokens: 200, maxRetries: 0,
});
City.parse(object);

const called = [];
const describe = tool({
  description: "Describes a city.",
  inputSchema: City,
  execute: async (city) => { called.push(city); return "It is a city."; },
});
const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" });
const loop = await generateText({
  model, tools: { describe }, prompt: "Describe Rome.", maxOutputTokens: 200, maxRetries: 0,
  stopWhen: stepCountIs(2), prepareStep,
});
assert.ok(called.length > 0 && loop.steps.length === 2);

const streamed = streamText({
  model, tools: { describe }, prompt: "Describe Rome.", maxOutputTokens: 200, maxRetries: 0, toolChoice: "required",
});
const parts = [];
for await (const part of streamed.fullStream) parts.push(part.type);
assert.ok(parts.includes("tool-call"), parts.join(" "));
assert.ok(!parts.includes("error"), parts.join(" "));
console.log("ok");
