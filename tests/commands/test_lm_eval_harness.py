"""lm-evaluation-harness with our model and with the same weights as `--model hf`: equal numbers."""

import functools
import json
import os
import sys
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoTokenizer, GPT2Tokenizer

from gpt2 import cli
from gpt2.api import GPT2
from gpt2.config.model import GPT2Config, ModernConfig
from gpt2.data.chat_template import encode_conversation, encode_prompt
from gpt2.errors import UserError
from gpt2.tokenizer import END_OF_TEXT, merges_folder

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
SHAPE = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 32}
CHECKPOINT = "lr=3e-4,bs=8/out_ckpt.pt"
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
    (folder / "lr=3e-4,bs=8").mkdir()  # the harness separates its arguments by commas
    model.save(folder / CHECKPOINT)
    wide = small_model(window=1024, spread=3.0)  # no text is longer
    served = GPT2(wide.config)
    served.load_state_dict(wide.state_dict())
    served.save(folder / "wide.pt")
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
import functools, json, sys
import lm_eval.evaluator
import torch
from gpt2 import cli
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

lm_eval.evaluator.add_env_info = lambda storage: None  # asks pip for all packages each time
# Reads 14,000 files of tasks otherwise, 13 s long.
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
folder, path, url = sys.argv[1:]
own = ["lm_eval", path, f"--include_path={folder}/tasks"]
own += ["--device=cpu"] * torch.cuda.is_available()  # without one it is chosen
precise = ["--model_args", "dtype=float64"]
assert cli.main([*own, "--tasks=local_choice", *precise, "--output_path", f"{folder}/results"]) == 0

manager = TaskManager(include_path=f"{folder}/tasks")
models = {
    "gpt2": ("gpt2", {"checkpoint": path, "dtype": "float64"}),
    "hf": ("hf", {"pretrained": f"{folder}/hf", "dtype": "float64"}),
    "here": ("gpt2", {"checkpoint": f"{folder}/wide.pt"}),
}
if url:
    models["served"] = "local-completions", {
        "base_url": f"{url}/v1/completions", "model": "wide", "tokenizer": f"{folder}/hf",
        "max_length": 1024, "num_concurrent": 4, "max_retries": 1,
    }
simple_evaluate(
    *models["here"], ["local_choice", "local_words"], limit=2, device="cpu", bootstrap_iters=0,
    task_manager=manager, apply_chat_template=True, system_instruction="Be kind.",
)
answers = {}
for name, (model, arguments) in models.items():
    found = simple_evaluate(
        model, arguments, ["local_choice", "local_words", "local_rolling", "local_writing"],
        device="cpu", bootstrap_iters=0, task_manager=manager,
    )
    answers[name] = {
        "results": found["results"],
        "answers": {
            task: [sample["resps"] for sample in samples]
            for task, samples in found["samples"].items()
        },
    }
open(f"{folder}/answers.json", "w").write(json.dumps(answers, default=str))
"""


@pytest.fixture(scope="module")
def url(places):
    """Of a server of the wide model; empty without the packages that the harness asks it with."""
    if not all(find_spec(name) for name in ("tenacity", "aiohttp", "fastapi", "httpx", "openai")):
        yield ""
        return
    from ..serve.running import Server

    server = Server(places / "wide.pt", "--slots=4", fork=True)
    yield server.url
    server.stop()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ours_equals_the_harness_own_model_and_the_served_one(places, url):
    """All results, and the answer to each question, to ten digits; of the server to four.

    In float64, so that what is computed is compared and not how it is rounded. The server, asked as
    `local-completions`, computes in float32.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_OFFLINE": "1",
                   "HF_HUB_OFFLINE": "1", "HF_HOME": str(places / "home")}  # fmt: skip
    done = run_python("-c", BOTH, places, places / CHECKPOINT, url, env=environment)
    found = json.loads((places / "answers.json").read_text())
    if url:
        compare_served(found["here"], found["served"])
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
    shown = [f"|{accuracy:.4f}|", f"|{accuracy:.3f}|"]  # by the release of pytablewriter
    assert any(number in done.stdout for number in shown)  # of the command
    (results,) = (places / "results").rglob("results_*.json")
    assert json.loads(results.read_text("utf-8"))["results"]["local_choice"]["acc,none"] == accuracy


