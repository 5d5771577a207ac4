"""The README's loop runs as it stands there, and its links lead somewhere; those of docs/ too."""

import re

import pytest
import torch
import torch.nn.functional as F
from support import ROOT
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

README = ROOT / "README.md"
STEPS = 280  # 10 epochs of 1,400 images, 50 at a time
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


class Residual(nn.Module):
    """A residual network of a reader's own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
                *(nn.Conv2d(64, 32, 3, padding=1), nn.BatchNorm2d(32)),
            )
            for _ in range(3)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def digits():
    """(images, labels) of scikit-learn's digits to train on, and to test on."""
    bundled = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.from_numpy(bundled.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(bundled.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return (images[order[:1400]], labels[order[:1400]]), (
        images[order[1400:]],
        labels[order[1400:]],
    )


def adamw(model):
    """As README says: lr × steps above 2, and a rate that falls to the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


@pytest.mark.slow
@pytest.mark.parametrize("make_optimizer", ["SGD", "AdamW"])
def test_loop(make_optimizer, digits, capsys, recwarn):
    """`STEPS` steps: half of the MACs go, and the network still reads digits."""
    (loop,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    (images, labels), (test_images, test_labels) = digits
    torch.manual_seed(0)
    model = Residual()
    names = {
        "model": model,
        "epochs": 10,
        "loader": DataLoader(TensorDataset(images, labels), batch_size=50, shuffle=True),
        "loss_fn": nn.CrossEntropyLoss(),
        "optimizer": {
            "SGD": lambda: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
            "AdamW": lambda: adamw(model),
        }[make_optimizer](),
    }
    exec(loop, names)
    assert "MACs" in capsys.readouterr().out
    slim = names["slim"].eval()
    assert type(slim) is Residual
    assert abs(names["plan"].flops_reduction - 0.5) <= 0.01
    assert (slim(test_images).argmax(1) == test_labels).float().mean() > 0.9
    assert not [w for w in recwarn if "polarfast" in str(w.filename) or "pf." in str(w.message)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    for path, heading in links(page):
        assert path.exists(), path
        assert not heading or heading in anchors(path), (path, heading)


def test_readme_knows_every_page():
    linked = {path.resolve() for path, _ in links(README)}
    assert not {page for page in PAGES if page != README} - linked
