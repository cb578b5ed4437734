"""Markdown of a model on the chat page: what it becomes, and what hostile text does not become."""

import random

import pytest

from ..browser import chromium
from .canned import canned_page, events, say

# In pieces of `size` characters; 0: all at once. Heads of code blocks are left out.
RENDER = """([text, size]) => {
  const made = make("div"), writer = new MarkdownWriter(made);
  for (let at = 0; at < text.length; at += size || text.length) {
    writer.add(text.slice(at, at + (size || text.length)));
  }
  writer.end();
  for (const head of made.querySelectorAll(".code-head")) head.remove();
  return made.innerHTML;
}"""
EVIL = '<img src=x onerror="harmed=1"><script>harmed=1</script><svg onload=harmed=1>'
LONG = "word " * 900 + "**bold** " + "x" * 5000 + "😀" * 1500


@pytest.fixture(scope="module")
def page():
    with chromium() as browser, canned_page(browser, lambda _: "") as opened:
        yield opened


def code(text: str, name: str = "Code") -> str:
    pre = f'<pre tabindex="0" role="region" aria-label="{name}">'
    return f'<div class="code">{pre}<code>{text}</code></pre></div>'


def link(address: str, label: str) -> str:
    rel = 'target="_blank" rel="noopener noreferrer nofollow"'
    return f'<a href="{address}" title="{address}" {rel}>{label}</a>'


CASES = {
    "plain": "<p>plain</p>",
    "one\ntwo\n\nthree": "<p>one\ntwo</p><p>three</p>",
    "# One\n### Three ##": "<h2>One</h2><h4>Three</h4>",
    "**b** *i* ***both*** __b__ _i_": "<p><strong>b</strong> <em>i</em> "
    "<strong><em>both</em></strong> <strong>b</strong> <em>i</em></p>",
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "a_name_here 2 * 3 * 4 ** 5 **open": "<p>a_name_here 2 * 3 * 4 ** 5 **open</p>",
    "\\*no\\* `*no*` ``a`b`` `open": "<p>*no* <code>*no*</code> <code>a`b</code> `open</p>",
    "- a\n- b\n  - c\n    1. d\n- e": "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p><ol>"
    "<li><p>d</p></li></ol></li></ul></li><li><p>e</p></li></ul>",
    "3. a\n\n   more\n4) b\n\nout": '<ol start="3"><li><p>a</p><p>more</p></li><li>'
    "<p>b</p></li></ol><p>out</p>",
    "- a\n1. b": "<ul><li><p>a</p></li></ul><ol><li><p>b</p></li></ol>",
    "> said\n> again": "<blockquote>said\nagain</blockquote>",
    "a\n\n---\nb": "<p>a</p><hr><p>b</p>",
    "```py\nif a:\n    b = '**c**'\n\n```\nafter": code("if a:\n    b = '**c**'\n", "Code, py")
    + "<p>after</p>",
    "~~~\n```\n~~~": code("```"),
    "```\nnever closed <b>": code("never closed &lt;b&gt;"),
    "1. do:\n   ```\n   a\n     b\n   ```\n2. c": "<ol><li><p>do:</p>" + code("a\n  b")
    + "</li><li><p>c</p></li></ol>",
    "| a | b |\n|---|:-:|\n| `x` | y \\| z |\n\n|v| = 1": '<div class="table" tabindex="0"><table>'
    "<tr><th>a</th><th>b</th></tr><tr><td><code>x</code></td><td>y | z</td></tr></table></div>"
    "<p>|v| = 1</p>",
    "[it](https://a.org/b_(c)) (http://b.org/x).": f"<p>{link('https://a.org/b_(c)', 'it')}"
    f" ({link('http://b.org/x', 'http://b.org/x')}).</p>",
    "#\n-\n1.\n``": "<p>#\n-\n1.\n``</p>",
}  # fmt: skip


@pytest.mark.parametrize("text", CASES)
def test_markdown_becomes_nodes(page, text):
    for size in (0, 1):
        assert page.evaluate(RENDER, [text, size]) == CASES[text]


@pytest.mark.parametrize("address", [
    "javascript:harmed=1", "JaVaScRiPt:harmed=1", "&#106;avascript:harmed=1", "data:text/html,x",
    "vbscript:x", "file:///etc/passwd", "blob:http://a.org/1", "//a.org", "/v1/models",
    "mailto:a@b.c", "java\tscript:harmed=1", "https://user:word@a.org",
    "https://", "ftp://a.org", "",
])  # fmt: skip
def test_other_addresses_stay_text(page, address):
    shown = page.evaluate(RENDER, [f"[click]({address})", 0])
    assert "<a" not in shown
    assert "click" in shown


