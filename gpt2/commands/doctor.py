"""`gpt2 doctor`: what this machine has, and why something is off, as a block for a bug report.

Nothing is compiled, trained or downloaded, so that it answers in seconds. What is missing is an
answer and no failure. Paths and names of the machine and of its user are left out.
"""

import importlib.metadata
import os
import platform
import shutil
import threading
import time

import torch

from .. import __version__
from ..config.commands import DoctorConfig
from ..distributed import devices
from ..errors import DISTRIBUTION, UserError, first_line
from ..kernels.precision import HAS_TRITON
from ..report import console
from ..report.versions import NEWEST_TORCH, newer_torch

PACKAGES = (  # those without which nothing works, then those of extras
    *("numpy", "tiktoken", "safetensors", "pyarrow", "huggingface_hub", "filelock", "matplotlib"),
    *("triton", "tokenizers", "gigatoken", "transformers", "peft", "lm_eval", "fastapi", "uvicorn"),
    *("wandb", "tensorboard", "trackio", "nvidia-cudnn-frontend"),
)


def run(config: DoctorConfig) -> int:
    """Prints the report; returns 0, whatever is missing."""
    console.log("```text")
    for name, answer in report(config.timeout_seconds):
        console.log(f"{name:14} {answer}")
    console.log("```")
    console.log(
        "Paste the lines above into a bug report. docs/troubleshooting.md has known causes."
    )
    return 0


def report(timeout_seconds: float) -> list[tuple[str, str]]:
    """(subject, answer) of each line."""
    try:
        device = devices.choose_device("auto")
    except (UserError, RuntimeError) as error:  # a driver that is broken
        device, broken = torch.device("cpu"), f"; {first_line(error)}"
    else:
        broken = ""
    return [
        ("gpt2", f"{__version__}, {_how_installed()}"),
        ("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("torch", _torch()),
        ("packages", _packages()),
        ("device", devices.describe(device) + broken + _why_no_gpu(device)),
        ("memory", _memory()),
        ("precision", _precision(device)),
        *features(device),
        ("disk", f"{_gigabytes(shutil.disk_usage('.').free)} free in this folder"),
        ("Hub", hub(timeout_seconds)),
    ]


def features(device: torch.device) -> list[tuple[str, str]]:
    """What makes training fast, on or off, and the reason."""
    missing = devices.missing_for_compile(device)
    compiles = not missing and device.type == "cuda"
    graph, why_graph = devices.choose_graph(device, compiles, sharded=False)
    try:
        devices.allow_fp8("head", device, torch.bfloat16)
        fp8 = "yes: --fp8=head"
    except UserError:
        fp8 = "no: needs a GPU of compute capability 8.9 or newer (RTX 4090, L4, H100, …)"
    flex = "yes: attention windows and documents skip what they hide"
    if not compiles:
        flex = f"no: {missing or f'it needs an NVIDIA GPU, not a {device.type}'}; dense masks"
    compiler = next(filter(shutil.which, devices.COMPILERS), "none")
    return [
        ("C compiler", compiler),
        ("compile", f"no: {missing}" if missing else _compile_words(device)),
        ("fp8", fp8),
        ("CUDA graphs", f"{'yes' if graph else 'no'}: {why_graph}"),
        ("FlexAttention", flex),
        ("Triton", "yes" if HAS_TRITON else "no: plain PyTorch takes its place"),
    ]


def _compile_words(device: torch.device) -> str:
    if device.type == "cuda":
        return "yes, by default; a run tries it on a tiny function first"
    return (
        f"can be; off by default, since on a {device.type} it takes half a minute and gains little"
    )


def hub(timeout_seconds: float) -> str:
    """Whether the Hugging Face Hub answers, within a time in seconds; 0: it is not asked."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "not asked: HF_HUB_OFFLINE is set"
    if not timeout_seconds:
        return "not asked"
    answers: list[str] = []
    begun = time.monotonic()
    # A thread: nothing bounds the time that a name server takes.
    asking = threading.Thread(target=_ask_hub, args=(answers, timeout_seconds), daemon=True)
    asking.start()
    asking.join(timeout_seconds)
    host = constants.ENDPOINT.partition("://")[2].partition("/")[0].rpartition("@")[2]
    if not answers:
        return f"{host} did not answer within {timeout_seconds:g} s; what is on this disk works"
    if answers[0]:
        return f"{host} cannot be reached ({answers[0]}); what is on this disk works"
    token = "with a token" if get_token() else "without a token"
    return f"{host} answered in {time.monotonic() - begun:.1f} s, {token}"


def _ask_hub(answers: list[str], timeout_seconds: float) -> None:
    """Appends what went wrong, or "" for an answer of any kind."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=timeout_seconds)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
        answers.append(first_line(error)[:150])
    else:
        answers.append("")


def _how_installed() -> str:
    try:
        files = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "not installed: run from a clone"
    editable = "editable" in (files.read_text("direct_url.json") or "")
    return "installed from a clone (pip install -e)" if editable else "installed"


def _torch() -> str:
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    newest = ".".join(map(str, NEWEST_TORCH))
    tested = f"newer than {newest}, the newest tested" if newer_torch(torch.__version__) else ""
    return f"{torch.__version__}, {built}; {tested or f'tested up to {newest}'}"


def _packages() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _why_no_gpu(device: torch.device) -> str:
    """Why there is no NVIDIA GPU, where a driver shows one."""
    if device.type == "cuda" or not shutil.which("nvidia-smi"):
        return ""
    if not torch.version.cuda:
        return "; nvidia-smi is here, but this torch was built without CUDA: install another build"
    return "; nvidia-smi is here, but torch finds no GPU: see docs/troubleshooting.md"


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return f"{os.cpu_count()} CPU cores"
    return f"{_gigabytes(size)}, {os.cpu_count()} CPU cores"


def _precision(device: torch.device) -> str:
    dtype, reason = devices.choose_dtype("auto", device)
    return f"{str(dtype)[6:]}: {reason}"


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
