import pytest

from gpt2.config.sweep import SweepConfig, jobs, split_arguments
from gpt2.errors import UserError


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('optimizer = "muon"\nmax_steps = 10\n')
    return str(path)


def test_arguments_are_sorted_between_sweep_and_training():
    argv = ["a.toml", "--seeds=1,2", "--set", "muon_lr=1,2", "--set=warmup-steps=0"]
    argv += ["--mlp", "relu2", "--out-dir=x"]
    own, texts, rest = split_arguments(argv)
    assert own == ["--seeds=1,2", "--out_dir=x"]
    assert texts == ["muon_lr=1,2", "warmup-steps=0"]
    assert rest == ["a.toml", "--mlp", "relu2"]


def test_every_combination_runs_with_every_seed(recipe):
    texts = ["muon_lr=0.01,0.02", "data-dir=a:0.5,b:0.5;c"]
    found = jobs(recipe, SweepConfig(seeds="1,2", out_dir="o"), texts, ["--mlp=relu2"])
    assert len(found) == 8
    last = found[-1]
    assert (last.recipe, last.seed) == ("muon_lr=0.02,data_dir=c", 2)
    assert last.folder.as_posix() == "o/muon_lr=0.02,data_dir=c,seed=2"
    assert found[0].folder.name == "muon_lr=0.01,data_dir=a_0.5,b_0.5,seed=1"
    config = last.config
    assert (config.optim.muon_lr, config.data.data_dir, config.system.seed) == (0.02, "c", 2)
    assert config.model.mlp == "relu2"
    assert config.output.out_dir == str(last.folder)
    assert last.with_steps(7).config.optim.max_steps == 7


@pytest.mark.parametrize(("texts", "rest", "given", "said"), [
    (["muon_lr"], [], {}, "write --set muon_lr=0.01,0.02"),
    (["muon_lr=0.1,"], [], {}, "write --set muon_lr=0.01,0.02"),
    ([""], [], {}, "(nothing): write --set"),
    (["moun_lr=0.1"], [], {}, "unknown option --moun_lr; did you mean --muon_lr?"),
    (["muon_lr=-1,1"], [], {}, "muon_lr=-1.0: use 0 or more"),
    (["muon_lr=1,1"], [], {}, "comes twice in the sweep"),
    (["mlp=gelu", "mlp=relu2"], [], {}, "--set mlp= comes twice; give all its values in one"),
    (["data=a", "data-dir=b"], [], {}, "--set data_dir= comes twice"),
    (["muon_lr=1e-3,0.001"], [], {}, "muon_lr=0.001 and muon_lr=1e-3 are the same run twice"),
    (["data_dir=a;./a"], [], {}, "are the same run twice"),
    (["min_lr_ratio=-1,0.1"], [], {}, "are the same run twice"),
    (["max_steps=3,4"], ["--max-steps=9"], {}, "--max_steps= is for all runs, and --set"),
    (["data=a;b"], ["--data_dir", "c"], {}, "--data_dir= is for all runs"),
    (["max_steps=3,4"], [], {"tokens": 9}, "--set max_steps= is a budget too; leave --tokens="),
    (["seed=1,2"], [], {}, "a sweep sets --seed= of each run; use --seeds="),
    ([], ["--seed=1"], {}, "use --seeds="),
    ([], ["--resume=never"], {}, "use the same command again"),
    ([], ["--device=cpu"], {}, "use --devices="),
    ([], [], {"seeds": "1,x"}, "write whole numbers, as in --seeds=1,2,3"),
    ([], [], {"seeds": "-1"}, "seed=-1: use a whole number"),
    ([], [], {"seeds": "1,1"}, "seed=1 comes twice"),
    (["warmup_steps=" + ",".join(map(str, range(999)))], [], {}, "a sweep has at most 1,000"),
])  # fmt: skip
def test_mistakes_are_found_before_the_first_run(recipe, texts, rest, given, said):
    with pytest.raises(UserError) as caught:
        jobs(recipe, SweepConfig(**given), texts, rest)
    assert said in str(caught.value)


def test_a_sweep_has_one_budget():
    with pytest.raises(UserError, match="are two budgets; give one"):
        SweepConfig(tokens=1, seconds=1.0)


def test_a_sweep_has_a_folder():
    with pytest.raises(UserError, match="out_dir is empty; name a folder"):
        SweepConfig(out_dir="")
