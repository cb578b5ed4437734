"""What only a CUDA device can show: `pytest -m gpu`. Skipped without one."""

import copy
import gc
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers

from gpt2 import files
from gpt2.checkpoint import training_state
from gpt2.config.command_line import parse
from gpt2.config.model import GPT2Config, ModernConfig
from gpt2.config.train import TrainConfig
from gpt2.distributed import devices, runtime
from gpt2.errors import UserError
from gpt2.generate.decoder import Decoder
from gpt2.generate.sampling import Sampling
from gpt2.generate.stream import generate, stream
from gpt2.huggingface.model_format import from_hf
from gpt2.kernels.attention import cached_attention, causal_attention, causal_attention_reference
from gpt2.kernels.head_loss import head_loss, head_loss_reference
from gpt2.kernels.linear import gelu
from gpt2.kernels.sampled_softmax import sample_ids
from gpt2.model.gpt import GPT
from gpt2.train import loop, setup, step
from gpt2.train.compilation import compile_network
from gpt2.train.cuda_graph import MicroBatchGraph
from gpt2.train.setup import network

from .conftest import ROOT, TINY, error
from .train.test_loop import metrics, weights

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
SMALL = [a for a in TINY if not a.startswith(("--device", "--dtype"))]


@pytest.fixture(scope="session")
def data_dir(gpt2_data_dir):
    """Shards of GPT-2's vocabulary: a GPU has kernels for its size."""
    return gpt2_data_dir


def run(data_dir, out_dir, *arguments):
    argv = [f"--data_dir={data_dir}", f"--out_dir={out_dir}", *SMALL, *arguments]
    return loop.run(parse(TrainConfig, argv, "gpt2 train"))


