"""Every example that the documentation shows runs, each page in an interpreter of its own and without a network."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from guardmw import _yaml
from guardmw.train.miniguard import recipe as miniguard
from guardmw.train.tinysafe import card
from guardmw.train.tinysafe import recipe as tinysafe

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("adapters/*/README.md")])
EXAMPLES = sorted(ROOT.glob("examples/**/*.py"))
RUN = """
import runpy, sys
from pytest_socket import socket_allow_hosts
socket_allow_hosts(["127.0.0.1", "::1"], allow_unix_socket=True)
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def code_of(page: str) -> str:
    """The Python blocks of a page, every line at its place, so that a traceback names the line of the page."""
    lines, shown = [], False
    for line in page.splitlines():
        fence = line.strip().startswith("```")
        shown = line.strip() == "```python" if fence else shown
        lines.append(line if shown and not fence else "")
    return "\n".join(lines) + "\n"


CODE = {page: code_of(page.read_text(encoding="utf-8")) for page in PAGES}


def run(path: Path, folder: Path) -> None:
    """Run a script as a reader would, in an empty folder."""
    answer = subprocess.run(
        [sys.executable, "-c", RUN, str(path)], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_the_readme_shows_code() -> None:
    """A first example above all."""
    assert CODE[ROOT / "README.md"].strip()


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=str(page.relative_to(ROOT))) for page, code in CODE.items() if code.strip()],
)
def test_a_page_runs(page: Path, tmp_path: Path) -> None:
    """Its blocks are one program, from top to bottom."""
    # langchain.py would hide langchain.
    script = tmp_path / f"page_{page.stem.replace('-', '_')}.py"
    script.write_text(CODE[page], encoding="utf-8")
    run(script, tmp_path)


def test_the_commands_of_the_evaluation_page_run(tmp_path: Path) -> None:
    """In their order, on the rows and the model that its first example makes."""
    page = ROOT / "docs" / "evaluation.md"
    run_code = tmp_path / "evaluation.py"
    run_code.write_text(CODE[page], encoding="utf-8")
    run(run_code, tmp_path)
    commands = re.findall(r"^\$ guardmw (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert {command.split()[0] for command in commands} == {"eval", "calibrate"}
    for command in commands:
        given = [sys.executable, "-m", "guardmw", *shlex.split(command)]
        done = subprocess.run(given, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, ""), command


@pytest.mark.parametrize("example", [pytest.param(path, id=path.name) for path in EXAMPLES])
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    """From any folder."""
    run(example, tmp_path)


@pytest.mark.parametrize(
    ("name", "recipe", "least"),
    [("training", tinysafe, {"train": {"encoder": "mine"}}), ("miniguard", miniguard, {"tune": {"model": "mine"}})],
)
def test_every_setting_of_a_training_page_is_valid(name: str, recipe: Any, least: dict[str, Any]) -> None:
    """Each block is a recipe, or a part that one can have."""
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        recipe.Recipe.model_validate({"name": "mine", "ingest": {"sources": ["rows.csv"]}} | least | _yaml.load(block))


def test_code_is_found_between_its_fences() -> None:
    """And only there."""
    page = "text\n```bash\nmake demo\n```\n```python\nprint(1)\n```\ntext\n  ```python\nprint(2)\n  ```\n"
    assert [line for line in code_of(page).splitlines() if line] == ["print(1)", "print(2)"]
    assert code_of(page).splitlines().index("print(1)") == 5


def test_the_page_of_the_embedded_model_tells_what_its_card_does() -> None:
    """Written anew from the card, it is the same."""
    folder = ROOT / "guardmw" / "models"
    told = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    assert card.page(told) == (folder / card.PAGE).read_text(encoding="utf-8")
