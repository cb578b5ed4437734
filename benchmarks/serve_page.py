"""Pictures of the pages: the chat page with what `box-chat` really answers, and an inspected text.

    gpt2 serve box-chat --port=8765
    python -m benchmarks.serve_page chat http://127.0.0.1:8765 docs/results/serve
    gpt2 inspect box "The capital of France is the city of" \
        --patch="The capital of Italy is the city of"
    python -m benchmarks.serve_page inspect inspect.html docs/results/inspect

They need Debian's chromium.
"""

import inspect
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

QUESTIONS = (
    "Name three animals that live in the sea.",
    "What is the capital of France?",
    "Who are you?",
)


def until(page, expression: str):
    """Asks from outside: the page's policy forbids what wait_for_function does."""
    while not page.evaluate(expression):
        page.wait_for_timeout(50)


@contextmanager
def chromium():
    """The system's browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


def shoot_chat(url: str, folder: Path):
    """Five pictures: a talk on a desk and on a phone, in the light and in the dark; settings."""
    folder.mkdir(parents=True, exist_ok=True)
    desk = {"viewport": {"width": 1100, "height": 720}, "device_scale_factor": 1.5}
    phone = {
        "viewport": {"width": 375, "height": 720},
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
    }
    with chromium() as browser:
        for name, settings, scheme in (
            ("desk-light", desk, "light"),
            ("phone-dark", phone, "dark"),
            ("desk-dark", desk, "dark"),
            ("phone-light", phone, "light"),
        ):
            page = browser.new_context(**settings, color_scheme=scheme).new_page()
            page.goto(url)
            until(page, "Boolean(model)")
            if name == "desk-light":
                page.click("#gear")
            for text in QUESTIONS:
                page.fill("#input", text)
                page.click("#send")
                until(page, "!running && Boolean(messages.at(-1)?.stats)")
            page.screenshot(path=str(folder / f"{name}.png"))
            if name == "phone-light":
                page.click("#gear")
                page.wait_for_timeout(300)
                page.screenshot(path=str(folder / "phone-settings.png"))


def shoot_inspect(page_path: Path, folder: Path):
    """The whole page, and its panel of patching."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        page = browser.new_context(viewport={"width": 1240, "height": 900}).new_page()
        page.goto(page_path.resolve().as_uri())
        panel = page.locator("#patching")
        if panel.is_visible():
            panel.screenshot(path=str(folder / "patching.png"))
        page.evaluate("document.getElementById('patching').hidden = true")
        page.screenshot(path=str(folder / "page.png"), full_page=True)
    for name in ("patching.png", "page.png"):
        if (folder / name).exists():  # flat colours: a palette halves the file
            Image.open(folder / name).convert("RGB").quantize(256).save(folder / name)


def main(arguments: list[str]) -> int:
    """One of the two."""
    match arguments:
        case ["chat", url, folder]:
            shoot_chat(url, Path(folder))
        case ["inspect", page, folder]:
            shoot_inspect(Path(page), Path(folder))
        case _:
            print(inspect.cleandoc(__doc__))
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