def test_full_size_logits_equal_hugging_face_in_float32():
    torch.manual_seed(0)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    hf = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    )
    hf = hf.eval().cuda()
    model = GPT(GPT2Config()).cuda()
    model.load_state_dict(from_hf(hf.state_dict()))
    idx = torch.randint(0, 50257, (2, 1024), device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(model(idx), hf(idx).logits, atol=1e-4, rtol=0)


def test_attention_in_bf16_against_float64():
    q, k, v = torch.randn(3, 2, 12, 1024, 64, device="cuda", dtype=torch.float64)
    exact = causal_attention_reference(q, k, v)
    found = causal_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert error(found, exact) < 1e-2


@pytest.mark.parametrize("cap", [0.0, 1.5])  # logits have a deviation of 0.55
@pytest.mark.parametrize("implementation", [head_loss, head_loss_reference])
def test_head_loss_in_bf16_against_float64(implementation, cap):
    x = torch.randn(2048, 768, device="cuda", requires_grad=True)
    weight = (torch.randn(50257, 768, device="cuda") * 0.02).requires_grad_()
    targets = torch.randint(0, 50257, (2048,), device="cuda")
    exact = head_loss_reference(x.double(), weight.double(), targets, 50304, "sum", softcap=cap)
    exact_grads = torch.autograd.grad(exact, (x, weight))
    with torch.autocast("cuda", torch.bfloat16):
        loss = implementation(x, weight, targets, 50304, "sum", softcap=cap)
    grads = torch.autograd.grad(loss, (x, weight))
    assert error(loss, exact) < 1e-4
    for found, wanted in zip(grads, exact_grads, strict=True):
        assert error(found, wanted) < 1e-2


def test_compiled_gelu_in_bf16_against_float64():
    x = torch.randn(2, 1024, 3072, device="cuda", requires_grad=True)
    upstream = torch.randn_like(x)
    exact = F.gelu(x.double(), approximate="tanh")
    (exact_grad,) = torch.autograd.grad(exact, x, upstream.double())
    found = torch.compile(gelu)(x.bfloat16())
    (grad,) = torch.autograd.grad(found, x, upstream.bfloat16())
    assert error(found, exact) < 1e-2
    assert error(grad, exact_grad.bfloat16()) < 1e-2


@pytest.mark.parametrize(("cap", "common"), [(0.0, 0.0), (1.5, 0.0), (0.0, 0.3)])
def test_fp8_head_against_float64(cap, common):
    """Gradients keep their direction to 1 %, also with rows that fill no whole chunk.

    And if all rows have something in common, which alone gives logits a deviation of 8.
    """
    torch.manual_seed(0)
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    x = torch.randn(5000, 768, device="cuda", requires_grad=True)
    weight = (torch.randn(50257, 768, device="cuda") * 0.02 + common).requires_grad_()
    targets = torch.randint(0, 50257, (5000,), device="cuda")
    targets[::7] = -1
    exact = head_loss_reference(x.double(), weight.double(), targets, 50304, "sum", softcap=cap)
    exact_grads = torch.autograd.grad(exact, (x, weight))
    with torch.autocast("cuda", torch.bfloat16):
        loss = head_loss(x, weight, targets, 50304, "sum", fp8=True, softcap=cap)
    grads = torch.autograd.grad(loss, (x, weight))
    assert error(loss, exact) < 1e-4
    for found, wanted in zip(grads, exact_grads, strict=True):
        assert 0.01 < error(found, wanted) < 0.1  # e5m2 keeps two bits of the mantissa
        assert F.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.995
    assert not grads[0][::7].any()


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("fp8", [False, True])
def test_sampled_head_against_float64(cap, fp8):
    """Of 16,768 ids; also where positions predict nothing, and recorded as a CUDA graph."""
    if fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    torch.manual_seed(0)
    x = torch.randn(5000, 768, device="cuda", requires_grad=True)
    weight = (torch.randn(50257, 768, device="cuda") * 0.02).requires_grad_()
    targets = torch.randint(0, 50257, (5000,), device="cuda")
    targets[::7] = -1
    ids, columns, raised = sample_ids(targets, 50257, 16768)
    logits = x.double() @ weight.double()[ids].t()
    logits = (cap * torch.tanh(logits / cap) if cap else logits) + raised
    exact = F.cross_entropy(logits, columns, ignore_index=-1, reduction="sum")
    exact_grads = torch.autograd.grad(exact, (x, weight))

    sampled = torch.tensor(16768)
    with torch.autocast("cuda", torch.bfloat16):
        loss = head_loss(x, weight, targets, 50304, "sum", fp8, cap, sampled)
    plain = loss, *torch.autograd.grad(loss, (x, weight))
    operator = torch.ops.gpt2.head_loss_and_gradients
    arguments = (
        x.detach().bfloat16(),
        weight.detach(),
        targets,
        50304,
        2,
        fp8,
        cap,
        sampled,
        None,
        0,
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = operator(*arguments)
    graph.replay()
    for loss, *grads in (plain, recorded):
        assert error(loss, exact) < 1e-4
        for found, wanted in zip(grads, exact_grads, strict=True):
            assert error(found, wanted) < (0.1 if fp8 else 1e-2)
        assert not grads[0][::7].any()


@pytest.mark.parametrize("cap", [0.0, 5.0, 50.0])  # logits have a deviation of 8
@pytest.mark.parametrize("compiled", [True, False])
def test_head_loss_ignores_and_leaves_out_padding(compiled, cap):
    """Also rows of which nothing counts, in float32 against float64."""
    x = torch.randn(5000, 64, device="cuda", requires_grad=True)
    weight = torch.randn(1001, 64, device="cuda", requires_grad=True)
    targets = torch.randint(0, 1001, (5000,), device="cuda")
    targets[::7] = -1
    exact = head_loss_reference(x.double(), weight.double(), targets, 1024, "sum", softcap=cap)
    exact_grads = torch.autograd.grad(exact, (x, weight))
    function = torch.compile(head_loss) if compiled else head_loss
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    loss = function(x, weight, targets, 1024, "sum", softcap=cap)
    grads = torch.autograd.grad(loss, (x, weight))
    assert error(loss, exact) < 1e-6
    for found, wanted in zip(grads, exact_grads, strict=True):
        assert error(found, wanted) < 1e-5
    with torch.no_grad():
        assert error(function(x, weight, targets, 1024, "sum", softcap=cap), exact) < 1e-6


def test_chunked_head_takes_less_memory():
    x = torch.randn(16384, 768, device="cuda", requires_grad=True)
    weight = torch.randn(50257, 768, device="cuda", requires_grad=True)
    targets = torch.randint(0, 50257, (16384,), device="cuda")
    peaks = []
    for implementation in (head_loss, head_loss_reference):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            implementation(x, weight, targets, 50304, "sum").backward()
        peaks.append(torch.cuda.max_memory_allocated())
        x.grad = weight.grad = None
    assert peaks[0] < peaks[1] / 4


def test_checkpointing_keeps_less_when_compiled(data_dir):
    shape = ["--n_layer=16", "--n_embd=512", "--n_head=8", "--block_size=256", "--batch_size=64"]
    peaks = []
    for flag in (False, True, "mlp"):
        argv = [f"--data_dir={data_dir}", *SMALL, *shape, "--dtype=bfloat16"]
        config = parse(TrainConfig, [*argv, f"--activation_checkpointing={flag}"], "gpt2 train")
        with runtime.start(config.system) as rt:
            state = setup.build(config, rt, None)
            for _ in range(4):
                torch.cuda.reset_peak_memory_stats()
                step.train_step(state, config, rt).read()
                peaks.append(torch.cuda.max_memory_allocated())
            assert state.graph.enabled  # recorded in the third step
            state.loader.close()
    assert peaks[5] < 0.6 * peaks[1], peaks
    assert peaks[5] < peaks[9] < 0.8 * peaks[1], peaks


def test_gpu_run_equals_the_cpu_run(data_dir, tmp_path):
    """Float32 without TF32 would be exact; with it, losses agree to 2e-2 over ten steps."""
    for device in ("cpu", "cuda"):
        run(data_dir, tmp_path / device, "--max_steps=10", f"--device={device}", "--dtype=float32")
    assert metrics(tmp_path / "cuda") == pytest.approx(metrics(tmp_path / "cpu"), abs=2e-2)


WINDOWS = {"window_pattern": "SL", "window": 100}


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    "masks", [{"document_mask": True}, WINDOWS, WINDOWS | {"document_mask": True}]
)
def test_masks_in_a_recorded_step_equal_the_plain_network(masks, apart):
    """The first two batches are not recorded; TF32 has 11 bits."""
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 512, "vocab_size": 300}
    model = network(ModernConfig(**shape, positions="rotary", **masks)).cuda()
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    plain = copy.deepcopy(model)
    model.checkpoint_activations = apart
    compile_network(model, sharded=False)
    assert model.compiled_apart is apart

    def forward_and_backward(x, y, factor, model=model):
        loss = model(x, y, reduction="sum")
        (loss * factor).backward()
        return loss.detach()

    recorded = MicroBatchGraph(model, enabled=True, log=pytest.fail)
    factor = torch.tensor(1e-3, device="cuda")
    for _ in range(5):
        idx = torch.randint(0, 300, (4, 513), device="cuda")  # one in 300 begins a document
        x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
        losses = [recorded(forward_and_backward, (x, y, factor), True).item()]
        losses.append(forward_and_backward(x, y, factor, plain).item())
        assert losses[0] == pytest.approx(losses[1], rel=2e-3)
        for (name, p), exact in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert error(p.grad, exact.grad) < 2e-2, name
            p.grad = exact.grad = None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("compiled", ["True", "False"])
