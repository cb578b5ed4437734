from gpt2 import cli
from gpt2.report.metrics import HISTORY, read_metrics
from gpt2.report.runs import find_runs

from ..conftest import TINY
from ..report.test_compare import write_run


def test_compare_prints_a_table_and_draws(tmp_path, capsys):
    for seed in (1, 2):
        write_run(tmp_path / f"a{seed}", (4, 3 + seed / 10), seed)
        write_run(tmp_path / f"b{seed}", (4, 5 + seed / 10), seed, learning_rate=0.1)
    target = tmp_path / "c.png"
    assert cli.main(["compare", str(tmp_path), f"--out={target}"]) == 0
    said = capsys.readouterr().out
    assert "| learning_rate=0.0006 | 2 | 3.1500 ± 0.0500 |" in said
    assert said.endswith(f"larger than the seeds' difference.\n\n{target}\n")
    assert target.read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_one_line(tmp_path, capsys):
    run = str(write_run(tmp_path / "a", ()))
    target = tmp_path / "notes.png"
    target.write_text("mine")
    assert cli.main(["compare", run, f"--out={tmp_path}/c.png"]) == 1  # it has no evaluation
    assert "no evaluation yet" in capsys.readouterr().out
    for argv, said in (([], "required: run"), ([run, "--output=x"], "did you mean --out?"),
                       ([run, f"--out={target}"], "is there and no picture")):  # fmt: skip
        assert cli.main(["compare", *argv]) == 2
        line = capsys.readouterr().err
        assert said in line
        assert line.count("\n") == 1


def test_runs_of_gpt2_train_are_compared(tmp_path, data_dir, capsys):
    """One resumed with another rate: a recipe of its own, on equal validation data."""
    argv = [*TINY, "--n_layer=1", "--n_embd=8", f"--data_dir={data_dir}"]
    argv.append(f"--out_dir={tmp_path / 'b'}")
    assert cli.main(["train", *argv, "--max_steps=1"]) == 0
    assert cli.main(["train", *argv, "--max_steps=2", "--learning_rate=2e-3"]) == 0
    first, second = read_metrics(tmp_path / "b" / HISTORY)
    assert (first["step"], first["changed"]) == (0, {})
    changed = {"max_steps": [1, 2], "learning_rate": [1e-3, 2e-3]}
    assert (second["step"], second["changed"]) == (1, changed)
    assert first["validation"] == second["validation"]
    (run,) = find_runs([tmp_path / "b"])
    validation, vocabulary, tokens = run.validation()
    write_run(tmp_path / "a", validation=validation, vocab_size=vocabulary, val_tokens=tokens)
    capsys.readouterr()
    assert cli.main(["compare", str(tmp_path), f"--out={tmp_path / 'c.png'}"]) == 0
    said = capsys.readouterr().out
    assert "left out" not in said
    assert "max_steps 1 -> 2 from step 1; learning_rate 0.001 -> 0.002 from step 1" in said
