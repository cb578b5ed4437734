"""Says which lower bounds of pyproject.toml are not what `make lowest` installs.

    python -m tests.lower_bounds PINS

PINS is what `uv pip compile --resolution=lowest-direct` wrote. A bound below the pin is one that
another package forbids: nobody could test it beside that package.
"""

import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def bounds(project: dict) -> dict[str, Version]:
    """The highest lower bound of every package that pyproject.toml names."""
    lines = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        lines += extra
    found: dict[str, Version] = {}
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        for part in requirement.specifier:
            if part.operator == ">=":
                found[name] = max(Version(part.version), found.get(name, Version("0")))
    return found


def not_reached(pins: str, project: dict) -> list[str]:
    """One line for each bound that differs from its pin, ignoring a local part as "+cpu"."""
    lines = re.findall(r"^([\w.-]+)==([\w.!]+)", pins, re.MULTILINE)
    pinned = {canonicalize_name(name): Version(version) for name, version in lines}
    return [
        f"{name}>={bound} is in pyproject.toml, {pinned.get(name, 'nothing')} was installed"
        for name, bound in sorted(bounds(project).items())
        if pinned.get(name) != bound
    ]


if __name__ == "__main__":
    wrong = not_reached(
        Path(sys.argv[1]).read_text("utf-8"),
        tomllib.loads(PYPROJECT.read_text("utf-8"))["project"],
    )
    print("\n".join(wrong) or "every lower bound is installed")
    sys.exit(bool(wrong))
