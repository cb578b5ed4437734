"""Each switch: it changes what it must, nothing else, and works with the cache and checkpoints."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.llama.modeling_llama import (
    LlamaConfig,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from gpt2.api import GPT2, SwitchedGPT2
from gpt2.checkpoint import training_state
from gpt2.checkpoint.weights import load
from gpt2.commands.export import export_hf
from gpt2.config.model import GPT2Config, ModernConfig, to_dict
from gpt2.errors import UserError
from gpt2.kernels import cudnn_choice
from gpt2.model import modern
from gpt2.model.attention_masks import mask_for
from gpt2.model.gpt import GPT
from gpt2.model.rotary import apply_rope, rope_cos_sin
from gpt2.train import loop
from gpt2.train.setup import network

from ..conftest import run_python
from ..test_distributed import command
from ..train.test_loop import config, metrics, same, weights

BASE = {"n_layer": 4, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 100}
ALL = {
    "positions": "rotary", "window_pattern": "SL", "window": 5, "document_mask": True,
    "qk_norm": True, "norm": "rmsnorm", "norm_embedding": True, "mlp": "relu2", "bias": False,
    "softcap": 5.0, "untied_head": True, "value_embeddings": 2, "skips": "unet+input",
}  # fmt: skip
PROJECTED = {
    **ALL, "untied_head": False, "value_embeddings": 0,
    "value_projection": 1, "attention_gate": True,
}  # fmt: skip
CASES = [
    {"positions": "rotary"}, {"window_pattern": "SL", "window": 5}, {"document_mask": True},
    {"qk_norm": True}, {"norm": "rmsnorm"}, {"norm_embedding": True}, {"mlp": "relu2"},
    {"mlp": "swiglu"}, {"bias": False}, {"softcap": 5.0}, {"untied_head": True},
    {"attention_scale": 0.5}, {"positions": "rotary", "rope_fraction": 0.5, "rope_base": 50.0},
    {"value_embeddings": 2}, {"skips": "unet"}, {"skips": "unet+input"},
    {"value_projection": 2}, {"attention_gate": True},
    ALL, PROJECTED,
]  # fmt: skip
OPTIONS = [f"--{n}={v}" for n, v in ALL.items()]


def disturbed(**switches):
    torch.manual_seed(0)
    model = network(ModernConfig(**BASE, **switches)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def tokens():
    torch.manual_seed(1)
    idx = torch.randint(0, 99, (2, 32))
    idx[:, 9] = idx[0, 20] = 99  # where documents begin
    return idx


def test_all_off_is_gpt2():
    torch.manual_seed(0)
    faithful = GPT(GPT2Config(**BASE))
    model = network(ModernConfig(**BASE))
    assert type(network(GPT2Config(**BASE))) is GPT
    model.load_state_dict(faithful.state_dict())
    idx = tokens()
    torch.testing.assert_close(model(idx), faithful(idx), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model(idx, idx), faithful(idx, idx), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("switches", CASES, ids=str)
def test_cache_gives_the_same_logits(switches):
    model, idx = disturbed(**switches), tokens()
    cache = model.new_cache(2, torch.float32, 32)
    with torch.no_grad():
        pieces = [model(part, cache=cache) for part in idx.split([5, 1, 1, 10, 15], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(idx), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("switches", CASES, ids=str)
def test_every_switch_does_something(switches):
    """Other parameters, or other logits from the same ones."""
    plain, model, idx = disturbed(), disturbed(**switches), tokens()
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (plain, model)]
    if shapes[0] == shapes[1]:
        assert not torch.allclose(plain(idx), model(idx), atol=1e-4)
    changed = idx.clone()
    changed[:, 25:] = 3
    assert torch.equal(model(idx)[:, :25], model(changed)[:, :25])


def gate_by_hand(x, weight):
    return 2 / (1 + (-x[:, :12] @ weight).exp())[:, None]


def values_of_tokens(c, s, layer, idx, first, normed):
    """What a layer's values get of the token itself, (T, C)."""
    from_end, name = min(layer, c.n_layer - 1 - layer), f"transformer.h.{layer}.attn."
    if c.value_embeddings:
        table = s[f"transformer.value_tables.{from_end}.weight"][idx]
        return table / table.pow(2).mean(-1, keepdim=True).add(1.1920929e-07).sqrt()
    if from_end >= c.value_projection:
        return torch.zeros_like(first)
    projected = (first @ s[name + "c_value.weight"].T).chunk(c.n_head, -1)
    gates = [gate_by_hand(normed, weight) for weight in s[name + "value_gate"]]
    return torch.cat([part * gate for part, gate in zip(projected, gates, strict=True)], -1)


