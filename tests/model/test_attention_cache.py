"""KV cache, packed documents and the lens's recorder follow one protocol and mean one thing."""

import pytest
import torch

from gpt2.config.model import GPT2Config, ModernConfig
from gpt2.interpret.logit_lens import Recorder
from gpt2.model.attention_cache import AttentionCache, MaskedAttentionCache
from gpt2.model.gpt import GPT
from gpt2.model.modern import Modern
from gpt2.model.packed_documents import Packed

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 50}


def caches(model, rows: int, T: int) -> list:
    begins = torch.zeros(rows, T, dtype=torch.int64)
    return [model.new_cache(rows, torch.float32, T), Packed(begins), Recorder()]


def test_all_three_follow_the_protocol_and_give_the_logits_of_none():
    torch.manual_seed(0)
    model = GPT(GPT2Config(**SHAPE)).eval()
    idx = torch.randint(0, 50, (1, 12))
    with torch.no_grad():
        plain = model(idx)
        for cache in caches(model, 1, 12):
            assert isinstance(cache, AttentionCache), type(cache)
            torch.testing.assert_close(model(idx, cache=cache), plain, atol=1e-5, rtol=1e-4)


def test_windows_and_documents_need_the_larger_protocol():
    torch.manual_seed(0)
    switches = {"window_pattern": "SL", "window": 4, "document_mask": True, "positions": "rotary"}
    model = Modern(ModernConfig(**SHAPE, **switches)).eval()
    idx = torch.randint(0, 50, (1, 12))
    idx[0, 5] = 49  # begins a document
    cache, packed, recorder = caches(model, 1, 12)
    assert not isinstance(packed, MaskedAttentionCache)
    with torch.no_grad():
        plain = model(idx)
        for each in (cache, recorder):
            assert isinstance(each, MaskedAttentionCache), type(each)
            torch.testing.assert_close(model(idx, cache=each), plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("missing", ["start", "attend", "advance"])
def test_a_class_without_one_of_the_methods_does_not_follow_it(missing):
    methods = {name: lambda self, *_: None for name in ("start", "attend", "advance")}
    del methods[missing]
    assert not isinstance(type("Odd", (), methods)(), AttentionCache)
