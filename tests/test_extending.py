"""docs/extending.md: its plugin and its diffs run as they are printed."""

import re
import shutil

import pytest
import torch

import gpt2
from gpt2 import cli
from gpt2.config.registry import forget
from gpt2.errors import UserError

from .conftest import ROOT, TINY, run_python
from .test_readme import FENCE

PAGE = (ROOT / "docs/extending.md").read_text("utf-8")
SMALL = [*TINY, "--n_layer=1", "--n_embd=16"]


def blocks(language: str) -> list[str]:
    return [block for name, block in FENCE.findall(PAGE) if name == language]


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The plugin of the page, in a folder from which the commands run."""
    (tmp_path / "my_idea.py").write_text(blocks("python")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield "--plugin=my_idea.py"
    forget()


PARTS = ["--mlp=bilinear", "--norm=l2norm", "--schedule=linear", "--optimizer=lion", "--loss=focal"]


def train(data_dir, *more):
    return cli.main(["train", *SMALL, f"--data_dir={data_dir}", *more])


def test_a_plugin_trains_resumes_and_writes(plugin, data_dir, capsys):
    whole, half = [plugin, *PARTS, "--out_dir=whole"], [plugin, *PARTS, "--out_dir=half"]
    assert train(data_dir, *whole, "--max_steps=3", "--save_every=2") == 0
    shutil.copytree("whole", "half")
    shutil.rmtree("half/state/step_00000003")  # as a kill after step 2 leaves it
    assert train(data_dir, *half, "--max_steps=3", "--save_every=2") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    chosen = f"half/out_ckpt.pt {plugin}"
    sample = f'gpt2 sample {chosen} --prompt="Hello world,"'
    assert said == f"next: gpt2 plot half, {sample}, gpt2 eval {chosen}"
    states = [torch.load(f"{name}/out_ckpt.pt") for name in ("whole", "half")]
    assert all(torch.equal(states[0]["model"][n], t) for n, t in states[1]["model"].items())
    assert states[0]["plugins"].keys() == {"my_idea.py"}
    model = gpt2.GPT2.from_checkpoint("whole/out_ckpt.pt")
    texts = [model.generate("Hello", 8, seed=1, use_cache=cache) for cache in (True, False)]
    assert texts[0] == texts[1]
    names = {name.split(".")[5] for name in states[0]["model"] if ".mlp.own." in name}
    assert names == {"c_fc", "c_proj"}

    forget()
    capsys.readouterr()
    for command in (["sample", "whole/out_ckpt.pt", "--prompt=a"], ["average", "whole", "--last=1"],
                    ["train", *SMALL, "--out_dir=whole", f"--data_dir={data_dir}"]):  # fmt: skip
        assert cli.main(command) == 2
        line = capsys.readouterr().err
        assert "it was trained with --plugin=my_idea.py (sha256 " in line
        assert line.count("\n") == 1
    assert (
        cli.main(["sample", "whole/out_ckpt.pt", "--prompt=a", "--max_new_tokens=2", plugin]) == 0
    )


def check_that_eval_warns_of_a_changed_plugin(folder, capsys):
    """So does every command that loads a model."""
    command = ["eval", "o", "--plugin=my_idea.py", "--device=cpu", "--eval_tokens=100"]
    path = folder / "my_idea.py"
    text = path.read_text()
    for text_now, changed in ((text, False), (text + "# changed\n", True)):
        gpt2.config.registry.forget()
        path.write_text(text_now)
        capsys.readouterr()
        assert cli.main(command) == 0
        told = "my_idea.py has changed since o/out_ckpt.pt was saved" in capsys.readouterr().err
        assert told == changed
    gpt2.config.registry.forget()
    path.write_text(text)


def test_a_recipe_does_not_run_code_by_itself(plugin, data_dir, capsys, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('plugin = "my_idea.py"\nmlp = "silu"\n')
    assert train(data_dir, f"--config={path}") == 2
    assert "this recipe needs my_idea.py, which is code: read it" in capsys.readouterr().err
    assert not gpt2.config.registry.plugins()
    assert train(data_dir, f"--config={path}", plugin, "--max_steps=1", "--out_dir=o") == 0
    check_that_eval_warns_of_a_changed_plugin(tmp_path, capsys)
    path = tmp_path / "my_idea.py"
    path.write_text(path.read_text() + "# changed\n")
    capsys.readouterr()
    assert train(data_dir, "--mlp=silu", plugin, "--max_steps=2", "--out_dir=o") == 0
    assert "my_idea.py has changed since" in capsys.readouterr().err


def test_a_step_that_is_not_finite_is_skipped_by_any_optimizer(plugin, data_dir, monkeypatch):
    seen = []

    def run(argv):
        gpt2.load_plugin("my_idea.py")
        lion = gpt2.config.registry.registered("optimizer", "lion")
        monkeypatch.setattr(lion, "step", lambda self: seen.append(1))
        gpt2.register("loss", "bad")(lambda logits, targets: logits.sum(-1) * float("nan"))
        return train(data_dir, *argv)

    assert run([plugin, "--optimizer=lion", "--loss=bad", "--max_steps=1", "--out_dir=o"]) == 2
    assert seen == []  # and the run, which has learned nothing, says so


@pytest.mark.parametrize(("code", "said"), [
    ("x = ", "line 1: SyntaxError"),
    ("\n1 / 0", "line 2: ZeroDivisionError: division by zero"),
    ("import sys\nsys.exit(3)", "line 2: SystemExit: 3"),
    ("import gpt2\ngpt2.register('mlpp', 'x')", "use one of mlp, norm, schedule, optimizer, loss"),
    ("import gpt2\ngpt2.register('mlp', 5)", "use another name, of small letters, digits"),
    ("import gpt2\ngpt2.register('mlp', 'gelu')", "gelu, relu2, swiglu are there already"),
    (None, "--plugin=p.py: No such file or directory"),
])  # fmt: skip
def test_mistakes_in_a_plugin_are_one_line(code, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if code is not None:
        (tmp_path / "p.py").write_text(code)
    assert cli.main(["train", "--plugin=p.py"]) == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1
    assert cli.main(["train", "--plugin=p.txt"]) == 2
    assert "name a file of Python" in capsys.readouterr().err
    forget()


@pytest.mark.parametrize(("part", "argv", "said"), [
    ("@gpt2.register('optimizer', 'odd')\ndef odd(groups, options): return 3",
     ["--optimizer=odd"], "gave a int instead of a torch.optim.Optimizer"),
    ("@gpt2.register('optimizer', 'odd')\ndef odd(groups, options):\n"
     "    return torch.optim.SGD(groups[0]['params'], 1)",
     ["--optimizer=odd"], "must keep all parameters and the `names`"),
    ("@gpt2.register('loss', 'odd')\ndef odd(logits, targets): return logits.sum()",
     ["--loss=odd"], "it must give one loss for each"),
    ("@gpt2.register('optimizer', 'odd')\ndef odd(groups, options): return 3",
     ["--optimizer=odd", "--parallel=fsdp"], "use --parallel=ddp"),
])  # fmt: skip
def test_parts_that_do_not_fit_are_one_line(part, argv, said, tmp_path, data_dir, capsys):
    path = tmp_path / "p.py"
    path.write_text(f"import gpt2, torch\n{part}\n")
    more = [f"--plugin={path}", *argv, f"--out_dir={tmp_path / 'o'}", "--max_steps=1"]
    assert train(data_dir, *more) == 2
    assert said in capsys.readouterr().err
    forget()


def test_a_config_with_a_plugin_that_was_not_loaded_is_refused():
    from gpt2.config.train import SystemOptions, TrainConfig

    with pytest.raises(UserError, match=r"call gpt2.load_plugin\('a.py'\) before"):
        TrainConfig(system=SystemOptions(plugin="a.py"))


# ---- the diffs -----------------------------------------------------------------------------------


def patched(package, diff: str) -> None:
    """Applies a diff whose hunks are found by their text, each in one place."""
    for part in re.split(r"^--- a/", diff, flags=re.MULTILINE)[1:]:
        name, _, *lines = part.splitlines()
        path = package.parent / name
        text = path.read_text("utf-8")
        for hunk in hunks(lines):
            old = "".join(f"{line[1:]}\n" for line in hunk if line[0] in " -")
            new = "".join(f"{line[1:]}\n" for line in hunk if line[0] in " +")
            assert text.count(old) == 1, (name, old)
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")


def hunks(lines: list[str]) -> list[list[str]]:
    """Lines in groups: a new one begins where old lines follow added ones."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line[0] != "+" and any(before[0] == "+" for before in found[-1]):
            found.append([])
        found[-1].append(line)
    return found


@pytest.mark.slow
def test_the_diffs_apply_and_train(tmp_path, data_dir):
    package = tmp_path / "gpt2"
    shutil.copytree(ROOT / "gpt2", package, ignore=shutil.ignore_patterns("__pycache__"))
    assert len(blocks("diff")) == 3
    for diff in blocks("diff"):
        patched(package, diff)
    switches = ["--mlp=silu", "--channel_gate=True", "--schedule=wsd_sqrt"]
    argv = ["-m", "gpt2", "train", *SMALL, f"--data_dir={data_dir}", *switches, "--out_dir=o"]
    places = {"package": tmp_path, "cwd": tmp_path}
    assert "as expected" in run_python(*argv, "--max_steps=2", **places).stdout
    assert "continuing from" in run_python(*argv, "--max_steps=3", **places).stdout
    code = "from gpt2 import GPT2; m = GPT2.from_checkpoint('o/out_ckpt.pt'); print(*("
    code += "m.generate([1, 2], 9, seed=1, use_cache=c) == m.generate([1, 2], 9, seed=1) "
    code += "for c in (True, False)), m.transformer.h[0].attn.c_gate.weight.shape)"
    assert run_python("-c", code, **places).stdout.startswith("True True torch.Size([16, 16])")
