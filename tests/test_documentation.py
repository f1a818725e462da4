"""Every Python block of the README and of the pages in `docs/` runs, and prints what it says it prints."""

import functools
import re
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]

FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAYS = re.compile(r"print\(.*\)\s+# -> (.*)$", re.MULTILINE)  # `print(x)  # -> 3` says that it prints 3


def blocks(text: str) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the number of lines above it."""
    return [(text[: match.start(1)].count("\n"), match.group(1)) for match in FENCE.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_run_in_order_and_print_what_they_say(page, tmp_path, monkeypatch, capsys, request):
    """One namespace a page, as a reader has who types them in one after another."""
    monkeypatch.chdir(tmp_path)  # a block may write files
    monkeypatch.setenv("MPLBACKEND", "Agg")
    request.addfinalizer(functools.partial(torch.set_default_dtype, torch.get_default_dtype()))  # a block may set another
    text = page.read_text(encoding="utf-8")
    assert len(blocks(text)) == text.count("```python"), "a block is indented or not closed"
    page_as_script = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", page_as_script)  # where a compiler looks up what a block has imported
    namespace = vars(page_as_script)
    for lines_above, block in blocks(text):
        exec(compile("\n" * lines_above + block, page, "exec"), namespace)
        printed = capsys.readouterr().out.splitlines()
        said = SAYS.findall(block)
        assert [line for line in printed if line in said] == said, f"the block at line {lines_above} printed {printed}"


def test_a_block_knows_its_place():
    assert blocks("title\n\n```python\nx = 1\n```\ntext\n```python\ny = x\n```\n") == [(3, "x = 1\n"), (7, "y = x\n")]
