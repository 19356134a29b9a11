"""What every notebook keeps to, without running it (`make notebooks` does that)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stripped_and_say_what_they_are_for(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    opening = "".join(cells[0]["source"])
    assert cells[0]["cell_type"] == "markdown" and opening.startswith("# ")
    assert "What you will learn" in opening and ("your" in opening and "file" in opening)
    # The last word is a picture.
    assert cells[-1]["cell_type"] == "code" and any(
        name in "".join(cells[-1]["source"]) for name in ("imshow", "show(")
    )
    for cell in code:
        compile("".join(cell["source"]), str(path), "exec")


def test_there_are_notebooks():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{n:02d}" for n in range(1, len(NOTEBOOKS) + 1)]
    assert len(NOTEBOOKS) >= 5
