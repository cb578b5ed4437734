"""Mutated files of every kind: read, or refused in one line without control characters.

Hypothesis draws the mutations: a few of each kind here, 2,000 of each kind in `make faults`.
"""

import contextlib
import io
import json
import shutil
import struct
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2 import GPT2, files
from gpt2.checkpoint import model_file, training_state
from gpt2.cli import main
from gpt2.config.command_line import parse
from gpt2.config.finetune import FinetuneConfig
from gpt2.config.model import GPT2Config
from gpt2.config.train import TrainConfig
from gpt2.data.conversations import open_conversations
from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.report.metrics import read_metrics
from gpt2.report.plot import draw
from gpt2.train import loop
from gpt2.untrusted.display import CONTROL

from .models import reference, write_build_nanogpt, write_llmc, write_nanogpt
from .mutations import ODD, TENSORS, mutate, mutate_bytes, to_json

SMALL = [
    *("--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--batch_size=1"),
    *("--grad_accum_steps=1", "--eval_tokens=16", "--dtype=float32", "--device=cpu"),
    *("--learning_rate=1e-3", "--warmup_steps=0", "--save_every=1", "--eval_every=0"),
]


class State:
    """`train_state.pt` and the manifest of a state, with right hashes: resume and do a step."""

    def __init__(self, folder, data_dir):
        self.out = folder / "out"
        self.argv = [f"--data_dir={data_dir}", f"--out_dir={self.out}", *SMALL]
        loop.run(parse(TrainConfig, [*self.argv, "--max_steps=2"], "x"))
        self.step = self.out / "state/step_00000002"
        self.content = torch.load(self.step / "train_state.pt", weights_only=True)
        self.manifest = json.loads((self.step / "manifest.json").read_text())
        self.kept = folder / "kept"
        shutil.copytree(self.out, self.kept)

    def read(self, rng):
        shutil.rmtree(self.out)
        shutil.copytree(self.kept, self.out)
        shutil.rmtree(self.out / "state/step_00000001")
        manifest = self.manifest
        if rng.random() < 0.8:
            content = mutate(self.content, rng, ODD + TENSORS)
            torch.save(content, self.step / "train_state.pt")
        else:
            manifest = mutate(manifest, rng)
        if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict):
            fresh = files.fingerprint(self.step / "train_state.pt")
            manifest = manifest | {"files": manifest["files"] | {"train_state.pt": fresh}}
            manifest.pop("sha256", None)
            manifest["sha256"] = training_state._digest(manifest)
        (self.step / "manifest.json").write_bytes(to_json(manifest))
        loop.run(parse(TrainConfig, [*self.argv, "--max_steps=3"], "x"))


class Model:
    """Checkpoints of this project, nanoGPT, build-nanogpt and llm.c."""

    def __init__(self, folder, data_dir):
        shape = GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=20)
        model_file.save_model(folder / "own.pt", GPT(shape), 1, 2.0)
        theirs = reference(vocab_size=30, block_size=8)
        write_nanogpt(folder / "nano.pt", theirs)
        self.builds = write_build_nanogpt(folder / "build.pt", theirs).read_bytes()
        self.llmc = write_llmc(folder / "llmc.bin", theirs, padded=128).read_bytes()
        self.contents = [
            torch.load(folder / name, weights_only=True) for name in ("own.pt", "nano.pt")
        ]
        self.files = [(folder / name).read_bytes() for name in ("own.pt", "nano.pt")]
        self.path = folder / "x.pt"

    def read(self, rng):
        kind = rng.randrange(4)
        if kind < 2:
            torch.save(mutate(rng.choice(self.contents), rng, ODD + TENSORS), self.path)
        elif kind == 2:
            self.path.write_bytes(mutate_bytes(rng.choice([*self.files, self.builds]), rng))
        else:
            header = list(struct.unpack("<9i", self.llmc[:36]))
            header[rng.randrange(9)] = rng.choice((0, -1, 1, 5, 2**31 - 1, 128, rng.randrange(99)))
            self.path.write_bytes(struct.pack("<9i", *header) + self.llmc[36:])
        GPT2.from_checkpoint(self.path, "cpu")


