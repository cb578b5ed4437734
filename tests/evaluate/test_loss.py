"""Loss, perplexity and bits per byte against plain arithmetic."""

import math

import numpy as np
import pytest
import torch

from gpt2.config.model import GPT2Config
from gpt2.data.loader import eval_batches
from gpt2.data.shards import find_shards, write_shard
from gpt2.distributed.runtime import Runtime
from gpt2.evaluate.loss import evaluate
from gpt2.model.gpt import GPT
from gpt2.tokenizer import END_OF_TEXT, gpt2_tokenizer

RT = Runtime(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(GPT2Config(n_layer=1, n_head=2, n_embd=16, block_size=16, dropout=0.3))


def test_against_plain_arithmetic(model, tmp_path):
    text = "The café — naïve — opened in 1999. "
    ids = [END_OF_TEXT, *gpt2_tokenizer().encode(text), END_OF_TEXT]
    ids = (ids * 5)[:50]
    write_shard(tmp_path / "t_val_000000.bin", np.array(ids, dtype=np.uint16))
    shards = find_shards(tmp_path, "val")
    results = [
        evaluate(model, eval_batches(shards, block_size=16, batch_size=b, eval_tokens=45), RT)
        for b in (1, 3, 8)
    ]
    assert model.training  # as before
    model.eval()
    nats, text_bytes = 0.0, 0
    for start in range(0, 45, 16):
        window = torch.tensor([ids[start : min(start + 16, 45) + 1]])
        logprobs = model(window[:, :-1]).log_softmax(-1)
        nats -= logprobs.gather(-1, window[:, 1:, None]).sum().item()
        for token in window[0, 1:].tolist():
            text_bytes += len(gpt2_tokenizer().decode_bytes([token])) * (token != END_OF_TEXT)
    model.train()
    for result in results:
        assert result.tokens == 45
        assert result.text_bytes == text_bytes
        assert result.loss == pytest.approx(nats / 45, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(nats / 45), rel=1e-4)
        assert result.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


def test_many_batches_lose_no_digits(model):
    """In float32 a sum of 30 million nats would move by 2 with each batch."""
    x = torch.zeros(1, 16, dtype=torch.int64)

    def large(*given, **more):
        return torch.tensor(30_000.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", large)
        found = evaluate(model, [(x, x)] * 1000, RT)
    assert found.nats == pytest.approx(1000 * float(np.float32(30_000.1)), rel=1e-12)


def test_a_signal_ends_it_before_the_next_batch_of_a_cpu(model, tmp_path):
    write_shard(tmp_path / "t_val_000000.bin", np.arange(100, dtype=np.uint16))
    rt, seen = Runtime(torch.device("cpu"), torch.float32), []

    def batches():
        shards = find_shards(tmp_path, "val")
        for batch in eval_batches(shards, block_size=16, batch_size=1, eval_tokens=90):
            seen.append(batch)
            rt.stop_signal = 2 if len(seen) == 2 else 0
            yield batch

    assert evaluate(model, batches(), rt) is None
    assert len(seen) == 2
