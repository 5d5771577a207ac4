"""The README's code runs as it stands there."""

import re

import pytest
import torch
from support import ROOT

import polarfast as pf
from polarfast.engine.models import resnet

README = ROOT / "README.md"


@pytest.mark.slow
def test_code_blocks(tmp_path, monkeypatch, capsys):
    models = pytest.importorskip("torchvision").models
    monkeypatch.chdir(tmp_path)
    first, use, target = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    model = resnet(8)
    images = torch.randn(2, 4, 3, 32, 32)
    names = {
        "model": model,
        "loader": [(batch, torch.arange(4)) for batch in images],
        "loss_fn": torch.nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    }
    exec(first, names)
    assert "MACs" in capsys.readouterr().out
    monkeypatch.setattr(models, "resnet50", lambda: resnet(8))  # the model that was saved
    names["torchvision"] = __import__("torchvision")
    exec(use, names)
    assert type(names["slim"]) is type(model)
    fresh = resnet(8)
    names |= {
        "model": fresh,
        "scales": pf.scaling_factors(fresh, names["x"], residual="expand"),
        "train": lambda lam, t: [0.54] * 10,
    }
    exec(target, names)
    assert names["result"].cut == 0.54 and names["reg"].cut == 0.54