def test_trains_in_half_precision(data_dir, tmp_path, dtype, compiled, capsys):
    arguments = ["--max_steps=30", f"--dtype={dtype}", f"--compile_model={compiled}"]
    assert run(data_dir, tmp_path, *arguments) == 0
    losses = metrics(tmp_path)
    assert losses[30] < losses[1] - 0.7
    assert f"compile_model {compiled}" in capsys.readouterr().out
    raw = torch.load(tmp_path / "out_ckpt.pt", weights_only=True)["model"]
    assert not any("_orig_mod" in name for name in raw)
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert "mfu" in lines
    assert "peak_gib" in lines


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_interrupted_run_goes_on_where_it_was(data_dir, tmp_path, dtype):
    """GPUs add in any order, so weights agree to 1e-3 and not to the bit."""
    arguments = ["--max_steps=10", "--save_every=5", "--keep_last=9", f"--dtype={dtype}"]
    arguments += ["--dropout=0.1", "--compile_model=False"]
    run(data_dir, tmp_path, *arguments)
    whole, losses = weights(tmp_path / "out_ckpt.pt"), metrics(tmp_path)
    files.discard(training_state.state_folders(tmp_path)[-1])
    run(data_dir, tmp_path, *arguments)
    assert metrics(tmp_path) == pytest.approx(losses, abs=1e-3)
    for name, tensor in weights(tmp_path / "out_ckpt.pt").items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-3, rtol=0, msg=name)


