"""The page of `gpt2 inspect` in a real browser."""

import json
import math

import pytest

from gpt2.checkpoint.weights import Weights
from gpt2.commands.inspect_text import _facts, encode
from gpt2.interpret.html_page import build
from gpt2.interpret.logit_lens import look
from gpt2.interpret.patching import patch_effects

from ..browser import chromium
from ..commands.test_inspect_text import small

HOSTILE = (
    "</script><script>window.hacked=1</script>"
    "<img src=x onerror=window.hacked=2> <!-- <script> &lt;b&gt;\u202e🙂\x07"
)


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def show(browser, tmp_path):
    """Opens a text's page; nothing may fail or be asked for from elsewhere."""
    faults, contexts = [], []

    def opened(text: str, model=None, maps=True, note="", patch="", **settings):
        model = model or small()
        seen = look(model, encode(text, special=True), attention=maps)
        found = Weights(model.config, {}, "<b>a model</b>", step=7)
        path = tmp_path / "page.html"
        patched = patch_effects(model, seen.ids, encode(patch, special=True)) if patch else None
        facts = _facts(found, seen, "m.pt") | {"note": note}
        path.write_text(build(seen, facts, patched=patched), "utf-8")
        contexts.append(browser.new_context(**settings))
        tab = contexts[-1].new_page()
        tab.on("pageerror", lambda e: faults.append(str(e)))
        tab.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        tab.on("dialog", lambda d: faults.append(d.message))
        tab.on("request", lambda r: faults.append(r.url) if not r.url.startswith(
            (path.as_uri(), "data:")) else None)  # fmt: skip
        tab.goto(path.as_uri())
        return tab, seen

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def state(tab, expression: str):
    return json.loads(tab.evaluate(f"JSON.stringify({expression})"))


def test_hostile_text_is_only_text(show):
    tab, seen = show(HOSTILE, patch=HOSTILE.replace("hacked=2", "hacked=3"))
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("img, b[onerror]").count() == 0
    assert tab.locator("script").count() == 2  # the data and ours
    assert tab.locator("#strip .t").count() == len(seen.ids) + 1
    assert "".join(state(tab, "D.pieces")) == HOSTILE
    assert "<b>a model</b>" in tab.locator("#model").inner_text()


def test_a_token_tells_how_it_was_predicted(show):
    tab, seen = show("def main(argv): return main")
    tab.locator("#strip .t").nth(3).click()
    bits = seen.nats[2].item() / math.log(2)
    said = tab.locator("#token").inner_text()
    assert f"{bits:.2f}" in said
    assert f"{seen.ranks[2].item():,}" in said
    names = tab.locator("#token .bars li:not(.gap)")
    assert names.count() == 11  # ten, and the one that came
    assert tab.locator("#token .bars .came").count() == 1
    tab.keyboard.press("ArrowLeft")
    assert state(tab, "at.token") == 2
    assert tab.locator("#strip [aria-selected=true]").get_attribute("data-i") == "2"
    for _ in range(3):
        tab.keyboard.press("ArrowLeft")
    assert "Nothing stands before it" in tab.locator("#token").inner_text()
    tab.locator("#strip .next").click()
    assert tab.locator("#token .bars li").count() == 10


def test_lens_shows_each_layer(show):
    tab, seen = show("def main(argv): return main")
    columns = tab.locator("#lens .col")
    assert columns.count() == len(seen.ids)
    cells = columns.nth(2).locator(".c")
    assert cells.count() == 3
    cells.nth(1).click()
    assert state(tab, "[at.token, at.row]") == [3, 1]
    said = tab.locator("#cell").inner_text()
    assert said.startswith("After layer 0")
    assert tab.locator("#cell .chip").count() == 5
    shown = float(cells.nth(1).evaluate("c => c.style.getPropertyValue('--a')"))
    assert math.isclose(shown, seen.lens_actual[1, 2].item(), abs_tol=0.001)
    tab.locator("#lens").focus()
    tab.keyboard.press("ArrowDown")
    assert state(tab, "at.row") == 2


@pytest.mark.parametrize("switch", ["skips", "value_embeddings", "value_projection"])
def test_patching_says_where_the_embedding_passes_the_stream(show, switch):
    model = small(**{switch: "unet" if switch == "skips" else 1})
    tab, _ = show("one two", model, patch="one three")
    assert "the embedding also reaches later layers" in tab.text_content("#patch-around")