def test_a_link_that_shows_another_address_stays_text(page):
    for label in ("https://bank.org", "www.bank.org/login", "HTTP://bank.org"):
        assert "<a" not in page.evaluate(RENDER, [f"[{label}](https://evil.org/)", 0])
    assert "<a" in page.evaluate(RENDER, ["[https://bank.org/x](https://bank.org/y)", 0])


def test_hostile_text_becomes_nothing_but_text(page):
    places = ("{}", "# {}", "**{}**", "`{}`", "- {}", "> {}", "| {} |", "```{}\n{}\n```",
              "[{}]({})", "[a](https://a.org/{})", "```\n{}", "1. {}\n   {}",
              '[a](https://a.org "{}")')  # fmt: skip
    text = "\n\n".join(place.replace("{}", EVIL) for place in places)
    page.unroute_all()
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        body=events(text), headers={"content-type": "text/event-stream"}))  # fmt: skip
    say(page, "Hello")
    answer = page.locator(".assistant .text")
    assert answer.locator("img, script, iframe, object, style, link, form").count() == 0
    assert answer.locator("svg").count() == answer.locator("svg path[d]").count()  # of copy buttons
    # no attribute of the text's: these are the ones that the renderer sets
    names = answer.evaluate("e => [...new Set([...e.querySelectorAll('*')]"
                            ".flatMap(x => x.getAttributeNames()))].sort()")  # fmt: skip
    assert set(names) <= {"aria-label", "class", "d", "href", "rel", "role", "start", "tabindex",
                          "target", "title", "viewBox"}  # fmt: skip
    assert page.evaluate("typeof harmed") == "undefined"
    assert answer.inner_text().count("<script>harmed=1</script>") >= len(places)


def test_the_nodes_do_not_depend_on_how_the_text_arrives(page):
    """Nor does any text make the writer raise."""
    draw = random.Random(0)
    parts = [*CASES, EVIL, "\n", "\n\n", "  ", "\t", "`", "```", "**", "*", "_", "[", "](", ")",
             "|", "- ", "1. ", "# ", "> ", "~~~", "http://a.org", "😀", "text", LONG]  # fmt: skip
    texts = ["".join(draw.choices(parts, k=draw.randint(1, 25))) for _ in range(50)]
    same = """([texts]) => texts.filter(text => {
      const render = %s;
      const whole = render([text, 0]);
      return [1, 7].some(size => text.length < 9000 * size && render([text, size]) !== whole);
    })"""
    assert page.evaluate(same % RENDER, [texts]) == []
    shown = page.evaluate("([t, f]) => { const e = make('div'), w = new MarkdownWriter(e);"
                          " w.add(t); w.end(); return e.textContent; }", [LONG, 0])  # fmt: skip
    assert shown == LONG.replace("**", "")


@pytest.mark.parametrize("piece", ["word ", "word\n", "* ", "[a](", "`", "**a", "| a ", "```", "x"])
def test_a_piece_costs_equally_much_wherever_it_comes(page, piece):
    """The writer reads at most the last part of the text again, so an answer takes linear time."""
    work = """([piece]) => {
      const writer = new MarkdownWriter(make("div")), write = writer.write.bind(writer);
      let most = 0, read = 0;
      writer.write = (line, complete) => { read += line.length; write(line, complete); };
      for (let at = 0; at < 1500; at += 1) {
        read = 0;
        writer.add(piece);
        most = Math.max(most, read);
      }
      return [most, LONGEST_PART];
    }"""
    most, longest = page.evaluate(work, [piece])
    assert most <= 2 * longest


def test_a_code_block_is_copied_and_finished_lines_stay_while_an_answer_grows(page):
    page.evaluate("""() => {
      window.clip = null;
      navigator.clipboard.writeText = async text => { window.clip = text; };
      window.host = document.body.appendChild(make("div"));
      window.writer = new MarkdownWriter(host);
      writer.add("First.\\n\\n```py\\nprint(1)\\n");
      host.firstChild.mine = host.querySelector("code").firstChild.mine = true;
      writer.add("print(2)\\n``");
      writer.add("`\\nThe end");
    }""")
    assert page.evaluate("host.firstChild.mine && host.querySelector('code').firstChild.mine")
    page.click("[aria-label='Copy code'] >> nth=-1")
    assert page.evaluate("clip") == "print(1)\nprint(2)"
    page.evaluate("host.remove()")