def by_hand(model, idx):
    """One sequence through a plain reference of the whole recipe, `ALL` or `PROJECTED`."""
    c, s = model.config, dict(model.named_parameters())
    norm = lambda x: x / x.pow(2).mean(-1, keepdim=True).add(1.1920929e-07).sqrt()  # noqa: E731
    T, D = len(idx), c.n_embd // c.n_head
    x = first = norm(s["transformer.wte.weight"][idx])
    documents, kept = (idx == c.vocab_size - 1).cumsum(0), []
    for layer in range(c.n_layer):
        name = f"transformer.h.{layer}."
        if layer >= c.n_layer // 2:
            x = x + s["skip_weights"][layer - c.n_layer // 2] * kept.pop()
        mix = s[name + "mix"]
        x = mix[0] * x + mix[1] * first
        normed = norm(x)
        q, k, v = (normed @ s[name + "attn.c_attn.weight"].T).split(c.n_embd, -1)
        lam = s.get(name + "attn.value_mix", torch.tensor([1.0, 0.0]))
        v = lam[0] * v + lam[1] * values_of_tokens(c, s, layer, idx, first, normed)
        heads = []
        for h in range(c.n_head):
            part = slice(h * D, (h + 1) * D)
            angles = []
            for y in (norm(q[:, part]), norm(k[:, part])):
                z = torch.complex(y[:, : D // 2], y[:, D // 2 :])
                rates = 10_000.0 ** (-2 * torch.arange(D // 2) / D)
                angle = torch.arange(T)[:, None] * rates
                z = z * torch.polar(torch.ones_like(angle), angle)
                angles.append(torch.cat([z.real, z.imag], -1))
            scores = angles[0] @ angles[1].T / D**0.5
            for a in range(T):
                for b in range(T):
                    far = "SL"[layer % 2] == "S" and a - b >= c.window
                    if b > a or far or documents[a] != documents[b]:
                        scores[a, b] = -math.inf
            heads.append(scores.softmax(-1) @ v[:, part])
            if c.attention_gate:
                heads[-1] *= gate_by_hand(normed, s[name + "attn.output_gate"][h])
        x = x + torch.cat(heads, -1) @ s[name + "attn.c_proj.weight"].T
        inner = (norm(x) @ s[name + "mlp.c_fc.weight"].T).clamp(min=0) ** 2
        x = x + inner @ s[name + "mlp.c_proj.weight"].T
        if layer < c.n_layer // 2:
            kept.append(x)
    head = s["head.weight" if c.untied_head else "transformer.wte.weight"]
    return c.softcap * torch.tanh(norm(x) @ head.T / c.softcap)


@pytest.mark.parametrize("recipe", [ALL, PROJECTED], ids=["tables", "projected"])
def test_the_recipe_equals_a_plain_reference(recipe):
    model, idx = disturbed(**recipe), tokens()
    with torch.no_grad():
        for row in idx:
            torch.testing.assert_close(model(row[None])[0], by_hand(model, row), atol=1e-4, rtol=0)
        loss = F.cross_entropy(model(idx).flatten(0, 1), idx.flatten())
        torch.testing.assert_close(model(idx, idx), loss)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8)
    at = torch.tensor([0, 3, 50])
    angles = [
        [rope_cos_sin(at[i : i + 1] + more, 4, 4, 100.0) for more in (7, 0)] for i in range(3)
    ]
    scores = [(apply_rope(q, far) * apply_rope(k, near)).sum() for far, near in angles]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])


def test_zero_init_first_loss():
    for switches in ({}, ALL | {"zero_init": True}):
        torch.manual_seed(0)
        model = network(ModernConfig(**(BASE | {"vocab_size": 5000}), **switches))
        idx = torch.randint(0, 5000, (4, 33))
        loss = model(idx[:, :-1], idx[:, 1:]).item()
        assert loss == pytest.approx(model.expected_first_loss(), abs=0.02)


@pytest.mark.parametrize("shape", [BASE, {**BASE, **ALL}])
def test_config_round_trip(shape):
    c = (ModernConfig if "mlp" in shape else GPT2Config)(**shape)
    assert GPT2Config.from_dict(to_dict(c)) == c


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"window": 5}, "give both"),
        ({"window_pattern": "SX", "window": 5}, "letters S and L"),
        ({"window_pattern": "S", "window": 32}, "whole context of 32; use a smaller one, as"),
        ({"block_size": 1, "window_pattern": "S", "window": 1}, "of 1; use none: --window_pattern"),
        ({"document_mask": True, "dropout": 0.1}, "dropout does not work with"),
        ({"rope_base": 5.0}, "rope_base is for"),
        ({"mlp": "tanh"}, "use gelu or relu2 or swiglu"),
        ({"value_embeddings": 3}, "at most n_layer // 2"),
        ({"value_projection": 3}, "value_projection=3: use at most n_layer // 2"),
        ({"value_embeddings": 1, "value_projection": 1}, "use one of them"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(switches, message):
    with pytest.raises(UserError, match=message):
        ModernConfig(**BASE | switches)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "normuon"])
