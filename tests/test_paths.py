"""Names from outside stay below their folder, and all of them go through one function."""

import ast
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from gpt2.errors import UserError
from gpt2.paths import below, check_unlinked, for_shell, is_below, no_follow

from .conftest import ROOT

PACKAGE = ROOT / "gpt2"
FINE = (
    "a",
    "a/b.bin",
    ".hidden",
    "..a",
    "a..b/c..",
    "Körper/漢字.txt",
    "a b/-c",
    "ab:c",
    "~",
    "%2e",
)
BAD = (
    *(
        "",
        ".",
        "..",
        "../x",
        "a/..",
        "a/../b",
        "a/./b",
        "a//b",
        "a/",
        "/",
        "/etc/passwd",
        "//host/x",
    ),
    *("C:x", "C:/x", "c:\\x", "..\\x", "a\\b", "\\\\host\\x", "\\x"),
    *(".. /x", "... /x", ". ./x", "a\0b", "a\nb", "a\x1b[2J", "a\x7f", "a\x85"),
    *(None, 3, 1.5, b"a", ["a"], {}),
)
# Joins with a variable name that do not go through `below`, and where the name comes from instead.
OUR_NAMES = {
    "checkpoint/training_state.py: folder / n": "files of a folder that was just made",
    "checkpoint/training_state.py: out_dir / 'state' / f'step_{step:08d}'": "a number",
    "checkpoint/training_state.py: path / n": "constants, or names that PART_FILE matches",
    "checkpoint/training_state.py: path / name": "constants, or names that PART_FILE matches",
    "commands/export.py: Path(made) / repository.partition('/')[2]": "matched by HUB_ID",
    "commands/export.py: temporary / name": "constants",
    "commands/inspect_shards.py: folder / name": "only shown; `read_manifest` has checked it",
    "data/random_tokens.py: folder / name": "constants",
    "config/sweep.py: Path(config.out_dir, name)": "letters, digits and .=,+-_, and `seed=`",
    "config/run_paths.py: folder / name": "`_plain` has refused absolute paths and ..; read only",
    "config/run_paths.py: start / name": "a folder to read, which --config= could name as well",
    "config/run_paths.py: start / settings['out_dir']": "the folder of the config.toml itself",
    "data/datasets.py: dataset.folder / shown(name)": "only shown",
    "data/no_shards.py: folder / n": "listed from this folder",
    "distributed/part_files.py: folder / f'shard-{rank + 1:05}-model-00001-of-00001.safetensors'": (
        "a number"
    ),
    "evaluate/tasks.py: DOWNLOADS / task.repository": "constants",
    "huggingface/own_tokenizer.py: folder / name": "constants",
    "interpret/html_page.py: FOLDER / name": "constants",
    "paths.py: folder / name": "`below` itself",
    "prepare/multi_machine.py: out_dir / f'worker-{self.number:0{width}d}-of-{self.count}'": (
        "numbers"
    ),
    "serve/page.py: ASSETS / name": "constants",
    "train/run_folder.py: folder / name": "constants",
    "train/run_folder.py: folder / path.name": "constants",
    "train/run_folder.py: folder / path.relative_to(out_dir)": "found in that folder",
    "train/run_folder.py: out_dir / f'archive_{number}'": "a number",
    "train/run_folder.py: out_dir / name": "constants",
    "train/save.py: out_dir(config) / name": "constants",
}


@pytest.mark.parametrize("name", FINE)
def test_names_below_a_folder(name, tmp_path):
    assert below(tmp_path, name) == tmp_path / name
    assert (tmp_path / name).resolve().is_relative_to(tmp_path.resolve())


@pytest.mark.fault(13, "names with ../, drive letters, backslashes, control characters, of no text")
@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_names_that_lead_out(name, tmp_path):
    assert not is_below(name)
    with pytest.raises(UserError, match="outside its folder") as caught:
        below(tmp_path, name)
    assert str(caught.value).isprintable()


# ---- the sources ---------------------------------------------------------------------------------

