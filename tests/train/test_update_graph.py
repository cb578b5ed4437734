"""The update by a CUDA graph: when it is recorded, and that it computes what launches compute."""

import copy

import pytest
import torch

from gpt2.config.train import OptimOptions
from gpt2.distributed.runtime import Runtime
from gpt2.train.optimizer import build_optimizer
from gpt2.train.update_graph import Numbers, UpdateGraph


class Recording(UpdateGraph):
    """Records nothing; says what happened."""

    def __init__(self):
        super().__init__()
        self.log = []

    def _record(self, update):
        self.log.append("record")
        return self

    def replay(self):
        self.log.append("replay")


def test_it_is_recorded_once_the_addresses_stay():
    graph = Recording()
    for key in (1, 2, 2, 2, 2, 3):
        graph(lambda: graph.log.append("update"), key)
    assert graph.log == ["update"] * 3 + ["record", "replay", "replay", "update"]


def test_what_cannot_be_recorded_is_launched():
    graph, log = UpdateGraph(), []
    graph._record = lambda update: setattr(graph, "enabled", False)
    for _ in range(5):
        graph(lambda: log.append("update"), 1)
    assert log == ["update"] * 5
    assert not graph.enabled


def test_numbers_keep_their_addresses():
    numbers, device = Numbers(), torch.device("cpu")
    rate = numbers("rate", 0.5, device)
    assert numbers("rate", 0.25, device) is rate
    assert rate == 0.25
    for given, value in ((torch.ones(1), 1.0), (None, 0.0), (torch.tensor(3.0), 3.0), (None, 0.0)):
        numbers.copy("skip", given, 0.0, rate)
        assert numbers["skip"] == value


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["muon", "normuon"])
def test_a_recorded_update_equals_a_launched_one(optimizer):
    """Eight steps with other rates each, one that is skipped, and a state loaded in between."""
    options = OptimOptions(optimizer=optimizer, muon_weight_decay=0.1)
    found = []
    for recorded in (True, False):
        torch.manual_seed(0)
        net = torch.nn.Module()
        net.h = torch.nn.ModuleList(torch.nn.Linear(64, n, bias=False) for n in (64, 256))
        model = torch.nn.Module()
        model.transformer = net.to("cuda")
        rt = Runtime(torch.device("cuda"), torch.bfloat16)
        built = build_optimizer(model, options, rt)
        built.graph.enabled = recorded
        grads = [torch.zeros_like(p) for p in model.parameters()]
        for step in range(8):
            for p, grad in zip(model.parameters(), grads, strict=True):
                p.grad = grad.normal_()
            for group in built.param_groups:
                group["lr"] = 0.01 * (step + 1)
            built.grad_scale = torch.full((), 1.0 + step, device="cuda")
            built.found_inf = torch.tensor(float(step in {4, 5}), device="cuda")
            built.step()
            if step == 4:
                built.load_state_dict(copy.deepcopy(built.state_dict()))
        assert (built.graph._graph is not None) == recorded
        found.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
