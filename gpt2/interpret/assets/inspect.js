"use strict";
// Everything from the text and the model is written by textContent, never as HTML.
const D = JSON.parse(document.getElementById("data").textContent);
const T = D.ids.length, L = D.shape.n_layer, H = D.shape.n_head;
const $ = (id) => document.getElementById(id);
const at = { token: T > 1 ? Math.ceil(T / 2) : T, row: L, layer: 0, head: 0, query: 0, key: -1 };

function el(tag, kind, ...children) {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  node.append(...children);
  return node;
}
function sign(text) { return el("span", "sign", text); }
const percent = (p) => p >= 0.9995 ? "100 %" : p >= 0.0995 ? `${(100 * p).toFixed(0)} %`
  : p >= 0.001 ? `${(100 * p).toFixed(1)} %` : p >= 1e-5 ? `${(100 * p).toFixed(3)} %`
  : p > 0 ? "< 0.001 %" : "0 %";
const number = (n) => n.toLocaleString("en-US");
const bits = (nats) => nats / Math.LN2;

// ---- tokens as text: spaces, line ends and half characters are made visible

function visible(text) {
  const parts = [];
  for (const piece of text.split(/([ \t\n\r]|[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff])/)) {
    if (!piece) continue;
    const shown = { " ": "·", "\t": "⇥", "\n": "↵", "\r": "␍" }[piece];
    const code = piece.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    const hidden = /^[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]$/.test(piece);
    parts.push(shown ? sign(shown) : hidden ? sign(`U+${code}`) : piece);
  }
  return parts;
}
function token(id) {
  const name = D.names[id];
  if (typeof name === "string") return el("span", "tok", ...visible(name));
  return el("span", "tok bytes", name.map((b) => b.toString(16).padStart(2, "0")).join(" "));
}
function plain(id) {
  const name = D.names[id];
  return typeof name === "string" ? JSON.stringify(name)
    : `bytes ${name.map((b) => b.toString(16)).join(" ")}`;
}
function strip(place, each) {  // the text as spans, one per token, with its line ends
  D.pieces.forEach((text, i) => {
    const span = el("span", "t");
    span.dataset.i = i;
    if (text === "") span.append(sign("‥"));
    for (const part of text.split(/(\n)/)) {
      if (part === "\n") span.append(sign("↵"), el("br"));
      else span.append(...part.split(/(\t)/).map((p) => p === "\t" ? sign("⇥ ")
        : p === " " && text === " " ? sign("·") : p));
    }
    each(span, i);
    place.append(span);
  });
}

// ---- head of the page

function tile(label, value, unit) {
  $("tiles").append(el("div", "", el("dt", "", label), el("dd", "", value, el("small", "", unit))));
}
function head() {
  document.title = `${D.name} · gpt2 inspect`;
  const s = D.shape, on = Object.entries(D.switches).map(([k, v]) => `${k}=${v}`).join(", ");
  $("model").textContent = `${D.model}: ${s.n_layer} layers × ${s.n_head} heads, ${s.n_embd} `
    + `channels, context ${number(s.block_size)}`
    + (D.step === null ? "" : `, after ${number(D.step)} steps`)
    + (on ? `. Not as in GPT-2: ${on}` : "");
  tile("tokens", number(T), ` of ${number(s.block_size)}`);
  if (D.loss !== null) {
    tile("loss per token", D.loss.toFixed(3), " nats");
    tile("loss of the text", D.total.toFixed(1), " nats");
    tile("perplexity", Math.exp(D.loss) < 1e6 ? number(+Math.exp(D.loss).toFixed(1)) : "> 1e6", "");
    const right = D.ranks.filter((r) => r === 1).length;
    tile("likeliest was right", percent(right / D.predicted), ` of ${number(D.predicted)}`);
  }
  if (D.bitsPerByte !== null) {
    tile("bits per byte", D.bitsPerByte.toFixed(3), ` of ${number(D.bytes)} bytes`);
  }
  if (T === 1) D.note = "One token: nothing was predicted in this text. " + D.note;
  $("notes").hidden = !D.note;
  $("notes").textContent = D.note;
  if ("skips" in D.switches) {
    $("lens-skips").textContent = "This network also hands outputs of early layers to late ones "
      + "(skips), which a lens on a state in between does not see.";
  }
}

