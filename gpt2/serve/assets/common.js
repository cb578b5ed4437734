"use strict";
// Shared by the pages. No text ever becomes HTML: everything is put in as textContent or value.
const $ = id => document.getElementById(id);
const ICONS = {
  copy: "M9 9h11v11H9zM5 15H4V4h11v1", again: "M20 12a8 8 0 1 1-2.5-5.8M20 3v4h-4", edit: "M4 20h4L19 9l-4-4L4 16z", remove: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13",
};

// The browser's storage; where it is disabled, one that is `lost` with the page.
function storage(name) {
  try { window[name].getItem("gpt2"); return window[name]; } catch { /* below */ }
  const held = new Map();
  return {
    lost: true, get length() { return held.size; }, key: at => [...held.keys()][at], getItem: key => held.get(key) ?? null,
    setItem: (key, value) => held.set(key, String(value)), removeItem: key => held.delete(key),
  };
}
const local = storage("localStorage"), session = storage("sessionStorage");

function load(store, name, otherwise) {
  try {
    const found = JSON.parse(store.getItem(name));
    if (found === null) return structuredClone(otherwise);
    return otherwise === null || Array.isArray(otherwise) ? found : {...otherwise, ...found};
  } catch { return structuredClone(otherwise); }
}
function keep(store, name, value) { try { store.setItem(name, JSON.stringify(value)); } catch { /* full: forgotten */ } }
function make(tag, kind, text) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}
function button(icon, label, action) {
  const made = make("button"), svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  path.setAttribute("d", ICONS[icon]);
  svg.append(path);
  made.append(svg);
  made.title = label;
  made.setAttribute("aria-label", label);
  made.onclick = () => action(made);
  return made;
}
function copy(text) {
  return async pressed => {
    const label = pressed.title;
    if (!await copied(text())) return;
    pressed.title = pressed.ariaLabel = "Copied";
    pressed.style.color = "var(--accent)";
    setTimeout(() => { pressed.style.color = ""; pressed.title = pressed.ariaLabel = label; }, 1200);
  };
}
// Whether a text was copied. Browsers offer `navigator.clipboard` over https and on this machine only.
async function copied(text) {
  try { await navigator.clipboard.writeText(text); return true; } catch { /* below */ }
  const field = make("textarea"), before = document.activeElement;
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  before?.focus();
  return done;
}
