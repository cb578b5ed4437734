"""Model files that claim more than they hold: refused within 2 s and 200 MB above their size.

Each file is read in a forked process, whose peak memory is compared with that at the fork.
"""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from gpt2.checkpoint import model_file, safe_load, training_state
from gpt2.checkpoint.safe_load import torch_load
from gpt2.config.model import GPT2Config, ModernConfig, to_dict
from gpt2.errors import UserError
from gpt2.huggingface.model_format import config_to_hf, to_hf
from gpt2.model.gpt import GPT

from ..conftest import ROOT
from ..memory import PEAK

SHAPE = GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=20)
EXTRA_MB, SECONDS = 200, 2.0
READ = (
    PEAK
    + """
import os, resource, sys, time
from pathlib import Path
import torch
from gpt2 import GPT2
from gpt2.checkpoint.training_state import load_state
from gpt2.errors import UserError
import torch.distributed.checkpoint  # what is imported only once is no part of refusing a file
torch.set_num_threads(1)  # threads do not survive a fork
small, *paths = map(Path, sys.argv[1:])
GPT2.from_checkpoint(small, "cpu")
for path in paths:
    if not os.fork():
        before = peak()
        began = time.process_time()
        is_state = (path / "train_state.pt").exists()
        try:
            load_state(path) if is_state else GPT2.from_checkpoint(path, "cpu")
            said = "READ"
        except UserError as error:
            said = str(error)
        extra = peak() - before
        print(f"{extra:.0f}\t{time.process_time() - began:.2f}\t{said}", flush=True)
        os._exit(0)
    os.wait()
"""
)


def saved(path, **changes):
    """A model file whose content is changed."""
    content = {"model": GPT(SHAPE).state_dict(), "config": to_dict(SHAPE), "format": 1}
    torch.save(content | changes, path)
    return path


def with_config(path, **changes):
    return saved(path, config=to_dict(SHAPE) | changes)


def deflated(path):
    """A data.pkl of 300 MB, compressed to 0.3 MB."""
    whole = zipfile.ZipFile(saved(path))
    entries = [(entry, whole.read(entry)) for entry in whole.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in entries:
            with archive.open(entry.filename, "w") as file:
                file.write(data)
                if entry.filename.endswith("data.pkl"):
                    for _ in range(30):
                        file.write(b"\0" * 10**7)
    return path


def rewrite(path, change):
    """Changes the pickle of a model file; the archive is right."""
    whole = zipfile.ZipFile(path)
    entries = [(entry.filename, whole.read(entry)) for entry in whole.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries:
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return path


def many_objects(path, count=10**5):
    """A pickle of many empty sets: a byte of the file, 240 bytes of memory each."""
    return rewrite(saved(path), lambda _: b"\x80\x02(" + b"\x8f" * count + b"t.")


def operations(path, objects, numbers):
    """A pickle of so many operations that make an object, and that do not."""
    body = b"]" * objects + b"N" * numbers
    return rewrite(saved(path), lambda _: b"\x80\x02(" + body + b"t.")


def many_entries(path):
    saved(path)
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(60_000):
            archive.writestr(f"x_{number}", b"")
    return path


def strides_of_zero(path):
    state = GPT(SHAPE).state_dict()
    return saved(path, model=state | {"transformer.wte.weight": torch.zeros(1).expand(10**10)})


def views_of_one(path):
    """Many tensors of one memory, each of which `float` would copy."""
    memory = torch.zeros(10**6, dtype=torch.bfloat16)
    return saved(path, model={f"t{n}": memory[n : n + 900_000] for n in range(2000)})


def shared_without_end(path):
    """Lists of lists of lists: 2^60 elements for one who walks through all."""
    tree = [torch.zeros(1)]
    for _ in range(60):
        tree = [tree, tree]
    return saved(path, model=tree)


def llmc(path, layers, width):
    header = struct.pack("<8i", 20240326, 3, 4, 20, layers, 1, width, 128)
    path.write_bytes(header.ljust(1024, b"\0") + b"\0" * 1000)
    return path


def folder(path, **changes):
    path.mkdir()
    tensors = to_hf(GPT(SHAPE).state_dict())
    del tensors["lm_head.weight"]  # as transformers does
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config_to_hf(SHAPE) | changes))
    return path