# What a name looks like in the sources. Numbers that something is divided by look otherwise.
NAME = re.compile(r"\b(\w*name\w*|n|file|entry|key|repository|relative_to)\b|\bf['\"]|\[['\"]")


def joins_with_names(package: Path) -> set[str]:
    """Paths that are made of a variable name without `below`, as "module: expression"."""
    found = set()
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            joined = ""
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                joined = ast.unparse(node.right)
            elif isinstance(node, ast.Call):
                function, arguments = ast.unparse(node.func), map(ast.unparse, node.args)
                if function.endswith(("path.join", ".joinpath")):
                    joined = " ".join(arguments)
                elif function.endswith("Path"):
                    joined = " ".join([*arguments][1:])
            if NAME.search(joined):
                found.add(f"{path.relative_to(package).as_posix()}: {ast.unparse(node)}")
    return found


@pytest.mark.fault(13, "search of all sources for paths that are made of an unchecked name")
def test_every_name_from_outside_goes_through_one_function():
    assert joins_with_names(PACKAGE) == set(OUR_NAMES)


@pytest.mark.parametrize("line", [
    "folder / manifest['prefix']",
    "out_dir / entry['name']",
    "folder / file.name",
    "folder / name",
    "out_dir / f'{prefix}_train.bin'",
    "os.path.join(folder, name)",
    "folder.joinpath(name)",
    "Path(folder, name)",
])  # fmt: skip
def test_a_join_without_a_check_is_seen(line, tmp_path):
    (tmp_path / "a.py").write_text(f"x = 3 / 4\ny = folder / 'manifest.json'\nz = {line}\n")
    assert joins_with_names(tmp_path) == {f"a.py: {line}"}


# ---- links ---------------------------------------------------------------------------------------


@pytest.fixture
def links(tmp_path) -> Path:
    """A folder behind a link, with links in it to a file and a folder outside, and to nothing."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_text("old")
    (inside / "sub").mkdir(parents=True)
    for name in ("file", "folder", "nothing"):
        (inside / "sub" / name).symlink_to(outside / name)
    (tmp_path / "named").symlink_to(inside)
    return tmp_path / "named"


def test_links_below_a_folder_are_seen_and_the_folder_itself_may_be_one(links):
    check_unlinked(links, links, links / "sub", links / "sub/new", links / "new/new")
    for name in ("file", "folder", "nothing", "folder/new", "folder/new/new"):
        with pytest.raises(UserError, match=r"sub.\w+ is a symbolic link.*; move it away"):
            check_unlinked(links, links / "new", links / "sub" / name)


@pytest.mark.parametrize("mode", ["ab", "wb", "r+b"])
def test_opening_does_not_follow_a_link(links, mode, monkeypatch):
    for look in (os.path.islink, lambda path: False):  # the system refuses by itself as well
        monkeypatch.setattr(os.path, "islink", look)
        for name in ("file", "nothing"):
            with pytest.raises(OSError, match=r"symbolic link"):
                open(links / "sub" / name, mode, opener=no_follow).close()
    assert (links / "sub/file").read_text() == "old"
    assert not (links / "sub/nothing").exists()
    with open(links / "sub/new", "wb", opener=no_follow) as file:
        file.write(b"x")
    assert (links / "sub/new").stat().st_mode & 0o777 == (links / "sub/file").stat().st_mode & 0o777


@pytest.mark.skipif(os.name == "nt", reason="quotes of a POSIX shell")
def test_a_printed_command_can_be_pasted():
    for plain in ("out/a.pt", Path("/tmp/x_1-2"), "data:0.8,code:0.2", "--seed=1"):
        assert for_shell(plain) == str(plain)
    for odd in ("a b", "it's", "$HOME/x", "~/x", "a;rm -r b", "--prompt=def main("):
        assert shlex.split(f"gpt2 plot {for_shell(odd)}") == ["gpt2", "plot", odd]
        said = subprocess.run(
            ["sh", "-c", f"printf %s {for_shell(odd)}"], capture_output=True, text=True, check=True
        )
        assert said.stdout == odd