// ---- the text and the chosen token

const LEGENDS = { bits: ["0 bits", "12 or more"], p: ["0 %", "100 %"], rank: ["rank 1", "1,000th"] };
function shade(kind, i) {  // 0 … 1 for token i
  const nats = D.nats[i - 1];
  if (kind === "bits") return Math.min(1, bits(nats) / 12);
  if (kind === "p") return Math.exp(-nats);
  return Math.min(1, Math.log10(D.ranks[i - 1]) / 3);
}
function paint() {
  const kind = document.querySelector("#colour input:checked").value;
  $("strip").classList.toggle("by-p", kind === "p");
  for (const span of $("strip").children) {
    const i = +span.dataset.i;
    if (i > 0 && i < T) span.style.setProperty("--a", shade(kind, i).toFixed(3));
  }
  const ramp = el("i"), hue = kind === "p" ? "--good" : "--hot";
  ramp.style.background = `linear-gradient(90deg, transparent, rgb(var(${hue}) / var(--most)))`;
  $("legend").replaceChildren(LEGENDS[kind][0], ramp, LEGENDS[kind][1]);
}
function drawStrip() {
  strip($("strip"), (span, i) => {
    span.id = `t${i}`;
    span.setAttribute("role", "option");
    if (i === 0) { span.classList.add("first"); span.title = "predicted from nothing"; return; }
    span.title = `${percent(Math.exp(-D.nats[i - 1]))}, ${bits(D.nats[i - 1]).toFixed(1)} bits, `
      + `rank ${number(D.ranks[i - 1])}`;
  });
  const next = el("span", "t next", "?");
  next.id = `t${T}`; next.dataset.i = T; next.title = "what may follow";
  next.setAttribute("role", "option"); next.setAttribute("aria-label", "what may follow");
  $("strip").append(next);
  $("strip").addEventListener("click", (e) => {
    const span = e.target.closest(".t");
    if (span) choose(+span.dataset.i);
  });
  $("colour").addEventListener("change", paint);
  paint();
}
function bar(n, id, p, came) {
  const fill = el("i");
  fill.style.width = `${Math.max(0.6, 100 * p)}%`;
  const item = el("li", came ? "came" : "", el("span", "n", number(n)), token(id),
    el("span", "bar", fill), el("span", "p", percent(p)));
  item.title = plain(id) + (came ? ", the token that came" : "");
  return item;
}
function drawToken() {
  const i = at.token, place = $("token");
  if (i === 0) {
    place.replaceChildren(el("p", "quote", token(D.ids[0])), el("p", "",
      "The first token. Nothing stands before it, so the network predicts nothing here: it is given. "
      + "Its probability is unknown, and no sum on this page counts it."));
    return;
  }
  const list = el("ol", "bars"), actual = i < T ? D.ids[i] : null;
  D.topIds[i - 1].forEach((id, n) => list.append(bar(n + 1, id, D.topProbs[i - 1][n], id === actual)));
  const shown = D.topIds[i - 1].length;
  const sum = D.topProbs[i - 1].reduce((a, b) => a + b, 0);
  const said = el("p", "muted", `These ${shown} hold ${percent(sum)} of the probability; the other `
    + `${number(D.vocabulary - shown)} tokens share the rest.`);
  if (actual === null) {
    place.replaceChildren(el("p", "quote", "?"), el("p", "", "What may follow the text. `gpt2 sample` "
      + "draws from such a list, token after token."), list, said);
    return;
  }
  const nats = D.nats[i - 1], rank = D.ranks[i - 1], p = Math.exp(-nats);
  if (!D.topIds[i - 1].includes(actual)) list.append(el("li", "gap", "⋯"), bar(rank, actual, p, true));
  const figure = (value, label) => el("div", "", el("b", "", value), label);
  place.replaceChildren(
    el("p", "quote", token(actual)),
    el("p", "muted", `token ${i} of the text, id ${D.ids[i]}, after `, token(D.ids[i - 1])),
    el("div", "three", figure(percent(p), "probability"), figure(bits(nats).toFixed(2), "bits of surprise"),
      figure(number(rank), `rank of ${number(D.vocabulary)}`)),
    list, said);
}

