// Every feature of OpenAI's dialect, with openai-node as it comes.
//
//     npm install openai && node examples/clients/every_openai.mjs http://127.0.0.1:8000/v1 MODEL [ADAPTER]
//
// Parts that need a chat template with tools, or a model that gives embeddings, are left out, and said so, where the model has none.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [url, model, adapter] = process.argv.slice(2);
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
assert.equal((await client.models.retrieve(model)).id, model);

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
const every = {
  max_tokens: 6, seed: 1, temperature: 1.2, top_p: 0.9, frequency_penalty: 0.1, presence_penalty: 0.1,
  top_k: 20, min_p: 0.01, repetition_penalty: 1.1,
};
const again = [await say(every), await say(every)].map((answer) => answer.choices[0].message.content);
assert.equal(again[0], again[1]);
console.log("chat: whole, streamed with usage, log probabilities, n, stop, bias, sampling, seed");
if (adapter) {
  const adapted = `${model}+${adapter}`;
  assert.equal((await say({ model: adapted, max_tokens: 8, temperature: 0 })).model, adapted);
  console.log("adapter:", adapted);
}

const json_schema = { name: "order", schema: parameters, strict: true };
const parsed = JSON.parse((await say({ response_format: { type: "json_schema", json_schema } })).choices[0].message.content);
assert(parsed.number >= 1 && parsed.number <= 9999);
const json = (await say({ response_format: { type: "json_object" }, max_tokens: 200, seed: 1 })).choices[0];
assert(json.finish_reason === "length" || typeof JSON.parse(json.message.content) === "object");
console.log("response_format:", parsed);

const plain = { model, prompt: "Hello", max_tokens: 4, temperature: 0 };
const done = await client.completions.create({ ...plain, logprobs: 1 });
assert(done.choices[0].logprobs);
let told = "";
for await (const piece of await client.completions.create({ ...plain, stream: true })) told += piece.choices[0]?.text ?? "";
assert.equal(told, done.choices[0].text);
console.log("completions: whole, streamed");

let hasTools = true;
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
  const named = { tools, tool_choice: { type: "function", function: { name: "find_order" } } };
  assert.equal((await say(named)).choices[0].message.tool_calls.length, 1);
  assert(!(await say({ tools, tool_choice: "none", max_tokens: 4 })).choices[0].message.tool_calls);
  assert((await say({ tools, tool_choice: "auto", max_tokens: 4 })).usage);
  console.log("tools: required, named, none, auto, answered, streamed:", message.tool_calls[0].function.arguments);
} catch (error) {
  if (error.status !== 400) throw error;
  hasTools = false;
  console.log("tools left out:", error.message);
}

const first = await client.responses.create({ model, input: "Hello", max_output_tokens: 4 });
const kinds = [];
const more = { model, input: "More", previous_response_id: first.id, max_output_tokens: 4, stream: true };
for await (const event of await client.responses.create(more)) kinds.push(event.type);
assert.equal(kinds[0], "response.created");
assert(["response.completed", "response.incomplete"].includes(kinds.at(-1)));
const format = { type: "json_schema", ...json_schema };
assert((await client.responses.parse({ model, input: "Hello", text: { format } })).output_parsed.number >= 1);
if (hasTools) {
  const tools = [{ type: "function", name: "find_order", parameters, strict: true }];
  const reply = await client.responses.create({ model, input: "Hello", tools, tool_choice: "required" });
  const { call_id } = reply.output.find((item) => item.type === "function_call");
  const input = [{ type: "function_call_output", call_id, output: "on its way" }];
  assert((await client.responses.create({ model, input, previous_response_id: reply.id, tools, max_output_tokens: 4 })).usage);
}
assert.equal((await client.responses.retrieve(first.id)).id, first.id);
await client.responses.delete(first.id);
console.log("responses: whole, gone on with, streamed, parsed, kept, deleted", hasTools ? "with tools" : "without tools");

try {
  const { data } = await client.embeddings.create({ model, input: ["Where is my parcel?", "Hello"] });
  assert.equal(data.length, 2);
  for (const { embedding } of data) assert(Math.abs(Math.hypot(...embedding) - 1) < 1e-4);
  console.log("embeddings:", data[0].embedding.length, "dimensions");
} catch (error) {
  if (error.status !== 400) throw error;
  console.log("embeddings left out:", error.message);
}

await assert.rejects(client.chat.completions.create({ model: "none", messages }), (error) => error.status === 404);
await assert.rejects(say({ temperature: 3 }), (error) => error.status === 400 && error.param === "temperature");
console.log("errors");
