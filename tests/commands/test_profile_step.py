"""`gpt2 profile`: every microsecond once, in the right group."""

import gzip
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from gpt2.cli import main
from gpt2.commands import profile_step
from gpt2.config.command_line import parse
from gpt2.config.commands import ProfileConfig
from gpt2.config.model import GPT2Config
from gpt2.config.train import plan_batch
from gpt2.errors import UserError
from gpt2.model.gpt import GPT

from ..conftest import TINY


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNN", "matmuls"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_nn_n_tilesize128x128x64_dgelu", "matmuls"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matmuls"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 64>", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("_cross_entropy", "head"),
        ("_gradient_fp8", "head"),
        ("triton_per_fused__to_copy_add_native_layer_norm_view_7", "norms"),
        (
            "void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata>",
            "optimizer",
        ),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("triton_red_fused_sum_view_8", profile_step.OTHERS),
        ("triton_poi_fused_gelu_5", profile_step.OTHERS),
        ("aten::addmm", "matmuls"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::native_layer_norm_backward", "norms"),
    ],
)
def test_groups(name, group):
    assert profile_step.group_of(name) == group


def test_flops_are_six_per_weight_and_token_and_attention():
    model = GPT(GPT2Config())
    work = profile_step.flops(model, 1)
    tables = model.transformer.wpe.weight.numel()
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    padding = (50304 - 50257) * 768
    assert work["matmuls"] + work["head"] == 6 * (
        model.num_parameters() - tables - vectors + padding
    )
    assert sum(work.values()) == pytest.approx(model.flops_per_token(), rel=2e-3)


def test_ranges_on_a_gpu_count_only_by_their_kernels():
    """torch.profiler reports a range of kernels, such as `Optimizer.step`, as one more event."""

    def event(name, microseconds=0.0, kernels=(), parent=None, annotation=False, on="CUDA"):
        return SimpleNamespace(
            name=name,
            device_type=getattr(DeviceType, on),
            time_range=SimpleNamespace(elapsed_us=lambda: microseconds),
            is_user_annotation=annotation,
            kernels=[SimpleNamespace(name=k, duration=d) for k, d in kernels],
            cpu_parent=parent,
        )

    step = event("Optimizer.step#Muon.step", annotation=True, on="CPU")
    launch = event("aten::mm", kernels=[("nvjet_a", 300.0)], parent=step, on="CPU")
    kernels = [event("nvjet_a", 300.0), event("nvjet_b", 500.0)]
    of_range = event("Optimizer.step#Muon.step", 9000.0, annotation=True)
    times = profile_step._on_gpu([step, launch, *kernels, of_range])
    assert times == {"matmuls": 500.0, "optimizer": 300.0}


@pytest.mark.parametrize("data", ["shards", "none"])
def test_profile_on_a_cpu(data, data_dir, tmp_path, capsys):
    argv = [
        "profile",
        *TINY,
        f"--trace={tmp_path / 'trace.json.gz'}",
        f"--out_dir={tmp_path / 'out'}",
    ]
    folder = data_dir if data == "shards" else tmp_path / "nothing"
    assert main([*argv, f"--data_dir={folder}"]) == 0
    out = capsys.readouterr().out
    assert ("profiling on random tokens" in out) == (data == "none")
    rows = {}
    for line in out.splitlines():
        for name in (*profile_step.ORDER, "waiting", "step"):
            if line.startswith(name + " " * 3):
                rows[name] = float(line[28:38])
    assert rows.keys() == {*profile_step.ORDER, "waiting", "step"}
    assert sum(rows.values()) - rows["step"] == pytest.approx(rows["step"], rel=0.02)
    assert rows["matmuls"] > 0
    assert rows["head"] > rows["norms"] > 0
    assert rows["attention"] > 0
    assert rows["optimizer"] > 0
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        assert len(json.load(file)["traceEvents"]) > 100
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_in_the_middle_of_a_step(name, data_dir, tmp_path, capsys, monkeypatch):
    """And what is measured has been said before."""

    def step(state, config, rt):
        assert "3 under the profiler" in capsys.readouterr().out
        signal.raise_signal(getattr(signal, name))
        pytest.fail("the step went on")

    monkeypatch.setattr(profile_step.training_step, "train_step", step)
    argv = ["profile", *TINY, f"--trace={tmp_path / 't.json'}", f"--data_dir={data_dir}"]
    assert main(argv) == 128 + getattr(signal, name)
    assert capsys.readouterr().err == "interrupted\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "micro_batches"),
    [
        ([], 1),
        (["--grad_accum_steps=3"], 3),
        (["--total_batch_tokens=2048"], 4),
    ],
)
def test_a_step_is_one_micro_batch_unless_more_are_asked_for(given, micro_batches):
    argv = ["--size=gpt2-tiny", "--batch_size=8", "--block_size=64", *given]
    config = parse(ProfileConfig, argv, "gpt2 profile")
    assert plan_batch(config.data, 64, 1).grad_accum_steps == micro_batches


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--trace=nowhere/t.json", "there is no folder nowhere"),
        ("--trace=t.txt", "ends in .json or .json.gz"),
        ("--trase=t.json", "did you mean"),
        ("--trace=/proc/x.json", "trace=/proc/x.json: "),  # not even root can write there
    ],
)
def test_wrong_input_is_one_line(argument, message, capsys):
    assert main(["profile", *TINY, argument]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_trace_that_pytorch_did_not_write_is_an_error(tmp_path):
    path = tmp_path / "t.json"
    path.write_text("of an earlier call")
    with pytest.raises(UserError, match=r"cannot write .*t\.json: No such file"):
        profile_step.write_trace(SimpleNamespace(export_chrome_trace=lambda path: None), path)
    assert path.read_text() == "of an earlier call"
    writes = SimpleNamespace(export_chrome_trace=lambda path: Path(path).write_text("new"))
    profile_step.write_trace(writes, path)
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_trace_is_not_written_through_a_link(tmp_path, capsys):
    (tmp_path / "mine.json").write_text("mine")
    (tmp_path / "t.json").symlink_to("mine.json")
    assert main(["profile", f"--trace={tmp_path / 't.json'}", *TINY]) == 2
    assert "t.json is a symbolic link" in capsys.readouterr().err
    assert (tmp_path / "mine.json").read_text() == "mine"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.timeout(600)
@pytest.mark.alone
def test_profile_on_a_gpu(tmp_path, capsys):
    # with a smaller batch the GPU waits for Python, which the profiler slows down
    argv = ["--batch_size=64", "--grad_accum_steps=1", f"--trace={tmp_path / 't.json'}"]
    assert main(["profile", *argv, f"--data_dir={tmp_path / 'none'}"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    share = {line[:28].strip(): float(line[38:46].strip("% ")) for line in rows if line[0] != "f"}
    assert share["matmuls"] > 25
    assert share["head"] > 10
    assert share["attention"] > 5
    assert share[profile_step.OTHERS] < 30
    assert share["optimizer"] < 10  # the range `Optimizer.step` is no kernel
    kernels = sum(value for name, value in share.items() if name not in {"waiting", "step"})
    assert kernels < 105  # of a step of training, which is measured apart