class Folder:
    """config.json, the header of safetensors and the index of a Hugging Face folder."""

    def __init__(self, folder, data_dir):
        self.folder = folder / "hf"
        reference(vocab_size=30, block_size=8).save_pretrained(self.folder)
        self.config = json.loads((self.folder / "config.json").read_text())
        data = (self.folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        self.header, self.body = json.loads(data[8 : 8 + length]), data[8 + length :]

    def write(self, config, header):
        (self.folder / "config.json").write_bytes(to_json(config))
        text = to_json(header)
        data = struct.pack("<Q", len(text)) + text + self.body
        (self.folder / "model.safetensors").write_bytes(data)


class Config(Folder):
    def read(self, rng):
        self.write(mutate(self.config, rng), self.header)
        GPT2.from_checkpoint(self.folder, "cpu")


class Safetensors(Folder):
    def read(self, rng):
        self.write(self.config, mutate(self.header, rng))
        GPT2.from_checkpoint(self.folder, "cpu")


class Adapters:
    """The folder of LoRA's adapters, as a model; and the state of the run that wrote it."""

    def __init__(self, folder, data_dir):
        base = folder / "base.pt"
        shape = GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=8)
        model_file.save_model(base, GPT(shape), 1, None)
        self.out = folder / "out"
        options = [option for option in SMALL if "--n_" not in option]
        self.argv = [
            *(f"--init={base}", f"--data={data_dir}", f"--out_dir={self.out}", "--lora_rank=2"),
            *options,
        ]
        loop.run(parse(FinetuneConfig, [*self.argv, "--max_steps=1"], "x"))
        self.folder = self.out / "out_adapter"
        self.settings = json.loads((self.folder / "adapter_config.json").read_text())
        self.step = self.out / "state/step_00000001"
        data = (self.step / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        self.header, self.body = json.loads(data[8 : 8 + length]), data[8 + length :]
        self.manifest = json.loads((self.step / "manifest.json").read_text())
        self.adapters = (self.folder / "adapter_model.safetensors").read_bytes()

    def read_folder(self, rng):
        """A mutated adapter_config.json, or other bytes in the adapters."""
        settings, data = self.settings, self.adapters
        if rng.random() < 0.7:
            settings = mutate(settings, rng)
        else:
            data = mutate_bytes(data, rng)
        (self.folder / "adapter_config.json").write_bytes(to_json(settings))
        (self.folder / "adapter_model.safetensors").write_bytes(data)
        file = rng.choice(("", "adapter_model.safetensors"))  # which stands for its folder
        GPT2.from_checkpoint(self.folder / file, "cpu")

    def read(self, rng):
        if rng.random() < 0.5:
            self.read_folder(rng)
            return
        text = to_json(mutate(self.header, rng))
        path = self.step / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + self.body)
        manifest = copy_signed(self.manifest, "model.safetensors", path)
        (self.step / "manifest.json").write_bytes(to_json(manifest))
        found = training_state.load_state(self.step)
        model_file.load_into(GPT(found.config), found.model, self.step)


def copy_signed(manifest, name, path):
    fresh = manifest | {"files": manifest["files"] | {name: files.fingerprint(path)}}
    fresh.pop("sha256", None)
    return fresh | {"sha256": training_state._digest(fresh)}


class Manifest:
    """manifest.json of a folder of shards: verify, info, show, go on, merge."""

    def __init__(self, folder, data_dir):
        self.folder, self.source = folder / "shards", folder / "x.jsonl"
        self.source.write_text('{"text": "some words of a text, and more of them"}\n' * 60)
        self.argv = [
            *(f"--source={self.source}", f"--out_dir={self.folder}", "--shard_tokens=100"),
            *("--num_workers=1", "--tokenizer=tiktoken"),
        ]
        main(["prepare", *self.argv])
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        shutil.copytree(self.folder, folder / "kept")
        self.kept = folder / "kept"

    def read(self, rng):
        shutil.rmtree(self.folder)
        shutil.copytree(self.kept, self.folder)
        changed = mutate(self.manifest, rng)
        (self.folder / "manifest.json").write_bytes(to_json(changed))
        command = rng.choice(
            [["shards", "verify"], ["shards", "show"], ["shards", "merge"], ["prepare"]]
        )
        rest = self.argv if command == ["prepare"] else [str(self.folder)]
        assert main([*command, *rest]) in (0, 1, 2)


