"""Prompts that are read by a CUDA graph; on a CPU a function takes its place."""

import gc
import weakref

import pytest
import torch

from gpt2.config.model import GPT2Config
from gpt2.generate import cached_forward
from gpt2.generate.cached_forward import PROMPT_STEP, CachedForward
from gpt2.model.gpt import GPT

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": 2 * PROMPT_STEP + 10}


class Replayed:
    """A graph that records nothing."""

    def __init__(self, warm_up, work):
        warm_up()
        self.replay = work


class Recorded:
    """A graph that keeps no Python, as those of CUDA."""

    def __init__(self, _, work):
        work()

    def replay(self):
        pass


def prompts_compared(device: str, dtype: torch.dtype, error: float, monkeypatch) -> None:
    """Rows read by graphs equal rows that are read two at a time."""
    torch.manual_seed(0)
    model = GPT(GPT2Config(**SHAPE, vocab_size=300)).eval().to(device, dtype)
    plain, recorded = (CachedForward(model, 3, 999, per_row_lengths=True) for _ in range(2))
    plain.copy_head()
    recorded.copy_head()
    if device == "cuda":
        tokens = torch.zeros(3, dtype=torch.int64, device=device)
        recorded.record(lambda: recorded.next_logits(tokens))
    else:
        monkeypatch.setattr(recorded, "graph_of", Replayed)
        monkeypatch.setattr(recorded, "records_prompts", True)

    def compare(found, wanted):
        assert (found - wanted).float().norm() < error * wanted.float().norm()

    first = {}
    for turn, length in enumerate((5, PROMPT_STEP, 2 * PROMPT_STEP + 3) * 3):
        row, prompt = turn % 3, torch.randint(300, (length,)).tolist()
        wanted = plain.prefill([row, (row + 1) % 3], [prompt, prompt])[:1]
        found = recorded.prefill([row], [prompt])
        compare(found, wanted)
        for name in ("keys", "values"):
            compare(*[getattr(f.cache, name)[:, row, :, :length] for f in (recorded, plain)])
        assert recorded.cache.lengths[row] == length
        # the first of a length is read without a graph, and must be what graphs compute later
        kept, numbers = first.setdefault(length, (prompt, found.clone()))
        assert torch.equal(recorded.prefill([row], [kept]), numbers)
    assert all(prompt.graph for prompt in recorded._prompts.values())
    assert sorted(recorded._prompts) == [PROMPT_STEP, 2 * PROMPT_STEP + 10]
    assert recorded.cache.rows is None
    both = [torch.randint(300, (n,)).tolist() for n in (7, 9)]
    compare(recorded.prefill([2, 0], both), plain.prefill([2, 0], both))
    assert recorded.prefill([1], [[]]) is None
    newest = torch.tensor([3, 4, 5], device=device)
    for forward in (plain, recorded):
        forward.cache.lengths[1], forward.cache.length = 0, 9
    compare(recorded.next_logits(newest), plain.next_logits(newest))
    # too long for a graph, or watched: read as it is
    kept, numbers = first[5]
    monkeypatch.setattr(recorded, "_read_prompt", None)
    seen = []
    hook = model.transformer.h[0].register_forward_hook(lambda *_: seen.append(1))
    compare(recorded.prefill([0], [kept]), numbers)
    assert seen
    hook.remove()
    monkeypatch.setattr(cached_forward, "PROMPT_LONGEST", 4)
    compare(recorded.prefill([0], [kept]), numbers)


@torch.inference_mode()
def test_a_prompt_that_cannot_be_recorded_is_read_all_the_same(monkeypatch):
    forward = CachedForward(GPT(GPT2Config(**SHAPE)).eval(), 1, 99, per_row_lengths=True)
    forward.records_prompts = True
    wanted = forward.prefill([0], [[1, 2, 3]])

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(forward, "graph_of", fails)
    assert torch.equal(forward.prefill([0], [[1, 2, 3]]), wanted)
    assert not forward.records_prompts


@torch.inference_mode()
def test_texts_that_are_read_again_are_not_recorded(monkeypatch):
    forward = CachedForward(GPT(GPT2Config(**SHAPE)).eval(), 1, 99, per_row_lengths=True)
    forward.records_prompts = True
    monkeypatch.setattr(forward, "graph_of", None)
    for _ in range(3):
        forward.prefill([0], [[1, 2, 3]], may_record=False)


def test_the_cache_goes_with_its_decoder():
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            forward = CachedForward(GPT(GPT2Config(**SHAPE)).eval(), 1, 99, per_row_lengths=True)
            forward.records_prompts, forward.graph_of = True, Recorded
            for _ in range(3):
                forward.prefill([0], [[1, 2, 3]])
        keys = weakref.ref(forward.cache)
        del forward
        assert keys() is None
    finally:
        gc.enable()


@torch.inference_mode()
def test_a_recorded_prompt_equals_one_that_is_read_with_others(monkeypatch):
    prompts_compared("cpu", torch.float32, 1e-5, monkeypatch)


@pytest.mark.gpu
@torch.inference_mode()
def test_a_prompt_that_a_graph_reads_equals_one_that_is_read_with_others(monkeypatch):
    prompts_compared("cuda", torch.bfloat16, 1e-2, monkeypatch)
