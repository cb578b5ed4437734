"""What `gpt2 doctor` says of machines that lack something."""

import contextlib
import time

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from gpt2.cli import main
from gpt2.commands import doctor
from gpt2.distributed import devices

SUBJECTS = [
    *("gpt2", "python", "torch", "packages", "device", "memory", "precision", "C compiler"),
    *("compile", "fp8", "CUDA graphs", "FlexAttention", "Triton", "disk", "Hub"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Session:
    """Stands for huggingface_hub's client."""

    def __init__(self, seconds=0.0, error=None):
        self.seconds, self.error = seconds, error

    def head(self, url, timeout):
        time.sleep(self.seconds)
        if self.error:
            raise self.error


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def use(**trouble):
        monkeypatch.setattr(huggingface_hub, "get_session", lambda: Session(**trouble))

    return use


def test_one_block_and_no_name_of_the_user(client, capsys, tmp_path, monkeypatch):
    client(error=OSError("[Errno -2] Name or service not known\nmore"))
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 0
    begin, *lines, end, advice = capsys.readouterr().out.splitlines()
    assert (begin, end) == ("```text", "```")
    assert [line[:14].strip() for line in lines] == SUBJECTS
    assert all(line[14:].strip() for line in lines)
    assert "bug report" in advice
    assert lines[2].split()[1].rstrip(",") == torch.__version__
    assert "Name or service not known); what is on this disk works" in lines[-1]
    assert str(tmp_path) not in "".join(lines)


def test_the_hub_is_asked_for_a_short_time_only(client, monkeypatch):
    client()
    assert "answered in 0.0 s" in doctor.hub(3.0)
    client(seconds=0.6)
    begun = time.monotonic()
    assert "did not answer within 0.1 s" in doctor.hub(0.1)
    assert time.monotonic() - begun < 0.5
    assert doctor.hub(0) == "not asked"
    monkeypatch.setattr(constants, "ENDPOINT", "https://user:secret@hub.example/path")
    client(error=ValueError("x"))
    assert doctor.hub(3.0).startswith("hub.example cannot be reached (")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert doctor.hub(3.0) == "not asked: HF_HUB_OFFLINE is set"


@pytest.mark.parametrize("given", ["-1", "61", "soon"])
def test_a_wrong_time_is_one_line(given, capsys):
    assert main(["doctor", f"--timeout_seconds={given}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_features_of_a_cpu_have_their_reasons(monkeypatch):
    found = dict(doctor.features(CPU))
    assert found["fp8"].startswith("no: needs a GPU of compute capability 8.9")
    assert found["CUDA graphs"] == "no: there are none on a cpu"
    assert found["FlexAttention"].startswith("no: it needs an NVIDIA GPU, not a cpu")
    monkeypatch.setattr(devices.shutil, "which", lambda _: None)
    found = dict(doctor.features(CPU))
    assert found["C compiler"] == "none"
    if devices.sys.platform != "win32":
        assert found["compile"].startswith("no: torch.compile needs a C compiler (install gcc)")


@pytest.mark.parametrize(
    ("capability", "fp8", "graphs"), [((9, 0), True, True), ((7, 5), False, True),
                                      ((6, 1), False, False)],
)  # fmt: skip
def test_features_of_gpus(capability, fp8, graphs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(devices, "describe", str)
    monkeypatch.setattr(devices.shutil, "which", lambda name: name)
    found = dict(doctor.features(GPU))
    assert found["fp8"].startswith("yes" if fp8 else "no")
    assert found["CUDA graphs"].startswith("yes" if graphs else "no")
    assert found["FlexAttention"].startswith("yes" if graphs else "no: torch.compile needs a GPU")


def test_a_torch_that_does_not_fit_the_driver_is_named(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA: install another build" in doctor._why_no_gpu(CPU)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "torch finds no GPU" in doctor._why_no_gpu(CPU)
    assert doctor._why_no_gpu(GPU) == ""
