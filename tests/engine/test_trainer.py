"""The training loop, against loops written out by hand; accuracy on the test images."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.engine import TINY, on
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import polarfast as pf
from polarfast.engine import distributed, models
from polarfast.engine.data.plan import EpochPlan
from polarfast.engine.data.settings import Data
from polarfast.engine.data.source import DataSource, load
from polarfast.engine.distributed import Workers
from polarfast.engine.recipe import Recipe, Stage
from polarfast.engine.seeds import seed_at
from polarfast.engine.trainer import Trainer, evaluate
from polarfast.errors import ArgumentError

STAGE = Stage(epochs=3, lr=0.05, warmup=0.5)
PLAIN = replace(TINY, train=STAGE)  # 4 steps of 24 images an epoch
SEED = 11


@pytest.fixture(scope="module")
def digits() -> DataSource:
    return load(TINY.data, torch.device("cpu"))


def network() -> nn.Module:
    torch.manual_seed(0)
    return models.build("resnet8", 10, 1)


def trainer_of(
    digits: DataSource, recipe: Recipe, regularizer: pf.Regularizer | None = None
) -> Trainer:
    model, scales, workers = network(), None, Workers(recipe.hardware)
    if regularizer is not None:
        scales = pf.scaling_factors(model, digits.example(), residual="expand")
        pf.init_scales(scales, 0.5)
    model = distributed.prepare(model, recipe, workers)
    return Trainer(model, digits, recipe, STAGE, SEED, workers, scales, regularizer)


def train(trainer: Trainer, epochs: int = STAGE.epochs) -> list[float]:
    losses = []
    for _ in range(epochs):
        for _ in trainer.rest_of_epoch():
            pass
        losses.append(trainer.mean_loss())
    return losses


def batches(digits: DataSource, epoch: int, shards: int = 1) -> list[tuple[Tensor, Tensor]]:
    plan = EpochPlan(seed_at(SEED, epoch), 24, shards=shards, shard_count=shards)
    return list(digits.train(plan))


#: Warm-up over 2 of 12 steps, then a cosine to 0.
RATES = [0.025, 0.05, *(0.025 * (1 + math.cos(math.pi * i / 10)) for i in range(10))]


def written_out(digits: DataSource, recipe: Recipe) -> tuple[nn.Module, nn.Module, list[float]]:
    """Three epochs of SGD with torch's own classes: the model, its average, losses by epoch."""
    model = network()
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    apart = {id(p) for p in norms} | {id(m.bias) for m in model.modules() if hasattr(m, "bias")}
    decayed = [p for p in model.parameters() if recipe.decay_norms or id(p) not in apart]
    rest = [p for p in model.parameters() if not recipe.decay_norms and id(p) in apart]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest}],
        lr=1.0,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
    )
    decay = get_ema_multi_avg_fn(recipe.ema)
    average = AveragedModel(model, multi_avg_fn=decay, use_buffers=True)
    average.update_parameters(model)  # the first one copies
    precise = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.precision]
    scaler = torch.amp.GradScaler("cpu", enabled=recipe.precision == "fp16")
    losses: list[list[float]] = []
    for epoch in range(3):
        losses.append([])
        shards = batches(digits, epoch, recipe.accumulate)
        for step in range(4):
            for group in optimizer.param_groups:
                group["lr"] = RATES[4 * epoch + step]
            optimizer.zero_grad()
            total = 0.0
            for images, labels in shards[recipe.accumulate * step :][: recipe.accumulate]:
                with torch.autocast("cpu", precise, enabled=precise is not None):
                    logits = model(images)
                    loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
                    loss = loss / recipe.accumulate
                scaler.scale(loss).backward()
                total += loss.item()
            losses[-1].append(total)
            if recipe.clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            scaler.step(optimizer)
            scaler.update()
            average.update_parameters(model)
    return model, average.module, [sum(epoch) / 4 for epoch in losses]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate": 3},
    "nesterov, norms not decayed": {"nesterov": True, "decay_norms": False},
    "clipped": {"clip": 0.5},
    "smoothed": {"label_smoothing": 0.1},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16", "clip": 0.5},
    "averaged": {"ema": 0.8},
}


SLOW = {"bf16", "fp16"}  # on a CPU


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in OPTIONS]
)
def test_training_is_sgd_written_out(digits: DataSource, name: str) -> None:
    recipe = replace(PLAIN, **OPTIONS[name])
    trainer = trainer_of(digits, recipe)
    losses = train(trainer)
    model, average, expected = written_out(digits, recipe)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert_equal(trainer.model.state_dict(), model.state_dict())
    with trainer.averaged():
        mine, other = trainer.model.state_dict(), (average if recipe.ema else model).state_dict()
        assert_equal(floats(mine), floats(other))
    assert_equal(trainer.model.state_dict(), model.state_dict())
    assert trainer.epoch == 3 and trainer.step == trainer.steps == 12