def test_interrupted_run_gives_the_same_bits(data_dir, tmp_path, optimizer):
    arguments = [*OPTIONS, "--n_layer=4", "--max_steps=8", "--save_every=3", "--schedule=wsd",
                 f"--optimizer={optimizer}", "--batch_warmup=0.5", "--window_warmup=0.7",
                 "--embedding_lr=3e-3", "--head_lr=2e-3"]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.run(config(data_dir, whole, *arguments, "--keep_last=9"))
    shutil.copytree(whole, parts)
    for folder in training_state.state_folders(parts)[1:]:  # as if killed after step 3
        shutil.rmtree(folder)
    assert loop.run(config(data_dir, parts, *arguments)) == 0
    assert same(weights(whole / "out_ckpt.pt"), weights(parts / "out_ckpt.pt"))
    assert metrics(whole) == metrics(parts)
    assert metrics(whole, "tokens")[1] == 64  # one micro-batch
    assert metrics(whole)[8] < metrics(whole)[1]


def test_a_checkpoint_writes_text_and_is_not_exported(data_dir, tmp_path):
    loop.run(config(data_dir, tmp_path, *OPTIONS, "--n_layer=4", "--max_steps=1"))
    path = tmp_path / "out_ckpt.pt"
    model = GPT2.from_checkpoint(path, device="cpu")
    settings = {"max_new_tokens": 40, "temperature": 0.0}
    assert model.generate([1, 2, 3], **settings) == model.generate(
        [1, 2, 3], **settings, use_cache=False
    )
    with pytest.raises(UserError, match=r"not GPT-2's network .positions=rotary"):
        export_hf(load(path), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow
def test_two_ranks_equal_one(data_dir, tmp_path):
    arguments = [*OPTIONS, "--n_layer=4", "--optimizer=muon", "--max_steps=4"]
    run_python(*command(2, data_dir, tmp_path / "two", *arguments))
    run_python(*command(1, data_dir, tmp_path / "one", *arguments, "--grad_accum_steps=4"))
    assert metrics(tmp_path / "two") == pytest.approx(metrics(tmp_path / "one"), abs=1e-4)


@pytest.mark.parametrize("base", [10_000.0, 500.0])
def test_rotary_equals_llama(base):
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )  # fmt: skip
    q, k = torch.randn(2, 2, 4, 50, 16)
    at = torch.arange(50)
    theirs = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config)(q, at[None]))
    angles = rope_cos_sin(at, 8, 8, base)
    for ours, wanted in zip((apply_rope(q, angles), apply_rope(k, angles)), theirs, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)


