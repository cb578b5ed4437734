"""`gpt2 inspect` on the command line."""

import errno
import io
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from gpt2 import cli
from gpt2.api import GPT2
from gpt2.commands import inspect_text
from gpt2.commands.inspect_text import encode, evaluation, format_table
from gpt2.config.model import ModernConfig
from gpt2.interpret import html_page
from gpt2.interpret.logit_lens import look
from gpt2.tokenizer import END_OF_TEXT, gpt2_tokenizer

from ..test_cli import complain

TEXT = "def main(argv): return main"


def small(**switches) -> GPT2:
    """A model of 48 positions whose heads look at something."""
    from gpt2.api import SwitchedGPT2

    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 48}
    model = SwitchedGPT2(ModernConfig(**shape, **switches)) if switches else GPT2(**shape)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.pt"
    small().save(path)
    return path


def inspect(*argv) -> int:
    return cli.main(["inspect", *map(str, argv), "--device=cpu"])


def test_table_has_the_numbers(checkpoint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inspect(checkpoint, TEXT, "--out=") == 0
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    seen = look(small(), gpt2_tokenizer().encode(TEXT))
    lines = out.splitlines()
    assert lines[:-1] == format_table(seen).splitlines()[:-1]
    assert f"loss {seen.nats.sum().item():.2f} nats in all" in lines[-1]
    assert len(lines) == len(seen.ids) + 3  # a head, what may follow, the sum
    assert "nothing before it" in lines[1]
    p, bits, rank = re.search(r"([\d.]+)% +([\d.]+) +([\d,]+)", lines[2]).groups()
    nats = seen.nats[0].item()
    assert math.isclose(float(p), 100 * math.exp(-nats), abs_tol=0.006)
    assert math.isclose(float(bits), nats / math.log(2), abs_tol=0.006)
    assert int(rank.replace(",", "")) == seen.ranks[0]
    assert all(len(line) <= 100 for line in lines[:-1])


def test_sums_leave_out_the_first_token():
    seen = look(small(), gpt2_tokenizer().encode("Hello world, hello"))
    e = evaluation(seen)
    assert (e.tokens, e.text_bytes) == (3, len(" world, hello"))
    assert math.isclose(e.nats, seen.nats.sum().item(), rel_tol=1e-6)


def test_page_is_written_and_written_again(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert inspect(checkpoint, TEXT) == 0
    first = (tmp_path / "inspect.html").read_text("utf-8")
    assert html_page.MARK in first
    assert "open it in a browser" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(TEXT.encode())))
    assert inspect(checkpoint, "-") == 0
    assert (tmp_path / "inspect.html").read_text("utf-8") == first
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    assert inspect(checkpoint, "--file=t.txt", "--top=3") == 0
    assert (tmp_path / "inspect.html").read_text("utf-8") != first  # fewer alternatives


def test_a_byte_order_mark_is_no_text(checkpoint, tmp_path, monkeypatch, capsys):
    """Windows' editors begin a file with it; a pipe may pass it on."""
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "bom.txt").write_text(TEXT, encoding="utf-8-sig")
    tables = []
    for name in ("t.txt", "bom.txt"):
        assert inspect(checkpoint, f"--file={tmp_path / name}", "--out=") == 0
        tables.append(capsys.readouterr().out)
    data = io.BytesIO((tmp_path / "bom.txt").read_bytes())
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=data))
    assert inspect(checkpoint, "-", "--out=") == 0
    assert tables[0] == tables[1] == capsys.readouterr().out


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("text", ["one\ntwo", "one\r\n two ", "one\n"])
def test_the_last_line_break_of_a_file_is_no_text(tmp_path, monkeypatch, text, end):
    """Nor that of `echo`; an earlier one is, and so is each of an argument."""
    whole = text + end
    wanted = text if end else text.removesuffix("\n")
    (tmp_path / "t.txt").write_bytes(whole.encode())
    assert inspect_text._read("", f"{tmp_path / 't.txt'}") == wanted
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(whole.encode())))
    assert inspect_text._read("-", "") == wanted
    assert inspect_text._read(whole, "") == whole


