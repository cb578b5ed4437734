"""The mean of a run's newest saved states, as one model: `gpt2 average`.

The mean of weights from the end of a run often has a lower loss than the last of them (Izmailov et
al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407).
Only `model.safetensors` of each state is read, after its sha256 was compared with the manifest, and
the tokenizer of the newest.
"""

from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..config.model import GPT2Config
from ..config.parameter_shapes import check_fit, check_size, parameter_shapes
from ..errors import UserError, first_line
from ..files import check_replaceable
from ..huggingface.kept_tokenizer import stored_tokenizer
from ..huggingface.safetensors_header import read_header
from ..paths import check_utf8
from .model_file import check_finite, config_of, write_model
from .safe_load import torch_load
from .state_schema import not_whole
from .training_state import (
    MANIFEST,
    MODEL_FILE,
    PART_FILE,
    STATE_FILE,
    check_files,
    read_manifest,
    state_folders,
)

MEAN_NAME = "mean.pt"  # the default of --out=, in the folder of the run
OF_THE_RUN = "out_ckpt.pt", "best_ckpt.pt"
ZIP_BEGIN = b"PK\x03\x04"  # of a file that torch.save wrote


def average_states(out_dir: Path, last: int, out: str = "") -> str:
    """Writes the mean of the newest states of a run as a checkpoint for use.

    Args:
        out_dir: the run's folder, with `state/step_…` below it.
        last: number of newest states.
        out: the checkpoint to write; empty: `mean.pt` in `out_dir`.

    Returns:
        A line that says what was averaged, and where it is.

    Raises:
        UserError: fewer states than that, damage, FSDP parts, LoRA adapters, states of different
            networks, a file in the way that is no checkpoint, or a model of the run itself.
    """
    path = Path(out) if out else out_dir / MEAN_NAME
    check_utf8(path)
    check_utf8(out_dir)
    if path.exists() and path.resolve() in [(out_dir / of_run).resolve() for of_run in OF_THE_RUN]:
        raise UserError(
            f"{path}: the run wrote this file itself, with its loss; use another --out=, as "
            f"{out_dir / MEAN_NAME}"
        )
    check_replaceable(path, ZIP_BEGIN, "checkpoint of this project")
    folders = state_folders(out_dir)
    if not folders:
        raise UserError(f"{out_dir / 'state'} holds no saved states; name the folder of a run")
    if len(folders) < last:
        raise UserError(
            f"{out_dir / 'state'} holds {len(folders)} saved states, not {last}; use "
            f"--last={len(folders)}, or train with --keep_last={last}"
        )
    step, config, mean = _mean(folders[-last:])
    state = torch_load(folders[-1] / STATE_FILE)  # mapped: the optimizer state is not read
    kept = state.get("tokenizer") if isinstance(state, dict) else None
    own = stored_tokenizer(kept, folders[-1] / STATE_FILE, config.vocab_size)
    write_model(path, config, mean, step, None, own_tokenizer=own)
    first = folders[-last].name.removeprefix("step_").lstrip("0") or "0"
    return f"{path}: the mean of {last} saved states, steps {int(first):,} to {step:,}"


def _mean(folders: list[Path]) -> tuple[int, GPT2Config, dict[str, Tensor]]:
    """(last step, config, the mean of the weights). Sums are kept in float64."""
    step, config, total, types = 0, GPT2Config(), {}, {}
    for number, folder in enumerate(folders):
        step, found, state = _read(folder)
        if number == 0:
            config, total = (
                found,
                {n: torch.zeros_like(t, dtype=torch.float64) for n, t in state.items()},
            )
            types = {name: tensor.dtype for name, tensor in state.items()}
        elif found != config:
            raise UserError(
                f"{folder} and {folders[0]} are of different networks; use a smaller --last"
            )
        for name, tensor in state.items():
            total[name] += tensor
    return step, config, {n: (t / len(folders)).to(types[n]) for n, t in total.items()}


def _read(folder: Path) -> tuple[int, GPT2Config, dict[str, Tensor]]:
    """(step, config, weights) of a state, without its optimizer state."""
    manifest = read_manifest(folder)
    files, path = manifest["files"], folder / MODEL_FILE
    if any(PART_FILE.fullmatch(name) for name in files):
        raise UserError(
            f"{folder} holds FSDP parts, which are not averaged; continue the run without "
            "--parallel=fsdp, whose next saved states are whole"
        )
    config = config_of(manifest["config"], folder / MANIFEST, manifest.get("plugins"))
    try:
        check_files(folder, files, [MODEL_FILE], verify=True)
        shapes, _ = read_header(path)
        if any(".lora_" in name for name in shapes):
            raise UserError(
                f"{folder} holds LoRA adapters, and the mean of adapters is not the adapter of the "
                "mean; average a run without --lora_rank"
            )
        check_size(config, path.stat().st_size, folder)
        check_fit(parameter_shapes(config), shapes, folder)
        state = load_file(path)
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(not_whole(folder, first_line(error))) from None
    check_finite(state, path)
    return manifest["step"], config, state
