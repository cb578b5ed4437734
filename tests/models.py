"""Checkpoints as other projects write them, with transformers' network for the numbers."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
import transformers

from gpt2.huggingface.model_format import from_hf

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32}


def reference(vocab_size=50257, block_size=64, activation="gelu_new", bias=True, seed=0, **fields):
    """GPT2LMHeadModel with weights that are far from fresh ones."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        **SHAPE, vocab_size=vocab_size, n_positions=block_size, activation_function=activation,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **fields,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.1 * torch.randn_like(p))
            if not bias and name.endswith("bias"):
                p.zero_()
    return model


def logits(model, idx):
    with torch.no_grad():
        out = model(idx)
    return getattr(out, "logits", out)


def linear_state(model) -> dict[str, torch.Tensor]:
    """The reference's tensors as nanoGPT and build-nanogpt hold them: (out, in), head included."""
    state = {n: t.clone() for n, t in from_hf(model.state_dict()).items()}
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def write_nanogpt(path: Path, model, prefix="", bias=True) -> Path:
    """A `ckpt.pt` with what nanoGPT's train.py puts there."""
    state = {prefix + n: t for n, t in linear_state(model).items() if bias or "bias" not in n}
    c = model.config
    some = torch.nn.Parameter(torch.zeros(2))
    args = {**SHAPE, "block_size": c.n_positions, "bias": bias, "vocab_size": c.vocab_size}
    torch.save(
        {
            "model": state,
            "optimizer": torch.optim.AdamW([some]).state_dict(),
            "model_args": args | {"dropout": 0.0},
            "iter_num": 2000,
            "best_val_loss": torch.tensor(3.25),
            "config": {"out_dir": "out", "compile": True},
        },
        path,
    )
    return path


def write_build_nanogpt(path: Path, model, module="__main__", name="GPTConfig") -> Path:
    """A `model_00250.pt`, whose config is an instance of a class of the script that wrote it."""
    cls = type(name, (), {"__module__": module})
    config = cls()
    c = model.config
    vars(config).update(SHAPE, block_size=c.n_positions, vocab_size=c.vocab_size)
    content = {"model": linear_state(model), "config": config, "step": 250, "val_loss": 6.5}
    home = sys.modules.get(module)
    made = home or sys.modules.setdefault(module, types.ModuleType(module))
    before = getattr(made, name, None)
    setattr(made, name, cls)  # pickle looks the class up where it says it is
    try:
        torch.save(content, path)
    finally:
        setattr(made, name, before) if before else delattr(made, name)
        if home is None:
            del sys.modules[module]
    return path


def write_llmc(path: Path, model, version=3, padded=50304) -> Path:
    """A `.bin` of llm.c: header, tables, each parameter of all blocks, last norm."""
    state, c = linear_state(model), model.config
    header = np.zeros(256, "<i4")
    header[:8] = (
        *(20240326, version, c.n_positions, c.vocab_size),
        *(SHAPE["n_layer"], SHAPE["n_head"], SHAPE["n_embd"], padded),
    )
    wte = torch.zeros(padded, SHAPE["n_embd"])
    wte[: c.vocab_size] = state["transformer.wte.weight"]
    order = (
        *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias"),
        *("attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias"),
        *("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
    )
    tensors = [wte, state["transformer.wpe.weight"]]
    tensors += [state[f"transformer.h.{layer}.{n}"] for n in order for layer in range(2)]
    tensors += [state["transformer.ln_f.weight"], state["transformer.ln_f.bias"]]
    with open(path, "wb") as file:
        file.write(header.tobytes())
        for t in tensors:
            raw = t if version == 3 else t.bfloat16().view(torch.int16)
            file.write(raw.numpy().tobytes())
    return path


def change_json(path: Path, **fields):
    """Sets fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | fields), encoding="utf-8")
