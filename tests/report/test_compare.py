import json
import math

import pytest

from gpt2.config.command_line import to_toml
from gpt2.errors import UserError
from gpt2.report.compare import differences, find_groups, report, verdict
from gpt2.report.compare_plot import draw_comparison
from gpt2.report.runs import find_runs

NAN = math.nan
LAST = {0.01: (3.10, 3.12, 3.09), 0.02: (3.25, 3.27, 3.23), 0.03: (3.11, 3.13, 3.10)}


def write_run(folder, losses=(4.0, 3.5), seed=1, steps=100, **given):
    """A run with evaluations at even distances; `given` are options, or `validation`, `changed`."""
    start = {"step": 0, "validation": "abc", "vocab_size": 50257, "changed": {}}
    recorded = ("validation", "training", "vocab_size", "changed")
    start |= {n: given.pop(n) for n in recorded if n in given}
    tokens = given.pop("val_tokens", 1000)
    folder.mkdir(parents=True)
    settings = {"seed": seed, "max_steps": steps, "out_dir": str(folder)} | given
    (folder / "config.toml").write_text(to_toml(settings))
    rows = []
    for number, loss in enumerate(losses, 1):
        step = number * 100 // len(losses)
        rows.append({"step": step, "loss": 9.0, "tokens": step * 10, "seconds": step / 10})
        result = {"nonfinite": ["val_loss"]} if loss is NAN else {"val_loss": loss}
        rows.append({"step": step, **result, "val_tokens": tokens, "tokens": step * 10})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if start["validation"]:
        (folder / "history.jsonl").write_text(json.dumps(start) + "\n")
    return folder


@pytest.fixture
def sweep(tmp_path):
    for rate, losses in LAST.items():
        for seed, loss in enumerate(losses):
            write_run(tmp_path / f"{rate}-{seed}", (4, loss), seed, learning_rate=rate)
    return tmp_path


def found(*folders):
    return find_groups(find_runs(folders))


def test_recipes_have_their_seeds_and_means(sweep):
    groups = found(sweep).groups
    assert [(g.name, [run.seed for run in g.runs]) for g in groups] == [
        (f"learning_rate={rate}", [0, 1, 2]) for rate in LAST
    ]
    assert differences(groups) == {"learning_rate": [*LAST]}
    said = report(found(sweep))
    row = "| learning_rate=0.01 | 3 | 3.1033 ± 0.0088 | 3.1033 ± 0.0088 | 100 | 1.00k | 10s |"
    assert row in said


def test_one_path_of_the_data_may_be_written_in_several_ways(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    ways = "data", "./data", str(tmp_path / "data"), f"{tmp_path}/data:0.5,data:0.5"
    for seed, way in enumerate(ways):
        write_run(tmp_path / f"runs/{seed}", seed=seed, data_dir=way)
    groups = found(tmp_path / "runs").groups
    assert [(len(g.runs), g.runs[0].settings["data_dir"]) for g in groups] == [
        (3, "data"),
        (1, "data:0.5,data:0.5"),
    ]


def test_a_run_that_the_clock_ended_counts_and_is_named(tmp_path):
    folder = write_run(tmp_path / "a", (4, 3.0), steps=120, max_seconds=9.0)
    assert found(folder).left_out[0][1] == "at step 100 of 120"
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 100, "counted_seconds": 8.9, "time_was_up": 9.0}) + "\n")
    said = report(found(folder))
    assert "| a | 1 | 3.0000 | 3.0000 | 100 | 1.00k | 9s |" in said
    assert f"end of its schedule: {folder}" in said


def test_a_run_that_did_not_use_its_seconds_is_named(tmp_path):
    folder = write_run(tmp_path / "a", max_seconds=9.0)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 100, "counted_seconds": 6.3, "time_was_up": 0}) + "\n")
    assert f"when the speed was measured: {folder} (70%)" in report(found(folder))
    text = (folder / "config.toml").read_text().replace("9.0", '"9"')
    (folder / "config.toml").write_text(text)
    with pytest.raises(UserError, match="max_seconds=9 is no number"):
        found(folder)


def test_the_best_loss_is_not_the_last(tmp_path):
    write_run(tmp_path / "a", (4, 3.0, 3.2))
    (group,) = found(tmp_path / "a").groups
    assert (group.last, group.best) == ([3.2], [3.0])


def judged(folder):
    return verdict([(group.name, group.last) for group in found(folder).groups])


