// The chat: settings, turns, streaming. Text reaches the page through textContent alone.

import { TracePanel } from "./panel.js";
import { ApiError, events, request } from "./stream.js";
import { Trace } from "./trace.js";

const $ = (id) => document.getElementById(id);

const RETRY_MS = 2000;
const turns = [];
let running = null; // AbortController of the answer that streams
const panel = new TracePanel(loadText, markToken);

function key() {
  return $("key").value.trim();
}

async function loadText(ids) {
  const response = await request("detokenize", { key: key(), body: { tokens: ids } });
  return (await response.json()).prompt;
}

function setStatus(text, isBad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", isBad);
}

let lookup = 0;
async function loadModels() {
  const mine = ++lookup;
  try {
    const { data } = await (await request("v1/models", { key: key() })).json();
    if (mine !== lookup) return;
    const chosen = $("model").value;
    $("model").replaceChildren(...data.map(({ id }) => new Option(id, id, false, id === chosen)));
    setStatus(`ready, up to ${data[0].max_model_len.toLocaleString("en")} tokens`);
  } catch (error) {
    if (mine !== lookup) return;
    if (error.status === 401) {
      setStatus(key() ? "the API key is wrong" : "an API key is needed: see Settings", true);
      return;
    }
    setStatus(error.status === 503 ? "the model is loading" : error.message, error.status !== 503);
    setTimeout(() => mine === lookup && loadModels(), RETRY_MS);
  }
}

// Throws an ApiError that names a setting whose text is no number, or out of range.
function options() {
  const body = { model: $("model").value || null };
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
    const input = $(name);
    if (!input.checkValidity()) {
      throw new ApiError(`${input.parentElement.firstChild.textContent}: ${input.validationMessage}`, 400, name);
    }
    if (input.value !== "") body[name] = Number(input.value);
  }
  return body;
}

function messages() {
  const system = $("system").value.trim();
  const shown = turns.filter(({ text }) => text).map(({ role, text }) => ({ role, content: text }));
  return system ? [{ role: "system", content: system }, ...shown] : shown;
}

function addTurn(role, text) {
  $("welcome").hidden = true;
  const element = document.createElement("div");
  element.className = `turn ${role}`;
  const name = document.createElement("span");
  name.className = "sr";
  name.textContent = role === "user" ? "You: " : "Model: ";
  const content = document.createElement("span");
  content.textContent = text;
  element.append(name, content);
  $("log").append(element);
  const turn = { role, text, element, content, spans: [], trace: new Trace(), texts: new Map() };
  turns.push(turn);
  element.classList.toggle("long", role === "user" && element.scrollHeight > element.clientHeight);
  scrollDown(true);
  return turn;
}

function scrollDown(always) {
  const log = $("log");
  if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
}

function showProblem(error) {
  const problem = document.createElement("div");
  problem.className = "problem";
  problem.setAttribute("role", "alert");
  problem.textContent = error.message;
  $("log").append(problem);
  scrollDown(true);
}

async function send(text) {
  let body;
  try {
    body = options();
  } catch (error) {
    showProblem(error);
    return;
  }
  const user = addTurn("user", text);
  const isTraced = $("tracing").checked;
  body = {
    ...body, messages: messages(), stream: true, return_token_ids: true,
    stream_options: { include_usage: true }, ...(isTraced && { nsa_trace: true }),
  };
  const turn = addTurn("assistant", "");
  turn.content.classList.add("waiting");
  if (isTraced) panel.open(turn);
  setRunning(new AbortController());
  const clock = { start: performance.now(), first: null, last: null, usage: null, reason: null };
  try {
    await stream(turn, body, clock);
  } catch (error) {
    if (error.name === "AbortError") clock.reason = "stopped";
    else if (error instanceof ApiError) showProblem(explain(error));
    else throw error;
  } finally {
    setRunning(null);
    turn.content.classList.remove("waiting");
    finish(user, turn, text, clock);
  }
}

function explain(error) {
  if (!error.param.startsWith("nsa_trace")) return error;
  $("tracing").checked = false;
  panel.clear(error.message);
  return new ApiError(`${error.message}\nTracing is switched off now; send the message again.`, error.status);
}

