// ---- attention: a byte for each head, query and key up to the query: 255 · √weight

const maps = D.attention.map((text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
const SIZE = T * (T + 1) / 2;
const byte = (l, h, q, k) => maps[l][h * SIZE + q * (q + 1) / 2 + k];
const weight = (l, h, q, k) => (byte(l, h, q, k) / 255) ** 2;
const seen = (l, q, k) => k <= q && k >= D.first[l][q];
let scores = null, cellSize = 0, mapSize = 0;

function headScores() {  // mean weight on four kinds of places, over all tokens but the first
  const earlier = D.ids.map((id, q) => D.ids.slice(0, q).flatMap((x, j) => x === id ? [j + 1] : []));
  const repeats = earlier.filter((list, q) => q > 0 && list.length).length;
  scores = [];
  for (let l = 0; l < L; l++) for (let h = 0; h < H; h++) {
    const s = { l, h, first: 0, previous: 0, self: 0, induction: repeats ? 0 : NaN };
    for (let q = 1; q < T; q++) {
      s.first += weight(l, h, q, 0) / (T - 1);
      s.self += weight(l, h, q, q) / (T - 1);
      if (q > 1) s.previous += weight(l, h, q, q - 1) / (T - 2);
      for (const k of earlier[q]) s.induction += weight(l, h, q, k) / repeats;
    }
    scores.push(s);
  }
  $("finders").hidden = T < 4;
  for (const button of $("finders").querySelectorAll("button")) {
    const kind = button.dataset.find;
    button.disabled = kind === "induction" && !repeats;
    if (button.disabled) button.title = "no token of this text occurs twice";
    button.addEventListener("click", () => {
      const best = scores.reduce((a, b) => b[kind] > a[kind] ? b : a);
      chooseHead(best.l, best.h);
    });
  }
}
function palette() {  // RGB of a byte, and of what cannot be seen
  const style = getComputedStyle(document.documentElement);
  const rgb = (name) => style.getPropertyValue(name).trim();
  const hex = (text) => [0, 1, 2].map((i) => parseInt(text.length < 5 ? text[i + 1] + text[i + 1]
    : text.slice(1 + 2 * i, 3 + 2 * i), 16));
  const from = hex(rgb("--card")), to = rgb("--look").split(" ").map(Number), line = hex(rgb("--line"));
  const table = new Uint8ClampedArray(3 * 256);
  for (let b = 0; b < 256; b++) for (let c = 0; c < 3; c++) {
    const share = b / 255;
    const strong = to[c] * (1 - 0.35 * Math.max(0, share - 0.6));
    table[3 * b + c] = from[c] + (strong - from[c]) * (0.04 + 0.96 * share);
  }
  return { table, line, back: hex(rgb("--paper")) };
}
function fill(image, width, x0, y0, size, l, h, colours) {  // a head as size × size pixels
  const skip = $("hide").checked ? 1 : 0;  // the first token; what is left is drawn larger
  let top = 255;
  if (skip) {
    top = 1;
    for (let q = 1; q < T; q++) for (let k = 1; k <= q; k++) top = Math.max(top, byte(l, h, q, k));
  }
  for (let y = 0; y < size; y++) {
    const q0 = Math.floor(y * T / size), q1 = Math.max(q0 + 1, Math.floor((y + 1) * T / size));
    for (let x = 0; x < size; x++) {
      const k0 = Math.floor(x * T / size), k1 = Math.max(k0 + 1, Math.floor((x + 1) * T / size));
      let most = -1;  // of the pairs under this pixel: a thin line must not fade
      for (let q = q0; q < q1; q++) for (let k = Math.max(k0, skip); k < k1; k++) {
        if (seen(l, q, k)) most = Math.max(most, byte(l, h, q, k));
      }
      const p = 4 * ((y0 + y) * width + x0 + x);
      const hatch = most < 0 && k0 <= q0 && k0 >= skip && (x + y) % 6 < 2;
      const b = Math.round(255 * Math.min(1, most / top));
      for (let c = 0; c < 3; c++) {
        image[p + c] = most >= 0 ? colours.table[3 * b + c] : hatch ? colours.line[c] : colours.back[c];
      }
      image[p + 3] = 255;
    }
  }
}
function prepare(canvas, width, height, ratio) {
  canvas.width = width * ratio; canvas.height = height * ratio;
  canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
  return canvas.getContext("2d");
}
let overview = { key: "" };  // the picture of all heads, drawn when size, colours or data change
function paintOverview(step, left, head, ratio) {
  const canvas = document.createElement("canvas"), size = cellSize * ratio;
  canvas.width = (left + H * step) * ratio; canvas.height = (head + L * step) * ratio;
  const context = canvas.getContext("2d"), colours = palette(), image = new ImageData(size, size);
  const style = getComputedStyle(document.body);
  context.fillStyle = style.getPropertyValue("--soft");
  context.strokeStyle = style.getPropertyValue("--line");
  context.font = `${11 * ratio}px ${style.fontFamily}`;
  context.textAlign = "center"; context.textBaseline = "middle";
  for (let h = 0; h < H; h++) context.fillText(h, ratio * (left + h * step + cellSize / 2), 8 * ratio);
  for (let l = 0; l < L; l++) {
    context.fillText(l, 12 * ratio, ratio * (head + l * step + cellSize / 2));
    for (let h = 0; h < H; h++) {
      fill(image.data, size, 0, 0, size, l, h, colours);
      context.putImageData(image, (left + h * step) * ratio, (head + l * step) * ratio);
      context.strokeRect((left + h * step) * ratio, (head + l * step) * ratio, size, size);
    }
  }
  return canvas;
}
function drawOverview() {
  const gap = 3, left = 26, head = 18, ratio = 2;
  cellSize = Math.floor(($("overview-frame").clientWidth - left - 4) / H) - gap;
  cellSize = Math.max(18, Math.min(104, cellSize));
  const step = cellSize + gap, look = document.documentElement.dataset.theme;
  const key = `${cellSize} ${look} ${$("hide").checked}`;
  if (overview.key !== key) overview = { key, canvas: paintOverview(step, left, head, ratio) };
  const context = prepare($("overview"), left + H * step, head + L * step, ratio);
  context.drawImage(overview.canvas, 0, 0);
  context.strokeStyle = getComputedStyle(document.body).getPropertyValue("--ink");
  context.lineWidth = 2.5 * ratio;
  context.strokeRect((left + at.head * step) * ratio, (head + at.layer * step) * ratio,
    cellSize * ratio, cellSize * ratio);
  $("overview").setAttribute("aria-label", `Maps of ${L} layers by ${H} heads; chosen: layer `
    + `${at.layer}, head ${at.head}. Arrow keys choose another.`);
}
let mapImage = null;
function drawMap() {
  const room = Math.min(480, $("map-frame").clientWidth - 2);
  const ratio = Math.min(2, Math.ceil(window.devicePixelRatio || 1));
  mapSize = Math.floor(room);
  const context = prepare($("map"), mapSize, mapSize, ratio), size = mapSize * ratio;
  mapImage = new ImageData(size, size);
  fill(mapImage.data, size, 0, 0, size, at.layer, at.head, palette());
  context.putImageData(mapImage, 0, 0);
  const s = scores[at.layer * H + at.head];
  $("head-name").textContent = `Layer ${at.layer}, head ${at.head}`;
  $("head-facts").textContent = T < 3 ? "" : `Mean weight in this text: first token ${percent(s.first)}, `
    + `previous ${percent(s.previous)}, itself ${percent(s.self)}`
    + (Number.isNaN(s.induction) ? "" : `, what followed an earlier equal token ${percent(s.induction)}`);
}
function drawQuery() {
  const context = $("map").getContext("2d"), unit = $("map").width / T;
  context.putImageData(mapImage, 0, 0);
  context.strokeStyle = getComputedStyle(document.body).getPropertyValue("--ink");
  context.lineWidth = 1.5;
  context.strokeRect(0.5, at.query * unit, Math.max(unit * (at.query + 1), 2), Math.max(unit, 2));
  const { layer: l, head: h, query: q } = at, skip = $("hide").checked ? 1 : 0;
  const row = Array.from({ length: q + 1 }, (_, k) => [weight(l, h, q, k), k]);
  const rest = row.slice(skip), most = rest.length ? Math.max(...rest.map((x) => x[0])) : 0;
  for (const span of $("attended").children) {
    const k = +span.dataset.i, w = k <= q && k >= skip ? row[k][0] : 0;
    const share = skip && most ? w / most : w;
    span.style.setProperty("--a", Math.sqrt(share).toFixed(3));
    span.classList.toggle("unseen", k > q);
    span.classList.toggle("masked", k <= q && !seen(l, q, k));
    span.classList.toggle("on", k === q);
    span.title = k > q ? "later: not visible" : seen(l, q, k) ? percent(row[k][0])
      : "not visible to this layer";
  }
  const chips = row.sort((a, b) => b[0] - a[0]).slice(0, 5).filter((x) => x[0] > 0)
    .flatMap(([w, k]) => [token(D.ids[k]), k === q ? " (itself)" : k === 0 ? " (the first)" : "",
      ` ${percent(w)}   `]);
  const next = q + 1 < T ? [" to predict ", token(D.ids[q + 1])] : [" to predict what follows"];
  const under = at.key >= 0 && at.key <= q
    ? [" Under the pointer: ", token(D.ids[at.key]), seen(l, q, at.key)
      ? ` ${percent(weight(l, h, q, at.key))}.` : " is not visible to this layer."] : [];
  $("query").replaceChildren("Reading ", token(D.ids[q]), ` (token ${q})`, ...next,
    ", this head looks at: ", ...chips, ...under);
}
function chooseHead(l, h) {
  at.layer = Math.max(0, Math.min(L - 1, l));
  at.head = (h + H) % H;
  $("layer").value = at.layer; $("head").value = at.head;
  drawOverview(); drawMap(); drawQuery();
}
function pairUnder(e) {
  const box = $("map").getBoundingClientRect(), unit = box.width / T;
  const clip = (x) => Math.max(0, Math.min(T - 1, Math.floor(x / unit)));
  at.query = clip(e.clientY - box.top); at.key = clip(e.clientX - box.left);
  drawQuery();
}
function attention() {
  if (!maps.length) {
    $("attention-body").hidden = true;
    $("attention-missing").hidden = false;
    $("attention-missing").textContent = D.note || "No attention maps in this page.";
    return;
  }
  for (let l = 0; l < L; l++) $("layer").append(new Option(l, l));
  for (let h = 0; h < H; h++) $("head").append(new Option(h, h));
  strip($("attended"), () => {});
  headScores();
  const over = (e) => {
    const box = $("overview").getBoundingClientRect(), step = cellSize + 3;
    const h = Math.floor((e.clientX - box.left - 26) / step), l = Math.floor((e.clientY - box.top - 18) / step);
    return l >= 0 && l < L && h >= 0 && h < H ? [l, h] : null;
  };
  $("overview").addEventListener("click", (e) => { const hit = over(e); if (hit) chooseHead(...hit); });
  $("overview").addEventListener("pointermove", (e) => {
    const hit = over(e), s = hit && scores[hit[0] * H + hit[1]];
    $("overview").title = s ? `layer ${s.l}, head ${s.h}: first ${percent(s.first)}, `
      + `previous ${percent(s.previous)}, itself ${percent(s.self)}` : "";
  });
  $("map").addEventListener("pointermove", pairUnder);
  $("map").addEventListener("pointerdown", pairUnder);
  $("map").addEventListener("pointerleave", () => { at.key = -1; drawQuery(); });
  const follow = (e) => {
    const span = e.target.closest(".t");
    if (span) { at.query = +span.dataset.i; at.key = -1; drawQuery(); }
  };
  $("attended").addEventListener("pointerover", (e) => { if (e.pointerType === "mouse") follow(e); });
  $("attended").addEventListener("click", follow);
  for (const id of ["layer", "head"]) {
    $(id).addEventListener("change", () => chooseHead(+$("layer").value, +$("head").value));
  }
  $("hide").addEventListener("change", () => chooseHead(at.layer, at.head));
  const kind = T > 3 && scores.some((s) => s.induction > 0.1) ? "induction" : "previous";
  const best = scores.reduce((a, b) => b[kind] > a[kind] ? b : a);
  chooseHead(best.l, best.h);
}

// ---- what belongs together

function choose(i) {
  at.token = Math.max(0, Math.min(T, i));
  at.query = Math.max(0, at.token - 1); at.key = -1;
  for (const span of $("strip").children) {
    span.setAttribute("aria-selected", +span.dataset.i === at.token);
  }
  $("strip").setAttribute("aria-activedescendant", `t${at.token}`);
  drawToken(); drawCell(true); drawPatch();
  if (maps.length) drawQuery();
}
function keys(e) {
  if (e.ctrlKey || e.metaKey || e.altKey || /^(INPUT|SELECT|SUMMARY)$/.test(e.target.tagName)) return;
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key];
  if (e.target.id === "overview" && step) chooseHead(at.layer + step[1], at.head + step[0]);
  else if (e.target.id === "map" && step) {
    at.query = Math.max(0, Math.min(T - 1, at.query + step[0] + step[1])); drawQuery();
  } else if (e.target.id === "patch" && step && patchAt) {
    patchAt = [Math.max(0, Math.min(L, patchAt[0] + step[1])),
      Math.max(0, Math.min(at.token - 1, patchAt[1] + step[0]))];
    tellPatch();
  } else if (e.target.id === "lens" && step && step[1]) {
    at.row = Math.max(0, Math.min(L, at.row + step[1])); drawCell(true);
  } else if (step && step[0]) {
    choose(at.token + step[0]);
    $(`t${at.token}`).scrollIntoView({ block: "nearest" });
  } else if (maps.length && (e.key === "[" || e.key === "]")) {
    const h = at.head + (e.key === "]" ? 1 : -1);
    chooseHead(h < 0 ? at.layer - 1 : h >= H ? at.layer + 1 : at.layer, h);
  } else return;
  e.preventDefault();
}
function theme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  if (mapImage) chooseHead(at.layer, at.head);
}
const system = window.matchMedia("(prefers-color-scheme: dark)");
theme(system.matches);
system.addEventListener("change", () => theme(system.matches));
$("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme !== "dark"));
head(); patching(); drawStrip(); drawLens(); attention(); choose(at.token);
document.addEventListener("keydown", keys);
let waiting = 0;
window.addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => { if (maps.length) chooseHead(at.layer, at.head); }, 150);
});
