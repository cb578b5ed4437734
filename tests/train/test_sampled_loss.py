"""A sampled softmax is looked at where a run begins or goes on; its numbers: `test_loop.py`."""

import shutil

from gpt2.train import loop

from .test_loop import config, metrics

SAMPLED = ("--loss=sampled_softmax", "--eval_every=0", "--n_layer=1")


def test_a_run_goes_on_with_another_mix(data_dir, tmp_path):
    """Its mixture begins behind the first sequence."""
    for name in "ab":
        shutil.copytree(data_dir, tmp_path / name)
    out = tmp_path / "out"
    loop.run(config(tmp_path / "a", out, *SAMPLED, "--max_steps=4"))
    assert loop.run(config(tmp_path / "b", out, *SAMPLED, "--max_steps=6")) == 0
    mix = f"{tmp_path / 'a'}:0.5,{tmp_path / 'b'}:0.5"
    assert loop.run(config(mix, out, *SAMPLED, "--max_steps=8")) == 0
    assert loop.run(config(mix, out, *SAMPLED, "--max_steps=9")) == 0
    assert list(metrics(out)) == [*range(1, 10)]