def with_header(path, header):
    folder(path)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    return path


def big_header(path):
    one = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return with_header(path, {f"t{number}": one for number in range(400_000)})


def not_finite(path):
    """Weights of 60 MB with a NaN: no copy is made of them before they are refused."""
    shape = GPT2Config(n_layer=1, n_head=1, n_embd=300, block_size=4, vocab_size=50257)
    state = GPT(shape).state_dict()
    state["transformer.wte.weight"][-1, -1] = float("nan")
    return saved(path, model=state, config=to_dict(shape))


def state(path, config=SHAPE, **content):
    """A training state with right hashes; its `train_state.pt` holds `content`."""
    model = GPT(SHAPE).state_dict()
    training_state.write_state(path, 1, config, model, content, keep_last=1)
    return path / "state/step_00000001"


FILES = {
    "layers": (lambda p: with_config(p, n_layer=4096), "does not fit the model: its config"),
    "layers without end": (lambda p: with_config(p, n_layer=10**9), "n_layer=1000000000: use at"),
    "width": (
        lambda p: with_config(p, n_embd=2**17, n_layer=4),
        "does not fit the model: its config",
    ),
    "positions": (lambda p: with_config(p, block_size=2**24), "wpe.weight is"),
    "tables": (
        lambda p: saved(p, config=to_dict(ModernConfig(n_layer=2000, value_embeddings=1000))),
        "does not fit the model",
    ),
    "strides of 0": (strides_of_zero, "refused"),
    "views": (views_of_one, "its tensors are larger than the file"),
    "lists": (shared_without_end, "not a table of tensors"),
    "compressed": (deflated, "an entry is compressed"),
    "objects": (many_objects, "objects"),
    "as many objects and numbers as may be": (
        lambda p: operations(p, 79_000, 3 * 2**18 - 80_000),
        "not a checkpoint of this project",
    ),
    "numbers": (lambda p: operations(p, 0, 3 * 2**18), "a pickle of over 786,432 bytes"),
    "entries": (many_entries, "more than 50,000 entries"),
    "NaN": (not_finite, "NaN or infinity"),
    "llm.c, layers": (lambda p: llmc(p, 10**9, 4), "n_layer=1000000000: use at most"),
    "llm.c, 4096 wide layers": (lambda p: llmc(p, 4096, 2**12), "damaged, 2,024 bytes instead of"),
    "folder": (lambda p: folder(p, n_layer=500, n_embd=10**4), "does not fit the model"),
    "header": (big_header, "missing or damaged"),
    "header of lists": (lambda p: with_header(p, b"[" + b"[]," * 10**6 + b"1]"), "values of JSON"),
    "state, layers": (lambda p: state(p, replace(SHAPE, n_layer=4096)), "does not fit the model"),
    "state, strides of 0": (
        lambda p: state(p, optimizer={"state": {0: {"step": torch.zeros(1).expand(10**10)}}}),
        "refused",
    ),
    "state, kinds": (lambda p: state(p, rng=[[0] * 10**5 * 3]), "not a whole checkpoint"),
}


@pytest.mark.slow
@pytest.mark.fault(28, "configs, headers, strides, archives and pickles that claim gigabytes")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on Windows")
def test_a_refused_file_takes_little_memory_and_time(tmp_path, record_property):
    small = saved(tmp_path / "small.pt")
    paths = [make(tmp_path / f"file {number}") for number, (make, _) in enumerate(FILES.values())]
    child = [sys.executable, "-c", READ, *map(str, (small, *paths))]
    answer = subprocess.run(child, capture_output=True, text=True, cwd=ROOT, check=True)
    lines = answer.stdout.splitlines()
    most_mb, most_seconds = 0.0, 0.0
    for (name, (_, message)), path, line in zip(FILES.items(), paths, lines, strict=True):
        extra, seconds, said = line.split("\t")
        files = [path] if path.is_file() else list(path.iterdir())
        extra_mb = int(extra) - sum(file.stat().st_size for file in files) / 2**20
        assert message in said, name
        assert str(path) in said, name
        assert extra_mb <= EXTRA_MB, name
        assert float(seconds) <= SECONDS, name
        most_mb, most_seconds = max(most_mb, extra_mb), max(most_seconds, float(seconds))
    found = f"{len(FILES)} files: at most {most_mb:.0f} MB and {most_seconds:.1f} s each"
    record_property("survived", found)