def test_patching_shows_the_effect_on_the_chosen_prediction(show):
    text, other = "The capital of France is", "The capital of Italy is"
    tab, seen = show(text, patch=other)
    found = patch_effects(small(), seen.ids, encode(other, special=False))
    assert state(tab, "at.token") == len(seen.ids)  # the last one, behind the difference
    columns = tab.locator("#patch .col")
    assert columns.count() == len(seen.ids)
    shown = columns.nth(3).locator(".c")
    last = [round(100 * v) for v in found.effect[:, 3, -1].tolist()]
    assert [c.replace(" %", "").replace("·", "0") for c in shown.all_inner_texts()] == [
        str(v) for v in last
    ]
    assert last[0] == 100
    shown.nth(0).click()
    assert "In the embedding, the state of token 3" in tab.locator("#patch-cell").inner_text()
    tab.locator("#patch").focus()
    tab.keyboard.press("ArrowDown")
    assert state(tab, "patchAt") == [1, 3]
    assert tab.locator("#patch .on").count() == 1
    tab.evaluate("choose(2)")  # before the difference
    assert tab.locator("#patch").is_hidden()
    assert "Both texts lead to the same" in tab.locator("#patch-said").inner_text()
    without, _ = show(text)
    assert without.locator("#patching").is_hidden()


def test_attention_is_what_was_computed(show):
    tab, seen = show("def main(argv): return main")
    T = len(seen.ids)
    for layer in range(2):
        shown = state(tab, f"[0,1].map(h => D.ids.map((_, q) => D.ids.map((_, k) => "
                           f"k <= q ? weight({layer}, h, q, k) : 0)))")  # fmt: skip
        for mine, theirs in zip(shown, seen.attention[layer].tolist(), strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert all(abs(x - y) < 0.004 for x, y in zip(a, b, strict=True))
    tab.locator("#overview").scroll_into_view_if_needed()
    tab.locator("#overview").focus()
    tab.evaluate("chooseHead(0, 0)")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#head-name").inner_text() == "Layer 1, head 1"
    box = tab.locator("#map").bounding_box()
    unit = box["width"] / T
    tab.mouse.move(box["x"] + 2.5 * unit, box["y"] + 4.5 * unit)
    assert state(tab, "[at.query, at.key]") == [4, 2]
    assert "Under the pointer" in tab.locator("#query").inner_text()
    expected = seen.attention[1][1, 4, 2].item() ** 0.5
    shade = tab.locator("#attended .t").nth(2).evaluate("t => t.style.getPropertyValue('--a')")
    assert math.isclose(float(shade), expected, abs_tol=0.004)
    assert tab.locator("#attended .unseen").count() == T - 5


def test_what_a_layer_cannot_see_is_hatched(show):
    model = small(document_mask=True, window_pattern="SL", window=2)
    tab, _ = show("one two<|endoftext|>three four five six", model)
    tab.evaluate("chooseHead(0, 0); choose(D.ids.length)")
    assert tab.locator("#attended .masked").count() == 5  # seven tokens, two in the window
    tab.evaluate("chooseHead(1, 0)")
    assert tab.locator("#attended .masked").count() == 2  # the other document
    assert "window_pattern=SL" in tab.locator("#model").inner_text()


def test_phone_and_dark(show):
    tab, _ = show(
        "def main(argv): return main\n" * 3, viewport={"width": 360, "height": 700},
        is_mobile=True, has_touch=True, color_scheme="dark",
    )  # fmt: skip
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert state(tab, "document.documentElement.dataset.theme") == "dark"
    tab.locator("#strip .t").nth(4).tap()
    assert state(tab, "at.token") == 4
    tab.locator("#theme").tap()
    assert state(tab, "document.documentElement.dataset.theme") == "light"


def test_without_maps_the_page_says_so(show):
    tab, _ = show("def main(argv)", maps=False, note="the attention maps are left out")
    assert tab.locator("#attention-body").is_hidden()
    assert "left out" in tab.locator("#attention-missing").inner_text()
    one, _ = show("a")
    assert "nothing was predicted" in one.locator("#notes").inner_text()


def test_two_hundred_tokens_and_144_heads_stay_quick(show):
    """Bounds are several times what an idle core needs."""
    from gpt2.api import GPT2

    model = GPT2(n_layer=12, n_head=12, n_embd=48, block_size=256, vocab_size=50257).eval()
    tab, seen = show("def main(argv): return main\n" * 28, model)
    assert len(seen.ids) > 200
    took = "(() => {{ const t = performance.now(); {}; return performance.now() - t }})()"
    assert tab.evaluate(took.format("drawQuery()")) < 100
    assert tab.evaluate(took.format("chooseHead(5, 6)")) < 1000
