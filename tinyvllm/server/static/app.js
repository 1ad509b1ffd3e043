// The page: a chat over /v1/chat/completions, and a live view of /engine/state. Plain modules, nothing to build.

const POLL_MS = 1000;
const STAGES = ["schedule", "pack", "device", "commit"];
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const EXAMPLES = ["Why is the sky blue?", "Write a haiku about memory.", "Name three rivers and where they end."];

const $ = (id) => document.getElementById(id);
const messages = []; // the conversation, in the form that the API takes
let running = null; // AbortController of the answer in progress
let canChat = true;
let model = null;
let chosen = null; // of several models; null while there is only one
let hasListed = false;
let apiKey = sessionStorage.getItem("api-key") ?? "";

// ---- Talking to the server ----

function headers(more = {}) {
  return apiKey ? { ...more, Authorization: `Bearer ${apiKey}` } : more;
}

function askForKey(note) {
  const form = $("key-form");
  if (note) $("key-note").textContent = note;
  if (!form.hidden) return;
  form.hidden = false;
  $("key").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey = $("key").value.trim();
  sessionStorage.setItem("api-key", apiKey);
  $("key").value = "";
  $("key-form").hidden = true;
  $("prompt").focus();
  hasListed = false;
  poll();
});

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

/** The JSON of each server-sent event, until [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer ended before it was complete");
    const frames = (rest + value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      if (!frame.startsWith("data: ")) continue; // a comment that keeps the connection alive
      if (frame === "data: [DONE]") return;
      yield JSON.parse(frame.slice(6));
    }
  }
}

// ---- Chat ----

function bodyOf(text) {
  const body = { model, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) {
    const field = $(name);
    if (field.value !== "") body[name] = Number(field.value);
  }
  if (!canChat) return ["/v1/completions", { max_tokens: 128, ...body, prompt: text }];
  const system = $("system").value.trim();
  const head = system ? [{ role: "system", content: system }] : [];
  return ["/v1/chat/completions", { ...body, messages: [...head, ...messages] }];
}

function addMessage(role, text) {
  $("empty").hidden = true;
  const element = document.createElement("article");
  element.className = `message ${role}`;
  const name = document.createElement("h3");
  name.textContent = role === "user" ? "You" : model ?? "Model";
  const content = document.createElement("div");
  content.className = "text";
  content.textContent = text;
  element.append(name, content);
  $("log").append(element);
  follow(true);
  return { element, content };
}

function addLine(element, kind, text) {
  const line = document.createElement("p");
  line.className = kind;
  line.textContent = text;
  element.append(line);
}

/** Keep the newest text in view, unless the reader has scrolled up. */
function follow(always = false) {
  const log = $("log");
  if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
}

function setBusy(isBusy) {
  $("stop").hidden = $("stop-help").hidden = !isBusy;
  $("send").hidden = isBusy;
  $("fresh").disabled = isBusy;
}

async function send(text) {
  messages.push({ role: "user", content: text });
  addMessage("user", text);
  const { element, content } = addMessage("assistant", "");
  element.setAttribute("aria-busy", "true");
  setBusy(true);
  running = new AbortController();
  const answer = { text: "", startMs: performance.now(), firstMs: 0, lastMs: 0, tokens: 0, reason: "" };
  try {
    await write(text, answer, content);
  } catch (error) {
    answer.failed = error.name !== "AbortError";
    if (answer.failed) addLine(element, "error", error.message);
    else answer.reason = "stopped";
  }
  running = null;
  setBusy(false);
  element.removeAttribute("aria-busy");
  if (answer.text) {
    messages.push({ role: "assistant", content: answer.text });
    addLine(element, "facts", factsOf(answer));
  } else {
    messages.pop(); // without an answer, the question is not part of the conversation
  }
  $("announce").textContent = answer.failed ? "The answer failed." : `The model answered: ${answer.text}`;
  follow();
  $("prompt").focus();
}

