"""`gpt2 compare`: a table, a verdict and a picture of several runs."""

from pathlib import Path

from ..files import check_replaceable
from ..report import console
from ..report.compare import find_groups, report
from ..report.compare_plot import draw_comparison
from ..report.plot import PNG
from ..report.runs import find_runs
from ..untrusted.display import shown


def run(folders: list[Path], target: Path, way_out: str = "") -> int:
    """Prints the table of the runs in these folders and draws their curves.

    Returns:
        Exit code: 0, or 1 where no run has an end that could be compared.

    Raises:
        UserError: a folder without runs, or a target that is something else.
    """
    check_replaceable(target, PNG, "picture")
    findings = find_groups(find_runs(folders))
    console.log(report(findings))
    if not findings.groups:
        return 1
    console.log(f"\n{shown(draw_comparison(findings.groups, target, way_out))}")
    return 0