@pytest.mark.parametrize("recipe", [[], ["--grad_accum_steps=3", "--dropout=0.1"],
                                    ["--window_pattern=SL", "--window=16", "--window_warmup=0.5"],
                                    ["--batch_warmup=0.5", "--grad_accum_steps=8"]])  # fmt: skip
def test_cuda_graph_gives_the_same_run(data_dir, tmp_path, recipe, capsys, monkeypatch):
    """GPUs add in any order (the gradient of an embedding), so to 1e-3 and not to the bit."""
    arguments = ["--max_steps=12", "--dtype=bfloat16", "--compile_model=True", *recipe]
    for graph in ("True", "False"):
        run(data_dir, tmp_path / graph, *arguments, "--eval_every=4")
        assert f"CUDA graph {graph}" in capsys.readouterr().out
        monkeypatch.setattr(devices, "choose_graph", lambda *_: (False, "for the comparison"))
    recorded, plain = tmp_path / "True", tmp_path / "False"
    assert metrics(recorded) == pytest.approx(metrics(plain), abs=1e-3)
    values = (metrics(folder, "val_loss") for folder in (recorded, plain))
    assert next(values) == pytest.approx(next(values), abs=1e-3)


def test_what_cannot_be_recorded_runs_without(data_dir, tmp_path, monkeypatch, capsys):
    recorded = torch.cuda.graph.__exit__

    def fails(self, *error):
        recorded(self, *error)
        raise torch.OutOfMemoryError("no room for it")

    monkeypatch.setattr(torch.cuda.graph, "__exit__", fails)
    arguments = ["--max_steps=6", "--dtype=bfloat16", "--compile_model=True"]
    run(data_dir, tmp_path / "fails", *arguments)
    assert "cannot be recorded as a CUDA graph (no room for it)" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(devices, "choose_graph", lambda *_: (False, "for the comparison"))
    run(data_dir, tmp_path / "plain", *arguments)
    assert metrics(tmp_path / "fails") == pytest.approx(metrics(tmp_path / "plain"), abs=1e-3)


def test_cached_generation_equals_uncached():
    torch.manual_seed(0)
    model = GPT(GPT2Config(n_layer=2, n_head=4, n_embd=64, block_size=64, vocab_size=500)).cuda()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    cached = generate(model, [[1, 2], [3]], 100, temperature=0)
    assert cached == generate(model, [[1, 2], [3]], 100, temperature=0, use_cache=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_kernel_equals_its_plain_form(dtype):
    torch.manual_seed(0)
    lengths = torch.tensor([0, 5, 64, 127], device="cuda")
    for width in (64, 16, 20):
        qkv = torch.randn(4, 1, 9 * width, device="cuda", dtype=dtype)
        q, k, v = (t.view(4, 1, 3, width).transpose(1, 2) for t in qkv.split(3 * width, 2))
        caches = torch.randn(2, 4, 3, 128, width, device="cuda", dtype=dtype)
        plain = [t.cpu() for t in caches]
        exact = cached_attention(q.cpu(), k.cpu(), v.cpu(), *plain, lengths.cpu(), 128)
        found = cached_attention(q, k, v, *caches, lengths, 128)
        assert error(found.cpu(), exact) < (1e-6 if dtype == torch.float32 else 1e-2)
        for cache, wanted in zip(caches, plain, strict=True):
            assert torch.equal(cache.cpu(), wanted)


PROMPTS = [[1, 2, 3], [7, 8, 9, 10, 11], [5], list(range(70))]
DRAWN = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 3}


@pytest.fixture(scope="module")
def sharp():
    """Weights that make some tokens clearly likelier, so that rounding seldom decides."""
    torch.manual_seed(0)
    model = GPT(GPT2Config(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=300))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model.cuda()