def floats(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the counters of batches, which torch averages too."""
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def assert_equal(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert mine.keys() == other.keys()
    different = {k: float((mine[k] - other[k]).abs().max()) for k in mine}
    assert max(different.values()) <= 1e-6, different


@pytest.mark.slow
def test_options_do_something(digits: DataSource) -> None:
    """That the test above could fail: every option ends elsewhere than plain training."""
    ends = {}
    for name, options in OPTIONS.items():
        trainer = trainer_of(digits, replace(PLAIN, **options))
        train(trainer, 1)
        with trainer.averaged():
            ends[name] = trainer.model.state_dict()["layer2.0.conv1.weight"].clone()
    assert len({float(end.double().sum()) for end in ends.values()}) == len(ends)


def after_one_step(digits: DataSource, recipe: Recipe) -> dict[str, Tensor]:
    """Of sparsity training; more steps would tell rounding apart, by what lies close to 0."""
    trainer = trainer_of(digits, recipe, pf.Polarization(lam=1e-3, t=1.2))
    next(trainer.rest_of_epoch())
    return trainer.model.state_dict()


def assert_same_mathematics(mine: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert mine.keys() == others.keys()
    assert all(torch.allclose(mine[k], others[k], atol=1e-4) for k in mine)
    start = network().state_dict()
    assert not torch.allclose(mine["fc.weight"], start["fc.weight"], atol=1e-3)


def test_other_memory_format(digits: DataSource) -> None:
    mine = after_one_step(digits, on(PLAIN, channels_last=True))
    weight = mine["layer3.0.conv1.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert_same_mathematics(mine, after_one_step(digits, PLAIN))


@pytest.mark.slow
def test_compiled(digits: DataSource) -> None:
    mine = after_one_step(digits, on(PLAIN, compile=True))
    assert_same_mathematics(mine, after_one_step(digits, PLAIN))


def test_scaling_factors_feel_the_regularizer(digits: DataSource) -> None:
    regularizer = pf.Polarization(lam=20.0, t=1.2)
    trainer = trainer_of(digits, PLAIN, regularizer)
    assert trainer.scales is not None
    before = regularizer.value(trainer.scales).item()
    train(trainer, 1)
    gammas = torch.cat([gamma.detach() for gamma in trainer.scales.values()])
    assert gammas.min() == 0 and gammas.max() <= 1
    assert regularizer.value(trainer.scales).item() < before


def test_batches_that_do_not_fit(digits: DataSource) -> None:
    with pytest.raises(ArgumentError, match="batch_size=101.*100"):
        trainer_of(digits, replace(PLAIN, batch_size=101))
    with pytest.raises(ArgumentError, match="1 processes x 5 passes"):
        trainer_of(digits, replace(PLAIN, accumulate=5))


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [0, 1])
def test_loss_goes_on_within_an_epoch(digits: DataSource, epochs: int) -> None:
    whole, begun = trainer_of(digits, PLAIN), trainer_of(digits, PLAIN)
    losses = train(whole, epochs + 1)
    train(begun, epochs)
    steps = begun.rest_of_epoch()
    next(steps), next(steps)
    resumed = trainer_of(digits, PLAIN)
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    assert resumed.step == 4 * epochs + 2
    assert train(resumed, 1)[0] == losses[-1]


class Oracle(nn.Module):
    """Right on the first ``right`` images, wrong on the others."""

    def __init__(self, labels: Tensor, right: int) -> None:
        super().__init__()
        self.labels, self.right, self.seen = labels, right, 0

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        labels = self.labels[self.seen : self.seen + len(x)]
        wrong = torch.arange(self.seen, self.seen + len(x)) >= self.right
        self.seen += len(x)
        return F.one_hot((labels + wrong) % 10, 10).float()


def test_accuracy_counts_every_image_once() -> None:
    data = load(Data("digits"), torch.device("cpu"))
    labels = torch.cat([labels for _, labels in data.test(100)])
    oracle = Oracle(labels, 400)
    accuracy = evaluate(oracle, data, Workers(TINY.hardware))
    assert accuracy == pytest.approx(100 * 400 / 797)
    assert oracle.training and oracle.seen == 797


def test_a_teacher_is_followed(digits: DataSource) -> None:
    """The loss of Hinton et al. (2015), written out with probabilities."""
    stage = replace(STAGE, distill=0.3, temperature=2.0)
    torch.manual_seed(5)
    teacher = models.build("resnet8", 10, 1).eval().requires_grad_(False)
    workers = Workers(PLAIN.hardware)
    trainer = Trainer(network(), digits, PLAIN, stage, SEED, workers, teacher=teacher)
    images, labels = batches(digits, 0)[0]
    loss = trainer._loss(images, labels)
    logits, target = trainer.model(images), teacher(images)
    p, q = (target / 2).softmax(1), (logits / 2).softmax(1)
    apart = (p * (p.log() - q.log())).sum(1).mean()
    own = -logits.softmax(1)[range(24), labels].log().mean()
    torch.testing.assert_close(loss, 0.7 * own + 0.3 * 4 * apart)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_that_has_arrived_has_no_loss(digits: DataSource) -> None:
    trainer = trainer_of(digits, PLAIN)
    trainer.stage = replace(STAGE, distill=1.0)
    trainer.teacher = trainer.model.eval()
    assert float(trainer._loss(*batches(digits, 0)[0])) == pytest.approx(0, abs=1e-5)
