"""Documents of one row do not see one another: against the formula, and against each alone."""

import torch

from gpt2.config.model import GPT2Config
from gpt2.model.gpt import GPT
from gpt2.model.packed_documents import Packed, packed, packed_reference

BEGINS = torch.tensor([[0, 0, 0, 3, 3, 5, 5, 5], [0, 0, 0, 0, 0, 0, 6, 7]])


def test_attention_equals_the_formula():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 8, 4, dtype=torch.float64)
    ours = Packed(BEGINS).attend(0, q, k, v)
    torch.testing.assert_close(ours, packed_reference(BEGINS, q, k, v))


def test_logits_of_packed_documents_are_those_alone():
    torch.manual_seed(0)
    shape = GPT2Config(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=50)
    model = GPT(shape).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    idx = torch.randint(50, (2, 8))
    together = model.logits(model.hidden(idx, packed(BEGINS)))
    for row in range(2):
        for begin in BEGINS[row].unique().tolist():
            inside = BEGINS[row] == begin
            torch.testing.assert_close(together[row, inside], model(idx[row, inside][None])[0])


def test_gradients_do_not_cross_either():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 8, 4, requires_grad=True) for _ in range(3))
    Packed(BEGINS[:1]).attend(0, q, k, v)[:, :, 3:5].sum().backward()
    for tensor in (k, v):
        touched = tensor.grad.abs().sum((0, 1, 3)) > 0
        assert not touched[:3].any()
        assert not touched[5:].any()


def test_without_beginnings_there_is_nothing_to_keep_apart():
    assert packed() is None