@pytest.mark.parametrize("settings", [{"temperature": 0}, DRAWN])
@pytest.mark.parametrize("prompts", [PROMPTS + PROMPTS[:2], PROMPTS, PROMPTS[:1]])
def test_graph_equals_plain_decoding(sharp, prompts, settings):
    """150 tokens through a context of 64; without cache is the plainest form."""
    recorded = generate(sharp, prompts, 150, **settings)
    assert [len(row) for row in recorded] == [150] * len(prompts)
    assert recorded == generate(sharp, prompts, 150, use_cache=False, **settings)
    assert recorded == generate(sharp.cpu(), prompts, 150, use_cache=False, **settings)
    sharp.cuda()


def test_graph_in_bf16_equals_the_same_pass_unrecorded(sharp):
    model = copy.deepcopy(sharp).bfloat16()
    for prompts in (PROMPTS, PROMPTS * 2):  # few rows, and more
        for sampling in (Sampling(temperature=0), Sampling(temperature=0.9, top_k=40)):
            rows = len(prompts)
            passes = [Decoder(model, rows, 250, sampling, static=True, graph=g) for g in (1, 0)]
            assert passes[0].forward.few == (rows <= 4)
            recorded, plain = (list(d.write(prompts, 150, seed=1)) for d in passes)
            assert recorded == plain
            assert list(passes[0].write(prompts, 150, seed=1)) == plain  # the graph again


def test_stream_from_a_graph_stops_and_frees(sharp):
    free = generate(sharp, [[1, 2, 3]], 100, temperature=0)[0]
    streamed = stream(sharp, [[1, 2, 3]], 100, temperature=0)
    assert [next(streamed)[0] for _ in range(20)] == free[:20]
    streamed.close()
    stop = free[30]
    stopped = generate(sharp, [[1, 2, 3]], 100, temperature=0, stop_token=stop)[0]
    assert stopped == free[: free.index(stop)]
    del streamed
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    list(stream(sharp, [[1, 2, 3]], 100, temperature=0))
    torch.cuda.synchronize()
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_native_bf16_is_chosen_where_it_is():
    device = devices.choose_device("auto")
    dtype, _ = devices.choose_dtype("auto", device)
    newer = torch.cuda.get_device_capability() >= (8, 0)
    assert dtype is (torch.bfloat16 if newer else torch.float16)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_equal_one_with_twice_the_accumulation(data_dir, tmp_path):
    common = ["train_gpt2.py", f"--data_dir={data_dir}", *SMALL, "--max_steps=10"]
    common += ["--dtype=float32", "--compile_model=True"]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *common]
    one = [*common, "--grad_accum_steps=4"]
    for name, command in (("two", two), ("one", one)):
        arguments = [*command, f"--out_dir={tmp_path / name}"]
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)
    assert metrics(tmp_path / "two") == pytest.approx(metrics(tmp_path / "one"), abs=1e-3)
    assert metrics(tmp_path / "two", "val_loss") == pytest.approx(
        metrics(tmp_path / "one", "val_loss"), abs=1e-3
    )


def test_out_of_memory_names_the_next_batch_size(data_dir, tmp_path):
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1e9 / total)
    try:
        with pytest.raises(UserError, match="use --batch_size=2048 --grad_accum_steps=2"):
            run(data_dir, tmp_path, "--batch_size=4096", "--grad_accum_steps=1", "--n_embd=512")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.alone
def test_no_lap_reports_more_tokens_than_the_gpu_computed(data_dir, tmp_path):
    """The last losses are read together, and the CPU may read the others a step late.

    Micro-batches are large enough that the GPU, not the CPU's launches, sets the pace: laps of
    launches differ by a third where other programs run.
    """
    arguments = ["--n_layer=12", "--n_head=12", "--n_embd=768", "--block_size=1024"]
    arguments += ["--batch_size=64", "--grad_accum_steps=4", "--compile_model=False"]
    run(data_dir, tmp_path, *arguments, "--max_steps=9", "--log_every=1", "--eval_every=0")
    rates = list(metrics(tmp_path, "tokens_per_second").values())[2:]
    assert max(rates) < 1.1 * sorted(rates)[len(rates) // 2]