// ---- logit lens: a column reads token j and predicts token j + 1

function drawLens() {
  const side = el("div", "side", el("div", "head", "reads"));
  for (let r = 0; r <= L; r++) {
    let mean = 0;
    for (let j = 0; j < T - 1; j++) mean -= Math.log2(Math.max(D.lensActual[r][j], 1e-30)) / (T - 1);
    const name = r === 0 ? "embedding" : r === L ? `layer ${r - 1} = output` : `layer ${r - 1}`;
    const cell = el("div", "c", name);
    if (T > 1) cell.append(sign(`  ${mean.toFixed(1)} bits`));
    cell.title = "mean surprise at the tokens that came, if the network ended here";
    side.append(cell);
  }
  side.append(el("div", "foot", "what came"));
  const columns = [side];
  for (let j = 0; j < T; j++) {
    const column = el("div", "col", el("div", "head", token(D.ids[j])));
    for (let r = 0; r <= L; r++) {
      const guess = D.lensIds[r][j][0], cell = el("div", "c", token(guess));
      cell.dataset.r = r;
      if (j < T - 1) {
        cell.style.setProperty("--a", D.lensActual[r][j].toFixed(3));
        if (guess === D.ids[j + 1]) cell.classList.add("hit");
      }
      column.append(cell);
    }
    column.append(el("div", "foot", j < T - 1 ? token(D.ids[j + 1]) : "?"));
    column.dataset.j = j;
    columns.push(column);
  }
  $("lens").replaceChildren(...columns);
  $("lens").classList.toggle("many", T * L > 4000);  // the browser then lays out what is in view
  $("lens").addEventListener("click", (e) => {
    const column = e.target.closest(".col");
    if (!column) return;
    if (e.target.closest(".c")) at.row = +e.target.closest(".c").dataset.r;
    choose(+column.dataset.j + 1);
  });
}
function drawCell(scroll) {
  for (const node of $("lens").querySelectorAll(".on")) node.classList.remove("on");
  const j = at.token - 1, r = at.row;
  if (j < 0) { $("cell").textContent = "Nothing predicts the first token."; return; }
  const column = $("lens").children[j + 1], cell = column.children[r + 1];
  column.classList.add("on"); cell.classList.add("on");
  if (scroll) {
    const box = $("lens"), side = box.firstChild.offsetWidth, left = column.offsetLeft;
    if (left < box.scrollLeft + side || left + column.offsetWidth > box.scrollLeft + box.clientWidth) {
      box.scrollLeft = left - (box.clientWidth + side - column.offsetWidth) / 2;
    }
  }
  const chips = D.lensIds[r][j].map((id, n) => el("span",
    j < T - 1 && id === D.ids[j + 1] ? "chip came" : "chip", token(id), ` ${percent(D.lensProbs[r][j][n])}`));
  const where = r === 0 ? "From the embedding alone" : r === L ? "The network itself"
    : `After layer ${r - 1}`;
  const came = j < T - 1 ? [" The token that came, ", token(D.ids[j + 1]),
    `, has ${percent(D.lensActual[r][j])} there.`] : [];
  $("cell").replaceChildren(`${where}, behind `, token(D.ids[j]), ": ", ...chips, ...came);
}
