"""The benchmarks run, with small numbers; what they measure is in dev/LOG.md."""

import json

import pytest

from .conftest import run_python

CLONE = """
import torch
from torch import nn
from dataclasses import dataclass
from helper import nothing  # a neighbour that only the script needs

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.table.weight, 0.0, 0.02)

    def forward(self, idx, targets):
        logits = self.table(idx) @ self.table.weight.t()
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas)

raise SystemExit("this was run as a script")
"""


@pytest.mark.slow
def test_throughput_beside_a_clone(tmp_path):
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone/model.py").write_text(CLONE)
    (tmp_path / "clone/helper.py").write_text("nothing = None")
    arguments = ["--size=gpt2-tiny", "--n_layer=1", "--block_size=16", "--steps=2", "--warmup=0"]
    arguments += [f"--nanogpt={tmp_path}/clone", f"--out_dir={tmp_path}/out", "--device=cpu"]
    done = run_python("-m", "benchmarks.throughput", *arguments)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/throughput.jsonl").open()]
    assert [row["name"] for row in rows] == ["ours", "nanoGPT"]
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert 10 < row["first_loss"] < 11.5
    assert "2 × 16 tokens a step" in rows[0]["setting"]
    assert (tmp_path / "out/throughput.png").stat().st_size > 5000


@pytest.mark.slow
def test_generate_beside_transformers(tmp_path):
    arguments = ["--size=gpt2-tiny", "--new_tokens=20", "--prompt_tokens=5", "--calls=1"]
    arguments += ["--batch_sizes=1,3", f"--out_dir={tmp_path}", "--device=cpu"]
    done = run_python("-m", "benchmarks.generate", *arguments)
    rows = [json.loads(line) for line in (tmp_path / "generate.jsonl").open()]
    assert [(row["name"], row["batch_size"]) for row in rows] == [
        ("ours", 1), ("transformers", 1), ("ours", 3), ("transformers", 3),
    ]  # fmt: skip
    assert [row["same_tokens"] for row in rows[1::2]] == ["20 of 20", "60 of 60"]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert "transformers" in done.stdout
    assert (tmp_path / "generate.png").stat().st_size > 5000
