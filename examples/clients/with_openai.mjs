// Asks `slmops serve` by the package `openai` for Node:
//
//   npm install openai
//   slmops serve desk=outputs/demo/bundle/model        (in another terminal)
//   node with_openai.mjs desk "where is my parcel?"
import OpenAI from "openai";

const [model, content] = process.argv.slice(2);
const client = new OpenAI({
  baseURL: `${process.env.SLMOPS_URL ?? "http://127.0.0.1:8000"}/v1`,
  apiKey: process.env.SLMOPS_API_KEY ?? "none",
});
const stream = await client.chat.completions.create({
  model, messages: [{role: "user", content}], temperature: 0, stream: true, stream_options: {include_usage: true},
});
for await (const event of stream) {
  process.stdout.write(event.choices[0]?.delta.content ?? "");
  if (event.usage) process.stdout.write(`\n${event.usage.completion_tokens} tokens\n`);
}
