#!/usr/bin/env bash
# local-attention 1.11.2: `LocalTransformer.generate` writes texts that the model does not predict. It keeps
# keys and values by default (`use_kv_cache=True`). Behind a cache `LocalMHA.forward` (transformer.py) turns all
# keys by the rotary embedding, and then puts the turned keys into the cache. The next step turns them
# again. So with each new word the older keys are turned once more. Nothing warns. `forward` and the
# loss are right, so that training goes well.
# Networks with `use_dynamic_pos_bias=True` have no rotary embedding, and are right.
#
# `qk_rmsnorm=True` has another error there. Its scores are to be multiplied by `qk_scale`, 8 by default. Behind a
# cache they are divided by the root of `dim_head`. The way out of both is `use_kv_cache=False`.
#
# Seen on Python 3.11, torch 2.13.0, two layers, one residual stream, six random words that are repeated; greatest
# error of a score behind a cache, and share of right words of greedy `generate`
#   rotary, as by default: error 10.67, right words 0.26, without cache 1.00
#   use_dynamic_pos_bias: error 0.00, right words 1.00, without cache 1.00
#   use_dynamic_pos_bias, qk_rmsnorm: error 9.82, right words 0.32, without cache 1.00
#   repaired: error 0.00, right words 1.00
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy local-attention==1.11.2 einops==0.8.2 hyper-connections==0.4.11
cat > try.py <<'PY'
import importlib.metadata
import inspect

import torch
from local_attention import LocalTransformer, transformer

PERIOD, LENGTH, WORDS, STEPS = 6, 48, 16, 150
START = 2 * PERIOD
for package in ("torch", "local-attention"):
    print(package, importlib.metadata.version(package))
torch.set_num_threads(1)


def rows(count: int) -> torch.Tensor:
    """Rows of six random words that are repeated."""
    return torch.randint(0, WORDS, (count, PERIOD)).repeat(1, LENGTH // PERIOD)


def repaired(*changes: tuple[str, str]) -> type:
    """LocalMHA with lines of its source replaced."""
    source = inspect.getsource(transformer.LocalMHA)
    for old, new in changes:
        if source.count(old) != 1:
            raise SystemExit(1)
        source = source.replace(old, new)
    space = dict(vars(transformer))
    exec(source, space)
    return space["LocalMHA"]


def measure(repair: type, **options: object) -> list[float]:
    """Scores' greatest error behind a cache; right words of generate as is, without cache, repaired."""
    torch.manual_seed(0)
    model = LocalTransformer(
        num_tokens=WORDS, dim=64, depth=2, max_seq_len=LENGTH, local_attn_window_size=8, dim_head=32, heads=4,
        num_residual_streams=1, **options,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(rows(16), return_loss=True).backward()
        optimizer.step()
    model.eval()
    ids = rows(50)

    def error() -> float:
        """The same words, read in one call and one by one behind a cache."""
        with torch.no_grad():
            at_once = model(ids)
            scores, cache = model(ids[:, :START], return_cache=True)
            worst = (scores - at_once[:, :START]).abs().max()
            for end in range(START + 1, LENGTH + 1):
                scores, cache = model(ids[:, :end], cache=cache, return_cache=True)
                worst = max(worst, (scores[:, -1] - at_once[:, end - 1]).abs().max())
        return worst.item()

    def right(**how: object) -> float:
        """Share of right words, most likely word by word."""
        text = model.generate(ids[:, :START], LENGTH - START, temperature=0.0, **how)
        return (text == ids[:, START:]).float().mean().item()

    found = [error(), right(), right(use_kv_cache=False)]
    for module in model.modules():
        if isinstance(module, transformer.LocalMHA):
            module.__class__ = repair
    return [*found, error(), right()]


keep = (
    ("(k, v))\n\n            if exists(self.attn_fn.rel_pos)",
     "(k, v))\n            kv = torch.stack((k, v))\n\n            if exists(self.attn_fn.rel_pos)"),
    ("if return_cache:\n", "if return_cache and not exists(cache):\n"),
)
scale = (("q = q * (q.shape[-1] ** -0.5)", "q = q * default(self.attn_fn.scale, q.shape[-1] ** -0.5)"),)
good = True
for name, repair, options, wrong in (
    ("rotary, as by default", keep, {}, True),
    ("use_dynamic_pos_bias", keep, {"use_dynamic_pos_bias": True}, False),
    ("use_dynamic_pos_bias, qk_rmsnorm", scale, {"use_dynamic_pos_bias": True, "qk_rmsnorm": True}, True),
):
    error, cached, plain, error_repaired, cached_repaired = measure(repaired(*repair), **options)
    print(f"{name}: error of a score {error:.4f}, right words {cached:.2f}, without cache {plain:.2f};")
    print(f"  repaired: error {error_repaired:.4f}, right words {cached_repaired:.2f}")
    good &= plain > 0.95 and error_repaired < 1e-3 and cached_repaired == plain
    good &= (error > 1 and cached < 0.7) if wrong else (error < 1e-3 and cached == plain)
raise SystemExit(0 if good else 1)
PY
venv/bin/python try.py
