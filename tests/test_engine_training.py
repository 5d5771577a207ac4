"""The training loop, against a loop written out by hand, and stopped and resumed."""

import io
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import polarfast as pf
from polarfast.engine import data, models
from polarfast.engine.recipe import Recipe, Sparsity, Stage
from polarfast.engine.training import Trainer, evaluate, learning_rate
from polarfast.errors import ArgumentError

STAGE = Stage(epochs=3, lr=0.05, warmup=0.2)
RECIPE = Recipe(
    "digits", "resnet8", Sparsity(lam=1e-3, t=1.2), STAGE, STAGE, batch_size=500, shift=1
)


@pytest.fixture(scope="module")
def digits() -> data.DataSet:
    return data.digits(torch.device("cpu"))


def network() -> nn.Module:
    torch.manual_seed(0)
    return models.build("resnet8", 10, 1)


def sparse_trainer(digits: data.DataSet) -> Trainer:
    model = network()
    scales = pf.scaling_factors(model, digits.test.images[:2], residual="expand")
    pf.init_scales(scales, 0.5)
    regularizer = pf.Polarization(lam=1e-3, t=1.2)
    generator = torch.Generator().manual_seed(1)
    return Trainer(model, digits, RECIPE, STAGE, generator, scales, regularizer)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([v.flatten().double() for v in model.state_dict().values()])


def test_plain_training_is_sgd_written_out(digits: data.DataSet) -> None:
    trainer = Trainer(network(), digits, RECIPE, STAGE, torch.Generator().manual_seed(1))
    losses = [trainer.run_epoch() for _ in range(2)]

    model, generator = network(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    rates = [0.05, *(0.025 * (1 + math.cos(math.pi * i / 5)) for i in range(5))]
    expected = []
    for images, labels in [b for _ in range(2) for b in data.batches(digits, 500, 1, generator)]:
        optimizer.param_groups[0]["lr"] = rates[len(expected)]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx([sum(expected[:2]) / 2, sum(expected[2:]) / 2])
    assert torch.equal(weights(trainer.model), weights(model))
    assert trainer.epoch == 2


def test_resumed_training_is_the_same_to_the_bit(digits: data.DataSet) -> None:
    whole = sparse_trainer(digits)
    whole.run_epoch()
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    for _ in range(2):
        whole.run_epoch()

    resumed = sparse_trainer(digits)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.epoch == 1
    for _ in range(2):
        resumed.run_epoch()
    assert torch.equal(weights(whole.model), weights(resumed.model))


def test_scaling_factors_feel_the_regularizer(digits: data.DataSet) -> None:
    trainer = sparse_trainer(digits)
    assert trainer.scales is not None and trainer.regularizer is not None
    before = trainer.regularizer.value(trainer.scales).item()
    trainer.regularizer.lam = 20.0
    trainer.run_epoch()
    gammas = torch.cat([g.detach() for g in trainer.scales.values()])
    assert gammas.min() == 0 and gammas.max() <= 1
    assert trainer.regularizer.value(trainer.scales).item() < before


def test_batch_larger_than_the_data(digits: data.DataSet) -> None:
    with pytest.raises(ArgumentError, match="batch_size=1001.*1000"):
        Trainer(network(), digits, replace(RECIPE, batch_size=1001), STAGE, torch.Generator())


def test_learning_rate() -> None:
    stage = Stage(epochs=1, lr=0.4, warmup=0.2)
    rates = [learning_rate(stage, step, 10) for step in range(10)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.4])
    assert rates[6] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(0.4 * 0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert learning_rate(Stage(epochs=1, lr=0.4, schedule="constant"), 9, 10) == 0.4


def test_accuracy_counts_every_image_once(digits: data.DataSet) -> None:
    class Oracle(nn.Module):
        """Right on the first 400 images, wrong on the others."""

        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            labels = digits.test.labels[self.seen : self.seen + len(x)]
            wrong = torch.arange(self.seen, self.seen + len(x)) >= 400
            self.seen += len(x)
            return F.one_hot((labels + wrong) % 10, 10).float()

    oracle = Oracle()
    assert evaluate(oracle, digits.test, batch_size=100) == pytest.approx(100 * 400 / 797)
    assert oracle.training and oracle.seen == 797
