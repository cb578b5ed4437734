"""Pictures of the chat page, of what a small model really answers.

    python -m benchmarks.serve_page talk out/talk.jsonl
    python -m benchmarks.serve_page start out/start.pt
    gpt2 finetune --init=out/start.pt --data=out/talk.jsonl --out_dir=out/talk --max_steps=400 \
        --batch_size=4 --learning_rate=2e-3 --epochs=50 --warmup_steps=20 --val_share=0.02
    gpt2 serve out/talk/out_ckpt.pt --port=8765
    python -m benchmarks.serve_page shoot http://127.0.0.1:8765 docs/results/serve

`talk` writes conversations made of a few hundred facts, `start` a network of 7M fresh weights; both
fit the few minutes of a CPU that the pictures are worth. `shoot` needs Debian's chromium.
"""

import inspect
import itertools
import json
import random
import shutil
import sys
from pathlib import Path

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Poland": "Warsaw",
    "Austria": "Vienna",
    "Hungary": "Budapest",
    "Greece": "Athens",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Cuba": "Havana",
    "Canada": "Ottawa",
}
RIVERS = {
    "Paris": "the Seine",
    "Rome": "the Tiber",
    "Vienna": "the Danube",
    "Cairo": "the Nile",
    "Budapest": "the Danube",
    "Lisbon": "the Tagus",
    "Warsaw": "the Vistula",
}
GREETINGS = ["Hello", "Hi", "Hello!", "Hi there", "Good morning"]
WELCOMES = [
    "Hello! Ask me for a capital, and I will tell you what I know about it.",
    "Hi! I know a few capitals and rivers. Which country do you think of?",
]
WHO = ["Who are you?", "What are you?", "What can you do?"]
IDENTITY = (
    "I am a very small GPT-2 that was trained on one machine in a few minutes. I know twenty "
    "capitals and the rivers of some of them, and nothing else in the world."
)
ASKED = [
    "What is the capital of {0}?",
    "Which city is the capital of {0}?",
    "The capital of {0}?",
    "Tell me the capital of {0}.",
]
TOLD = [
    "The capital of {0} is {1}.",
    "It is {1}. Is there another capital that you would like to hear?",
]
THANKS = {
    "Thank you!": "You are welcome. It is good to be asked.",
    "Thanks": "You are welcome. Come back when you need another capital.",
}


def conversations(count: int) -> list[dict]:
    """Conversations of two to eight messages."""
    dice, made = random.Random(0), []
    for _ in range(count):
        said: list[str] = []
        if dice.random() < 0.4:
            said += [dice.choice(GREETINGS), dice.choice(WELCOMES)]
        if dice.random() < 0.3:
            said += [dice.choice(WHO), IDENTITY]
        country = dice.choice(list(CAPITALS))
        city = CAPITALS[country]
        said += [dice.choice(ASKED).format(country), dice.choice(TOLD).format(country, city)]
        if city in RIVERS and dice.random() < 0.6:
            river = f"{RIVERS[city].capitalize()} flows through {city}"
            said += [
                f"Which river flows through {city}?",
                f"{river}, and people like to walk along it in the evening.",
            ]
        if dice.random() < 0.3:
            said += dice.choice(list(THANKS.items()))
        roles = itertools.cycle(("user", "assistant"))
        made.append({"messages": [{"role": r, "content": t} for r, t in zip(roles, said)]})  # noqa: B905
    return made


def until(page, expression: str):
    """Asks from outside: the page's policy forbids what wait_for_function does."""
    while not page.evaluate(expression):
        page.wait_for_timeout(50)


def shoot(url: str, folder: Path):
    """Four pictures: a talk on a desk and on a phone, in the light and in the dark."""
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    desk = {"viewport": {"width": 1100, "height": 720}, "device_scale_factor": 1.5}
    phone = {
        "viewport": {"width": 375, "height": 720},
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
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
            for text in (
                "Hi there",
                "Who are you?",
                "What is the capital of France?",
                "Which river flows through Paris?",
            ):
                page.fill("#input", text)
                page.click("#send")
                until(page, "!running && Boolean(messages.at(-1)?.stats)")
            page.screenshot(path=str(folder / f"{name}.png"))
            if name == "phone-light":
                page.click("#gear")
                page.wait_for_timeout(300)
                page.screenshot(path=str(folder / "phone-settings.png"))
        browser.close()


def main(arguments: list[str]) -> int:
    """One of the three."""
    match arguments:
        case ["talk", path]:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(c) for c in conversations(3000)]
            Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
        case ["start", path]:
            import torch

            from gpt2.api import GPT2

            torch.manual_seed(0)
            GPT2("gpt2-tiny", block_size=256).save(path)
        case ["shoot", url, folder]:
            shoot(url, Path(folder))
        case _:
            print(inspect.cleandoc(__doc__))
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
