// What the chat page knows of the API, by Node's own test runner.
import assert from "node:assert/strict";
import test from "node:test";
import {events, facts, parts, refusal, request} from "../../src/slmops/serve/page/stream.js";

const body = (text, cuts) => {
  const bytes = new TextEncoder().encode(text), ends = [...cuts, bytes.length];
  let begin = 0;
  return new ReadableStream({pull(to) {
    if (!ends.length) return to.close();
    const end = ends.shift();
    to.enqueue(bytes.slice(begin, end));
    begin = end;
  }});
};
const all = async stream => { const found = []; for await (const one of events(stream)) found.push(one); return found; };

test("events come whole wherever the bytes are cut", async () => {
  const text = 'data: {"a":"ü€"}\n\n: a comment\n\ndata:{"b":\ndata: 2}\r\n\r\ndata: [DONE]\n\ndata: {"c":3}\n\n';
  const length = new TextEncoder().encode(text).length;
  for (let cut = 1; cut < length; cut++) assert.deepEqual(await all(body(text, [cut])), [{a: "ü€"}, {b: 2}]);
});

test("a stream that ends too early is an error", async () => {
  await assert.rejects(all(body('data: {"a":1}\n\ndata: {"b"', [])), /ended before/);
});

test("what is refused is told in the words of the server", async () => {
  const answer = text => ({status: 418, json: async () => JSON.parse(text)});
  assert.equal(await refusal(answer('{"error":{"message":"no room"}}')), "no room");
  assert.equal(await refusal(answer('{"error":"no room"}')), "no room");
  assert.equal(await refusal(answer("<html>")), "the server answered 418");
});

test("a request has the settings that were made and no others", () => {
  const turns = [{role: "user", content: "a"}, {role: "assistant", content: "b"}, {role: "user", content: "c"}];
  assert.deepEqual(Object.keys(request("m", turns, {temperature: NaN, seed: 0})), ["model", "messages", "stream", "stream_options", "seed"]);
  assert.deepEqual(request("m", turns, {system: "s", alone: true}).messages.map(one => one.content), ["s", "c"]);
  assert.equal(request("m", turns, {most: 3}).max_completion_tokens, 3);
  assert.equal(turns.length, 3);
});

test("speed is of the tokens after the first", () => {
  assert.deepEqual(facts({completion_tokens: 11}, 0, 100, 1100, "length"), ["11 tokens", "first after 100 ms", "10.0 tokens/s", "ended at its longest"]);
  assert.deepEqual(facts({completion_tokens: 1}, 0, 5, 5, "stop"), ["1 token", "first after 5 ms"]);
  assert.deepEqual(facts(undefined, 0, undefined, undefined, "stopped"), ["stopped"]);
});

test("code is what stands between fences, also while it is written", () => {
  assert.deepEqual(parts("a\n```py\nx\n\ny\n```\nb"), [[false, "a"], [true, "x\n\ny"], [false, "b"]]);
  assert.deepEqual(parts("a\n```\nx"), [[false, "a"], [true, "x"]]);
});
