// The chat page: its state, the chat, the text that is continued, and what the buttons do.
const DEFAULTS = {system: "", temperature: 0.8, top_p: 1, top_k: 50, repetition_penalty: 1, max_tokens: 256, seed: ""};
const NUMBERS = ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens"];
let model = null, settings = load(local, "gpt2-settings", DEFAULTS);
let messages = conversation.messages;
let running = null;      // the AbortController of the answer that is being written
let pieces = [];         // what "Continue" has added, the newest last
const texts = new WeakMap();  // element of a message's text
let tries = 0;           // of the same answer: a fixed seed gives another one each time

// --- chat ----------------------------------------------------------------------------------------
function show() {
  const log = $("log");
  log.replaceChildren();
  if (!messages.length) {
    const empty = make("div");
    empty.id = "empty";
    empty.append(make("b", "", "Say something."), make("span", "", `What you write goes to ${location.host} and nowhere else.`));
    log.append(empty);
  }
  messages.forEach((message, at) => log.append(shown(message, at)));
  keepConversation(conversation);
  showConversations();
}
function shown(message, at) {
  const made = make("div", `message ${message.role}`), under = make("div", "under");
  made.setAttribute("role", "article");
  made.ariaLabel = message.role === "user" ? "You" : "Answer";
  made.append(written(message));
  if (message.role === "user") {
    if (at >= messages.length - 2) {
      under.append(button("edit", "Edit", () => { if (running) return; $("input").value = message.content; messages.length = at; show(); grow(); $("input").focus(); }));
      made.append(under);
    }
    return made;
  }
  if (message.error) {
    const note = make("div", "note bad", message.error + " ");
    const retry = make("button", "", "Try again");
    retry.onclick = again;
    note.append(retry);
    if (!message.content) made.replaceChildren();
    made.append(note);
    return made;
  }
  under.append(button("copy", "Copy", copy(() => message.content)));
  if (at === messages.length - 1) under.append(button("again", "Another answer", again));
  under.append(make("span", "", message.stats ?? ""));
  made.append(under);
  return made;
}
// The text of a message. That of an answer is Markdown, and is made once.
function written(message) {
  let made = texts.get(message);
  if (made) return made;
  made = make("div", "text");
  made.dir = "auto";
  if (message.role === "assistant") {
    const writer = new MarkdownWriter(made);
    writer.add(message.content);
    writer.end();
  } else made.textContent = message.content;
  texts.set(message, made);
  return made;
}
function again() {
  if (running || messages.at(-1)?.role !== "assistant") return;
  messages.pop();
  tries += 1;
  answer();
}
function send() {
  const text = $("input").value.trim();
  if (!text || running) return;
  $("input").value = "";
  grow();
  messages.push({role: "user", content: text});
  tries = 0;
  answer();
}
async function answer() {
  const body = asked(), message = {role: "assistant", content: ""};
  body.fit_context = true;
  body.messages = messages.filter(m => m.role === "user" || m.content).map(({role, content}) => ({role, content}));
  if (settings.system.trim()) body.messages.unshift({role: "system", content: settings.system});
  messages.push(message);
  const mine = conversation;  // another one may be opened while this answer is written
  Object.assign(mine, {system: settings.system.trim() && settings.system, changed: Date.now()});
  show();
  const bubble = $("log").lastChild, under = bubble.lastChild, scroll = $("scroll");
  const writer = new MarkdownWriter(bubble.firstChild);
  let waiting = "";  // text that the next frame shows: the layout is computed once for all of its pieces
  const write_waiting = () => {
    if (!waiting) return;
    const follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
    writer.add(waiting);
    waiting = "";
    if (follows) scroll.scrollTop = scroll.scrollHeight;
  };
  bubble.classList.add("writing");
  $("said").textContent = "The model is writing.";
  under.hidden = true;
  scroll.scrollTop = scroll.scrollHeight;
  busy(new AbortController());
  try {
    const found = await write("/v1/chat/completions", body, piece => {
      message.content += piece;
      if (!waiting) requestAnimationFrame(write_waiting);
      waiting += piece;
    }, running.signal);
    message.stats = described(found);
  } catch (error) {
    if (error.name === "AbortError") message.stats = "stopped";
    else message.error = problem(error);
  }
  busy(null);
  // a screen reader hears an answer once, when it is whole, instead of each of its pieces
  $("said").textContent = message.error ?? `${message.content} (${message.stats})`;
  write_waiting();
  const follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
  writer.end();
  if (mine !== conversation) { keepConversation(mine); showConversations(); return; }
  show();
  if (follows) scroll.scrollTop = scroll.scrollHeight;
  if (matchMedia("(pointer: fine)").matches) $("input").focus();
}
function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = input.scrollHeight + "px";
  $("send").disabled = !input.value.trim();
}

// --- text ----------------------------------------------------------------------------------------
async function proceed() {
  if (running) return;
  const paper = $("paper"), before = paper.value, began = before.length;
  $("text-error").hidden = true;
  busy(new AbortController());
  paper.readOnly = true;
  let count = 0;
  try {
    const found = await write("/v1/completions", {...asked(), prompt: before}, piece => {
      const follows = paper.scrollHeight - paper.scrollTop - paper.clientHeight < 60;
      paper.value += piece;
      $("text-count").textContent = `${++count} tokens`;
      if (follows) paper.scrollTop = paper.scrollHeight;
    }, running.signal);
    $("text-count").textContent = described(found);
  } catch (error) {
    if (error.name === "AbortError") $("text-count").textContent += " · stopped";
    else { $("text-error").textContent = problem(error); $("text-error").hidden = false; }
  }
  if (paper.value.length > began) pieces.push(before);
  paper.readOnly = false;
  busy(null);
  paper.focus();
}
function undo() {
  if (!pieces.length || running) return;
  $("paper").value = pieces.pop();
  busy(null);
}