async function stream(turn, body, clock) {
  const response = await request("v1/chat/completions", { key: key(), body, signal: running.signal });
  for await (const chunk of events(response)) {
    if (chunk.usage) clock.usage = chunk.usage;
    const choice = chunk.choices[0];
    if (!choice) continue;
    if (choice.prompt_token_ids) turn.trace.promptIds = choice.prompt_token_ids;
    if (choice.finish_reason) clock.reason = choice.finish_reason;
    if (!choice.token_ids?.length && !choice.delta.content) continue;
    clock.last = performance.now();
    clock.first ??= clock.last;
    addTokens(turn, choice.delta.content ?? choice.delta.reasoning ?? "", choice.token_ids ?? [], choice.nsa_trace);
    showMeta(turn, clock);
    scrollDown(false);
  }
}

function addTokens(turn, text, ids, trace) {
  turn.content.classList.remove("waiting");
  const first = turn.trace.ids.length;
  turn.trace.ids.push(...ids);
  turn.text += text;
  const span = document.createElement("span");
  span.textContent = text;
  turn.content.append(span);
  turn.spans.push({ first, last: first + ids.length - 1, span });
  if (!trace) return;
  turn.trace.add(trace);
  if (trace.tokens.length) {
    span.className = "tok";
    for (const event of ["pointerenter", "click"]) {
      span.addEventListener(event, () => !(running && event === "pointerenter") && panel.choose(first, turn));
    }
  }
  panel.update(turn);
}

function markToken(turn, token) {
  for (const other of turns) {
    for (const { first, last, span } of other.spans) {
      span.classList.toggle("chosen", other === turn && first <= token && token <= last);
    }
  }
}

function showMeta(turn, clock) {
  turn.meta ??= turn.element.appendChild(Object.assign(document.createElement("span"), { className: "meta" }));
  const count = turn.trace.ids.length;
  const parts = [];
  if (clock.first !== null) {
    parts.push(`first token ${((clock.first - clock.start) / 1000).toFixed(2)} s`);
    if (count > 1) parts.push(`${((count - 1) / ((clock.last - clock.first) / 1000)).toFixed(1)} tokens/s`);
  }
  parts.push(`${count} tokens`);
  const cached = clock.usage?.prompt_tokens_details?.cached_tokens;
  if (clock.usage) parts.push(`prompt ${clock.usage.prompt_tokens}${cached ? ` (${cached} cached)` : ""}`);
  if (clock.reason) parts.push({ length: "ended at max tokens", stop: "ended by itself" }[clock.reason] ?? clock.reason);
  turn.meta.textContent = parts.join(" · ");
}

// A question without an answer is taken back, so that it can be sent again.
function finish(user, turn, text, clock) {
  if (turn.trace.ids.length || turn.text) {
    showMeta(turn, clock);
    return;
  }
  turns.splice(turns.indexOf(turn), 1);
  turn.element.remove();
  if (clock.reason !== null) return;
  turns.splice(turns.indexOf(user), 1);
  user.element.remove();
  if (!$("prompt").value) $("prompt").value = text;
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = controller !== null;
  $("stop").hidden = controller === null;
  (controller ? $("stop") : $("prompt")).focus({ preventScroll: true });
}

// Facts in a row, most of them unlike the one that is asked for.
function longExample() {
  const colors = ["green", "amber", "violet", "silver", "teal", "scarlet", "ivory", "indigo"];
  const things = ["jars", "maps", "lanterns", "ropes", "books", "lenses", "coins", "seeds"];
  const facts = Array.from({ length: 180 }, (_, i) => {
    if (i === 70) return "The password of the archive is heron.";
    return `Shelf ${i + 1} holds ${3 + ((i * 7) % 40)} ${colors[i % 8]} ${things[(i * 5 + (i >> 3)) % 8]}.`;
  });
  return `${facts.join(" ")}\n\nWhat is the password of the archive?`;
}

function submit() {
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  send(text);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
$("options").addEventListener("submit", (event) => event.preventDefault());
$("stop").addEventListener("click", () => running?.abort());
$("key").addEventListener("change", loadModels);
$("clear").addEventListener("click", () => {
  running?.abort();
  turns.length = 0;
  $("log").replaceChildren($("welcome"));
  $("welcome").hidden = false;
  panel.clear("The map appears with the first answer.");
});
for (const chip of document.querySelectorAll(".chip")) {
  chip.addEventListener("click", () => {
    if (running) return;
    $("prompt").value = chip.dataset.example === "long" ? longExample() : "Why is the sky blue? Answer in two sentences.";
    submit();
  });
}
if (matchMedia("(max-width: 1120px)").matches) $("settings").open = false;
loadModels();