def test_rope_fraction_turns_the_first_pairs_alone():
    x, at = torch.randn(1, 1, 9, 16), torch.arange(9)
    part, whole = (
        apply_rope(x, rope_cos_sin(at, 8, 4, 100.0)),
        torch.cat([x[..., :4], x[..., 8:12]], -1),
    )
    whole = apply_rope(whole, rope_cos_sin(at, 4, 4, 100.0))
    torch.testing.assert_close(torch.cat([part[..., :4], part[..., 8:12]], -1), whole)
    assert torch.equal(part[..., 4:8], x[..., 4:8])
    assert torch.equal(part[..., 12:], x[..., 12:])


def test_attention_scale_replaces_one_over_the_root_of_the_width():
    plain, scaled, idx = disturbed(), disturbed(attention_scale=16**-0.5), tokens()
    torch.testing.assert_close(plain(idx), scaled(idx))
    twice = disturbed(attention_scale=2 * 16**-0.5)
    with torch.no_grad():
        for block in plain.transformer.h:
            for p in block.attn.c_attn.parameters():
                p[:32] *= 2  # the queries
    torch.testing.assert_close(plain(idx), twice(idx), atol=1e-5, rtol=1e-5)


def test_windows_grow_in_training_alone_and_end_with_the_warmup():
    model, idx = disturbed(window_pattern="SL", window=5), tokens()
    whole = model(idx)
    model.limit_attention_window(3)
    assert torch.equal(model(idx), whole)
    narrow = disturbed(window_pattern="S", window=3)
    torch.testing.assert_close(model.train()(idx), narrow(idx))
    model.limit_attention_window(32)
    torch.testing.assert_close(model(idx), whole)
    assert torch.equal(model.eval()(idx), whole)


@pytest.mark.parametrize("rows", [50_257, 50_304])
def test_documents_end_at_gpt2s_token_also_where_the_table_is_padded(rows):
    model = GPT2(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=rows, document_mask=True)
    first, second = (torch.tensor([[word, 6, 50_256, 8, 9]]) for word in (5, 1))
    with torch.no_grad():
        assert torch.equal(model(first)[0, 3:], model(second)[0, 3:])
        assert not torch.equal(model(first)[0, :2], model(second)[0, :2])