// --- the page ------------------------------------------------------------------------------------
function busy(controller) {
  running = controller;
  $("send").hidden = Boolean(controller);
  $("stop").hidden = !controller;
  $("go").textContent = controller ? "Stop" : "Continue";
  $("undo").disabled = $("again").disabled = Boolean(controller) || !pieces.length;
}
function stop() { running?.abort(); }
function mode(name) {
  stop();
  $("chat").hidden = name !== "chat";
  $("text").hidden = name !== "text";
  $("system-label").hidden = name !== "chat";
  $("to-chat").setAttribute("aria-pressed", name === "chat");
  $("to-text").setAttribute("aria-pressed", name === "text");
  $("base").hidden = name !== "chat" || !model || model.chat === "trained";
  keep(session, "gpt2-mode", name);
  if (matchMedia("(pointer: fine)").matches) $(name === "chat" ? "input" : "paper").focus();
}
// Opens or closes a panel; the focus goes into it, and back to the button that opened it.
function panel(name, opener, closer, open) {
  const inside = $(name).contains(document.activeElement), opens = open && $(name).hidden;
  $(name).hidden = !open;
  $(opener).setAttribute("aria-expanded", open);
  if (opens) $(closer).focus();
  else if (!open && inside) $(opener).focus();
}
function showSettings(open) {
  panel("settings", "gear", "close", open);
  $("shade").hidden = !open && $("conversations").hidden;
}
function showList(open) {
  panel("conversations", "to-list", "close-list", open);
  $("shade").hidden = !open && $("settings").hidden;
}
function fill() {
  for (const name of NUMBERS) {
    $(name).value = settings[name];
    document.querySelector(`output[for=${name}]`).textContent = settings[name];
  }
  $("system").value = settings.system;
  $("seed").value = settings.seed;
}
async function begin() {
  try {
    const response = await fetch("/v1/models", {headers: headers()});
    if (!response.ok) throw await complaint(response);
    model = (await response.json()).data[0];
  } catch (error) {
    $("base").textContent = problem(error);
    $("base").hidden = false;
    return;
  }
  document.title = $("name").textContent = $("name").title = model.id;
  $("max_tokens").max = Math.max(8, Math.min(model.max_new_tokens, Math.floor(model.context_length / 2)));
  settings.max_tokens = Math.min(settings.max_tokens, Number($("max_tokens").max));
  fill();
  const base = $("base"), link = make("button", "", "continue a text");
  const impossible = model.chat === "impossible";
  base.replaceChildren(impossible ? "This model cannot chat. It can " : "This model has not been trained on conversations: it imitates them rather than answering. It can ", link, ".");
  link.onclick = () => mode("text");
  if (!messages.length && !running) {
    const before = load(session, "gpt2-open", null);
    openConversation(keptConversations().find(each => each.id === before) ?? conversation);
  }
  show();
  mode(load(session, "gpt2-mode", null) ?? (model.chat === "trained" ? "chat" : "text"));
}
$("form").onsubmit = event => { event.preventDefault(); send(); };
$("input").oninput = grow;
$("input").onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && matchMedia("(pointer: fine)").matches) { event.preventDefault(); send(); }
};
$("stop").onclick = stop;
$("go").onclick = () => running ? stop() : proceed();
$("undo").onclick = undo;
$("again").onclick = () => { tries += 1; undo(); proceed(); };
$("paper").onkeydown = event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { tries = 0; proceed(); } };
$("to-chat").onclick = () => mode("chat");
$("to-text").onclick = () => mode("text");
$("new").onclick = () => { openConversation(fresh()); pieces = []; $("paper").value = $("text-count").textContent = ""; busy(running); $($("chat").hidden ? "paper" : "input").focus(); };
$("gear").onclick = () => showSettings($("settings").hidden);
$("to-list").onclick = () => showList($("conversations").hidden);
$("close").onclick = () => showSettings(false);
$("close-list").onclick = () => showList(false);
$("shade").onclick = () => { showSettings(false); if (matchMedia("(max-width: 760px)").matches) showList(false); };
$("undelete").onclick = restoreDeleted;
$("export-all").onclick = () => download("conversations", ".jsonl", keptConversations().map(asJson).join(""));
window.onstorage = showConversations;  // another tab has kept or deleted one
$("defaults").onclick = () => { settings = {...DEFAULTS, max_tokens: Math.min(DEFAULTS.max_tokens, Number($("max_tokens").max))}; fill(); keep(local, "gpt2-settings", settings); };
$("key").onchange = () => { try { session.setItem("gpt2-key", $("key").value); } catch { /* full */ } begin(); };
$("settings").oninput = event => {
  const name = event.target.id;
  if (!(name in DEFAULTS)) return;
  settings[name] = NUMBERS.includes(name) ? Number(event.target.value) : event.target.value;
  fill();
  keep(local, "gpt2-settings", settings);
};
document.onkeydown = event => {
  const typing = ["INPUT", "TEXTAREA"].includes(document.activeElement?.tagName);
  if (event.key === "Escape") {
    if (running) stop();
    else if ($("conversations").contains(document.activeElement)) showList(false);
    else showSettings(false);
  }
  if (event.key === "/" && !typing) { event.preventDefault(); $($("chat").hidden ? "paper" : "input").focus(); }
};
begin();
