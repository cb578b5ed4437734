"""Runs every test of a fault and writes what held into docs/reliability.md: `make faults`.

A test says what it injects by `@pytest.mark.fault(number, "what")`; the numbers are those of CASES.
What it counted, such as "50 of 50", it leaves by `record_property("survived", "…")`. The page is
written from what pytest reports, so a case whose tests failed, or did not run, says that.
"""

import argparse
import datetime
import platform
import sys
import time
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
CASES = {
    1: ("kill -9 at random moments", "the newest checkpoint is whole and no older than the last "
        "that was announced; a run that is killed again and again ends with the undisturbed bits"),
    2: ("kill -9 at each operation of a save", "the same; what is left over is removed at the next "
        "start"),
    3: ("full disk", "one line with the space needed and left; training goes on, older checkpoints "
        "stay; an error only at the last save"),
    4: ("run folder that cannot be written", "an error before the first step"),
    5: ("flipped bits", "noticed in every file; the checkpoint before is used, and it is said; a "
        "checkpoint asked for by name is an error"),
    6: ("truncated, empty and missing files", "as 5, never a bare EOFError"),
    7: ("no checkpoint is whole", "an error with each reason; never silently from the beginning"),
    8: ("checkpoint of another network", "an error that names the differences; nothing is changed"),
    9: ("optimizer of another kind or shape", "an error that names the parameter"),
    10: ("names with _orig_mod., module.", "loaded alike; never written"),
    11: ("code in pickles", "refused, and nothing is executed"),
    12: ("hostile safetensors, NaN in weights", "one line, no crash"),
    13: ("paths that lead out of the folder", "refused"),
    14: ("damaged shard headers", "found in all shards at the start, with both counts"),
    15: ("token ids outside the vocabulary", "named with shard and offset before they reach a "
         "device"),
    16: ("shards changed since the checkpoint", "refused; added ones are left out"),
    17: ("shard cut short while it is read", "one line instead of a dead process"),
    18: ("SIGTERM, SIGINT, SIGUSR1 in any phase", "one checkpoint at the step, exit code "
        "128 + signal; the run goes on to the same bits"),
    19: ("signal to one rank of two", "both stop at the same step"),
    20: ("a rank exits or raises", "the other ends at once; a restart goes on to the same losses"),
    21: ("a rank hangs", "named with its step within the limit; exit code 75"),
    22: ("NaN and infinity", "the step changes no weight on any rank; after many in a row the run "
         "ends and names their text"),
    23: ("interruption at a checkpoint", "the same bits; each part of the checkpoint matters"),
    24: ("another number of ranks or batch", "the same tokens in the same steps, or an error that "
         "names totals that work"),
    25: ("preparing: kills, damaged files, odd rows", "the same bytes in the end; odd rows are "
         "counted; a text is never taken for a special token"),
    26: ("two runs in a folder, lost log, no HOME, C locale, jumping clock", "the second run is "
         "refused; the others go on"),
    27: ("symbolic links in the place of files and folders", "replaced, or refused in one line; "
         "the file or folder behind the link is unchanged"),
    28: ("model files that claim more than they hold", "refused in one line before anything is "
         "built; at most 200 MB above the size of the file, and 2 s"),
    29: ("text that is larger than it looks, or of one kind", "read, or left out and counted; at "
         "most 600 MB above the imports, and time in proportion to the text"),
    30: ("mutations of every kind of file", "read, or refused in one line without control "
         "characters; no traceback"),
    31: ("server: clients that are silent, slow or gone", "they are closed at a time limit, with a "
         "line in the log; others are answered meanwhile; no traceback"),
    32: ("server: many clients at once", "every text is the one that its request gets alone, up to "
         "rounding; the memory stays level"),
}  # fmt: skip


class Collector:
    """A plugin of pytest: what each test injected, and what came of it."""

    def __init__(self):
        self.marks: dict[str, list[tuple[int, str]]] = {}
        self.results: dict[str, tuple[str, float, list[str]]] = {}

    def pytest_collection_modifyitems(self, items):
        """Notes the cases of each test."""
        for item in items:
            marks = [m.args for m in item.iter_markers("fault")]
            self.marks[item.nodeid] = [(m[0], m[1] if len(m) > 1 else "") for m in marks]

    def pytest_runtest_logreport(self, report):
        """Notes how a test ended."""
        if report.when == "call" or not report.passed:
            said = [str(v) for k, v in report.user_properties if k == "survived"]
            self.results[report.nodeid] = (report.outcome, report.duration, said)


def rows(found: Collector) -> list[str]:
    """The lines of the table."""
    lines = []
    for number, (name, expected) in CASES.items():
        tests = [n for n, marks in found.marks.items() if any(c == number for c, _ in marks)]
        ended = {n: found.results.get(n, ("not run", 0.0, [])) for n in tests}
        injected = dict.fromkeys(
            what for n in tests for case, what in found.marks[n] if case == number and what
        )
        said = dict.fromkeys(text for n in tests for text in ended[n][2])
        passed = [n for n in tests if ended[n][0] == "passed"]
        bad = [n for n in tests if ended[n][0] not in ("passed", "skipped")]
        skipped = len(tests) - len(passed) - len(bad)
        often = f"{len(passed)} of {len(tests) - skipped}"
        if skipped:
            often += f" ({skipped} skipped)"
        result = "; ".join([*said, expected])
        if bad or not passed:
            result = f"**FAILED**: {', '.join(bad) or 'no test ran'}"
        cells = [str(number), f"{name}: {'; '.join(injected)}" if injected else name, often, result]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def write(found: Collector, seconds: float):
    """Writes the page."""
    everything = [r[0] for n, r in found.results.items() if found.marks.get(n)]
    machine = f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    PAGE.write_text(
        "\n".join(
            [
                "# What was broken on purpose, and what survived",
                "",
                "Written by `make faults` from the results of the tests; do not edit. "
                f"Last written {datetime.date.today()} on {machine}: "
                f"{everything.count('passed')} of {len(everything)} tests passed in "
                f"{seconds / 60:.0f} minutes. All run on a CPU with a tiny network; what is said "
                "of bits holds for a CPU.",
                "",
                "| | injected | tests passed | what held |",
                "|---|---|---|---|",
                *rows(found),
                "",
                (Path(__file__).parent / "faults_notes.md").read_text("utf-8").strip(),
                "",
            ]
        ),
        encoding="utf-8",
    )


def main() -> int:
    """Runs pytest; its exit code."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", default="", help="passed to pytest's -k; nothing is written")
    given = options.parse_args()
    found, started = Collector(), time.monotonic()
    arguments = ["-m", "fault", "-p", "no:cacheprovider", "--durations=15"]
    code = pytest.main([*arguments, *(["-k", given.only] if given.only else [])], [found])
    if not given.only:
        write(found, time.monotonic() - started)
        print(f"wrote {PAGE}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
