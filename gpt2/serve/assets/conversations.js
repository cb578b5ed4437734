// Conversations: kept by the browser, listed beside the chat, renamed, deleted, exported.
//
// Each has its own entry of localStorage, so that two tabs do not overwrite what the other keeps.
const ENTRY = "gpt2-conversation-";
const MOST_CHARACTERS = 4e6;  // of all together: browsers give a page about 5 million
const LONGEST_TITLE = 60;
const FULL = "The browser has no room left for this conversation: it ends with this tab. Export it, or delete others.";
const LOST = "This browser keeps nothing for this page: conversations end with this tab. Export those that you need.";
let conversation = fresh();
let deleted = null;  // the last one, for "Undo"

function fresh() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 10);
  return {id, title: "", named: false, changed: 0, system: "", messages: []};
}

// The conversations that are kept, the newest first. What is no conversation is left alone.
function keptConversations() {
  const found = [];
  for (let at = 0; at < local.length; at += 1) {
    const name = local.key(at);
    if (!name.startsWith(ENTRY)) continue;
    const entry = {...fresh(), ...load(local, name, {})};
    const good = entry.messages instanceof Array && entry.messages.every(
      m => ["user", "assistant"].includes(m?.role) && typeof m.content === "string");
    if (good && ENTRY + entry.id === name) found.push({...entry, title: String(entry.title), system: String(entry.system)});
  }
  return found.sort((a, b) => b.changed - a.changed);
}

// Keeps a conversation in the browser, or says why it cannot.
function keepConversation(one) {
  if (!one.messages.length) return;
  if (!one.named) one.title = one.messages[0].content.trim().split("\n")[0].slice(0, LONGEST_TITLE);
  const entry = JSON.stringify(one);
  let others = 0;
  for (let at = 0; at < local.length; at += 1) {
    const name = local.key(at);
    if (name.startsWith(ENTRY) && name !== ENTRY + one.id) others += local.getItem(name).length;
  }
  let problem = local.lost ? LOST : "";
  try {
    if (others + entry.length > MOST_CHARACTERS) throw new RangeError(FULL);
    local.setItem(ENTRY + one.id, entry);
  } catch { problem = FULL; }
  $("storage").textContent = problem;
  $("storage").hidden = !problem;
}

function openConversation(one) {
  stop();
  conversation = one;
  messages = one.messages;
  keep(session, "gpt2-open", one.id);
  show();
  showConversations();
}

function deleteConversation(one) {
  deleted = one;
  local.removeItem(ENTRY + one.id);
  if (one.id === conversation.id) openConversation(fresh());
  else showConversations();
}

function restoreDeleted() {
  keepConversation(deleted);
  const one = deleted;
  deleted = null;
  openConversation(one);
}

// --- the list ------------------------------------------------------------------------------------
function showConversations() {
  const list = $("list"), all = keptConversations();
  list.replaceChildren(...all.map(row));
  $("none").hidden = all.length > 0;
  $("export-all").hidden = !all.length;
  $("deleted").hidden = !deleted;
}

function row(one) {
  const made = make("li"), opens = make("button", "title", one.title || "Without a title");
  opens.title = one.title;
  opens.onclick = () => {
    mode("chat");
    openConversation(one);
    if (matchMedia("(max-width: 760px)").matches) showList(false);
  };
  made.append(opens);
  if (one.id === conversation.id) {
    opens.setAttribute("aria-current", "true");
    const tools = make("div", "tools"), save = (name, action) => {
      const saver = make("button", "", name);
      saver.title = saver.ariaLabel = `Export as ${name}`;
      saver.onclick = action;
      return saver;
    };
    tools.append(
      button("edit", "Rename", () => rename(made, one)),
      button("remove", "Delete", () => deleteConversation(one)),
      make("span", "", "Export"),
      save("JSON", () => download(one.title, ".json", asJson(one))),
      save("Markdown", () => download(one.title, ".md", asMarkdown(one))),
    );
    made.append(tools);
  }
  return made;
}

function rename(place, one) {
  const field = make("input");
  field.value = one.title;
  field.maxLength = 200;
  field.setAttribute("aria-label", "Title");
  let open = true;
  const end = kept => {
    if (!open) return;
    open = false;
    const target = one.id === conversation.id ? conversation : one;
    if (kept && field.value.trim()) {
      Object.assign(target, {title: field.value.trim(), named: true});
      keepConversation(target);
    }
    showConversations();
    document.querySelector("#list [aria-current] + .tools button")?.focus();
  };
  field.onblur = () => end(true);
  field.onkeydown = event => {
    if (event.key === "Enter") { event.preventDefault(); end(true); }  // or it would press what has the focus next
    if (event.key === "Escape") { event.stopPropagation(); end(false); }
  };
  place.replaceChildren(field);
  field.select();
}

// --- export --------------------------------------------------------------------------------------
// The messages in OpenAI's form, which `gpt2 finetune --data=` reads; those that failed are left out.
function exported(one) {
  const said = one.messages.filter(m => m.content && (m.role === "user" || !m.error));
  const system = one.system.trim() ? [{role: "system", content: one.system}] : [];
  return [...system, ...said.map(({role, content}) => ({role, content}))];
}
function asJson(one) { return JSON.stringify({messages: exported(one)}) + "\n"; }
function asMarkdown(one) {
  const names = {system: "System", user: "You", assistant: model?.id ?? "Model"};
  const parts = exported(one).map(({role, content}) => `**${names[role]}**\n\n${content.trim()}\n`);
  return [`# ${one.title}\n`, ...parts].join("\n");
}

function download(title, ending, text) {
  const link = make("a"), name = title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 50);
  link.href = URL.createObjectURL(new Blob([text], {type: "text/plain"}));
  link.download = (name || "conversation") + ending;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
