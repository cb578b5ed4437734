#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.24.0: `GRPOTrainer` and `RLOOTrainer` train GPT-2 on texts that it
# did not write, once the prompts of a batch differ in length. Prompts are padded on the left.
# `generate` counts positions from each prompt's first word. The trainer then scores the completion
# with an attention mask and without positions. GPT-2 counts those from the first padding token. So
# the completion of any but the longest prompt is scored, and differentiated, at positions at which
# it was not written. Nothing warns. Old and new log-probabilities err alike, so that ratio,
# clipping and `kl` look as they should. Llama's positions are relative, and it is right. For Online
# DPO, XPO and Nash-MD the gap is a known issue (trl 6800); PPO passes positions.
#
# The gradient of a short prompt points elsewhere, and its reward can fall in training. A way out is
# the hook below, which gives the positions to `model.transformer`. Prompts of one length need none.
#
# Seen on Python 3.11, torch 2.13.0, 2 layers, random weights, prompts of 2 and 20 words,
# completions of 5 words, 60 steps; the reference scores each completion alone; error is the
# greatest of a log-probability
#   GPT-2 with GRPO, and with RLOO: prompt of 2: error 1.98, cosine of the gradient 0.23; prompt of
#     20: 0.00 and 1.00
#   GPT-2 with the hook, GPT-2 with prompts of one length, Llama: 0.00 and 1.00
#   reward of the prompt of 2: 0.49 before, 0.27 after, with the hook 0.99; prompt of 20: 0.45,
#     0.99, with it 0.99
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy transformers==5.24.0 trl==1.16.0 \
    accelerate==1.15.0 datasets==5.2.0
cat > try.py <<'PY'
import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
import datasets
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

logging.set_verbosity_error()
logging.disable_progress_bar()
datasets.disable_progress_bars()
warnings.simplefilter("ignore")
torch.set_num_threads(1)
WORDS, NEW, STEPS = 50, 5, 60
SHORT, LONG = "w1 w2", " ".join(f"w{i}" for i in range(3, 23))
core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=core, unk_token="w0", eos_token="w0", pad_token="w49"
)
common = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 49}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2, **off, **common))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2, **common))


def give_positions(module, args, kwargs):
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is None and mask is not None:
        kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return args, kwargs


def reward(prompts: list[str], completions: list[str], **other) -> list[float]:
    """The share of words with an odd number behind the short prompt, an even one behind others."""
    rewards = []
    for prompt, text in zip(prompts, completions):
        wanted = int(prompt == SHORT)
        rewards.append(sum(int(word[1:]) % 2 == wanted for word in text.split()) / NEW)
    return rewards


def trainer_of(kind, model, prompts: list[str], steps: int):
    config = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}[kind]
    options = config(
        output_dir="out",
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=NEW,
        max_steps=steps,
        beta=0.0,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=1,
    )
    trainer = kind(
        model=model,
        args=options,
        reward_funcs=reward,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def alone(model, prompt: torch.Tensor, completion: torch.Tensor) -> torch.Tensor:
    """The log-probabilities of a completion's words, without padding."""
    row = torch.cat([prompt, completion])[None]
    scores = model(input_ids=row, use_cache=False).logits[0].log_softmax(-1)
    return scores[len(prompt) - 1 : -1].gather(1, completion[:, None])[:, 0]


def measure(kind, make, prompts: list[str], hook: bool = False) -> dict[int, tuple[float, float]]:
    """By length of the prompt: greatest error of a log-probability, cosine of the gradient."""
    model = make()
    if hook:
        model.transformer.register_forward_pre_hook(give_positions, with_kwargs=True)
    trainer = trainer_of(kind, model, prompts, 1)
    first, score = trainer.compute_loss, trainer._get_per_token_logps_and_entropies
    found = {}

    def compare(network, inputs, *args, **kwargs):
        lengths = inputs["prompt_mask"].sum(1)
        for length in lengths.unique().tolist():
            rows = lengths == length
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)[rows]
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)[rows]
            told = score(network, ids, mask, inputs["completion_ids"].shape[1])[0]
            kept = inputs["completion_mask"][rows].bool()
            advantages = inputs["advantages"][rows]
            plain, error, goal = make(), 0.0, 0.0
            for i, keep in enumerate(kept):
                prompt = inputs["prompt_ids"][rows][i][-length:]
                exact = alone(plain, prompt, inputs["completion_ids"][rows][i][keep])
                error = max(error, (told[i][keep] - exact).abs().max().item())
                goal = goal + advantages[i] * exact.sum()
            pull = (advantages[:, None] * told * kept).sum()
            ours = torch.autograd.grad(pull, list(network.parameters()))
            right = torch.autograd.grad(goal, list(plain.parameters()))
            ours, right = (torch.cat([g.flatten() for g in part]) for part in (ours, right))
            found[length] = error, torch.cosine_similarity(ours, right, dim=0).item()
        return first(network, inputs, *args, **kwargs)

    trainer.compute_loss = compare
    trainer.train()
    return found


@torch.no_grad()
def value(model, prompt: str) -> float:
    """The reward of 500 completions of a prompt."""
    set_seed(5)
    row = tokenizer(prompt, return_tensors="pt").input_ids.expand(500, -1)
    model.eval()
    texts = model.generate(
        input_ids=row,
        attention_mask=torch.ones_like(row),
        do_sample=True,
        max_new_tokens=NEW,
    )
    return sum(reward([prompt] * 500, tokenizer.batch_decode(texts[:, row.shape[1] :]))) / 500


good = True
cases = (
    ("GPT-2 GRPO", GRPOTrainer, gpt2, [SHORT, LONG], False),
    ("GPT-2 RLOO", RLOOTrainer, gpt2, [SHORT, LONG], False),
    ("GPT-2 GRPO with the hook", GRPOTrainer, gpt2, [SHORT, LONG], True),
    ("GPT-2 GRPO, one length", GRPOTrainer, gpt2, [SHORT, "w3 w4"], False),
    ("Llama GRPO", GRPOTrainer, llama, [SHORT, LONG], False),
)
for name, kind, make, prompts, hook in cases:
    for length, (error, cosine) in sorted(measure(kind, make, prompts, hook).items()):
        print(f"{name}, prompt of {length}: error {error:.2f}, cosine of gradient {cosine:.2f}")
        if make is gpt2 and length == 2 and not hook and LONG in prompts:
            good &= error > 1 and cosine < 0.8
        else:
            good &= error < 1e-3 and cosine > 0.999
for name, hook in (("GPT-2 GRPO", False), ("GPT-2 GRPO with the hook", True)):
    model = gpt2()
    rewards = [[value(model, prompt) for prompt in (SHORT, LONG)]]
    if hook:
        model.transformer.register_forward_pre_hook(give_positions, with_kwargs=True)
    trainer_of(GRPOTrainer, model, [SHORT, LONG], STEPS).train()
    rewards.append([value(model, prompt) for prompt in (SHORT, LONG)])
    for i, length in enumerate((2, 20)):
        start, end = rewards[0][i], rewards[1][i]
        print(f"{name}, prompt of {length}: reward {start:.2f}, after {STEPS} steps {end:.2f}")
        if length == 2 and not hook:
            good &= end < start - 0.04
        else:
            good &= end > 0.8
raise SystemExit(0 if good else 1)
PY
venv/bin/python try.py
