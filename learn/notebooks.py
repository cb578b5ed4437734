"""Writes the notebook of each chapter from its `.py`: `python -m learn.notebooks`.

The `.py` is the source, in jupytext's percent format. A notebook has no outputs.
"""

from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).parent
METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
}


def sources() -> list[Path]:
    """The chapters in their order."""
    return sorted(FOLDER.glob("chapter_*.py"))


def notebook(source: Path) -> nbformat.NotebookNode:
    """The notebook of a chapter. Ids of its cells are their numbers, so nothing in it is random."""
    made = jupytext.reads(source.read_text("utf-8"), fmt="py:percent")
    made.metadata = nbformat.from_dict(METADATA)
    made.nbformat, made.nbformat_minor = 4, 5
    for number, cell in enumerate(made.cells, 1):
        cell.id, cell.metadata = f"cell-{number}", {}
    nbformat.validate(made)
    return made


def text_of(source: Path) -> str:
    """The content of the `.ipynb`."""
    return nbformat.writes(notebook(source)) + "\n"


def main() -> None:
    """Writes all notebooks."""
    for source in sources():
        source.with_suffix(".ipynb").write_text(text_of(source), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
