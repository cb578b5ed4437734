"""README and docs/: every command and every Python block runs, every link and path exists.

Commands run with small numbers where needed, in the order of the text, README first, so that a
reader who follows it from top to bottom has what each of them needs.
"""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from gpt2 import cli
from gpt2.prepare.sources import FINEWEB_FOLDER
from gpt2.report.throughput import peak_flops

from .conftest import ROOT, TINY, TORCHRUN, run_python
from .evaluate.test_tasks import hellaswag_items, lambada_items, write_jsonl
from .fake_hub import fake_hub, parquet_bytes
from .models import reference

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # whose commands run
LINKING = [
    *sorted(ROOT.glob("*.md")),
    *(page for folder in ("docs", "models") for page in sorted((ROOT / folder).rglob("*.md"))),
]
SMALL = [*TINY, "--max_steps=2"]
NO_BATCH = [a for a in SMALL if not a.startswith(("--grad_accum", "--batch_size"))]
OF_GIVEN_WEIGHTS = [a for a in SMALL if not a.startswith(("--n_", "--learning_rate"))]
# What is added to a command to make it small.
ADDED: dict[str, list[str]] = {
    # README.md
    "python -m gpt2 demo": [*SMALL, "--block_size=32"],
    'gpt2 sample box --prompt="The river rises in the mountains and"': ["--max_new_tokens=5"],
    "python fineweb.py": ["--shard_tokens=3000"],
    "python train_gpt2.py": SMALL,
    "python train_gpt2.py --compile_model=True --dtype=bfloat16 --grad_accum_steps=8": [
        a for a in SMALL if not a.startswith(("--grad_accum", "--dtype"))
    ] + ["--n_layer=1", "--out_dir=out/compiled"],
    "python train_gpt2.py --config=configs/gpt2_124m.toml --learning_rate=1e-3": [
        *NO_BATCH, "--batch_size=4", "--total_batch_tokens=256", "--out_dir=out/recipe",
    ],
    "torchrun --standalone --nproc_per_node=2 train_gpt2.py": [*SMALL, "--out_dir=out/two"],
    "gpt2 prepare --source=my_texts --out_dir=data/mine": [],
    "gpt2 train --config=configs/laptop.toml --data_dir=data/mine --out_dir=out/mine": [
        *NO_BATCH, "--total_batch_tokens=0", "--grad_accum_steps=1",
    ],
    "gpt2 plot out/": [],
    'gpt2 sample out/out_ckpt.pt --prompt="Hello world,"': ["--max_new_tokens=5"],
    "gpt2 eval out/out_ckpt.pt": ["--device=cpu"],
    "gpt2 finetune --init=gpt2 --data=chats.jsonl --lora_rank=8": [
        *OF_GIVEN_WEIGHTS, "--eval_every=1",
    ],
    "gpt2 chat out/finetuned/out_ckpt.pt": ["--max_new_tokens=5"],
    # docs/data.md
    "gpt2 shards verify fineweb": [],
    "gpt2 shards info fineweb": [],
    "gpt2 shards show fineweb --doc=17": ["--doc=2"],
    "gpt2 prepare --source=my_texts --tokenizer=my_tokenizer --out_dir=data/own": [],
    "gpt2 train --data_dir=data/own --out_dir=out/own --size=gpt2-mini --block_size=256": SMALL,
    'gpt2 sample out/own --prompt="Hello world,"': ["--max_new_tokens=5"],
    "gpt2 finetune --init=out/own --data=chats.jsonl --out_dir=out/own_chat": [
        *OF_GIVEN_WEIGHTS, "--eval_every=1",
    ],
    "gpt2 chat out/own_chat": ["--max_new_tokens=5"],
    "gpt2 export out/own_chat --to=hf out/own_hf": [],
    "gpt2 train --data_dir=fineweb:0.8,data/mine:0.2 --out_dir=out/mix": SMALL,
    # docs/evaluating.md
    "gpt2 eval out/out_ckpt.pt --hellaswag=hub --lambada=hub --text=my_texts/one.txt "
    "--json=out/eval.json": [
        "--hellaswag=h.jsonl", "--lambada=l.jsonl", "--eval_tokens=500", "--device=cpu",
    ],
    # docs/extending.md
    "gpt2 train --plugin=my_idea.py --mlp=silu --schedule=linear --out_dir=out/idea": [
        *SMALL, "--n_layer=1",
    ],
    'gpt2 sample out/idea/out_ckpt.pt --plugin=my_idea.py --prompt="Hello world,"': [
        "--max_new_tokens=5",
    ],
    # docs/finetuning.md
    "gpt2 eval out/finetuned/out_ckpt.pt": ["--device=cpu"],
    'gpt2 sample out/finetuned/out_adapter --prompt="Hello world,"': ["--max_new_tokens=5"],
    # docs/generating.md
    'gpt2 inspect out/out_ckpt.pt "The cat sat on the mat, and the dog sat on the"': [
        "--out=out/inspect.html",
    ],
    'gpt2 inspect box "The capital of France is the city of" --patch="The capital of Italy is '
    'the city of"': ["--out=out/inspect.html"],
    # docs/huggingface.md
    'gpt2 sample gpt2 --prompt="Hello world,"': ["--max_new_tokens=5"],
    "python train_gpt2.py --init=gpt2 --data_dir=data/mine --out_dir=out/tuned "
    "--learning_rate=3e-5 --max_steps=200": OF_GIVEN_WEIGHTS,
    "gpt2 export out/out_ckpt.pt --to=hf out/hf": [],
    "gpt2 push out/out_ckpt.pt OWNER/NAME": [],
    "gpt2 export out/out_ckpt.pt out/model.gguf --to=gguf": [],
    # docs/install.md
    "gpt2 doctor": ["--timeout_seconds=0"],
    # docs/research.md
    "gpt2 compare out/ out/recipe out/two": [],
    # docs/scaling.md
    "torchrun --standalone --nproc_per_node=2 train_gpt2.py --size=gpt2-xl --parallel=fsdp "
    "--activation_checkpointing=True --batch_size=8 --out_dir=out/xl": SMALL,
    "torchrun --nnodes=1:4 --nproc_per_node=8 --max_restarts=3 --rdzv_backend=c10d "
    "--rdzv_endpoint=HEAD:29500 --rdzv_id=1 -m gpt2 train --out_dir=/shared/out": SMALL,
    "python -m benchmarks.scaling": [],
    "torchrun --standalone --nproc_per_node=2 -m benchmarks.all_reduce": [
        "--bytes=4,1000", "--device=cpu",
    ],
    # docs/speed.md
    "gpt2 profile --batch_size=64 --grad_accum_steps=1": SMALL,
    # docs/switches.md
    "python train_gpt2.py --config=configs/speedrun.toml --mlp=swiglu --document_mask=True": [
        *SMALL, "--n_layer=6", "--total_batch_tokens=0", "--window=8", "--out_dir=out/modern",
    ],
    "python train_gpt2.py --config=configs/speedrun.toml --n_layer=4 --n_head=2 --n_embd=128 "
    "--block_size=128 --window=32 --batch_size=8 --total_batch_tokens=1024 --ema_steps=20 "
    "--max_steps=300 --eval_tokens=50000 --out_dir=out/small": ["--max_steps=2"],
    "python -m benchmarks.sprint configs/speedrun.toml configs/sprint_gpt2_muon.toml "
    "--data_dir=fineweb": [
        "--seconds=0.1", "--evaluations=1", "--val_tokens=500", "--devices=cpu", "--n_layer=6",
        "--total_batch_tokens=0", "--size=gpt2",
        *(a for a in TINY if not a.startswith(("--device", "--n_layer", "--eval", "--block"))),
        "--block_size=160",
    ],
    # docs/training.md
    "gpt2 average out/ --last=8": ["--last=1"],
    "python fineweb.py --source=data/raw --out_dir=data/corpus": [],
    "python train_gpt2.py --config=configs/gpt2_124m.toml --data_dir=data/corpus "
    "--out_dir=out/h200 --max_steps=480 --eval_every=50 --save_every=100": [
        *NO_BATCH, "--batch_size=4", "--total_batch_tokens=256",
    ],
    "gpt2 plot out/h200": [],
    'gpt2 sample out/h200/out_ckpt.pt --prompt="The history of the city begins" --seed=1337 '
    "--max_new_tokens=120": ["--max_new_tokens=5"],
}  # fmt: skip
# What a cluster has and this machine has not, replaced after the command was found in the text.
HERE = {
    "--nproc_per_node=8": ["--nproc_per_node=1"],
    "--rdzv_endpoint=HEAD:29500": ["--rdzv_endpoint=localhost:0"],
    "--rdzv_id=1": ["--rdzv_id=1", "--rdzv_conf=last_call_timeout=1"],  # 1 s for more machines
    "--out_dir=/shared/out": ["--out_dir=out/shared"],
}
# Commands that are not run here: the test file that runs them, and what it calls there.
ELSEWHERE = {
    "gpt2 sweep configs/sprint_gpt2_muon.toml --seeds=1,2,3 --set muon_lr=0.01,0.02": (
        "commands/test_sweep.py", '"sweep"',
    ),
    "gpt2 sweep configs/sprint_gpt2_muon.toml --set muon_lr=0.01,0.02 --seconds=200": (
        "commands/test_sweep.py", '"sweep"',
    ),
    "python -m benchmarks.finetune": ("test_benchmarks.py", "benchmarks.finetune"),
    "python -m benchmarks.generate --nanogpt=../nanoGPT": (
        "test_benchmarks.py", "benchmarks.generate",
    ),
    "python -m benchmarks.loader": ("test_benchmarks.py", "benchmarks.loader"),
    "python -m benchmarks.masks": ("test_benchmarks.py", "benchmarks.masks"),
    "python -m benchmarks.memory": ("test_benchmarks.py", "benchmarks.memory"),
    "python -m benchmarks.prepare": ("test_benchmark_prepare.py", "benchmarks.prepare"),
    "python -m benchmarks.saving": ("test_benchmarks.py", "benchmarks.saving"),
    "python -m benchmarks.scaling --measure": ("test_scaling_measure.py", "benchmarks.scaling"),
    "python -m benchmarks.throughput --before=REV": (
        "test_benchmark_before.py", "throughput, *argv",
    ),
    "python -m benchmarks.generate --before=REV --batch_sizes=1,8": (
        "test_benchmark_before.py", "generate, *SMALL",
    ),
    # with a clone of its own
    "python -m benchmarks.throughput --nanogpt=../nanoGPT --build_nanogpt=../build-nanogpt": (
        "test_benchmarks.py", "benchmarks.throughput",
    ),
    # downloads its tasks; the test has tasks of its own
    "gpt2 lm_eval out/out_ckpt.pt --tasks=hellaswag,piqa": ("test_lm_eval_harness.py", '"lm_eval"'),
    "gpt2 serve out/finetuned/out_ckpt.pt": ("test_server.py", '"serve"'),  # does not end
    "gpt2 serve out/out_ckpt.pt --name=gpt2": ("test_server.py", '"serve"'),
    "lm_eval run --model local-completions --tasks hellaswag --model_args "
    "base_url=http://127.0.0.1:8000/v1/completions,model=gpt2,tokenizer=openai-community/gpt2,"
    "max_length=1024": ("test_lm_eval_harness.py", '"local-completions"'),
}  # fmt: skip
# Commands that only install, that run this test, or that need programs which Python's package
# index does not have.
NOWHERE = {
    "make demo",  # `make -n demo` below
    "python -m venv .venv && . .venv/bin/activate",
    "docker build -t gpt2 .",  # by a job of the workflow
    "docker run --rm gpt2 doctor",
    'docker run --rm --gpus=all -v "$PWD:/work" gpt2 train --data_dir=data/mine --out_dir=out/mine',
    'docker run --rm -p 8000:8000 -v "$PWD:/work" gpt2 serve out/out_ckpt.pt --host=0.0.0.0 '
    "--api_key=KEY",
    "pip uninstall gpt2-from-scratch",
    "hf cache ls",
    "make test",
    "python -m pip install -e .",
    'python -m pip install -e ".[dev]" && python -m pytest -n auto',
    'pip install -e ".[eval]"',
    'pip install -e ".[fast]"',
    'pip install -e ".[serve]"',
    'pip install -e ".[tokenizers]"',
    'pip install "lm-eval[api]"',
    'echo "FROM ./model.gguf" > out/Modelfile && ollama create my-gpt2 -f out/Modelfile',
    "git lfs install",
    "git add -f out/out_ckpt.pt",
    'git commit -m "Weights of my run"',
    "git push",
    'ollama run my-gpt2 "Hello world,"',
    "vllm serve out/hf",
}
# Options of other programs that the text names.
FOREIGN = {
    "standalone", "nproc_per_node", "nnodes", "max_restarts", "rdzv_backend", "rdzv_endpoint",
    "rdzv_id", "signals-to-handle",  # torchrun
    "tasks", "model", "model_args", "apply_chat_template", "system_instruction",
    "fewshot_as_multiturn",  # lm_eval
    "install",  # xcode-select
    "build-arg", "gpus", "ipc", "user", "rm", "index-url",  # docker, and pip inside
}  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def read(page: Path) -> str:
    return page.read_text("utf-8")