def test_endoftext_is_text_unless_it_is_special(tmp_path, capsys):
    assert END_OF_TEXT not in encode("a<|endoftext|>b", special=False)
    assert encode("<|endoftext|>a<|endoftext|>b", True) == [50256, 64, 50256, 65]
    small(document_mask=True).save(tmp_path / "m.pt")
    out = tmp_path / "p.html"
    assert inspect(tmp_path / "m.pt", "a<|endoftext|>b c", "--special", f"--out={out}") == 0
    assert "'<|endoftext|>'" in capsys.readouterr().out
    data = out.read_text("utf-8")
    assert '"first":[[0,1,1,1],[0,1,1,1]]' in data
    assert '"switches":{"document_mask":"True"}' in data


def test_maps_that_would_be_too_large_are_left_out(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(html_page, "MOST_MAP_BYTES", 50)
    assert inspect(checkpoint, TEXT, f"--out={tmp_path / 'p.html'}") == 0
    said = capsys.readouterr().err
    assert "are left out; up to 5 tokens have them" in said
    assert '"attention":[]' in (tmp_path / "p.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([""], "there is no text"),
        ([], "there is no text"),
        (["a", "--file=t.txt"], "a text or --file=, not both"),
        (["--file=nowhere.txt"], "--file=nowhere.txt: No such file"),
        (["--file=bad.txt"], "bad.txt is not UTF-8 (byte 1)"),
        (["word " * 60], "tokens, and the model sees 48 at once; leave out"),
        (["a", "--out=bad.txt"], "is there and no page of `gpt2 inspect`"),
        (["a", "--out=/proc/x.html"], "x.html: "),  # not even root can write there
        (["a", "--top=0"], "top=0: use 1 or more"),
        (["a", "b"], "unrecognized arguments: b"),
        (["a b", "--patch=a b c"], "has 2 tokens and the second text 3"),
        (["a b", "--patch=a b"], "both texts are equal"),
        (["a b", "--patch=a c", "--patch_token=1: c"], "--patch= or --patch_token=, not both"),
        (["a b", "--patch_token=2: c"], "the places of this text are 0 to 1"),
        (["a b", "--patch_token=c"], "use PLACE:TOKEN, as in --patch_token='4: Rome'"),
        (["a b", "--patch_token=1: unwritten things"], "tokens; use one, with its space before"),
    ],
)
def test_mistakes(checkpoint, capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"a\xffb")
    assert message in complain(capsys, "inspect", str(checkpoint), *argv)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.txt"]


def test_a_page_that_cannot_be_written_is_one_line(checkpoint, capsys, tmp_path, monkeypatch):
    def refuse(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(inspect_text, "write_atomically", refuse)
    argv = ["inspect", str(checkpoint), "a b", f"--out={tmp_path / 'p.html'}", "--device=cpu"]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert "tokens predicted" in out
    assert err.endswith("p.html: No space left on device\n")
    assert err.count("\n") == 1


def test_patching_by_text_and_by_token(checkpoint, capsys, tmp_path):
    """Both ways name the same second text: the lines and the page are equal."""
    written = []
    for patch in ("--patch=The capital of Italy is", "--patch_token=3: Italy"):
        out = tmp_path / f"{len(written)}.html"
        assert inspect(checkpoint, "The capital of France is", patch, f"--out={out}") == 0
        said = capsys.readouterr().out.replace(str(out), "")
        written.append((said, out.read_text("utf-8")))
    assert written[0] == written[1]
    said, page = written[0]
    lines = said[said.index("patching: ") :].splitlines()
    assert re.match(r"patching: '.*' [\d.]+%, '.*' [\d.]+% after the text; ", lines[0])
    assert lines[1].strip().startswith("embedding  100% moves with token 3, ' Italy'")
    assert len(lines) == 1 + 3 + 1  # the embedding, two layers, the page
    assert '"patch":{"ids":[464,3139,286,8031,318]' in page


def test_a_page_about_box_has_no_path_of_this_machine(tmp_path):
    out = tmp_path / "box.html"
    assert inspect("box", "a b", "--top=1", f"--out={out}") == 0
    assert '"model":"box (Hugging Face)"' in out.read_text("utf-8")


def test_one_token(checkpoint, capsys):
    assert inspect(checkpoint, "a", "--out=") == 0
    assert "nothing was predicted" in capsys.readouterr().out


def test_a_console_without_these_letters(checkpoint, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    assert inspect(checkpoint, "naïve 🙂", "--out=") == 0
