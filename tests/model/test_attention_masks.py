"""The blocks of FlexAttention hold what the dense mask shows."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from gpt2.model.attention_masks import (
    BLOCK,
    block_lists,
    document_ids,
    mask_for,
    masked_attention,
    takes_blocks,
)

from ..conftest import error


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
@pytest.mark.parametrize("several", [False, True])
def test_blocks_equal_the_dense_mask(window, several):
    torch.manual_seed(0)
    T = 4 * BLOCK
    idx = (torch.rand(3, T) < 0.01).long()
    idx[0], idx[1, 128], idx[1, 255] = 0, 1, 1
    documents = document_ids(idx == 1) if several else None
    wide = None if window is None else torch.tensor(window)
    if window is None and not several:
        assert mask_for(T, wide, documents, flex=True) is None
        return
    dense = mask_for(T, wide, documents, flex=False)
    blocks = mask_for(T, wide, documents, flex=True)
    rows = len(dense)
    assert torch.equal(create_mask(blocks.mask_mod, rows, 1, T, T, "cpu"), dense)
    squares = dense.view(rows, 1, 4, BLOCK, 4, BLOCK).transpose(3, 4).flatten(4)
    whole, some = squares.all(-1), squares.any(-1) & ~squares.all(-1)
    for counts, numbers, wanted in (
        (blocks.full_kv_num_blocks, blocks.full_kv_indices, whole),
        (blocks.kv_num_blocks, blocks.kv_indices, some),
        (blocks.full_q_num_blocks, blocks.full_q_indices, whole.mT),
        (blocks.q_num_blocks, blocks.q_indices, some.mT),
    ):
        found = torch.zeros_like(wanted)
        for r in range(rows):
            for i in range(4):
                found[r, 0, i, numbers[r, 0, i, : counts[r, 0, i]].long()] = True
        # a block may be listed though it shows nothing, never the other way round
        assert not (wanted & ~found).any()
        if counts is blocks.full_kv_num_blocks or counts is blocks.full_q_num_blocks:
            assert not (found & ~wanted).any()  # in a whole block nothing is masked
    q, k, v = torch.randn(3, 3, 2, T, 16)
    torch.testing.assert_close(
        masked_attention(q, k, v, blocks), masked_attention(q, k, v, dense), atol=1e-5, rtol=1e-4
    )


def test_the_compiler_is_told_what_the_operator_returns():
    """Shapes, types and strides; the kernels go by the strides."""
    some, whole = torch.rand(2, 3, 8, 8) < 0.5
    torch.library.opcheck(block_lists, (some, whole))


@pytest.mark.parametrize(
    ("shared_kib", "hip", "widths"),
    [
        (64, None, []),
        (99, None, [16, 64, 128]),
        (163, None, [16, 64, 128, 256]),
        (None, None, [16, 64, 128, 256]),
        (64, "7.0", [16, 64, 128, 256]),
    ],
    ids=["T4", "RTX 4090", "A100", "not known", "AMD"],
)
def test_small_gpus_get_the_dense_mask(shared_kib, hip, widths, monkeypatch):
    """PyTorch's sizes of FlexAttention need more shared memory than a T4 has."""
    size = {} if shared_kib is None else {"shared_memory_per_block_optin": shared_kib << 10}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**size))
    monkeypatch.setattr(torch.version, "hip", hip)
    some = 8, 16, 64, 128, 256, 320
    assert [w for w in some if takes_blocks(torch.device("cuda"), w)] == widths
    assert not any(takes_blocks(torch.device("cpu"), w) for w in some)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("window", "several"), [(100, False), (300, False), (None, True), (100, True), (300, True)]
)
def test_compiled_blocks_equal_the_dense_mask_on_a_gpu(window, several):
    """Forward and backward, with other documents in every row; attention in TF32 has 11 bits."""
    torch.manual_seed(0)
    rows, heads, T, width = 5, 3, 8 * BLOCK, 64
    wide = None if window is None else torch.tensor(window, device="cuda")

    def attend(q, k, v, begins, blocks):
        mask = mask_for(T, wide, document_ids(begins) if several else None, blocks)
        return masked_attention(q, k, v, mask)

    compiled = torch.compile(attend)
    for _ in range(2):
        q, k, v, upstream = torch.randn(4, rows, heads, T, width, device="cuda").unbind()
        inputs = [part.requires_grad_() for part in (q, k, v)]
        begins = torch.rand(rows, T, device="cuda") < 1 / 300
        both = []
        for function, blocks in ((compiled, True), (attend, False)):
            y = function(*inputs, begins, blocks)
            both.append([y, *torch.autograd.grad(y, inputs, upstream)])
        for found, exact in zip(*both, strict=True):
            assert error(found, exact) < 5e-3