class Shard:
    """A shard: verify, and the text of a document."""

    def __init__(self, folder, data_dir):
        self.folder = folder / "shards"
        shutil.copytree(data_dir, self.folder)
        self.path = self.folder / "text_val_000000.bin"
        self.data = self.path.read_bytes()[:3024]
        self.data = self.data[:8] + struct.pack("<i", 1000) + self.data[12:]

    def read(self, rng):
        data = mutate_bytes(self.data, rng)
        if rng.random() < 0.5:
            count = rng.choice((0, -1, 2**31 - 1, (len(data) - 1024) // 2))
            data = data[:8] + struct.pack("<i", count) + data[12:]
        self.path.write_bytes(data)
        assert main(["shards", "verify", str(self.folder)]) in (0, 1, 2)
        assert main(["shards", "show", str(self.path)]) in (0, 2)


class Toml:
    """A file for `--config=`, and config.toml beside a checkpoint."""

    def __init__(self, folder, data_dir):
        self.path = folder / "config.toml"
        self.lines = [
            *('data_dir = "x"', "n_layer = 2", "batch_size = 4", "learning_rate = 6e-4"),
            *("compile_model = false", "seed = 1", 'size = "gpt2"', "max_steps = 10"),
        ]

    def read(self, rng):
        lines = list(self.lines)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(lines))
            name = lines[at].partition(" ")[0]
            value = rng.choice(
                [
                    "1" * 5000,
                    "0x" + "f" * 5000,
                    "[[[[1]]]]",
                    "nan",
                    "inf",
                    "-1",
                    "1e300",
                    '"é"',
                    "''",
                ]
                + ["1979-05-27", "{a = 1}", '"""x\ny"""', "10_000_000_000_000", "[" * 3000, "", "="]
                + [json.dumps(value) for value in ODD[:20]]
            )
            lines[at] = f"{name} = {value}"
        text = "\n".join(lines).encode()
        self.path.write_bytes(text if rng.random() < 0.7 else mutate_bytes(text, rng))
        parse(TrainConfig, [f"--config={self.path}"], "gpt2 train")


class Conversations:
    """Rows in OpenAI's and in Alpaca's form, as .jsonl and .json."""

    def __init__(self, folder, data_dir):
        chat = [{"role": role, "content": "some words"} for role in ("system", "user", "assistant")]
        self.rows = [{"messages": chat}, {"instruction": "a", "input": "", "output": "b c d"}] * 3
        self.lines, self.list = folder / "x.jsonl", folder / "x.json"

    def read(self, rng):
        rows = mutate(self.rows, rng)
        path = self.list
        if rng.random() < 0.5 and isinstance(rows, list):
            path = self.lines
            data = b"".join(to_json(row) + b"\n" for row in rows)
        else:
            data = to_json(rows)
        path.write_bytes(data if rng.random() < 0.7 else mutate_bytes(data, rng))
        open_conversations(str(path), 16, 0.3)


class Metrics:
    """metrics.jsonl: what `gpt2 plot` draws."""

    def __init__(self, folder, data_dir):
        self.path = folder / "metrics.jsonl"
        self.rows = [
            {"step": n, "loss": 9.0 / n, "lr": 1e-3, "grad_norm": 1.0, "tokens": 512 * n,
             "tokens_per_second": 100.0, "seconds": 1.5 * n, "val_loss": 8.0}
            for n in range(1, 5)
        ]  # fmt: skip

    def read(self, rng):
        rows = mutate(self.rows, rng)
        lines = rows if isinstance(rows, list) else [rows]
        data = b"".join(to_json(row) + b"\n" for row in lines)
        self.path.write_bytes(data if rng.random() < 0.7 else mutate_bytes(data, rng))
        rows = read_metrics(self.path)
        if rows:
            figure = draw(rows, "a $\\frac name \x1b[2J")
            if rng.random() < 0.05:
                figure.savefig(io.BytesIO(), format="png", dpi=20)


KINDS = {
    "training states": State,
    "models": Model,
    "config.json": Config,
    "safetensors": Safetensors,
    "adapters": Adapters,
    "manifests of shards": Manifest,
    "shards": Shard,
    "TOML": Toml,
    "conversations": Conversations,
    "metrics": Metrics,
}
MANY = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="session")
def data_dir(gpt2_data_dir):
    """Shards that also tune adapters of a model with GPT-2's vocabulary."""
    return gpt2_data_dir


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        *(pytest.param(kind, 15, id=f"{kind}, a few") for kind in KINDS),
        *(
            pytest.param(
                *(kind, 2000),
                id=f"{kind}, many",
                marks=[*MANY, pytest.mark.fault(30, f"2,000 mutations of {kind}")],
            )
            for kind in KINDS
        ),
    ],
)
def test_mutations(kind, count, tmp_path, data_dir, record_property):
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        reader = KINDS[kind](tmp_path, data_dir)
    refused = []

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(seed=st.integers(0, 2**40))
    def read(seed):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                reader.read(Random(seed))
            except UserError as error:
                refused.append(error)
                main_says(error)
        assert not CONTROL.search(said.getvalue().replace("\n", "").replace("\t", ""))

    read()
    assert refused or kind in ("manifests of shards", "shards", "metrics")  # these have exit codes
    record_property("survived", f"{kind}: {len(refused)} refused")


def main_says(error: UserError):
    """What the command line prints of an error: one line."""
    from gpt2.cli import _complain

    assert str(error)
    assert _complain(str(error)) == 2
