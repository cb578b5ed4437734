"""lm-evaluation-harness with our model and with the same weights as `--model hf`: equal numbers."""

import json
import os
import sys

import pytest
from transformers import AutoTokenizer, GPT2Tokenizer

from gpt2 import cli
from gpt2.api import GPT2
from gpt2.tokenizer import merges_folder

from ..conftest import ROOT, run_python
from ..evaluate.test_scoring import in_transformers, small_model
from ..evaluate.test_tasks import hellaswag_items, lambada_items, write_jsonl

pytest.importorskip("lm_eval")

CHOICE = """
task: local_choice
output_type: multiple_choice
doc_to_text: "{{ctx}}{{'  ' if ind == 1 else ''}}"
doc_to_choice: "{{endings}}"
doc_to_target: "{{label | int}}"
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
  - {metric: brier_score}
"""
WORDS = """
task: local_words
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ') if ind else ''}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity}
  - {metric: acc}
"""
ROLLING = """
task: local_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
"""
WRITING = """
task: local_writing
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: ""
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 12}
metric_list:
  - {metric: exact_match}
"""
DATA = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""


def tokenizer_files(folder):
    merges = merges_folder()
    tokenizer = GPT2Tokenizer(str(merges / "encoder.json"), str(merges / "vocab.bpe"))
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).encode("Hello world") == [15496, 995]


@pytest.fixture(scope="module")
def places(tmp_path_factory, text):
    """A checkpoint, the same weights for transformers, and four tasks over files made here."""
    folder = tmp_path_factory.mktemp("harness")
    model = GPT2(small_model(window=48, spread=3.0).config)
    model.load_state_dict(small_model(window=48, spread=3.0).state_dict())
    model.save(folder / "out_ckpt.pt")
    theirs = in_transformers(model)
    theirs.config.bos_token_id = theirs.config.eos_token_id = 50256
    theirs.save_pretrained(folder / "hf")
    tokenizer_files(folder / "hf")
    (folder / "tasks").mkdir()
    texts = [{"ind": i, **item} for i, item in enumerate(lambada_items(24))]
    long = [{"text": text[i : i + 300 + i]} for i in range(0, 2000, 250)]  # of several windows
    files = {
        "choice": (CHOICE, hellaswag_items(40)),
        "words": (WORDS, texts),
        "rolling": (ROLLING, long),
        "writing": (WRITING, [{"text": t["text"]} for t in long + texts][:12]),
    }
    for name, (task, items) in files.items():
        file = write_jsonl(folder / f"{name}.jsonl", items)
        path = folder / "tasks" / f"{name}.yaml"
        path.write_text(task + DATA.format(file=file), encoding="utf-8")
    return folder


BOTH = """
import json, sys
from gpt2 import cli

folder = sys.argv[1]
assert cli.main([
    "lm_eval", f"{folder}/out_ckpt.pt", "--tasks=local_choice", f"--include_path={folder}/tasks",
    "--device=cpu", "--model_args=dtype=float64", "--output_path", f"{folder}/results",
]) == 0

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

manager = TaskManager(include_path=f"{folder}/tasks", include_defaults=False)
answers = {}
for model, arguments in (
    ("gpt2", f"checkpoint={folder}/out_ckpt.pt,dtype=float64"),
    ("hf", f"pretrained={folder}/hf,dtype=float64"),
):
    found = simple_evaluate(
        model, arguments, ["local_choice", "local_words", "local_rolling", "local_writing"],
        device="cpu", bootstrap_iters=0, task_manager=manager,
    )
    answers[model] = {
        "results": found["results"],
        "answers": {
            task: [sample["resps"] for sample in samples]
            for task, samples in found["samples"].items()
        },
    }
open(f"{folder}/answers.json", "w").write(json.dumps(answers, default=str))
"""


@pytest.mark.slow
@pytest.mark.timeout(400)  # most of it imports lm_eval and reads its list of tasks
def test_ours_equals_the_harness_own_model(places):
    """All results, and the answer to each question, to ten digits.

    In float64, so that what is computed is compared and not how it is rounded.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_OFFLINE": "1",
                   "HF_HUB_OFFLINE": "1", "HF_HOME": str(places / "home")}  # fmt: skip
    done = run_python("-c", BOTH, places, env=environment)
    found = json.loads((places / "answers.json").read_text())
    ours, theirs = found["gpt2"], found["hf"]
    assert ours["answers"].pop("local_writing") == theirs["answers"].pop("local_writing")
    for task, values in theirs["results"].items():
        for name, value in values.items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-10), (task, name)
    for task, answers in theirs["answers"].items():
        ours_flat, theirs_flat = flat(ours["answers"][task]), flat(answers)
        assert len(theirs_flat) >= 8
        assert ours_flat == pytest.approx(theirs_flat, rel=1e-10), task
    accuracy = theirs["results"]["local_choice"]["acc,none"]
    assert f"|{accuracy:6.4f}|" in done.stdout  # of the command
    (results,) = (places / "results").rglob("results_*.json")
    assert json.loads(results.read_text("utf-8"))["results"]["local_choice"]["acc,none"] == accuracy


def flat(answers) -> list[float]:
    """Numbers of nested lists; True and False, which the harness writes as text, as 1 and 0."""
    if isinstance(answers, list | tuple):
        return [number for part in answers for number in flat(part)]
    if answers in ("True", "False"):
        return [float(answers == "True")]
    return [float(answers)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a checkpoint first: gpt2 lm_eval out/out_ckpt.pt --tasks="),
        (["--tasks=hellaswag"], "name a checkpoint first"),
        (["x.pt", "--model=hf"], "--model: `gpt2 lm_eval` gives the model"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert cli.main(["lm_eval", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_lm_eval_it_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "gpt2.commands.lm_eval_harness", raising=False)
    monkeypatch.delitem(sys.modules, "lm_eval._cli", raising=False)
    assert cli.main(["lm_eval", "x.pt", "--tasks=hellaswag"]) == 2
    assert 'pip install -e ".[eval]"' in capsys.readouterr().err
