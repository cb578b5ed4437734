# a training run whose tied head becomes a matrix of its own after UNTIE_AT of the steps
import copy, os, sys, torch
from torch import nn
import gpt2.train.loop as loop
from gpt2.cli import main
from gpt2.report import console
from gpt2.train.cuda_graph import MicroBatchGraph
from gpt2.train.optimizer import build_optimizer
real, at = loop.train_step, float(os.environ.get("UNTIE_AT", "0.6667"))
def untie(state, config, rt):
    model, old = state.model, state.optimizer
    wte = model.transformer.wte.weight
    head = nn.Linear(wte.shape[1], wte.shape[0], bias=False, device=wte.device, dtype=wte.dtype)
    with torch.no_grad(): head.weight.copy_(wte)
    model.head = head
    new = build_optimizer(model, config.optim, rt)
    for group, before in zip(new.param_groups, old.param_groups):
        for key, value in before.items():
            if key not in ("params", "names"): group[key] = value
        for p in group["params"]:
            kept = old.state[wte if p is head.weight else p]
            new.state[p] = {k: v.clone() if isinstance(v, torch.Tensor) else copy.copy(v) for k, v in kept.items()} if p is head.weight else kept
    state.optimizer = new
    state.graph.forget()
    state.graph = MicroBatchGraph(model, state.graph.enabled, console.warn)
    console.log(f"untied at step {state.step}: head in group {[g['names'][:2] for g in new.param_groups if 'head.weight' in g['names']]}")
def step(state, config, rt):
    if state.model.head is None and state.step >= at * config.optim.max_steps:
        with state.clock.pause(): untie(state, config, rt)
    return real(state, config, rt)
loop.train_step = step
sys.exit(main(sys.argv[1:]))
