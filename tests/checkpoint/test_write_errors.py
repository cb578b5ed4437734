"""Why a checkpoint was not written: a full disk, a limit, or something else."""

import errno
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import safetensors

from gpt2.checkpoint.write_errors import write_errors
from gpt2.errors import UserError

FULL, LARGE = "the disk is full, see docs", "no file may be so large here (ulimit -f, or the file"
QUOTA, LIMIT = (
    "the disk quota is used up, see",
    "a limit on the size of a file (ulimit -f) or",
)
CUT = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
WRITER = RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
ROOM, NONE = 2**35, 2**20


def of_rust(text):
    return safetensors.SafetensorError(f"Error while serializing: I/O error: {text}")


@pytest.mark.parametrize(("error", "free", "said"), [
    (OSError(errno.ENOSPC, "No space left on device"), ROOM, FULL),
    (OSError(errno.ENOSPC, "No space left on device"), NONE, FULL),
    (of_rust("No space left on device (os error 28)"), ROOM, FULL),
    (of_rust("There is not enough space on the disk. (os error 112)"), ROOM, FULL),
    (CUT, NONE, FULL),
    (WRITER, NONE, FULL),
    (CUT, ROOM, LIMIT),
    (WRITER, ROOM, LIMIT),
    (OSError(errno.EFBIG, "File too large"), ROOM, LARGE),
    (of_rust(f"File too large (os error {errno.EFBIG})"), NONE, LARGE),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), ROOM, QUOTA),
    (of_rust(f"Disk quota exceeded (os error {errno.EDQUOT})"), ROOM, QUOTA),
    (OSError(errno.EACCES, "Permission denied", "/workspace/out"), ROOM, "[Errno 13] Permission"),
    (RuntimeError("Parent directory /workspace/out does not exist."), NONE, "Parent directory"),
])  # fmt: skip
def test_the_reason_is_the_one_of_the_system(error, free, said, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    path = tmp_path / "a.pt"
    with pytest.raises(UserError) as caught, write_errors(path, 2**30):
        raise error
    assert str(caught.value).startswith(f"checkpoint {path} not written: {said}")
    assert "(needs 1.00 GiB, " in str(caught.value)


def test_little_room_is_not_none(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 2**20))
    with pytest.raises(UserError) as caught, write_errors(tmp_path / "a.pt", 2**22 + 2**19):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(caught.value).endswith("(needs 4.5 MiB, 3.0 MiB free)")


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit of file sizes")
@pytest.mark.parametrize(("kind", "said"), [("model", LIMIT), ("state", LARGE), ("rest", LIMIT)])
def test_a_limit_of_file_sizes_is_named(kind, said, tmp_path):
    """Torch tells nobody which error of the system it met."""
    code = f"""
import resource, sys, torch
from pathlib import Path
from gpt2.checkpoint.model_file import write_model
from gpt2.checkpoint.training_state import write_state
from gpt2.config.model import GPT2Config
from gpt2.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
many, few = {{"a": torch.zeros(10**5)}}, {{"a": torch.zeros(10)}}
out = Path(sys.argv[1])
try:
    if {kind!r} == "model":
        write_model(out / "a.pt", GPT2Config(), many, 1, None)
    else:
        tensors, rest = (many, few) if {kind!r} == "state" else (few, many)
        write_state(out, 1, GPT2Config(), tensors, rest, keep_last=1)
except UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert f"not written: {said}" in done.stdout
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
