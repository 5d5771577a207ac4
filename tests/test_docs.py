"""Documentation runs as it stands there: the ```python blocks of a page of docs/, one after the
other, are a script.

A page is picked up by having such blocks. Code that is to be read only goes into a block of another
name (```text, ```sh).
"""

import ast
import importlib.util
import subprocess
import sys

import pytest
from support import ROOT

DOCS = ROOT / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if "```python\n" in page.read_text()]
#: What a page may import beyond torch; where one is missing, the page is skipped.
OPTIONAL = {"onnx", "onnxruntime", "onnxscript", "sklearn", "timm", "torch_pruning", "torchvision"}


def script(page: str) -> str:
    """A page's code on the lines where it stands, so that errors name lines of the page."""
    lines, inside = [], False
    for line in page.splitlines():
        fence = line.startswith("```")
        inside = line == "```python" if fence else inside
        lines.append(line if inside and not fence else "")
    return "\n".join(lines)


def imported(code: str) -> set[str]:
    """The packages that a script imports, by their first name."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).partition(".")[0])
    return names


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page, tmp_path):
    code = script(page.read_text())
    missing = [name for name in OPTIONAL & imported(code) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    (tmp_path / f"{page.stem}.py").write_text(code)
    run = subprocess.run(
        [sys.executable, f"{page.stem}.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]


def test_a_script_keeps_its_lines():
    page = (
        "# Title\n\n```python\nx = 1\n```\nWords.\n```sh\nx = 2\n```\n```python\nassert x == 1\n```"
    )
    assert script(page).splitlines()[3] == "x = 1"
    assert script(page).splitlines()[10] == "assert x == 1"
    assert "x = 2" not in script(page) and "Words" not in script(page)
    assert imported("import a.b, c\nfrom d.e import f") == {"a", "c", "d"}