def prose(page: Path) -> str:
    """The text of a page without its code blocks, whose lines may look like links or headings."""
    return FENCE.sub("", read(page))


def blocks(language: str) -> list[str]:
    """The code blocks of all pages in a language, each once."""
    found = (
        block for page in PAGES for name, block in FENCE.findall(read(page)) if name == language
    )
    return list(dict.fromkeys(found))


def commands() -> list[str]:
    """Every command of all pages once, in the order of the text; continued lines are joined."""
    joined = (re.sub(r"\s*\\\n\s*", " ", block) for block in blocks("bash"))
    lines = (line.strip() for block in joined for line in block.splitlines())
    return list(dict.fromkeys(filter(None, lines)))


def code_spans(page: Path) -> list[str]:
    """What stands between backticks in a page, code blocks left out."""
    return re.findall(r"`([^`\n]+)`", prose(page))


@pytest.fixture(scope="module")
def clone(tmp_path_factory, text) -> Path:
    """A copy of what git tracks, in which the commands run one after the other."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=False,
                            capture_output=True, text=True).stdout.split()  # fmt: skip
    for name in listed:
        if not name.startswith(("tests/", "docs/")) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in ("my_texts", "data/raw"):
        (folder / name).mkdir(parents=True)
        (folder / name / "one.txt").write_text(text, encoding="utf-8")
    (folder / "my_idea.py").write_text(FENCE.search(read(ROOT / "docs/extending.md"))[2])
    write_jsonl(folder / "h.jsonl", hellaswag_items(5))
    write_jsonl(folder / "l.jsonl", lambada_items(5))
    write_jsonl(folder / "chats.jsonl", [
        {"instruction": f"What is {n} + 1?", "output": f"It is {n + 1}."} for n in range(60)
    ])  # fmt: skip
    return folder


def run(command: list[str], folder: Path, **environment):
    """Runs the package of the clone, by forks; torchrun itself where it is more than some ranks."""
    words = {"python": [], "gpt2": ["-m", "gpt2"], "torchrun": TORCHRUN[:2]}
    program, *arguments = command
    run_python(*words[program], *arguments, package=folder, cwd=folder, timeout=300,
               env={**os.environ, "PYTHONPATH": str(folder), **environment})  # fmt: skip


def test_every_command_of_the_text_is_known():
    found = commands()
    assert [c for c in found if c not in NOWHERE and c not in ELSEWHERE] == list(ADDED)
    assert {*ELSEWHERE, *NOWHERE} <= set(found)  # none that the text no longer has


@pytest.mark.parametrize(("command", "place"), ELSEWHERE.items())
def test_commands_that_other_tests_run_are_there(command, place):
    name, call = place
    (test,) = (ROOT / "tests").rglob(name)
    assert call in read(test), f"{command}: {name} does not run it"


@pytest.mark.slow
@pytest.mark.timeout(900)  # forty commands
def test_commands_and_python_of_the_text(clone, text, tmp_path):
    """In one test, since they build on one another."""
    texts = [text[i : i + 4000] for i in range(0, 40_000, 4000)]
    reference().save_pretrained(tmp_path / "model")
    with fake_hub({f"{FINEWEB_FOLDER}/000_00000.parquet": parquet_bytes(texts)}) as hub:
        model = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
        hub.models["openai-community/gpt2"] = model
        online = {**hub.environment(tmp_path), "HF_TOKEN": "any"}
        (tokenizer,) = [block for block in blocks("python") if "BpeTrainer" in block]
        run(["python", "-c", tokenizer], clone, **online)
        for command, added in ADDED.items():
            words = [new for word in shlex.split(command) for new in HERE.get(word, [word])]
            run([*words, *added], clone, **online)
        each = f"for code in {blocks('python')!r}: exec(code, {{'__name__': '__main__'}})"
        run(["python", "-c", each], clone, **online)
        assert "model.safetensors" in hub.models["OWNER/NAME"]
    for path in ("fineweb/edufineweb_val_000000.bin", "fineweb/edufineweb_train_000001.bin",
                 "out/demo/loss.png", "out/demo/metrics.jsonl", "out/demo/out_ckpt.pt",
                 "out/loss.png", "out/eval.json", "out/inspect.html", "out/two/out_ckpt.pt",
                 "out/mine/out_ckpt.pt", "out/finetuned/out_ckpt.pt", "out/shared/out_ckpt.pt",
                 "out/h200/loss.png", "out/tuned/out_ckpt.pt", "out/hf/config.json",
                 "data/own/tokenizer.json", "out/own_hf/tokenizer.json"):  # fmt: skip
        assert (clone / path).exists(), path


def test_readme_is_a_front_door():
    assert len(read(ROOT / "README.md").splitlines()) <= 250


CARDS = {  # how a row of "Your machine" begins -> name for its driver, 16-bit type, number
    "T4": ("Tesla T4", "float16", 1),
    "Kaggle": ("Tesla T4", "float16", 2),
    "RTX 3060": ("NVIDIA GeForce RTX 3060", "bfloat16", 1),
    "RTX 4090": ("NVIDIA GeForce RTX 4090", "bfloat16", 1),
    "RTX 5090": ("NVIDIA GeForce RTX 5090", "bfloat16", 1),
    "A100": ("NVIDIA A100-SXM4-80GB", "bfloat16", 1),
}


def wrong_rates(readme: str, speed: str) -> list[str]:
    """Calculated rates of the README that do not follow from the H100's in docs/speed.md."""
    measured = int(re.search(r"H100, 124M.*?\| this project \| (\d+)k", speed, re.DOTALL)[1])
    rows = re.findall(r"^\| ([^|]+) \|[^|]*\| (\d+)k \|.*\| calculated", readme, re.MULTILINE)
    assert len(rows) == len(CARDS)
    wrong = []
    for row, rate in rows:
        ((name, dtype, number),) = (card for key, card in CARDS.items() if row.startswith(key))
        wanted = 0.8 * measured * number * peak_flops(name, dtype) / 989e12
        wrong += [] if int(rate) == round(wanted) else [f"{row}: {rate}k, not {wanted:.0f}k"]
    return wrong