def test_the_verdict_tells_differences_larger_than_the_seeds(sweep):
    second, third = judged(sweep)
    assert second.startswith("`learning_rate=0.01` is 0.1467 nats below `learning_rate=0.02` (± ")
    assert second.endswith(": larger than the seeds' difference.")
    assert "p = 0.0023 after Holm's correction for 3 pairs, 3 seeds each" in second
    assert ": not larger than the seeds' difference; about 48 more seeds of each would" in third


def test_unequal_numbers_of_seeds_are_both_said():
    equal = verdict([("a", [3.0, 3.1]), ("b", [3.0, 3.1])])
    assert equal == ["`a` and `b` have equal losses."]
    (line,) = verdict([("a", [3.0, 3.1]), ("b", [3.2, 3.3, 3.4])])
    assert ", 2 and 3 seeds): " in line


def test_one_seed_tells_nothing(tmp_path):
    write_run(tmp_path / "a", (3.0,), learning_rate=0.1)
    write_run(tmp_path / "b", (3.5,), learning_rate=0.2)
    (line,) = judged(tmp_path)
    assert "`learning_rate=0.1` and `learning_rate=0.2` ran with one seed, whose spread" in line
    assert judged(tmp_path / "a") == ["One recipe: there is nothing to compare it with (1 seed)."]


@pytest.mark.parametrize(("given", "why"), [
    ({"validation": "xyz"}, "other validation data than"),
    ({"val_tokens": 999}, "another number of validation tokens than"),
    ({"vocab_size": 512}, "another vocabulary than"),
    ({"losses": ()}, "no evaluation yet (step 0 of 100)"),
    ({"steps": 200}, "at step 100 of 200"),
    ({"losses": (NAN,)}, "diverged (validation loss NaN at step 100)"),
    ({"losses": (4, 3, NAN, NAN)}, "diverged (validation loss NaN at step 75)"),
    ({"losses": (4, NAN), "steps": 200}, "diverged (validation loss NaN at step 100)"),
    ({"losses": (NAN, NAN), "early_stop_evals": 2, "steps": 200}, "diverged (validation loss"),
    ({}, "the options and the seed of"),
])  # fmt: skip
def test_what_does_not_compare_is_named_and_left_out(given, why, tmp_path):
    write_run(tmp_path / "a")
    odd = write_run(tmp_path / "b", **{"learning_rate": 0.5} | given if given else {})
    findings = found(tmp_path)
    assert [run.folder.name for group in findings.groups for run in group.runs] == ["a"]
    assert f"{odd} is left out: {why}" in report(findings)


def test_a_run_that_got_over_nan_counts(tmp_path):
    write_run(tmp_path / "a", (4, NAN, 3.2, 3.1))
    write_run(tmp_path / "b", (4, 3, NAN, 3.1), steps=400, early_stop_evals=2, learning_rate=0.5)
    groups = found(tmp_path).groups
    assert [(group.last, group.best) for group in groups] == [([3.1], [3.1]), ([3.1], [3])]
    assert draw_comparison(groups, tmp_path / "c.png").exists()


@pytest.mark.parametrize(("mark", "why"), [
    ({"step": 70, "diverged_since": 51}, "diverged (loss or gradient NaN since step 51)"),
    ({"step": 69, "diverged_since": 51}, "at step 70 of 100"),  # it went on afterwards
    ({"step": 70, "diverged_since": "x"}, "at step 70 of 100"),
])  # fmt: skip
def test_a_run_that_gave_up_is_named(mark, why, tmp_path):
    folder = write_run(tmp_path / "a", (3.0,), seed=2)
    rows = [{"step": 50, "val_loss": 3.0}, {"step": 70, "lr": 1.0}, mark]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [reason for _, reason in found(folder).left_out] == [why]
    assert bool(find_runs([folder])[0].unfinished()) == why.startswith("at step")


def test_an_early_stop_is_an_end(tmp_path):
    write_run(tmp_path / "a", (4, 3, 3.1, 3.2), steps=400, early_stop_evals=2)
    write_run(tmp_path / "b", (4, 3, 3.1, 2.9), steps=400, early_stop_evals=2)
    assert [run.folder.name for group in found(tmp_path).groups for run in group.runs] == ["a"]


