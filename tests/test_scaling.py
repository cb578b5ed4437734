"""The estimates of benchmarks/scaling.py, and the tables of docs/scaling.md."""

import pytest

from benchmarks import scaling
from gpt2.config.model import SIZES, GPT2Config
from gpt2.train.setup import network

from .conftest import ROOT


def test_tables_of_the_docs_are_what_the_program_prints():
    text = (ROOT / "docs/scaling.md").read_text("utf-8")
    for table in (scaling.scaling_table(), scaling.memory_table(), scaling.cost_table()):
        assert "\n".join(table) in text


def test_parameters_are_those_of_the_networks():
    assert scaling.parameters("gpt2") == 124_439_808
    assert scaling.parameters("gpt2-xl") == 1_557_611_200
    small = GPT2Config(**SIZES["gpt2-tiny"])
    assert scaling.parameters("gpt2-tiny") == network(small).num_parameters()


def test_one_gpu_is_what_was_measured():
    assert 65_536 / scaling.step_seconds(scaling.MACHINES[0], 64)[0] == pytest.approx(593_305, 1e-3)


def test_two_gpus_come_near_what_was_measured():
    """dev/LOG.md: 2 × H200 were 1.98 × one, with 256 sequences per GPU and step."""
    one, two = (scaling.step_seconds(scaling.MACHINES[n], 512 >> n)[0] for n in (0, 1))
    assert one / two == pytest.approx(1.98, abs=0.03)


def test_more_gpus_send_more_and_gain_less():
    rates = [m.gpus * 8 / scaling.step_seconds(m, 8)[0] / m.gpus for m in scaling.MACHINES]
    assert rates == sorted(rates, reverse=True)
    assert scaling.ring_bytes(8.0, 2) == 8
    assert scaling.ring_bytes(8.0, 8) == 14
    # as much as DDP for one micro-batch: bf16 twice and float32 once, but each only half a ring
    ddp = scaling.ring_bytes(4 * scaling.parameters("gpt2-xl"), 8)
    assert scaling.fsdp_bytes("gpt2-xl", 8, 1) == pytest.approx(ddp)
