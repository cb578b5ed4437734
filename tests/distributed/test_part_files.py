"""FSDP parts with and without PyTorch's Distributed Checkpoint: each form reads what both write."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from gpt2.checkpoint import sharded_state
from gpt2.config.model import GPT2Config
from gpt2.distributed import fsdp, part_files
from gpt2.distributed.part_files import Rows
from gpt2.errors import UserError

WHOLE = {
    "model.a": torch.arange(15.0).view(5, 3),
    "model.b": torch.arange(7).bfloat16(),
    "optimizer.0.m": torch.arange(2.0)[:, None, None].expand(2, 3, 4).contiguous(),
}
NAMES = ("HuggingFaceStorageWriter", "HuggingFaceStorageReader")


@pytest.fixture
def alone():
    """A process group of one rank, without a network; what makes a DTensor."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def remove(monkeypatch):
    for name in NAMES:
        monkeypatch.delattr(dcp, name)


def parts(mesh, tensors):
    from torch.distributed.tensor import Shard, distribute_tensor

    return {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in tensors.items()}


def written_by(ranks, folder, monkeypatch):
    """What several ranks write without DCP, one after the other."""
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(dist, "all_gather_object", lambda found, own: found.__setitem__(0, own))
    for rank in range(ranks):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        own = {}
        for name, tensor in WHOLE.items():
            size = -(-len(tensor) // ranks)
            first = min(len(tensor), rank * size)
            own[name] = Rows(tensor[first : first + size], first, tensor.shape)
        part_files.write(folder, own)
    monkeypatch.undo()


@pytest.mark.parametrize("how", ["DCP", "plain"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_both_forms_read_what_the_plain_form_wrote(how, ranks, alone, tmp_path, monkeypatch):
    """With three ranks, the last has no row of the tensor with two."""
    written_by(ranks, tmp_path, monkeypatch)
    assert len(list(tmp_path.iterdir())) == ranks
    if how == "plain":
        remove(monkeypatch)
    found = parts(alone, {name: torch.full_like(t, -1) for name, t in WHOLE.items()})
    fsdp.read_parts(tmp_path, found)
    for name, tensor in WHOLE.items():
        assert torch.equal(fsdp.whole(found[name]), tensor), name


@pytest.mark.parametrize("first", [0, 2, 4])
def test_plain_form_reads_the_rows_of_a_rank(first, alone, tmp_path):
    fsdp.write_parts(tmp_path, parts(alone, WHOLE))  # by DCP
    own = torch.zeros(2 if first < 4 else 1, 3)
    part_files.read(tmp_path, {"model.a": Rows(own, first, (5, 3))})
    assert torch.equal(own, WHOLE["model.a"][first : first + 2])


def test_plain_form_writes_where_dcp_is_missing(alone, tmp_path, monkeypatch):
    remove(monkeypatch)
    fsdp.write_parts(tmp_path, parts(alone, WHOLE))
    (file,) = tmp_path.iterdir()
    monkeypatch.undo()
    found = parts(alone, {name: torch.full_like(t, -1) for name, t in WHOLE.items()})
    fsdp.read_parts(tmp_path, found)  # by DCP
    assert all(torch.equal(fsdp.whole(found[name]), WHOLE[name]) for name in WHOLE)
    assert file.name == "shard-00001-model-00001-of-00001.safetensors"


@pytest.mark.parametrize("form", ["DCP", "plain"])
def test_what_does_not_fit_is_one_line(form, alone, tmp_path, monkeypatch):
    fsdp.write_parts(tmp_path, parts(alone, WHOLE))
    if form == "plain":
        remove(monkeypatch)
    for name, shape in (("model.a", (6, 3)), ("model.a", (5, 4)), ("model.c", (5, 3))):
        with pytest.raises(UserError, match="does not fit the model"):
            fsdp.read_parts(tmp_path, parts(alone, {name: torch.zeros(shape)}))
    with pytest.raises(UserError, match="not written"):
        fsdp.write_parts(tmp_path / "file", parts(alone, blocked(tmp_path)))


def blocked(folder):
    """A file where a folder is wanted: nothing can be written below it, by root neither."""
    (folder / "file").write_text("", "utf-8")
    return WHOLE


def test_a_full_disk_at_the_end_of_a_checkpoint_is_one_line(alone, tmp_path, monkeypatch):
    """`rt.on_main` hands only a UserError to the other ranks; with another they would wait."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharded_state, "write_rest", full)
    rt = SimpleNamespace(on_main=lambda function: function(), alone=contextlib.nullcontext)
    tensors = {
        "model": {"a": parts(alone, WHOLE)["model.a"]},
        "optimizer": {"state": {}, "param_groups": []},
    }
    with pytest.raises(UserError, match="step_00000001 not written: the disk is full"):
        sharded_state.write(tmp_path, 1, GPT2Config(), tensors, {}, keep_last=1, rt=rt)
    assert list((tmp_path / "state").iterdir()) == []