def compare_served(here: dict, served: dict):
    assert served["answers"].pop("local_writing") == here["answers"].pop("local_writing")
    for task, answers in here["answers"].items():
        assert flat(served["answers"][task]) == pytest.approx(flat(answers), abs=2e-3), task
    for task, values in here["results"].items():
        for name, value in values.items():
            if isinstance(value, float):
                assert served["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)


def test_a_conversation_has_the_ids_of_the_chat_template(places):
    """Also where a text ends or begins with white space, and where the assistant has begun."""
    from gpt2.commands.lm_eval_harness import Harness

    harness = Harness(str(places / CHECKPOINT), device="cpu")
    talk = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " What?\n"},
        {"role": "assistant", "content": "\nThis: "},
        {"role": "user", "content": "A literal <|endoftext|> is text."},
    ]
    plain = harness.tok_encode("<|endoftext|>user\nHi")
    assert END_OF_TEXT not in plain
    assert harness.chat_template(True).startswith("<|endoftext|>")
    with pytest.raises(UserError, match="there is one template only"):
        harness.chat_template("llama")
    text = harness.apply_chat_template(talk)
    prompt = encode_prompt(talk)
    assert harness.tok_encode(text) == prompt
    assert harness._encode_pair(text, "B c") == (prompt, harness.tok_encode("B c"))
    begun = harness.apply_chat_template(talk[:3], add_generation_prompt=False)
    whole = encode_conversation(talk[:3])[0][:-1]
    assert harness.tok_encode(begun) == whole
    context, rest = harness._encode_pair(begun, "42")
    assert context + rest == harness.tok_encode(begun.rstrip() + " 42")
    with pytest.raises(UserError, match="begins a message"):
        harness.apply_chat_template([{"role": "user", "content": "a<|endoftext|>system\nb"}])


def test_a_model_that_cannot_chat_says_so(tmp_path):
    from gpt2.api import SwitchedGPT2
    from gpt2.commands.lm_eval_harness import Harness

    SwitchedGPT2(ModernConfig(**SHAPE, document_mask=True)).save(tmp_path / "m.pt")
    with pytest.raises(UserError, match="document_mask"):
        Harness(str(tmp_path / "m.pt"), device="cpu").chat_template(True)


def test_ids_without_text_end_no_generation(tmp_path):
    """A model with added tokens writes them as it likes; GPT-2 has no text for them."""
    from gpt2.commands.lm_eval_harness import Harness

    model = GPT2(GPT2Config(**SHAPE, vocab_size=50260))
    with torch.no_grad():  # the likeliest token is always the last
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight.zero_()
        model.transformer.wte.weight[50259] = 1.0
    model.save(tmp_path / "added.pt")
    harness = Harness(str(tmp_path / "added.pt"), device="cpu")
    assert harness._generate("Once", {"until": ["x"], "max_gen_toks": 4}) == ""


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--tasks=foo,local_choise"],
            "--tasks: no such task: foo, local_choise; `lm_eval ls tasks` lists them "
            "(did you mean local_choice?)",
        ),
        (["--tasks=foo"], "--tasks: no such task: foo; `lm_eval ls tasks` lists them"),
        (["--tasks=foo", "--config=/nope.yaml"], "lm_eval: Config file not found: "),
    ],
)
def test_what_the_harness_refuses_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    # Reads 14,000 files of tasks otherwise.
    without = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", without)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # as the harness does, but for this test
    data = DATA.format(file=tmp_path / "none.jsonl")
    (tmp_path / "local_choice.yaml").write_text(CHOICE + data, encoding="utf-8")
    assert cli.main(["lm_eval", "x.pt", f"--include_path={tmp_path}", *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"gpt2: error: {message}")


def test_an_error_that_is_not_about_options_keeps_its_traceback(monkeypatch):
    def fail(self, args):
        raise ValueError("a fault of the program")

    monkeypatch.setattr("lm_eval._cli.HarnessCLI.execute", fail)
    with pytest.raises(ValueError, match="a fault of the program"):
        cli.main(["lm_eval", "x.pt", "--tasks=foo"])


def test_without_lm_eval_it_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "gpt2.commands.lm_eval_harness", raising=False)
    monkeypatch.delitem(sys.modules, "lm_eval._cli", raising=False)
    assert cli.main(["lm_eval", "x.pt", "--tasks=hellaswag"]) == 2
    assert 'pip install -e ".[eval]"' in capsys.readouterr().err
