// ---- activation patching: rows are layers, columns are places, of the prediction that is chosen

const P = D.patch;
let patchAt = null;  // [row, place] of the chosen cell

function drawPatch() {
  if (!P) return;
  const t = at.token - 1, said = $("patch-said"), place = $("patch");
  const changes = t >= 0 && P.effect[0][0][t] !== null;
  place.hidden = $("patch-cell").hidden = !changes;
  if (!changes) {
    said.textContent = t < 0 ? "Nothing predicts the first token. Choose a later one."
      : "Both texts lead to the same prediction here. Choose a token behind their first difference.";
    return;
  }
  const [a, b] = P.probs;
  said.replaceChildren("Behind ", token(D.ids[t]), ` (token ${t}), the text says `, token(P.ours[t]),
    ` ${percent(a[0][t])} and `, token(P.theirs[t]), ` ${percent(a[1][t])}; the second text `,
    token(P.ours[t]), ` ${percent(b[0][t])} and `, token(P.theirs[t]), ` ${percent(b[1][t])}.`);
  const side = el("div", "side", el("div", "head", "in the text"), el("div", "head", "in the second"));
  for (let r = 0; r <= L; r++) side.append(el("div", "c", r ? `layer ${r - 1}` : "embedding"));
  const columns = [side];
  for (let j = 0; j <= t; j++) {
    const column = el("div", "col", el("div", "head", token(D.ids[j])),
      el("div", D.ids[j] === P.ids[j] ? "head same" : "head", token(P.ids[j])));
    for (let r = 0; r <= L; r++) {
      const value = P.effect[r][j][t], cell = el("div", "c", value ? `${value} %` : "·");
      cell.style.setProperty("--a", Math.min(1, Math.abs(value) / 100).toFixed(3));
      if (value < 0) cell.classList.add("away");
      cell.dataset.r = r;
      column.append(cell);
    }
    column.dataset.j = j;
    columns.push(column);
  }
  place.replaceChildren(...columns);
  tellPatch();
}
function tellPatch() {
  const t = at.token - 1;
  for (const node of $("patch").querySelectorAll(".on")) node.classList.remove("on");
  if (!patchAt || patchAt[1] > t) { $("patch-cell").textContent = ""; return; }
  const [r, j] = patchAt, value = P.effect[r][j][t];
  $("patch").children[j + 1].children[r + 2].classList.add("on");
  $("patch-cell").replaceChildren(r ? `After layer ${r - 1}` : "In the embedding",
    `, the state of token ${j}, `, token(P.ids[j]), " in the second text, moves ", el("b", "", `${value} %`),
    " of the prediction behind ", token(D.ids[t]), ".");
}
function patching() {
  $("patching").hidden = !P;
  if (!P) return;
  at.token = T;  // the last prediction comes after every difference
  let most = -1;
  for (let r = 1; r < L; r++) for (let j = 0; j < T; j++) {
    if (P.effect[r][j][T - 1] > most) { most = P.effect[r][j][T - 1]; patchAt = [r, j]; }
  }
  if (["skips", "value_embeddings", "value_projection"].some((name) => name in D.switches)) {
    $("patch-around").textContent = "In this network the embedding also reaches later layers past "
      + "the stream (skips, value embeddings or projections), which a patch of the stream does not change.";
  }
  $("patch").addEventListener("click", (e) => {
    const cell = e.target.closest(".c"), column = e.target.closest(".col");
    if (!cell || !column) return;
    patchAt = [+cell.dataset.r, +column.dataset.j];
    tellPatch();
  });
}

