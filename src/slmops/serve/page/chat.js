// The chat page: a conversation with a model of this server. Texts are only ever set as text, never as HTML.
import {events, facts, parts, refusal, request} from "./stream.js";

const at = id => document.getElementById(id);
const [model, fresh, open, settings, turnList, empty, trouble, ask, message, send, stop, said, main] =
  ["model", "fresh", "open", "settings", "turns", "empty", "trouble", "ask", "message", "send", "stop", "said"].map(at).concat(document.querySelector("main"));
let turns = [], running = null;

const number = id => at(id).value.trim() === "" ? NaN : Number(at(id).value);
const chosen = () => ({
  system: at("system").value.trim(), alone: at("alone").checked,
  temperature: number("temperature"), top_p: number("top_p"), most: number("most"), seed: number("seed"),
});
const headers = () => at("key").value ? {Authorization: `Bearer ${at("key").value}`} : {};

function complain(text) {
  trouble.textContent = text;
  trouble.hidden = !text;
}

async function loadModels() {
  try {
    const response = await fetch("v1/models", {headers: headers()});
    if (!response.ok) throw new Error(await refusal(response));
    const names = (await response.json()).data.map(one => one.id), before = model.value;
    model.replaceChildren(...names.map(name => new Option(name, name, false, name === before)));
    model.disabled = !names.length;
    complain(names.length ? "" : "this server has no model");
  } catch (error) {
    complain(`The models cannot be listed: ${error.message}`);
    if (!at("key").value && /key/i.test(error.message)) show(true, "key");
  }
}

function show(yes, field) {
  settings.hidden = !yes;
  open.setAttribute("aria-expanded", String(yes));
  if (yes) at(field ?? "system").focus();
}

function item(role, text) {
  const li = document.createElement("li"), who = document.createElement("p"), body = document.createElement("div"), about = document.createElement("p");
  li.className = role;
  who.className = "who";
  who.textContent = role === "user" ? "You" : model.value;
  body.className = "text";
  about.className = "facts";
  li.append(who, body, about);
  body.textContent = text;
  turnList.append(li);
  empty.hidden = true;
  return {li, body, about};
}

function followed() { // only who is at the end is kept there
  return main.scrollHeight - main.scrollTop - main.clientHeight < 60;
}

function write(body, text) {
  const end = followed();
  const made = parts(text).map(([code, part]) => {
    if (!code) return document.createTextNode(part);
    const pre = document.createElement("pre");
    pre.textContent = part;
    return pre;
  });
  body.replaceChildren(...made);
  if (end) main.scrollTop = main.scrollHeight;
}

async function answer() {
  const {li, body, about} = item("assistant", "");
  const control = running = new AbortController();
  const began = performance.now();
  let text = "", first, last, usage, finish, due = false;
  li.classList.add("open");
  busy(true);
  complain("");
  const draw = () => { due = false; write(body, text); };
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", signal: control.signal, headers: {"Content-Type": "application/json", ...headers()},
      body: JSON.stringify(request(model.value, turns, chosen())),
    });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message ?? event.error);
      if (event.usage) usage = event.usage;
      const choice = event.choices?.[0];
      if (!choice) continue;
      finish = choice.finish_reason ?? finish;
      if (choice.delta.content) {
        text += choice.delta.content;
        if (!due) { due = true; requestAnimationFrame(draw); }
      }
      if (choice.delta.content || choice.finish_reason) { last = performance.now(); first ??= last; }
    }
  } catch (error) {
    if (control.signal.aborted) finish = "stopped";
    else complain(error.message === "Failed to fetch" ? "The server cannot be reached." : error.message);
  }
  draw();
  li.classList.remove("open");
  if (text || finish) {
    turns.push({role: "assistant", content: text});
    about.append(...facts(usage, began, first, last, finish).map(fact => Object.assign(document.createElement("span"), {textContent: fact})), copier(() => text));
    said.textContent = text;
  } else {
    li.remove();
    const lost = turns.pop();
    turnList.lastElementChild?.remove();
    empty.hidden = turns.length > 0;
    if (!message.value) message.value = lost.content;
  }
  if (running === control) running = null;
  busy(false);
  main.scrollTop = main.scrollHeight;
}

function copier(text) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(text());
      said.textContent = "Copied";
      button.textContent = "Copied";
    } catch {
      complain("This browser does not let the page copy; mark the text instead.");
    }
  };
  return button;
}

function busy(yes) {
  send.hidden = yes;
  stop.hidden = !yes;
  model.disabled = yes || !model.options.length;
  fresh.disabled = yes;
  if (!yes) message.focus({preventScroll: true});
}

function grow() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight + 2}px`;
}

ask.onsubmit = event => {
  event.preventDefault();
  const text = message.value.trim();
  if (!text || running) return;
  if (!model.value) return complain("There is no model to ask.");
  if (!settings.reportValidity()) return show(true);
  message.value = "";
  grow();
  turns.push({role: "user", content: text});
  item("user", text);
  main.scrollTop = main.scrollHeight;
  answer();
};
message.oninput = grow;
message.onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask.requestSubmit(); }
};
document.onkeydown = event => { if (event.key === "Escape" && running) running.abort(); };
stop.onclick = () => running?.abort();
fresh.onclick = () => {
  turns = [];
  turnList.replaceChildren();
  empty.hidden = false;
  complain("");
  message.focus();
};
open.onclick = () => show(settings.hidden);
settings.onsubmit = event => event.preventDefault();
at("key").onchange = loadModels;
model.onfocus = () => { if (!model.options.length) loadModels(); };
loadModels();
