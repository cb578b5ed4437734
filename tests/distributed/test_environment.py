"""The variables by which torchrun numbers its processes, also where they are left over."""

import pytest

from gpt2.cli import main
from gpt2.distributed.environment import Ranks, check_meeting_place, is_first_rank, ranks
from gpt2.errors import UserError

THERE = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.fixture
def given(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", *THERE):
        monkeypatch.delenv(name, raising=False)

    def given(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return given


def test_alone_and_under_torchrun(given):
    assert ranks() == Ranks(0, 0, 1, 1)
    given(RANK="3", LOCAL_RANK="1", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2", **THERE)
    assert ranks() == Ranks(3, 1, 4, 2)
    assert not is_first_rank()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "abc", "RANK": "0"}, "WORLD_SIZE=abc in the environment is not"),
        ({"RANK": "-1"}, "RANK=-1 in the environment"),
        ({"RANK": "1"}, "RANK=1, WORLD_SIZE=1 in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 without MASTER_ADDR and MASTER_PORT in"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "WORLD_SIZE=2 without MASTER_PORT"),
    ],
)
def test_what_another_program_left_behind_is_one_line(variables, said, given, data_dir, capsys):
    given(**variables)
    assert is_first_rank()
    wrong = ranks if "without" not in said else check_meeting_place
    with pytest.raises(UserError, match="or unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE"):
        wrong()
    assert main(["train", f"--data_dir={data_dir}", "--size=gpt2-tiny"]) == 2
    assert f"gpt2: error: {said}" in capsys.readouterr().err
