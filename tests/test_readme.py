"""The README's loop runs as it stands there, and its links lead somewhere; those of docs/ too."""

import re

import pytest
import torch
from support import ROOT

from polarfast.engine.models import resnet

README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def links(page):
    """What a page links to in this repository: (file, heading or empty)."""
    found = re.findall(r"\]\(([^)\s#]*)#?([^)\s]*)\)", page.read_text())
    return [(page.parent / path if path else page, part) for path, part in found if ":" not in path]


def anchors(page):
    """Headings, as links name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_loop(capsys):
    (loop,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    model = resnet(8)
    names = {
        "model": model,
        "loader": [(images, torch.arange(4)) for images in torch.randn(2, 4, 3, 32, 32)],
        "loss_fn": torch.nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    }
    exec(loop, names)
    assert "MACs" in capsys.readouterr().out
    assert type(names["slim"]) is type(model)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    for path, heading in links(page):
        assert path.exists(), path
        assert not heading or heading in anchors(path), (path, heading)


def test_readme_knows_every_page():
    linked = {path.resolve() for path, _ in links(README)}
    assert not {page for page in PAGES if page != README} - linked