def test_a_window_is_a_number_where_cudnn_takes_it(monkeypatch):
    """It is without documents, warm-up and dropout; the logits are those of a mask."""
    seen = []
    attend = modern.masked_attention

    def watched(q, k, v, mask, dropout):
        seen.append(mask)
        return attend(q, k, v, mask, dropout)

    idx = torch.randint(0, 100, (2, 32))
    models = [disturbed(window_pattern="SL", window=5, document_mask=m) for m in (False, True)]
    wanted = [model(idx) for model in models]
    monkeypatch.setattr(modern, "masked_attention", watched)
    monkeypatch.setattr(cudnn_choice, "takes", lambda *_: True)
    torch.testing.assert_close(models[0](idx), wanted[0])
    assert seen == [5, None] * (len(seen) // 2)
    torch.testing.assert_close(models[1](idx), wanted[1])
    models[0](idx[:, :5])  # a window of all
    models[0].train().limit_attention_window(3)
    models[0](idx)
    assert not any(isinstance(mask, int) for mask in seen[len(models[0].transformer.h) :])


@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, True])
def test_compiled_masks_need_no_second_graph_for_other_windows_and_documents(apart, monkeypatch):
    """The blocks of FlexAttention, which a GPU gets, against the table; forward, as on a CPU."""
    torch._dynamo.reset()  # what earlier tests compiled would count as well
    torch.manual_seed(0)
    shape = BASE | {"block_size": 256, "n_embd": 64}
    model = network(ModernConfig(**shape, **ALL | {"window": 140})).train()
    batches, widths, wanted = torch.randint(0, 100, (3, 2, 256)), (100, 200, 256), []
    with torch.no_grad():
        for idx, width in zip(batches, widths, strict=True):
            model.limit_attention_window(width)
            wanted.append(model(idx, idx))
        monkeypatch.setattr(modern, "mask_for", lambda *given: mask_for(*given[:3], flex=True))
        counter = CompileCounterWithBackend("aot_eager")
        for part in model.transformer.h if apart else [model]:
            part.compile(backend=counter, fullgraph=True)
        graphs = set()
        for idx, width, loss in zip(batches, widths, wanted, strict=True):
            model.limit_attention_window(width)
            torch.testing.assert_close(model(idx, idx), loss, atol=1e-4, rtol=1e-4)
            graphs.add(counter.frame_count)
    assert graphs == ({3} if apart else {1})  # of four blocks two have no value embeddings


@pytest.mark.parametrize("switches", [{"zero_init": True}, {"norm_embedding": True}])
@pytest.mark.parametrize("more", [{}, {"positions": "rotary"}, {"softcap": 30.0}])
@pytest.mark.parametrize("n_layer", [1, 12])
def test_first_loss_where_a_tied_head_sees_the_embedding(switches, more, n_layer):
    torch.manual_seed(0)
    shape = BASE | {"vocab_size": 2000, "n_embd": 512, "n_layer": n_layer}
    model = network(ModernConfig(**shape, **switches, **more))
    idx = torch.randint(0, 2000, (8, 33))
    with torch.no_grad():
        loss = model(idx[:, :-1], idx[:, 1:]).item()
    assert loss == pytest.approx(model.expected_first_loss(), abs=0.3)
    assert model.expected_first_loss() > GPT.expected_first_loss(model) + 0.1


def test_the_class_with_files_wants_its_own_config(tmp_path):
    with pytest.raises(UserError, match="use SwitchedGPT2"):
        GPT2(ModernConfig(**BASE, qk_norm=True))
    model = SwitchedGPT2(ModernConfig(**BASE, qk_norm=True))
    assert len(model.generate([1, 2], 5, temperature=0)) == 7
    plain = GPT2(GPT2Config(**BASE))
    plain.save(tmp_path / "plain.pt")
    with pytest.raises(UserError, match="for this config use GPT2"):
        SwitchedGPT2.from_checkpoint(tmp_path / "plain.pt")


def test_every_loaded_model_is_an_instance_of_gpt2(tmp_path):
    class Mine(GPT2):
        pass

    for name, model in {
        "plain": GPT2(GPT2Config(**BASE)),
        "switched": SwitchedGPT2(ModernConfig(**BASE, qk_norm=True)),
    }.items():
        model.save(tmp_path / f"{name}.pt")
        for cls in (GPT2, Mine):
            loaded = cls.from_checkpoint(tmp_path / f"{name}.pt")
            assert isinstance(loaded, GPT2)
            assert isinstance(loaded, SwitchedGPT2) == (name == "switched")
    assert isinstance(Mine.from_checkpoint(tmp_path / "plain.pt"), Mine)
    assert not isinstance(GPT(GPT2Config(**BASE)), GPT2)


def test_gradients_of_key_biases_are_kept_where_positions_turn():
    """`linear.qkv` leaves them out, which is right for GPT-2 alone."""
    model, idx = disturbed(positions="rotary"), tokens()
    model(idx, idx).backward()
    bias = model.transformer.h[0].attn.c_attn.bias
    assert bias.grad[32:64].abs().max() > 1e-5
