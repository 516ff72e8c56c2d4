// Every feature of OpenAI's dialect, with openai-node as it comes.
//
//     npm install openai && node examples/clients/every_openai.mjs http://127.0.0.1:8000/v1 MODEL
import assert from "node:assert/strict";
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Where is my parcel?" }];
const parameters = {
  type: "object",
  properties: { number: { type: "integer", minimum: 1, maximum: 9999 } },
  required: ["number"],
  additionalProperties: false,
};
const say = (more) => client.chat.completions.create({ model, messages, ...more });

const names = [];
for await (const card of client.models.list()) names.push(card.id);
assert(names.includes(model));

const few = { max_completion_tokens: 8, temperature: 0 };
const whole = await say({ ...few, logprobs: true, top_logprobs: 2 });
assert(whole.usage && whole.choices[0].logprobs.content.length);
let text = "";
let usage;
for await (const piece of await say({ ...few, stream: true, stream_options: { include_usage: true } })) {
  text += piece.choices[0]?.delta.content ?? "";
  usage = piece.usage ?? usage;
}
assert.equal(text, whole.choices[0].message.content);
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
assert.equal((await say({ n: 3, seed: 1, max_tokens: 2, stop: ["\n"], logit_bias: { 4: -100 } })).choices.length, 3);
console.log("chat: whole, streamed with usage, log probabilities, n, seed, stop, bias");

const json_schema = { name: "order", schema: parameters, strict: true };
const parsed = JSON.parse((await say({ response_format: { type: "json_schema", json_schema } })).choices[0].message.content);
assert(parsed.number >= 1 && parsed.number <= 9999);
console.log("response_format:", parsed);

assert((await client.completions.create({ model, prompt: "Hello", max_tokens: 4 })).choices.length);

try {
  const tools = [{ type: "function", function: { name: "find_order", parameters, strict: true } }];
  const must = { tools, tool_choice: "required", parallel_tool_calls: false };
  const { message, finish_reason } = (await say(must)).choices[0];
  assert.equal(finish_reason, "tool_calls");
  const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "on its way" };
  assert((await say({ messages: [...messages, message, result], tools, max_tokens: 4 })).usage);
  const runner = client.chat.completions.stream({ model, messages, ...must });
  const last = (await runner.finalChatCompletion()).choices[0].message;
  assert.equal(last.tool_calls[0].function.name, "find_order");
  console.log("tools:", message.tool_calls[0].function.arguments);
} catch (error) {
  if (error.status !== 400) throw error;
  console.log("tools left out:", error.message);
}

const first = await client.responses.create({ model, input: "Hello", max_output_tokens: 4 });
const kinds = [];
const again = { model, input: "More", previous_response_id: first.id, max_output_tokens: 4, stream: true };
for await (const event of await client.responses.create(again)) kinds.push(event.type);
assert.equal(kinds[0], "response.created");
console.log("responses: whole, gone on with, streamed");

await assert.rejects(client.chat.completions.create({ model: "none", messages }), (error) => error.status === 404);
