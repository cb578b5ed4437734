"""The commands as a person meets them: in a process of their own."""

import errno
import gc
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from gpt2 import cli
from gpt2.data.shards import write_shard

from . import forks
from .conftest import ROOT, TINY, run_python, start_python
from .train.test_loop import metrics, same, weights


def complain(capsys, *argv) -> str:
    assert cli.main(list(argv)) == 2
    err = capsys.readouterr().err
    assert err.startswith("gpt2: error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian'; use one of prepare, shards, train"),
        (["train", "--data_dir=/nowhere"], "no data folder /nowhere; make one with"),
        (["train", "--grad_acum_steps=8"], "did you mean --grad_accum_steps"),
        (["sample", "missing.pt", "--prompt=a"], "missing.pt: no such checkpoint"),
        (
            ["sample", "missing.pt", "--prompt=a", "--top_p=2"],
            "top_p=2.0: use a number above 0",
        ),
        (["sample", "missing.pt", "--prompt=a", "--seed=-2"], "seed=-2: use a whole number from 0"),
        (["sample", "missing.pt", "--prompt=a", "--min_p=2"], "min_p=2.0: use a number from 0"),
        (
            ["sample", "missing.pt", "--repetition_penalty=0"],
            "repetition_penalty=0.0: use a number",
        ),
        (["sample"], "checkpoint"),
        (["eval", "missing.pt", "--text=README.md"], "missing.pt: no such checkpoint"),
        (["plot", "/nowhere"], "metrics.jsonl"),
        (["prepare", "--source=/nowhere.txt"], "no such file, folder or glob"),
        (["prepare", "--worker=0/4"], "workers count from 1; use 1/4 to 4/4"),
        (["shards", "verfy", "x"], "use one of verify, info, show, merge (did you mean verify?)"),
        (["shards", "verify"], "arguments are required: folder"),
        (["shards", "info", "/nowhere"], "no folder /nowhere; make shards with `gpt2 prepare"),
        (["shards", "show", "/nowhere", "--dok=3"], "did you mean --doc"),
        (["shards", "merge", "/nowhere"], "/nowhere: no folders of workers to join"),
        (["demo", "--max_stepz=2"], "did you mean --max_steps"),
        (["export", "missing.pt", "x"], "missing.pt: no such checkpoint"),
        (["export", "missing.pt", "x", "--to=onnx"], "hf"),
        (["export", "missing.pt", "x", "--dtype=int8"], "int8"),
        (["sweep", "/nowhere.toml"], "error: recipe /nowhere.toml: No such file or directory"),
        (["sweep", "tests"], "error: recipe tests: not a file"),
        (["average", "/nowhere"], "holds no saved states; name the folder of a run"),
        (["average", "/nowhere", "--last=0"], "last=0"),
        (["push", "missing.pt", "name"], "'name': name the repository as OWNER/NAME"),
        (["train", "--init=missing.pt", "--max_steps=1"], "missing.pt: no such checkpoint"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, argv, message):
    assert message in complain(capsys, *argv)


def test_two_values_of_an_option_that_holds_several_are_refused(capsys):
    """The first --source= would otherwise be dropped without a word."""
    for argv, way_out in (
        (["prepare", "--source=/nowhere/a", "--out-dir=x", "--source", "/nowhere/b"], "one folder"),
        (["train", "--data_dir=a", "--data-dir=b"], "give all in one, with commas"),
        (["train", "--log_to=wandb", "--log_to=trackio"], "give all in one, with commas"),
    ):
        (error,) = complain_in_lines(capsys, argv)
        assert "is given twice; " in error
        assert way_out in error
    for argv in (
        ["sweep", "/nowhere.toml", "--set=seed=1", "--set=size=gpt2"],
        ["prepare", "--source=/nowhere/a", "--max_tokens=5", "--max_tokens=6"],
        ["prepare", "--source=/nowhere/a", "--source=/nowhere/a"],
    ):
        (error,) = complain_in_lines(capsys, argv)
        assert "given twice" not in error


def complain_in_lines(capsys, argv) -> list[str]:
    assert cli.main(argv) == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("kind", ["EACCES", "EROFS", "ENAMETOOLONG", "ENOSPC"])
def test_a_path_that_the_system_refuses_is_one_line(capsys, monkeypatch, kind):
    def refuse(argv):
        raise OSError(getattr(errno, kind), "the reason", "/a/b")

    monkeypatch.setitem(cli.COMMANDS, "plot", refuse)
    assert complain(capsys, "plot") == "gpt2: error: /a/b: the reason\n"