def test_content_of_odd_types_is_refused(tmp_path):
    odd = {
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(3, device="meta"),
        "complex": torch.zeros(3, dtype=torch.complex64),
        "float8": torch.zeros(3).to(torch.float8_e4m3fn),
        "overlapping": torch.zeros(6).as_strided((4, 3), (1, 1)),
        "quantized": torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    }
    for name, tensor in odd.items():
        with pytest.raises(UserError, match=r"refused|not a readable"):
            torch_load(saved(tmp_path / "x.pt", extra=[tensor]))
        assert name
    transposed = torch.arange(6.0).reshape(2, 3).t()  # dense, although not contiguous
    assert torch.equal(torch_load(saved(tmp_path / "x.pt", extra=transposed))["extra"], transposed)


def test_an_archive_that_claims_more_than_it_holds(tmp_path):
    """A storage of 10^6 numbers over a record of 12 bytes would be read beyond its end."""
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(300)}, path)
    rewrite(path, lambda pickled: pickled.replace(b"M,\x01", b"M\xff\xff"))
    with pytest.raises(UserError, match="not a readable checkpoint"):
        torch_load(path)


def test_a_copy_does_not_follow_the_file(tmp_path):
    tied = torch.arange(3.0)
    torch.save({"a": tied, "b": [tied, (1, "x")], "c": tied[1:]}, tmp_path / "x.pt")
    copy = safe_load.in_memory(torch_load(tmp_path / "x.pt"))
    with open(tmp_path / "x.pt", "r+b") as file:
        file.write(b"\0" * (tmp_path / "x.pt").stat().st_size)
    assert copy["a"].tolist() == [0, 1, 2]
    assert copy["a"].data_ptr() == copy["b"][0].data_ptr()
    assert copy["b"][1] == (1, "x")
    assert copy["c"].tolist() == [1, 2]


def test_the_format_before_torch_1_6_is_named(tmp_path):
    torch.save({"a": 1}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"not written by torch 1\.6 or newer"):
        torch_load(tmp_path / "x.pt")


def test_values_beside_the_weights_are_numbers(tmp_path):
    path = saved(tmp_path / "x.pt", step="\x1b[2J", val_loss=[1], notes=5, origin="\x1b[2J")
    _, _, rest = model_file.load_model(path)
    assert rest == {"format": 1, "step": None, "val_loss": None}
    state = GPT(SHAPE).state_dict() | {"\x1b[2J": torch.ones(1)}
    with pytest.raises(UserError, match=r"unexpected \\x1b\[2J"):
        model_file.load_model(saved(path, model=state))


def test_pickles_of_the_old_kind_are_not_unpickled(tmp_path):
    buffer = io.BytesIO()
    pickle.dump({"model": 1}, buffer)
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="not a readable checkpoint"):
        torch_load(tmp_path / "x.pt")


def test_large_models_are_still_read(tmp_path):
    """What is refused is the claim: a network of many layers that is there is read."""
    shape = GPT2Config(n_layer=60, n_head=1, n_embd=4, block_size=4, vocab_size=20)
    model = GPT(shape)
    model_file.save_model(tmp_path / "x.pt", model, 1, None)
    assert model_file.load_model(tmp_path / "x.pt")[0] == shape
    save_file(model.state_dict(), tmp_path / "m.safetensors")


def test_damage_anywhere_in_an_archive_is_one_line(tmp_path):
    """Each byte of the archive's own records, one after the other; `zipfile` raises many things."""
    path = tmp_path / "c.pt"
    torch.save({"a": torch.zeros(1)}, path)
    whole = path.read_bytes()
    said = []
    for at in (*range(200), *range(len(whole) - 400, len(whole))):
        path.write_bytes(whole[:at] + b"\xf5" + whole[at + 1 :])
        try:
            safe_load.check_sums(path)
        except UserError as error:
            said.append(str(error))
    assert len(said) > 100
    assert all(text.startswith(f"{path}: damaged (") for text in said)
