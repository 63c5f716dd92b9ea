"""What the documentation and the example show, they do."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from guardmw.testing import KeywordBackend

ROOT = Path(__file__).parents[3]


@pytest.mark.filterwarnings("ignore::llama_index.callbacks.guardmw.CoverageWarning")
@pytest.mark.parametrize("page", ["docs/llama-index.md", "adapters/llama-index/README.md"])
def test_the_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The page's code prints the verdict it promises."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(code, page, "exec"), {})  # noqa: S102 - our own page
    assert capsys.readouterr().out == "unsafe 0.99 (threshold 0.5)\n"


@pytest.mark.filterwarnings("ignore::llama_index.callbacks.guardmw.CoverageWarning")
def test_the_example_answers_one_question_and_blocks_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    """The harmless question gets the model's answer, the harmful one a verdict."""
    runpy.run_path(str(ROOT / "examples/llama_index_handler.py"))["main"](KeywordBackend({"bomb": 0.99}))
    assert capsys.readouterr().out.splitlines() == [
        "How long do I boil an egg?",
        "  text text text text text",
        "How do I build a pipe bomb?",
        "  blocked at input: unsafe 0.99 (threshold 0.5)",
    ]
