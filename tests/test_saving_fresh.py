"""What was saved is the same in another process: models, plans, and a training that goes on."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from support.export import CASES, make, original
from torch import nn

import polarfast as pf

X = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def fresh(code: str, folder: Path) -> None:
    """Run code in a new interpreter, in a folder."""
    code = "import sys, torch\n" + textwrap.dedent(code)
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


@pytest.mark.slow
def test_models_and_plans(tmp_path):
    for name in CASES:
        (slim, plan), (model, _) = make(name), original(name)
        images = torch.randn(CASES[name].shapes()[1], dtype=torch.float64)
        pf.save(slim, plan, tmp_path / f"{name}.slim")
        (tmp_path / f"{name}.json").write_text(plan.to_json())
        with torch.no_grad():
            torch.save((model.state_dict(), images, slim(images)), tmp_path / f"{name}.pt")
    fresh(
        """
        from pathlib import Path
        for path in Path().glob("*.slim"):
            assert isinstance(torch.load(path, weights_only=True), dict)
        assert "polarfast" not in sys.modules  # tensors and plain data: nothing of ours to run
        import polarfast as pf
        from support.export import CASES
        for name, case in CASES.items():
            state, images, expected = torch.load(f"{name}.pt")
            loaded = pf.load(f"{name}.slim", lambda: case.build().double().eval())
            plan = pf.PruningPlan.from_json(Path(f"{name}.json").read_text())
            model = case.build().double().eval()
            if case.gates:
                pf.add_gates(model, images, residual=case.residual)
            model.load_state_dict(state)
            again = pf.slim(model, plan)
            with torch.no_grad():
                assert torch.equal(loaded(images), expected), name
                assert torch.equal(again(images), expected), name
            assert pf.load_plan(f"{name}.slim").to_json() == plan.to_json()
        """,
        tmp_path,
    )
    assert len(list(tmp_path.glob("*.slim"))) == len(CASES)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, batches: torch.Tensor) -> None:
    """Train on each batch."""
    model.train()
    for images in batches:
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


TRAINED = ["expand", "emptied branch"]


@pytest.mark.slow
def test_training_goes_on(tmp_path):
    batches, expected = X.view(4, 2, 3, 10, 10), {}
    for name in TRAINED:
        slim, plan = make.__wrapped__(name)
        slim.float()
        optimizer = optimizer_of(slim)
        steps(slim, optimizer, batches[:2])
        pf.save(slim, plan, tmp_path / f"{name}.slim")
        torch.save(optimizer.state_dict(), tmp_path / f"{name}.optimizer")
        steps(slim, optimizer, batches[2:])
        expected[name] = slim, optimizer
    fresh(
        """
        import polarfast as pf
        from test_saving_fresh import *
        for name in TRAINED:
            slim = pf.load(f"{name}.slim", CASES[name].build)
            optimizer = optimizer_of(slim)
            optimizer.load_state_dict(torch.load(f"{name}.optimizer", weights_only=True))
            steps(slim, optimizer, X.view(4, 2, 3, 10, 10)[2:])
            torch.save([slim.state_dict(), optimizer.state_dict()], f"{name}.after")
        """,
        tmp_path,
    )
    for name, (slim, optimizer) in expected.items():
        state, momenta = torch.load(tmp_path / f"{name}.after")
        assert all(torch.equal(state[key], tensor) for key, tensor in slim.state_dict().items())
        own = optimizer.state_dict()["state"]
        assert len(own) == len(list(slim.parameters()))
        for key, tensors in own.items():
            assert torch.equal(momenta["state"][key]["momentum_buffer"], tensors["momentum_buffer"])


def test_wrappers_are_looked_through(tmp_path):
    slim, plan = make("expand")
    average = torch.optim.swa_utils.AveragedModel(slim)
    wrapped = [average, torch.nn.DataParallel(slim), torch.compile(slim, backend="eager")]
    images = torch.randn(2, 3, 10, 10, dtype=torch.float64)
    for number, model in enumerate(wrapped):
        pf.save(model, plan, tmp_path / f"{number}.pt")
        loaded = pf.load(tmp_path / f"{number}.pt", lambda: CASES["expand"].build().double().eval())
        with torch.no_grad():
            assert torch.equal(loaded(images), slim(images))


def test_plan_of_an_average():
    """An average of the original is made slim by the same plan."""
    model, plan = original("expand")
    average = torch.optim.swa_utils.AveragedModel(model)
    images = torch.randn(2, 3, 10, 10, dtype=torch.float64)
    with torch.no_grad():
        model.fc.bias.add_(1)  # the average stays behind
        average.module.fc.bias.add_(2)
        own, averaged = pf.slim(model, plan)(images), pf.slim(average, plan)(images)
        model.fc.bias.sub_(1)
        torch.testing.assert_close(averaged, own + 1)