@pytest.mark.parametrize("argv", [[], ["--help"], ["help"]])
def test_help_names_every_command(capsys, argv):
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert all(f"gpt2 {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("argv", [["shards"], ["shards", "--help"]])
def test_help_names_every_command_for_shards(capsys, argv):
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert all(f"gpt2 shards {name} " in out for name in cli.SHARDS_COMMANDS)


@pytest.mark.parametrize("flag", ["-h", "--help", "--help=all"])
@pytest.mark.parametrize(
    "command", ["", *cli.COMMANDS, *(f"shards {name}" for name in cli.SHARDS_COMMANDS)]
)
def test_every_command_explains_itself(capsys, command, flag):
    """As `gpt2 --help` says of every one."""
    if (command, flag) == ("lm_eval", "--help=all"):
        pytest.importorskip("lm_eval")  # whose options they are
    try:
        code = cli.main([*command.split(), flag])
    except SystemExit as stopped:  # of argparse
        code = stopped.code
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert out.startswith("usage: ")
    assert command == "" or command in out


def test_demo_shows_its_commands_for_pasting(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    called = []
    for name in ("prepare", "train", "plot", "sample"):

        def note(argv, name=name):
            called.append(["gpt2", name, *argv])
            return 0

        note.__name__ = name
        monkeypatch.setattr(cli, name, note)
    assert cli.demo(["--out_dir=my run"]) == 0
    said = [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    assert [shlex.split(line) for line in said] == called
    assert "my run/out_ckpt.pt" in called[-1]


def test_shards_from_the_command_line(gpt2_data_dir, tmp_path):
    """Exit codes 0 and 1, as scripts want them; a bar only where there is a terminal."""
    folder = shutil.copytree(gpt2_data_dir, tmp_path / "data")
    done = run_python("-m", "gpt2", "shards", "verify", folder)
    assert (done.returncode, done.stderr) == (0, "")
    os.truncate(next(folder.glob("*_val_*.bin")), 2000)
    done = run_python("-m", "gpt2", "shards", "verify", folder, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert len(done.stdout.splitlines()) == 2


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    run_python(
        "train_gpt2.py", f"--data_dir={data_dir}", f"--out_dir={out}", *TINY, "--max_steps=3"
    )
    return out


@pytest.mark.skipif(sys.platform == "win32", reason="pipes differ on Windows")
def test_reader_that_has_seen_enough(tmp_path):
    """As in `gpt2 shards show … | head`."""
    write_shard(tmp_path / "x_train_000001.bin", np.array([50256, *[262] * 300_000], np.uint16))
    command = [sys.executable, "-m", "gpt2", "shards", "show", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
        assert p.stdout.read(8) == b" the the"
        p.stdout.close()
        assert p.stderr.read() == b""
    assert p.returncode == 1


PRINTING = [  # CKPT, RUN and DATA are a model, its run and shards
    "--help",
    "--version",
    "train --help",
    "shards --help",
    "shards info DATA",
    "shards verify DATA",
    "sample CKPT --prompt=Hello --max_new_tokens=4",
    "sample CKPT",
    "chat CKPT",
    "inspect CKPT text --out=",
    "eval CKPT --data_dir=DATA --eval_tokens=100 --device=cpu",
    "plot RUN",
    "average RUN --last=1 --out=NEW",
    "export CKPT NEW",
    "serve CKPT --port=0 --device=cpu",
    "prepare --source=TEXT --out_dir=NEW",
    "train --data_dir=DATA --out_dir=NEW --max_steps=2 --device=cpu --size=gpt2-tiny "
    "--block_size=16 --batch_size=2 --grad_accum_steps=1 --eval_tokens=100",
]


@pytest.mark.skipif(not forks.AVAILABLE, reason="needs forks, and /dev/full as Linux has it")
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    "arguments",
    [words for words in PRINTING if words.split()[0] != "serve"],  # which goes on
    ids=lambda words: " ".join(words.split()[:2]),
)
def test_the_disk_of_the_output_is_full(arguments, unbuffered, trained, data_dir, tmp_path):
    """A log that cannot be written costs no work; another output is an error."""
    lasting = arguments.split()[0] in cli.LASTING and "--help" not in arguments
    command = [forks.server(ROOT).python, "-m", "gpt2"]
    command += in_place(arguments, trained, data_dir, tmp_path).split()
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE,
            text=True, check=False, timeout=100, env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    what = "the output cannot be written: No space left on device"
    assert done.stderr.count(what) == 1
    if lasting:
        assert f"{what}; the work goes on without it\n" in done.stderr
        assert done.returncode == 0
    else:
        assert done.stderr.endswith(f"gpt2: error: {what}\n")
        assert "goes on" not in done.stderr
        assert done.returncode == 2
    assert (tmp_path / "new").exists() == (lasting and "NEW" in arguments)


def test_a_full_disk_of_something_else_is_not_told_as_that_of_the_output(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli, "_run", full)
    with pytest.raises(OSError, match="No space left"):  # whose traceback shows the place
        cli.main(["inspect", "x"])


def in_place(arguments, trained, data_dir, tmp_path) -> str:
    """A command of `PRINTING` with its files."""
    places = {"CKPT": trained / "out_ckpt.pt", "RUN": trained, "DATA": data_dir,
              "NEW": tmp_path / "new", "TEXT": tmp_path / "a.txt"}  # fmt: skip
    (tmp_path / "a.txt").write_text("A quiet harbour. " * 400)
    for name, place in places.items():
        arguments = arguments.replace(name, str(place))
    return arguments


@pytest.mark.skipif(not forks.AVAILABLE, reason="needs forks, and pipes as Linux has them")
@pytest.mark.parametrize("arguments", PRINTING, ids=lambda words: " ".join(words.split()[:2]))
def test_nobody_reads_the_output(arguments, trained, data_dir, tmp_path):
    """As in `gpt2 … | head -0`, of every command that prints: no traceback, and an exit code."""
    arguments = in_place(arguments, trained, data_dir, tmp_path)
    command = [forks.server(ROOT).python, "-m", "gpt2", *arguments.split()]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE,
        text=True, check=False, timeout=100,
    )  # fmt: skip
    os.close(writer)
    name = arguments.split()[0]
    stopped = f"gpt2: error: {name} stopped, because nobody reads its output any more\n"
    works = name in ("train", "prepare") and "--help" not in arguments
    assert [line for line in done.stderr.splitlines(True) if line[:4] == "gpt2"] == [
        stopped
    ] * works
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    if arguments != "train --help":  # argparse ignores that its text could not be written
        assert done.returncode == 1


def test_a_backend_of_matplotlib_that_is_not_there_is_not_asked_for(trained):
    """Notebooks and shells set it for windows; a plot is a file."""
    env = {**os.environ, "MPLBACKEND": "nowhere"}
    done = run_python("-m", "gpt2", "plot", trained, env=env, real=True)
    assert done.stdout == f"{trained / 'loss.png'}\n"


def test_sample(trained):
    arguments = ["-m", "gpt2", "sample", trained / "out_ckpt.pt", "--max_new_tokens=8", "--seed=1"]
    once = run_python(*arguments, "--prompt=Hello world,", "--num_samples=2").stdout
    assert once.count("Hello world,") == 2
    assert once == run_python(*arguments, "--prompt=Hello world,", "--num_samples=2").stdout


def test_sample_ends_before_the_stop_string(trained):
    arguments = ["-m", "gpt2", "sample", trained / "out_ckpt.pt", "--max_new_tokens=12", "--seed=1"]
    arguments += ["--prompt=Hello", "--min_p=0.001", "--repetition_penalty=1.1"]
    whole = run_python(*arguments).stdout.rstrip("\n")
    stop = whole[len("Hello") + 8 : len("Hello") + 12]
    stopped = run_python(*arguments, f"--stop={stop}").stdout
    assert stopped == whole[: whole.index(stop, len("Hello"))] + "\n\n"
    assert run_python(*arguments, "--dtype=bfloat16").stdout.startswith("Hello")


def test_sample_asks_without_a_prompt(trained):
    done = run_python(
        "-m", "gpt2", "sample", trained / "out_ckpt.pt", "--max_new_tokens=4", input="one\ntwo\n\n"
    )
    assert "one" in done.stdout
    assert "two" in done.stdout


def test_console_that_knows_only_ascii(trained, data_dir):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = run_python(
        "train_gpt2.py", f"--data_dir={data_dir}", f"--out_dir={trained}", *TINY, "--max_steps=3",
        env=environment, real=True,
    )  # fmt: skip
    assert "batch_size 2 ? block_size 32" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ on Windows")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_the_same_command_goes_on(data_dir, tmp_path, number, code):
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = ["train_gpt2.py", f"--data_dir={data_dir}", *TINY, "--max_steps=25", "--save_every=0"]
    run_python(*command, f"--out_dir={whole}")
    command.append(f"--out_dir={out}")
    if number == signal.SIGINT:  # Python itself begins with a handler of its own
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
    else:
        process = start_python(*command)
    for line in process.stdout:
        if line.startswith("step") and " 3/25" in line:
            process.send_signal(number)
            break
    rest = process.communicate(timeout=60)
    assert process.returncode == code, rest
    assert "stopped at step" in "".join(filter(None, rest))  # of Popen: stdout and stderr
    stopped = max(metrics(out))
    assert 3 <= stopped < 25
    run_python(*command)
    assert same(weights(out / "out_ckpt.pt"), weights(whole / "out_ckpt.pt"))
    assert metrics(out) == metrics(whole)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
def test_kill_9_and_the_same_command(data_dir, tmp_path):
    """Killed three times within some step, the run ends with the undisturbed one's bits.

    A fast machine may be done before it is killed; the run then begins anew.
    """
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = ["train_gpt2.py", f"--data_dir={data_dir}", *TINY, "--max_steps=30", "--save_every=5"]
    run_python(*command, f"--out_dir={whole}")
    kills = 0
    for _ in range(20):
        process = start_python(*command, f"--out_dir={out}")
        left = 7 if kills < 3 else 99  # more steps than are saved at once, so that each run gets on
        for line in process.stdout:
            left -= line.startswith("step")
            if left == 0:
                time.sleep(random.uniform(0, 0.03))  # any moment of a step, or of a save
                process.send_signal(signal.SIGKILL)
                break
        process.communicate(timeout=100)
        if process.returncode == 0 and kills == 3:
            break
        if process.returncode == 0:
            shutil.rmtree(out)
        kills = 0 if process.returncode == 0 else kills + 1
    assert (process.returncode, kills) == (0, 3)
    assert same(weights(out / "out_ckpt.pt"), weights(whole / "out_ckpt.pt"))
    assert metrics(out) == metrics(whole)


def test_version_without_torch():
    """That of the distribution which is installed; a program asks `gpt2.__version__`."""
    code = (
        "import sys, gpt2; from gpt2.cli import main; code = main(['--version'])\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "print(gpt2.__version__); sys.exit(code)"
    )
    first, second = run_python("-c", code, real=True).stdout.splitlines()
    assert first == f"gpt2 {second}"
    assert re.fullmatch(r"gpt2 \d+\.\d+\.\d+", first)


def test_version_of_a_checkout_that_is_not_installed(tmp_path):
    """Without site-packages (-S), where the distribution would be found."""
    shutil.copytree(ROOT / "gpt2", tmp_path / "gpt2", ignore=shutil.ignore_patterns("__pycache__"))
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    changed = re.sub(r'^version = ".*"', 'version = "7.8.9"', project, flags=re.MULTILINE)
    (tmp_path / "pyproject.toml").write_text(changed, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": ""}
    done = run_python("-S", "-m", "gpt2", "--version", cwd=tmp_path, env=environment, real=True)
    assert done.stdout == "gpt2 7.8.9\n"


def test_a_typo_of_any_command_is_answered_without_torch(tmp_path):
    (tmp_path / "a.toml").write_text("")
    names = {"shards": ["info", "x"], "sweep": [str(tmp_path / "a.toml")]}
    bare = ("prepare", "train", "finetune", "profile", "demo")
    lines = [
        [name, *names.get(name, [] if name in bare else ["a", "b"]), "--tpyo=1"]
        for name in cli.COMMANDS
        if name != "lm_eval"  # whose options are the harness's
    ]
    for name in ("sample", "chat", "serve", "eval", "plot", "average", "compare"):
        next(line for line in lines if line[0] == name).remove("b")
    code = f"import sys; from gpt2 import cli; print([cli.main(line) for line in {lines}]); "
    done = run_python("-c", f"{code}print({{'torch', 'numpy'}} & {{*sys.modules}})", real=True)
    assert done.stdout == f"{[2] * len(lines)}\nset()\n"
    assert done.stderr.count("unknown option --tpyo") == len(lines)


def test_sample_collects_no_garbage_while_it_imports(monkeypatch):
    collecting = []

    class Terminal(types.ModuleType):
        def __getattr__(self, name):
            if name != "sample":
                raise AttributeError(name)
            collecting.append(gc.isenabled())
            return lambda path, config: collecting.append(gc.isenabled()) or 0

    monkeypatch.setitem(sys.modules, "gpt2.commands.terminal", Terminal("terminal"))
    assert cli.main(["sample", "box", "--prompt=x"]) == 0
    assert collecting == [False, True]
