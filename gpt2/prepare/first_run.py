"""The command that `gpt2 prepare` ends with: a run that fits the amount of text and the device.

On a CPU it takes minutes and does not read a small text more than `CPU_EPOCHS` times. On a GPU a
token is read at most four times, up to which repetition is nearly as good as new text (Muennighoff
et al. 2023, arXiv:2305.16264), and the model has about 20 tokens for each parameter or the largest
size that has (Hoffmann et al. 2022, arXiv:2203.15556).
"""

import shutil
from pathlib import Path

from ..paths import for_shell

AMD_DRIVER = Path("/dev/kfd")  # of ROCm
CPU_BATCH = 4  # of 256 tokens, as in configs/laptop.toml: 0.4 to 1.6 s on two cores with gpt2-mini
CPU_STEPS, CPU_EPOCHS = 300, 20
GPU_EPOCHS = 4
GPU_STEPS = 1000  # as many if the text is small; larger texts have larger steps
LARGEST_STEP, FULL_RUN = 524_288, 19_073  # GPT-2's recipe: 10 billion tokens
GPU_SIZES = ((1_000_000_000, "gpt2"), (0, "gpt2-mini"))  # from so many tokens to train on


def device_here() -> str:
    """ "cuda" where a driver of NVIDIA or AMD is installed, else "cpu".

    torch would know better, but preparing works without it, and importing it takes seconds.
    """
    return "cuda" if shutil.which("nvidia-smi") or AMD_DRIVER.exists() else "cpu"


def options(tokens: int, device: str) -> dict[str, object]:
    """Options of `gpt2 train` beside the folders, by name.

    Args:
        tokens: of the training shards.
        device: "cpu" or "cuda".
    """
    longest = 1 << max(0, (tokens - 1).bit_length() - 1)  # a sequence and the token after it
    if device != "cuda":
        block_size = min(256, longest)
        steps = max(1, min(CPU_STEPS, CPU_EPOCHS * tokens // (CPU_BATCH * block_size)))
        return {
            "size": "gpt2-mini",
            "block_size": block_size,
            "batch_size": CPU_BATCH,
            "grad_accum_steps": 1,
            "max_steps": steps,
            "learning_rate": 1e-3,
            "eval_every": max(1, steps // 5),
            "eval_tokens": 16_384,
        }
    whole = min(GPU_EPOCHS * tokens, FULL_RUN * LARGEST_STEP)
    size = next(name for least, name in GPU_SIZES if whole >= least)
    step = 8192  # one micro-batch: 8 sequences of 1,024 tokens
    while step < LARGEST_STEP and whole // (2 * step) >= GPU_STEPS:
        step *= 2
    steps = max(1, whole // step)
    if (step, steps, size) == (LARGEST_STEP, FULL_RUN, "gpt2"):
        return {}  # the defaults
    every = max(1, steps // 20)
    asked = {"size": size, "total_batch_tokens": step, "max_steps": steps, "eval_every": every}
    if longest < 1024:
        asked["block_size"] = longest
    return asked | {"eval_tokens": min(10_485_760, max(16_384, whole // 100))}


def command(tokens: int, device: str, out_dir: Path) -> str:
    """The command line of a first run on the shards in `out_dir`."""
    chosen = "".join(f" --{name}={value}" for name, value in options(tokens, device).items())
    data, out = for_shell(out_dir), for_shell(f"out/{out_dir.name}")
    return f"gpt2 train --data_dir={data} --out_dir={out}{chosen}"
