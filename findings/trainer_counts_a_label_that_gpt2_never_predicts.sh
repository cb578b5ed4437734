#!/usr/bin/env bash
# transformers 5.24.0: the Trainer reports GPT-2's loss too low, and its gradient is too small. A sequence
# of T tokens has T - 1 predictions; the Trainer divides their sum by T. A quarter of the loss is missing
# at 4 tokens, a sixteenth at 16. So `eval_loss` depends on where a text is cut, and exp(eval_loss) is no
# perplexity. Llama's loss is right: since May 2026 the Trainer leaves the first label out of its count,
# if the name of the model's class has "ForCausalLM" in it. GPT-2's class is called GPT2LMHeadModel. The
# same weights in a subclass without a line of code, GPT2ForCausalLM, have another loss. The one warning,
# `loss_type=None` is unrecognized, says that the default loss is used, which is the right one.
#
# Short texts suffer most: lines, replies, questions. A GPT-2 does not compare with another model, nor with
# what another program measures. AdamW hides the gradient's size; SGD and clipping do not. Two ways out:
# `model.loss_type = "ForCausalLM"` before the Trainer is made, or -100 as every sequence's first label.
#
# Seen on Python 3.11 with torch 2.13.0, random weights, random tokens; loss by the model, by the Trainer
#   4 tokens   model 4.160  GPT2LMHeadModel 3.120  GPT2ForCausalLM 4.160  loss_type 4.160  first label -100 4.160
#   16 tokens  model 4.166  GPT2LMHeadModel 3.906  GPT2ForCausalLM 4.166  loss_type 4.166  first label -100 4.166
#   64 tokens  model 4.177  GPT2LMHeadModel 4.112  GPT2ForCausalLM 4.177  loss_type 4.177  first label -100 4.177
#   gradient of GPT2LMHeadModel as a share of GPT2ForCausalLM's: 0.7500, 0.9375, 0.9844
#   two texts of 64 tokens in pieces of 4: perplexity 63.1 by the model, 22.4 by the Trainer
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy transformers==5.24.0 accelerate==1.15.0
cat > try.py <<'PY'
import contextlib
import copy
import io
import math
import warnings

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

warnings.filterwarnings("ignore")
logging.set_verbosity_error()


class GPT2ForCausalLM(GPT2LMHeadModel):
    """GPT-2 by another name."""


rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 64, "n_positions": 64}
config = GPT2Config(**shape, **rates, bos_token_id=0, eos_token_id=0)
torch.manual_seed(0)
gpt2 = GPT2LMHeadModel(config).eval()
renamed = GPT2ForCausalLM(config).eval()
renamed.load_state_dict(gpt2.state_dict())
told = copy.deepcopy(gpt2)
told.loss_type = "ForCausalLM"
small = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64}
llama = LlamaForCausalLM(LlamaConfig(**small, num_hidden_layers=2, num_attention_heads=2)).eval()


def rows(ids: torch.Tensor, first: bool = True) -> list[dict[str, torch.Tensor]]:
    """A data set; without `first`, no sequence's first token is a label."""
    made = [{"input_ids": row, "labels": row.clone()} for row in ids]
    for row in made:
        row["labels"][0] = row["labels"][0] if first else -100
    return made


def arguments(**more: object) -> TrainingArguments:
    """What every Trainer here is told."""
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    return TrainingArguments("out", per_device_eval_batch_size=32, **quiet, **more)


def by_trainer(model: PreTrainedModel, data: list) -> float:
    """`eval_loss`."""
    with contextlib.redirect_stdout(io.StringIO()):
        return Trainer(model, arguments(), eval_dataset=data).evaluate()["eval_loss"]


def by_model(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """The mean loss of all predictions, worked out here."""
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


def gradient(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The gradient of one step of the Trainer: what SGD with a rate of 1 takes away."""
    model = copy.deepcopy(model)
    before = model.transformer.wte.weight.detach().clone()
    options = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    step = arguments(**options, max_steps=1, max_grad_norm=0.0, per_device_train_batch_size=32)
    with contextlib.redirect_stdout(io.StringIO()):
        Trainer(model, step, train_dataset=rows(ids)).train()
    return before - model.transformer.wte.weight.detach()


def near(a: float, b: float) -> bool:
    """Equal but for rounding."""
    return abs(a - b) < 1e-3 * abs(b)


as_described = True
for length in (4, 16, 64):
    ids = torch.randint(64, (32, length))
    true = by_model(gpt2, ids)
    plain, other = by_trainer(gpt2, rows(ids)), by_trainer(renamed, rows(ids))
    typed, masked = by_trainer(told, rows(ids)), by_trainer(gpt2, rows(ids, first=False))
    share = (gradient(gpt2, ids).norm() / gradient(renamed, ids).norm()).item()
    print(
        f"{length:2d} tokens: model {true:.3f}, Trainer with GPT2LMHeadModel {plain:.3f}, "
        f"GPT2ForCausalLM {other:.3f}, loss_type {typed:.3f}, first label -100 {masked:.3f}; "
        f"gradient {share:.4f}"
    )
    wanted = (length - 1) / length
    as_described &= near(plain, true * wanted) and near(share, wanted)
    as_described &= all(near(x, true) for x in (other, typed, masked))
    control, wanted = by_trainer(llama, rows(ids)), by_model(llama, ids)
    print(f"           Llama: model {wanted:.3f}, Trainer {control:.3f}")
    as_described &= near(control, wanted)

pieces = torch.randint(64, (2, 64)).view(-1, 4)
right, wrong = math.exp(by_model(gpt2, pieces)), math.exp(by_trainer(gpt2, rows(pieces)))
print(f"two texts of 64 tokens in pieces of 4: perplexity {right:.1f} by the model, {wrong:.1f} by the Trainer")
as_described &= wrong < right / 2
print("as described" if as_described else "the behaviour has changed")
raise SystemExit(0 if as_described else 1)
PY
venv/bin/python try.py