async function write(text, answer, content) {
  const [path, body] = bodyOf(text);
  const response = await fetch(path, {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify(body),
    signal: running.signal,
  });
  if (response.status === 401) askForKey("The key was not accepted. Try another one.");
  if (!response.ok) throw new Error(await errorOf(response));
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) answer.tokens = event.usage.completion_tokens;
    for (const choice of event.choices) {
      const piece = choice.delta ? choice.delta.content ?? "" : choice.text;
      if (choice.finish_reason) answer.reason = choice.finish_reason;
      if (!piece) continue;
      answer.lastMs = performance.now();
      answer.firstMs ||= answer.lastMs;
      answer.text += piece;
      content.textContent = answer.text;
      follow();
    }
  }
}

function factsOf({ startMs, firstMs, lastMs, tokens, reason }) {
  const facts = [`first token after ${seconds((firstMs - startMs) / 1000)}`];
  if (tokens > 1 && lastMs > firstMs) {
    facts.unshift(`${tokens} tokens`, `${((1000 * (tokens - 1)) / (lastMs - firstMs)).toFixed(1)} tokens/s`);
  }
  if (reason === "length") facts.push("reached the token limit");
  if (reason === "stopped") facts.push("stopped by you");
  return facts.join(" · ");
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  send(text);
});

$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});

$("stop").addEventListener("click", () => running?.abort());

$("fresh").addEventListener("click", () => {
  messages.length = 0;
  document.querySelectorAll(".message").forEach((element) => element.remove());
  $("empty").hidden = false;
  $("prompt").focus();
});

for (const text of EXAMPLES) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet";
  button.textContent = text;
  button.addEventListener("click", () => running || send(text));
  $("examples").append(button);
}

for (const name of ["system", ...NUMBERS]) {
  $(name).value = localStorage.getItem(name) ?? "";
  $(name).addEventListener("change", () => localStorage.setItem(name, $(name).value));
}

// ---- Several models ----

/** Offer the server's models, if it has several names for them. */
async function listModels() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) return; // it is asked again at the next poll
  hasListed = true;
  const names = (await response.json()).data.map((card) => card.id);
  if (names.length < 2) return;
  const before = sessionStorage.getItem("model");
  chosen = names.includes(before) ? before : names[0];
  $("models").replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
  $("models").hidden = false;
  $("model").hidden = true;
}

$("models").addEventListener("change", () => {
  chosen = $("models").value;
  sessionStorage.setItem("model", chosen);
  earlier = null;
  history.length = 0;
  for (const id of ["running", "waiting", "output-rate", "prompt-rate", "ttft", "itl", "hits"]) $(id).textContent = "–";
  poll();
});

// ---- Light and dark ----

const darkScheme = matchMedia("(prefers-color-scheme: dark)");
let lastState = null;

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  if (lastState) show(lastState);
}

setTheme(localStorage.getItem("theme"));
$("theme").addEventListener("click", () => {
  const isDark = (document.documentElement.dataset.theme ?? (darkScheme.matches ? "dark" : "light")) === "dark";
  localStorage.setItem("theme", isDark ? "light" : "dark");
  setTheme(isDark ? "light" : "dark");
});
darkScheme.addEventListener("change", () => lastState && show(lastState));

// ---- The engine ----