@pytest.mark.parametrize("then", [{"validation": "def"}, {"val_tokens": 2000}])
def test_losses_of_other_validation_tokens_are_not_compared(tmp_path, then):
    """The second half of the run is about other tokens, whose losses are higher."""
    folder = write_run(tmp_path / "a", (2, 2.1, 4, 3.5), steps=400, early_stop_evals=2)
    start = {"step": 50, "validation": "abc", "vocab_size": 50257} | then
    with open(folder / "history.jsonl", "a") as file:
        file.write(json.dumps(start) + "\n")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["step"] > 50 and "val_tokens" in row:
            row["val_tokens"] = then.get("val_tokens", row["val_tokens"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run,) = find_runs([folder])
    assert run.comparable_losses == [4, 3.5]
    assert run.unfinished() == "at step 100 of 400"
    settings = (folder / "config.toml").read_text().replace("max_steps = 400", "max_steps = 100")
    (folder / "config.toml").write_text(settings)
    assert found(folder).groups[0].best == [3.5]


def test_a_folder_whose_training_tokens_changed_is_named(tmp_path):
    for seed, training in enumerate(("abc", "abc", "def")):
        write_run(tmp_path / f"{seed}", seed=seed, training=training, data_dir="x")
    write_run(tmp_path / "other", training="ghi", data_dir="y")
    write_run(tmp_path / "old", seed=9, data_dir="x")
    findings = found(tmp_path)
    assert [len(group.runs) for group in findings.groups] == [4, 1]
    first, last = tmp_path / "0", tmp_path / "2"
    assert findings.notes == [
        f"x held other training tokens than for {first} when these runs read it: {last}"
    ]


def test_options_changed_on_the_way_make_another_recipe(tmp_path):
    write_run(tmp_path / "a")
    changed = {"learning_rate": [0.1, 0.2], "out_dir": ["x", "y"]}
    write_run(tmp_path / "b", seed=2, changed=changed)
    findings = found(tmp_path)
    assert len(findings.groups) == 2
    assert differences(findings.groups) == {
        "changed on the way": [None, "learning_rate 0.1 -> 0.2 from step 0"]
    }


@pytest.mark.parametrize("step", [50, 100])
def test_a_start_without_steps_changed_nothing(step, tmp_path):
    """It failed, and the next one went on from the same step; or the run was at its end."""
    folder = write_run(tmp_path / "a", (2, 2.1, 4, 3.5))
    changed = {"batch_size": [2, 64], "seed": [1, 2]}
    tried = {"step": step, "validation": "def", "vocab_size": 50257, "changed": changed}
    again = {"step": 50, "validation": "abc", "vocab_size": 50257, "changed": {}}
    with open(folder / "history.jsonl", "a") as file:
        for start in [tried, again] if step == 50 else [again, tried]:
            file.write(json.dumps(start) + "\n")
    (run,) = find_runs([folder])
    assert not run.changes
    assert run.comparable_losses == [2, 2.1, 4, 3.5]
    assert run.validation()[0] == "abc"
    assert [start["step"] for start in run.starts] == [0, 50]


def test_a_run_that_went_on_with_another_seed_is_no_run_of_that_seed(tmp_path):
    write_run(tmp_path / "a", seed=1)
    write_run(tmp_path / "b", seed=5, changed={"seed": [1, 5]})
    groups = found(tmp_path).groups
    assert [len(group.runs) for group in groups] == [1, 1]
    assert differences(groups) == {"changed on the way": [None, "seed 1 -> 5 from step 0"]}


def test_runs_of_older_versions_are_compared_by_their_data_dir(tmp_path):
    write_run(tmp_path / "a", validation="", learning_rate=0.1, data_dir="x")
    write_run(tmp_path / "b", validation="", learning_rate=0.2, data_dir="x")
    write_run(tmp_path / "c", validation="", learning_rate=0.2, data_dir="y")
    findings = found(tmp_path)
    assert len(findings.groups) == 2
    assert "was compared by --data_dir= alone" in findings.notes[0].replace("data was", "was")
    assert "c is left out: other validation data" in report(findings)


def test_unequal_tokens_are_said(tmp_path):
    write_run(tmp_path / "a", learning_rate=0.1)
    folder = write_run(tmp_path / "b", learning_rate=0.2)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"tokens": 1000', '"tokens": 2000'))
    assert "unequal numbers of tokens: 1.00k to 2.00k" in report(found(tmp_path))


@pytest.mark.parametrize(("files", "said"), [
    (None, "no such folder; name the folders of runs"),
    ({}, r"is no run and holds none \(no metrics.jsonl\)"),
    ({"metrics.jsonl": ""}, "config.toml is missing, so the options of this run are not known"),
    ({"metrics.jsonl": "", "config.toml": "seed = 'x'"}, "config.toml: seed=x is no whole number"),
    ({"metrics.jsonl": "", "config.toml": "seed"}, "is not a TOML file"),
])  # fmt: skip
def test_bad_folders_are_one_line(files, said, tmp_path):
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        find_runs([folder])
    assert str(folder) in str(caught.value)


def test_a_run_that_is_named_twice_counts_once(sweep):
    assert len(find_runs([sweep, sweep / "0.01-1", sweep / ".." / sweep.name])) == 9
