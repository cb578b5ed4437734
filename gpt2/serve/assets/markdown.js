// Markdown of a model as DOM nodes. The model's text goes into text nodes alone, so it cannot become HTML.
//
// `MarkdownWriter` takes an answer piece by piece. A line that is complete is written once and stays. The last line,
// which is still growing, is written provisionally and taken back with the next piece. The time for an answer is
// therefore linear in its length, and the nodes do not depend on how the text was cut into pieces.
//
// Marks end within their line. A line over `LONGEST_PART` characters is written in parts, and no mark spans two.
const LONGEST_PART = 1000;  // characters
const DEEPEST = 3;          // marks inside of marks
const MOST_LISTS = 8;       // lists inside of lists

const FENCE = /^(\s*)(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)(\s#*)?$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const ITEM = /^(\s*)([-*+]|(\d{1,9})[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const ROW = /^ {0,3}\|(.*)\|\s*$/;
const UNDECIDED = /^\s*(#{1,6}|[-*+_][-*_ ]*|\d{1,9}[.)]?|\|.*|>|[`~]{1,2}|[`~]{3}.*)?\s*$/;  // may become any of these

class MarkdownWriter {
  // `into`: an empty element.
  constructor(into) {
    this.into = into;
    this.line = "";         // the last line, as far as it is not written for good
    this.provisional = [];  // nodes of that line
    // `paragraph`: takes the next line of text; `lists`: open lists, outermost first; `within`: where the line goes on
    this.state = {paragraph: null, lists: [], quote: null, table: null, fence: null, within: null};
  }

  add(piece) {
    const lines = (this.line + piece).split("\n");
    this.line = lines.pop();
    this.takeBack();
    for (const line of lines) this.write(this.cut(line), true);
    this.line = this.cut(this.line);
    this.provisional = [];
    const before = this.state, held = before.fence ? /^\s*[`~]*\s*$/ : UNDECIDED;
    if (before.within || !held.test(this.line)) this.write(this.line, false);
    this.state = before;
  }

  // Writes the line that is left, also if it could have become something else.
  end() {
    const rest = this.line;
    this.line = "";
    this.takeBack();
    if (rest) this.write(rest, true);
    this.provisional = [];
  }

  // Removes the last line; what is written from now on stays, until `provisional` is a list again.
  takeBack() {
    for (const node of this.provisional.reverse()) node.remove();
    this.provisional = null;
  }

  // Writes the parts of a line that is too long for one, and gives the last.
  cut(line) {
    while (line.length > LONGEST_PART) {
      let end = line.lastIndexOf(" ", LONGEST_PART - 1) + 1;
      if (end < LONGEST_PART / 2) end = LONGEST_PART - (/[\ud800-\udbff]/.test(line[LONGEST_PART - 1]) ? 1 : 0);
      this.write(line.slice(0, end), false);
      line = line.slice(end);
    }
    return line;
  }

  // Writes a line or a part of one; `complete`: it ends here.
  write(line, complete) {
    const state = this.state = {...this.state};
    if (state.fence) this.writeCode(line, complete);
    else if (state.within) inline(line, node => this.put(state.within, node));
    else state.within = this.begin(line, complete);
    if (complete) state.within = null;
  }

  put(parent, node) {
    parent.append(node);
    this.provisional?.push(node);
    return node;
  }

  // Begins a line; gives the element in which it goes on.
  begin(line, complete) {
    const state = this.state, text = line.trimStart();
    let found;
    if (!text) {
      Object.assign(state, {paragraph: null, quote: null, table: null});
      return null;
    }
    if ((found = FENCE.exec(line)) && complete) return this.beginCode(found);
    if ((found = ROW.exec(line)) && complete) return this.writeRow(found[1]);
    state.table = null;
    if ((found = HEADING.exec(line))) {
      this.leave();
      return this.text(this.put(this.into, make("h" + Math.min(6, found[1].length + 1))), found[2]);
    }
    if (RULE.test(line)) {
      this.leave();
      this.put(this.into, make("hr"));
      return null;
    }
    if ((found = ITEM.exec(line))) return this.beginItem(found);
    if ((found = QUOTE.exec(line))) {
      const quote = state.quote;
      this.leave();
      state.quote = quote ?? this.put(this.into, make("blockquote"));
      return this.text(state.quote, (quote ? "\n" : "") + found[1]);
    }
    if (state.paragraph) return this.text(state.paragraph, "\n" + text);
    const indented = /^\s/.test(line) && state.lists.length;
    if (!indented) this.leave();
    state.paragraph = this.put(indented ? state.lists.at(-1).item : this.into, make("p"));
    return this.text(state.paragraph, text);
  }

  // Closes all that is open.
  leave() { Object.assign(this.state, {paragraph: null, lists: [], quote: null, table: null}); }

  text(element, text) {
    inline(text, node => this.put(element, node));
    return element;
  }

  beginItem([, space, mark, number, text]) {
    const state = this.state, indent = space.replace(/\t/g, "    ").length;
    const tag = number === undefined ? "ul" : "ol";
    const lists = state.lists.filter(list => list.indent <= indent);
    let last = lists.at(-1);
    if (last && (indent < last.indent + 2 || lists.length === MOST_LISTS)) {
      if (last.tag !== tag) { lists.pop(); last = null; }
    } else last = null;
    if (!last) {
      const list = this.put(lists.at(-1)?.item ?? this.into, make(tag));
      if (tag === "ol" && Number(number) !== 1) list.start = Number(number);
      last = {tag, list, indent};
      lists.push(last);
    }
    const item = this.put(last.list, make("li"));
    lists[lists.length - 1] = {...last, item};
    Object.assign(state, {lists, paragraph: this.put(item, make("p")), quote: null});
    return this.text(state.paragraph, text);
  }

  beginCode([, indent, fence, name]) {
    const state = this.state, language = name.trim().split(/\s/)[0];
    if (!indent) this.leave();
    const [made, code] = codeBlock(language.slice(0, 30));
    this.put(state.lists.at(-1)?.item ?? this.into, made);
    Object.assign(state, {paragraph: null, quote: null, table: null, fence: {fence, indent: indent.length, code, began: false}});
    return null;
  }

  writeCode(line, complete) {
    const state = this.state, {fence, indent, code, began} = state.fence;
    const end = line.trim();
    if (complete && !state.within && end.length >= fence.length && end === fence[0].repeat(end.length)) {
      state.fence = null;
      return;
    }
    const shown = state.within ? line : line.replace(/^\s*/, space => space.slice(indent));
    this.put(code, document.createTextNode((began && !state.within ? "\n" : "") + shown));
    state.fence = {...state.fence, began: true};
    state.within = code;
  }

  writeRow(line) {
    const state = this.state, cells = line.split(/(?<!\\)\|/).map(cell => cell.trim().replace(/\\\|/g, "|"));
    if (state.table && cells.every(cell => /^:?-+:?$/.test(cell))) return null;
    const first = !state.table;
    if (first) {
      this.leave();
      const scrolled = this.put(this.into, make("div", "table"));
      scrolled.tabIndex = 0;
      state.table = scrolled.appendChild(make("table"));
    }
    const row = this.put(state.table, make("tr"));
    for (const cell of cells) {
      const place = row.appendChild(make(first ? "th" : "td"));
      inline(cell, node => place.append(node));
    }
    return null;
  }
}

function codeBlock(language) {
  const made = make("div", "code"), head = make("div", "code-head", language), pre = make("pre"), code = make("code");
  head.append(button("copy", "Copy code", copy(() => code.textContent)));
  pre.tabIndex = 0;  // so that the keyboard can scroll it
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  pre.append(code);
  made.append(head, pre);
  return [made, code];
}

// Calls `put` with the nodes of a text within a line: code, bold, italics, links.
function inline(text, put, depth = 0) {
  let plain = 0;
  for (let at = 0; at < text.length;) {
    const found = depth < DEEPEST ? mark(text, at, depth) : null;
    if (!found) { at += 1; continue; }
    if (at > plain) put(document.createTextNode(text.slice(plain, at)));
    put(found.node);
    at = plain = found.end;
  }
  if (text.length > plain) put(document.createTextNode(text.slice(plain)));
}

const ESCAPE = /\\([!-\/:-@[-`{-~])/y;
const LINK = /\[([^\[\]]+)\]\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+"[^"]*")?\s*\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`]+/y;

// The mark that begins at a character, as {node, end}; null for none.
function mark(text, at, depth) {
  const first = text[at];
  let found;
  if (first === "\\" && (found = match(ESCAPE, text, at))) return {node: document.createTextNode(found[1]), end: at + 2};
  if (first === "`") return codeSpan(text, at);
  if (first === "*" || first === "_") return emphasis(text, at, depth);
  if (first === "[" && (found = match(LINK, text, at))) {
    const node = link(found[2], found[1]);
    return {node: node ?? document.createTextNode(found[0]), end: at + found[0].length};
  }
  if (first === "h" && !/\w/.test(text[at - 1] ?? "") && (found = match(ADDRESS, text, at))) {
    const address = found[0].replace(/[.,:;!?*_]+$/, "").replace(/^([^(]*)\)+$/, "$1");
    const node = link(address, address);
    return node && {node, end: at + address.length};
  }
  return null;
}

function match(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

function runAt(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

function codeSpan(text, at) {
  const length = runAt(text, at);
  for (let end = at + length; (end = text.indexOf("`", end)) >= 0;) {
    const other = runAt(text, end);
    if (other === length) {
      const inside = text.slice(at + length, end);
      return {node: make("code", "", /^ .*\S.* $/.test(inside) ? inside.slice(1, -1) : inside), end: end + length};
    }
    end += other;
  }
  return {node: document.createTextNode(text.slice(at, at + length)), end: at + length};
}

// *italics*, **bold**, ***both***; with _ only around whole words, so that names_with_it stay what they are.
function emphasis(text, at, depth) {
  const sign = text[at], length = runAt(text, at), literal = {node: document.createTextNode(text.slice(at, at + length)), end: at + length};
  const begin = at + length;
  if (length > 3 || /^\s?$/.test(text[begin] ?? "") || (sign === "_" && /\w/.test(text[at - 1] ?? ""))) return literal;
  for (let end = begin; (end = text.indexOf(sign, end)) >= 0;) {
    const other = runAt(text, end);
    const closes = other === length && !/\s/.test(text[end - 1]) && !(sign === "_" && /\w/.test(text[end + length] ?? ""));
    if (closes) {
      const outer = make(length === 1 ? "em" : "strong");
      const inner = length === 3 ? outer.appendChild(make("em")) : outer;
      inline(text.slice(begin, end), node => inner.append(node), depth + 1);
      return {node: outer, end: end + length};
    }
    end += other;
  }
  return literal;
}

// A link that opens beside the page; null unless it is one of http or https that hides no other address.
function link(address, label) {
  let url;
  try { url = new URL(address); } catch { return null; }
  if (!["http:", "https:"].includes(url.protocol) || url.username || url.password) return null;
  const named = /^(?:https?:\/\/|www\.)[^\s\/?#]*/i.exec(label)?.[0].replace(/^https?:\/\//i, "").toLowerCase();
  if (named !== undefined && named !== url.host) return null;
  const made = make("a", "", label);
  made.href = url.href;
  made.title = url.href;
  made.target = "_blank";
  made.rel = "noopener noreferrer nofollow";
  return made;
}
