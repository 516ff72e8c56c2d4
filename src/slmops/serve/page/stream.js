// What the chat page knows of the server's API, apart from the page: so that it can be tested without one.

/** The data of server-sent events in a stream of bytes, each parsed from JSON, up to `[DONE]`. */
export async function* events(body) {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const bytes of chunks(body)) {
    rest += decoder.decode(bytes, {stream: true});
    const parts = rest.split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter(line => line.startsWith("data:")).map(line => line.slice(5).replace(/^ /, "")).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
  throw new Error("the connection ended before the answer did");
}

async function* chunks(body) { // not every browser can iterate over a stream
  const reader = body.getReader();
  try {
    for (;;) {
      const {done, value} = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** What the server says went wrong. */
export async function refusal(response) {
  let said = "";
  try {
    const {error} = await response.json();
    said = typeof error === "string" ? error : error?.message ?? "";
  } catch {}
  return said || `the server answered ${response.status}`;
}

/** The request of an answer. Settings that are left empty are left to the server. */
export function request(model, turns, settings) {
  const messages = settings.alone ? turns.slice(-1) : [...turns];
  if (settings.system) messages.unshift({role: "system", content: settings.system});
  const body = {model, messages, stream: true, stream_options: {include_usage: true}};
  for (const [field, value] of [["temperature", settings.temperature], ["top_p", settings.top_p], ["max_completion_tokens", settings.most], ["seed", settings.seed]])
    if (Number.isFinite(value)) body[field] = value;
  return body;
}

/** Tokens, time to the first of them, tokens a second after it: as people read them. Times in ms. */
export function facts(usage, began, first, ended, finish) {
  const said = [];
  const tokens = usage?.completion_tokens;
  if (tokens !== undefined) said.push(`${tokens} token${tokens === 1 ? "" : "s"}`);
  if (first !== undefined) said.push(`first after ${Math.round(first - began)} ms`);
  if (tokens > 1 && ended > first) {
    const speed = (tokens - 1) / (ended - first) * 1000;
    said.push(`${speed.toFixed(speed < 100 ? 1 : 0)} tokens/s`);
  }
  if (finish === "length") said.push("ended at its longest");
  if (finish === "stopped") said.push("stopped");
  return said;
}

/** A text as [is code, text] parts: what stands between lines of three backticks is code. */
export function parts(text) {
  const found = [];
  let code = false, lines = [];
  const close = () => { if (lines.length) found.push([code, lines.join("\n")]); lines = []; };
  for (const line of text.split("\n")) {
    if (/^\s*```/.test(line)) { close(); code = !code; } else lines.push(line);
  }
  close();
  return found;
}