def test_calculated_rates_follow_from_the_measured_one():
    readme, speed = read(ROOT / "README.md"), read(ROOT / "docs/speed.md")
    assert wrong_rates(readme, speed) == []
    assert len(wrong_rates(readme, speed.replace("project | 570k", "project | 650k"))) == len(CARDS)
    scaling = read(ROOT / "docs/scaling.md")
    for row in ("| RTX 4090", "| Kaggle, 2×T4"):
        rates = [re.search(rf"^{re.escape(row)}.*?\| (\d+k) \|", page, re.M)[1]
                 for page in (readme, scaling)]  # fmt: skip
        assert rates[0] == rates[1]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        name = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return {f"{name}-{n}" if n else name for name, last in found.items() for n in range(last + 1)}


def broken_links(page: Path) -> list[str]:
    """Links and pictures of a page that lead to no file, or to no heading."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if link.startswith("https://"):
            continue
        lines = re.fullmatch(r"L\d+-L\d+", anchor)  # of source code: tests/test_reading.py
        if not target.exists() or (anchor and not lines and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    assert not broken_links(page)


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "b.md").write_text(
        "# One `two`: three!\n\n# Four\n\n```\n# no heading\n```\n\n# Four\n"
    )
    (tmp_path / "a.md").write_text(
        "[](b.md#one-two-three) [](b.md#four-1) ![](b.md) [](https://a.b/c) [](gone.md) "
        "[](b.md#no-heading) [](b.md#four-2) [](#here)\n\n```\n[](in_code.md)\n```\n"
    )
    assert broken_links(tmp_path / "a.md") == ["gone.md", "b.md#no-heading", "b.md#four-2", "#here"]


def missing_paths(page: Path) -> list[str]:
    """Files and folders of this project that a page names between backticks and that are not there.

    A path may begin at the root or at `gpt2/`; a test is also found by its name alone.
    """
    missing = []
    for span in code_spans(page):
        rooted = re.fullmatch(r"(gpt2|tests|benchmarks|configs|docs|dev)/[\w./-]*", span)
        if rooted or re.fullmatch(r"[\w/]+\.py", span):
            places = [ROOT / span, ROOT / "gpt2" / span]
            known = any(place.exists() for place in places) or span in (
                "hellaswag.py",
                "my_idea.py",
            )
            if not known and not ("/" not in span and any((ROOT / "tests").rglob(span))):
                missing.append(span)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    assert not missing_paths(page)


def test_a_file_that_is_not_there_is_found(tmp_path):
    (tmp_path / "a.md").write_text(
        "`gpt2/cli.py` `cli.py` `gpt2/gone.py` `gone/it.py` `out/x.json`"
    )
    assert missing_paths(tmp_path / "a.md") == ["gpt2/gone.py", "gone/it.py"]


@pytest.mark.parametrize("name", ["README.md", "docs/architecture.md"])
def test_every_wing_is_on_the_map(name):
    wings = {path.parent.name for path in (ROOT / "gpt2").glob("*/__init__.py")}
    named = {span.removeprefix("gpt2/") for span in code_spans(ROOT / name)}
    assert wings
    assert {f"{wing}/" for wing in wings} <= named


def options() -> set[str]:
    """All options of all commands and benchmarks."""
    found = set()
    for cls in (c for name, c in vars(cli).items() if name.endswith("Config")):
        for field in dataclasses.fields(cls):
            inner = (
                dataclasses.fields(field.type) if dataclasses.is_dataclass(field.type) else [field]
            )
            found |= {name for f in inner for name in (f.name, f.metadata.get("alias"))}
    for path in (ROOT / "benchmarks").glob("*.py"):
        found |= set(re.findall(r'"--(\w+)"', read(path)))
    return found | FOREIGN | {"config", "help"}


def test_every_option_that_the_text_names_exists():
    known = options()
    for page in PAGES:
        for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", read(page)):
            assert name in known, f"{page.name}: --{name}"


def test_every_command_that_the_text_names_exists():
    for page in PAGES:
        for name, inner in re.findall(r"(?:`|^)gpt2 (\w+)(?: (\w+))?", read(page), re.MULTILINE):
            assert name in cli.COMMANDS, f"{page.name}: gpt2 {name}"
            assert name != "shards" or inner in cli.SHARDS_COMMANDS, f"{page.name}: {name} {inner}"


def test_make_demo_runs_the_demo():
    shown = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True,
                           check=False)  # fmt: skip
    if shown.returncode == 127:
        pytest.skip("no make here")
    assert "gpt2 demo" in shown.stdout