const seconds = (value) => (value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`);
const percent = (value) => `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`;
const count = (value) => value.toLocaleString("en");
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function setStatus(status) {
  const element = $("status");
  if (element.dataset.status === status && element.textContent === status) return;
  element.dataset.status = status;
  element.textContent = status;
}

function show(state) {
  lastState = state;
  setStatus(state.status);
  const toCome = state.counts?.num_captures_to_come ?? 0;
  $("warming").hidden = toCome === 0;
  $("warming").textContent = `warming up: ${count(toCome)} ${toCome === 1 ? "graph" : "graphs"} left`;
  model = chosen ?? state.model;
  canChat = state.can_chat;
  $("model").textContent = state.model;
  document.title = `${state.model} – tinyvllm`;
  $("uptime").textContent = `version ${state.version}, up for ${duration(state.uptime_s)}`;
  $("send").disabled = state.status !== "ready" && state.status !== "unloaded"; // its first message loads a model
  if (!state.counts) return;
  showCounts(state);
  showPool(state);
  showMemory(state);
  showSteps(state.steps);
}

function duration(value) {
  if (value < 120) return `${Math.round(value)} s`;
  if (value < 7200) return `${Math.round(value / 60)} min`;
  return `${Math.round(value / 3600)} h`;
}

let earlier = null; // counts of the previous poll

function showCounts({ counts, limits, ttft_s: ttft, itl_s: itl }) {
  $("running").textContent = count(counts.num_running);
  $("running-of").textContent = `of ${limits.max_num_seqs} places`;
  $("waiting").textContent = count(counts.num_waiting);
  $("preempted").textContent = counts.num_preemptions ? `${count(counts.num_preemptions)} preempted` : "in the queue";
  const nowMs = performance.now();
  const rates = ratesSince(counts, nowMs);
  $("output-rate").textContent = rates ? rates.output.toFixed(rates.output < 100 ? 1 : 0) : "–";
  const accepted = counts.num_draft_tokens ? counts.num_accepted_tokens / counts.num_draft_tokens : null;
  $("output-note").textContent = accepted === null ? "tokens/s" : `tokens/s, ${percent(accepted)} of drafts right`;
  $("prompt-rate").textContent = rates ? rates.prompt.toFixed(rates.prompt < 100 ? 1 : 0) : "–";
  for (const [name, { p50, p95 }] of [["ttft", ttft], ["itl", itl]]) {
    $(name).textContent = p50 === null ? "–" : seconds(p50);
    $(`${name}-95`).textContent = p95 === null ? "\u00a0" : `p95 ${seconds(p95)}`;
  }
  const share = counts.num_prompt_tokens ? counts.num_cached_tokens / counts.num_prompt_tokens : 0;
  $("hits").textContent = counts.num_prompt_tokens ? percent(share) : "–";
  $("hits-meter").value = share;
}

const history = []; // [ms, counts] of the latest polls, for rates

function ratesSince(counts, nowMs) {
  if (earlier && counts.num_output_tokens < earlier.num_output_tokens) history.length = 0; // the server has restarted
  earlier = counts;
  history.push([nowMs, counts]);
  while (history.length > 4) history.shift();
  const [thenMs, then] = history[0];
  if (nowMs - thenMs < POLL_MS / 2) return null;
  const per = (name) => (1000 * (counts[name] - then[name])) / (nowMs - thenMs);
  return { output: per("num_output_tokens"), prompt: per("num_prompt_tokens") };
}

/** Draw the pool as a grid of squares: dark is in use, light is cached, the rest is free. */
function showPool({ pool, limits }) {
  if (!pool) return;
  const canvas = $("pool");
  const scale = devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const cells = pool.held.length;
  const { columns, size } = gridOf(cells, width, height);
  const gap = size > 6 ? 2 : size > 3 ? 1 : 0.5;
  const [free, cached, held] = ["--free", "--cached", "--held"].map(color);
  for (let cell = 0; cell < cells; cell += 1) {
    const x = (cell % columns) * size;
    const y = Math.floor(cell / columns) * size;
    const paint = (fill, alpha) => {
      context.globalAlpha = alpha;
      context.fillStyle = fill;
      context.fillRect(x, y, size - gap, size - gap);
    };
    paint(free, 1);
    const shares = [[cached, Number(pool.cached[cell]) / 9], [held, Number(pool.held[cell]) / 9]];
    for (const [fill, share] of shares) if (share) paint(fill, 0.25 + 0.75 * share);
  }
  const share = pool.num_held / limits.num_blocks;
  const text = `${percent(share)} of ${count(limits.num_blocks)} blocks`;
  $("pool-text").textContent = text;
  canvas.setAttribute(
    "aria-label",
    `${text} in use, ${count(pool.num_shared)} of them shared; ${count(pool.num_cached)} cached for prompts with the same prefix`,
  );
}

const KINDS = {
  weights: "Weights",
  scratch: "Intermediate values, at most",
  kv: "Keys and values",
  "states live": "States of running sequences",
  "states checkpoints": "Checkpoints of states",
  "states free": "Free state slots",
};

const bytes = (value) =>
  value < 2 ** 30 ? `${(value / 2 ** 20).toFixed(value < 10 * 2 ** 20 ? 1 : 0)} MiB` : `${(value / 2 ** 30).toFixed(1)} GiB`;

/** List the device's memory by kind, and what recurrent states have checkpoints for. */
function showMemory({ memory, counts }) {
  const rows = Object.entries(memory);
  const total = rows.reduce((sum, [, value]) => sum + value, 0);
  $("memory").hidden = total === 0;
  $("memory-text").textContent = bytes(total);
  $("memory-rows").replaceChildren(
    ...rows.map(([kind, value]) => {
      const row = document.createElement("tr");
      const name = document.createElement("th");
      name.scope = "row";
      name.textContent = KINDS[kind] ?? kind.replace("kv window", "Keys and values, window of");
      row.append(name, document.createElement("td"));
      row.lastChild.textContent = bytes(value);
      return row;
    }),
  );
  $("states-text").hidden = !("states live" in memory);
  $("states-text").textContent =
    `${count(counts.num_live_states)} states in use, ${count(counts.num_checkpoints)} checkpoints; ` +
    `${count(counts.num_checkpoint_hits)} prompts resumed from one`;
}

/** Columns and side length of the largest squares of which `cells` fit into this area, row by row. */
function gridOf(cells, width, height) {
  let columns = Math.max(1, Math.floor(Math.sqrt((cells * width) / height)));
  while (Math.ceil(cells / columns) * (width / columns) > height) columns += 1;
  return { columns, size: Math.min(width / columns, 22) };
}

function showSteps(steps) {
  const svg = $("steps");
  const totals = steps.map((step) => STAGES.reduce((sum, stage) => sum + step[`${stage}_ms`], 0));
  const most = Math.max(...totals, 0.001);
  const typical = [...totals].sort((a, b) => a - b)[Math.floor(0.9 * totals.length)] ?? most;
  const full = Math.min(most, 2.5 * typical); // one long step must not flatten all others
  const slots = 60;
  svg.setAttribute("viewBox", `0 0 ${slots} 100`);
  const bars = [];
  steps.slice(-slots).forEach((step, index) => {
    let top = 100;
    for (const stage of STAGES) {
      const height = Math.min((96 * step[`${stage}_ms`]) / full, top);
      if (height < 0.05) continue;
      top -= height;
      const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      for (const [name, value] of Object.entries({ x: slots - Math.min(steps.length, slots) + index + 0.1, y: top, width: 0.8, height })) {
        bar.setAttribute(name, value);
      }
      bar.setAttribute("class", `bar-${stage}`);
      bars.push(bar);
    }
  });
  svg.replaceChildren(...bars);
  const last = steps.at(-1);
  const text = last ? `last ${totals.at(-1).toFixed(1)} ms, longest ${most.toFixed(1)} ms` : "none yet";
  $("steps-text").textContent = text;
  svg.setAttribute("aria-label", `Time of the latest ${steps.length} steps by stage: ${text}`);
  if ($("step-rows").closest("details").open) showStepRows(steps);
}

function showStepRows(steps) {
  const rows = steps.slice(-20).reverse().map((step) => {
    const row = document.createElement("tr");
    const values = [step.number, step.num_seqs, step.num_tokens, ...STAGES.map((stage) => step[`${stage}_ms`].toFixed(2))];
    for (const value of values) row.insertCell().textContent = value;
    return row;
  });
  $("step-rows").replaceChildren(...rows);
}

$("step-rows").closest("details").addEventListener("toggle", () => lastState && showSteps(lastState.steps));
addEventListener("resize", () => lastState && show(lastState));

let isPolling = false;

async function poll() {
  if (isPolling || document.hidden) return;
  isPolling = true;
  try {
    const query = chosen === null ? "" : `?model=${encodeURIComponent(chosen)}`;
    const response = await fetch(`/engine/state${query}`, { headers: headers() });
    if (response.status === 401) {
      setStatus("key needed");
      askForKey();
    } else if (response.ok) {
      show(await response.json());
      if (!hasListed && lastState.status !== "loading") await listModels(); // while it loads, a single server lists none
    } else {
      setStatus("unreachable");
    }
  } catch {
    setStatus("unreachable");
  }
  isPolling = false;
}

document.addEventListener("visibilitychange", poll);
setInterval(poll, POLL_MS);
poll();
