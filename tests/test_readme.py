"""Every command and every Python block of the README runs, with small numbers where needed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2.prepare.sources import FINEWEB_FOLDER

from .conftest import ROOT, TINY
from .evaluate.test_tasks import hellaswag_items, lambada_items, write_jsonl
from .fake_hub import fake_hub, parquet_bytes
from .models import reference

README = (ROOT / "README.md").read_text("utf-8")
SMALL = [*TINY, "--max_steps=2"]
NO_BATCH = [a for a in SMALL if not a.startswith(("--grad_accum", "--batch_size"))]
# What is added to a command to make it small. None: it only installs, or is what runs this test.
ADDED: dict[str, list[str] | None] = {
    "make demo": None,
    "make test": None,
    "python -m pip install -e .": None,
    "python -m gpt2 demo": [*SMALL, "--block_size=32"],
    'python -m pip install -e ".[dev]" && python -m pytest -n auto': None,
    "python fineweb.py": ["--shard_tokens=3000"],
    "python train_gpt2.py": SMALL,
    "gpt2 shards verify fineweb": [],
    "gpt2 shards info fineweb": [],
    "gpt2 shards show fineweb --doc=17": ["--doc=2"],
    "python train_gpt2.py --compile_model=True --dtype=bfloat16 --grad_accum_steps=8": [
        a for a in SMALL if not a.startswith(("--grad_accum", "--dtype"))
    ] + ["--out_dir=out/compiled"],
    "python train_gpt2.py --config=configs/gpt2_124m.toml --learning_rate=1e-3": [
        *NO_BATCH, "--total_batch_tokens=2048", "--out_dir=out/recipe",
    ],
    "gpt2 plot out/": [],
    'gpt2 sample out/out_ckpt.pt --prompt="Hello world,"': ["--max_new_tokens=5"],
    "gpt2 prepare --source=my_texts --out_dir=data/mine": [],
    "gpt2 train --data_dir=data/mine --out_dir=out/mine --size=gpt2-mini --block_size=256": SMALL,
    "gpt2 train --data_dir=fineweb:0.8,data/mine:0.2 --out_dir=out/mix": SMALL,
    "gpt2 eval out/out_ckpt.pt": ["--device=cpu"],
    "gpt2 eval out/out_ckpt.pt --hellaswag=hub --lambada=hub --text=my_texts/one.txt "
    "--json=out/eval.json": [
        "--hellaswag=h.jsonl", "--lambada=l.jsonl", "--eval_tokens=500", "--device=cpu",
    ],
    # downloads its tasks; tests/test_harness.py runs it with tasks of its own
    "gpt2 lm_eval out/out_ckpt.pt --tasks=hellaswag,piqa": None,
    'gpt2 inspect out/out_ckpt.pt "The cat sat on the mat, and the dog sat on the"': [
        "--out=out/inspect.html",
    ],
    'gpt2 sample gpt2 --prompt="Hello world,"': ["--max_new_tokens=5"],
    "python train_gpt2.py --init=gpt2 --data_dir=data/mine --out_dir=out/tuned "
    "--learning_rate=3e-5 --max_steps=200": [
        "--max_steps=2", *(a for a in TINY if not a.startswith(("--n_", "--learning_rate"))),
    ],
    "gpt2 export out/out_ckpt.pt --to=hf out/hf": [],
    "gpt2 push out/out_ckpt.pt OWNER/NAME": [],
    # need other programs, which Python's package index does not have
    "python ../llama.cpp/convert_hf_to_gguf.py out/hf --outfile=out/model.gguf": None,
    'echo "FROM ./model.gguf" > out/Modelfile && ollama create my-gpt2 -f out/Modelfile': None,
    'ollama run my-gpt2 "Hello world,"': None,
    "vllm serve out/hf": None,
    'pip install -e ".[serve]"': None,
    "gpt2 serve out/finetuned/out_ckpt.pt": None,  # does not end; tests/test_serve.py runs it
    "python train_gpt2.py --config=configs/speedrun.toml --mlp=swiglu --window_pattern=SSSL "
    "--window=256": [
        *SMALL, "--n_layer=6", "--total_batch_tokens=0", "--window=8", "--out_dir=out/modern",
    ],
    "python -m benchmarks.sprint configs/speedrun.toml configs/sprint_gpt2_muon.toml "
    "--data_dir=fineweb": [
        "--seconds=0.1", "--evaluations=1", "--val_tokens=500", "--devices=cpu", "--n_layer=6",
        "--total_batch_tokens=0", "--size=gpt2",
        *(a for a in TINY if not a.startswith(("--device", "--n_layer", "--eval"))),
    ],
    "torchrun --standalone --nproc_per_node=2 train_gpt2.py": [*SMALL, "--out_dir=out/two"],
    "torchrun --standalone --nproc_per_node=2 train_gpt2.py --size=gpt2-xl --parallel=fsdp "
    "--activation_checkpointing=True --batch_size=8 --out_dir=out/xl": SMALL,
    # needs clones of other projects; tests/test_benchmarks.py runs it with one of its own
    "python -m benchmarks.throughput --nanogpt=../nanoGPT --build_nanogpt=../build-nanogpt": None,
    "gpt2 profile --batch_size=64 --grad_accum_steps=1": SMALL,
    "python -m benchmarks.generate --nanogpt=../nanoGPT": None,
    "python -m benchmarks.loader": [
        "--shard_tokens=100000", "--batch_size=2", "--seconds=0.1",
    ],
    "python -m benchmarks.memory": [
        "--sizes=gpt2-tiny", "--batch_sizes=1", "--block_size=32", "--device=cpu",
        "--n_layer=1", "--n_head=2", "--n_embd=32", "--dtype=float32",
    ],
    "python fineweb.py --source=data/raw --out_dir=data/corpus": [],
    "python train_gpt2.py --config=configs/gpt2_124m.toml --data_dir=data/corpus "
    "--out_dir=out/h200 --max_steps=480 --eval_every=50 --save_every=100": [
        *NO_BATCH, "--total_batch_tokens=2048",
    ],
    "gpt2 plot out/h200": [],
    'gpt2 sample out/h200/out_ckpt.pt --prompt="The history of the city begins" --seed=1337 '
    "--max_new_tokens=120": ["--max_new_tokens=5"],
}  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


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
    write_jsonl(folder / "h.jsonl", hellaswag_items(5))
    write_jsonl(folder / "l.jsonl", lambada_items(5))
    return folder


def run(command: list[str], folder: Path, **environment):
    words = {"python": [sys.executable], "gpt2": [sys.executable, "-m", "gpt2"]}
    words["torchrun"] = [sys.executable, "-m", "torch.distributed.run"]
    env = {**os.environ, "PYTHONPATH": str(folder), **environment}
    done = subprocess.run([*words[command[0]], *command[1:]], cwd=folder, env=env, timeout=170,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_every_command_of_the_readme_is_known():
    assert commands() == list(ADDED)


@pytest.mark.slow
@pytest.mark.timeout(600)  # thirty commands, each a process that imports torch
def test_commands_and_python_of_the_readme(clone, text, tmp_path):
    """In one test, since they build on one another."""
    texts = [text[i : i + 4000] for i in range(0, 40_000, 4000)]
    reference().save_pretrained(tmp_path / "model")
    with fake_hub({f"{FINEWEB_FOLDER}/000_00000.parquet": parquet_bytes(texts)}) as hub:
        model = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
        hub.models["openai-community/gpt2"] = model
        online = {**hub.environment(tmp_path), "HF_TOKEN": "any"}
        for command in commands():
            if ADDED[command] is not None:
                run([*shlex.split(command), *ADDED[command]], clone, **online)
        for code in blocks("python"):
            run(["python", "-c", code], clone, **online)
        assert "model.safetensors" in hub.models["OWNER/NAME"]
    for path in ("fineweb/edufineweb_val_000000.bin", "fineweb/edufineweb_train_000001.bin",
                 "out/demo/loss.png", "out/demo/metrics.jsonl", "out/demo/out_ckpt.pt",
                 "out/loss.png", "out/eval.json", "out/inspect.html", "out/two/out_ckpt.pt",
                 "out/mine/out_ckpt.pt",
                 "out/h200/loss.png", "out/tuned/out_ckpt.pt", "out/hf/config.json"):  # fmt: skip
        assert (clone / path).exists(), path


def test_files_and_links_of_the_readme_exist():
    links = re.findall(r"\]\(([^)#]+?)\)", README)
    assert len(links) > 3
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link
    headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
                for h in re.findall(r"^##* (.*)$", README, re.MULTILINE)}  # fmt: skip
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in headings, anchor


def test_make_demo_runs_the_demo():
    shown = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True,
                           check=False)  # fmt: skip
    if shown.returncode == 127:
        pytest.skip("no make here")
    assert "gpt2 demo" in shown.stdout
