"""The timm example, and timm's optimizers: γ move as the formula says."""

import pytest
import torch
import torch.nn.functional as F
from support import oracles
from support.trainers import (
    LAM,
    LR,
    STEPS,
    T,
    assert_pruned_alike,
    digits,
    example,
    factors,
    near_the_ends,
    plain_loop,
)
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

import polarfast as pf


def timm_case(opt: str) -> tuple[nn.Module, Optimizer, pf.ScalingFactors]:
    """In float64: what timm's optimizers do to the last bit of a float32 would hide the rest."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8 * 16, 10)).double()
    scales = pf.scaling_factors(model, torch.zeros(1, 1, 8, 8, dtype=torch.float64))
    pf.init_scales(scales, 0.5)
    create = pytest.importorskip("timm.optim").create_optimizer_v2
    return model, create(model, opt=opt, lr=0.01, weight_decay=0.05), scales


def timm_run(opt: str, use: str, lam: float = 0.05) -> Tensor:
    """γ after a few steps: the formula by hand, `pf.step`, or `pf.attach`."""
    model, optimizer, scales = timm_case(opt)
    reg, gammas = pf.Polarization(lam, T), list(scales.values())
    if use == "attach":
        pf.attach(optimizer, scales, reg)
    second_order = getattr(optimizer, "is_second_order", False)
    for images, labels in digits(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images.double()), labels)
        loss.backward(create_graph=second_order)
        if use == "formula":
            penalties = oracles.subgradients(gammas, [1.0] * len(gammas), oracles.POLARIZATION, T)
            for gamma, penalty in zip(gammas, penalties, strict=True):
                gamma.grad = gamma.grad + lam * penalty
        pf.step(optimizer, scales, reg) if use == "step" else optimizer.step()
        if use == "formula":
            for gamma in gammas:
                gamma.data.clamp_(0, 1)
    return factors(scales)


TIMM_OPTIMIZERS = """adabelief adadelta adafactor adafactorbv adagrad adahessian adam adamax adamp
adamuon adamw adamwlegacy adan adopt cadamw clamb clion csgdw lamb lambc laprop larc lars lion
lookahead_adamw lookahead_lamb lookahead_momentum madgrad mars momentum muon nadam nadamw nlarc
novograd radam rmsprop rmsproptf sgd sgdp sgdw""".split()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # adahessian's create_graph
@pytest.mark.parametrize("opt", TIMM_OPTIMIZERS)
def test_timm_optimizers_follow_the_formula(opt: str) -> None:
    expected = timm_run(opt, "formula")
    assert (timm_run(opt, "formula", lam=0.0) - expected).abs().max() > 1e-5
    for use in ("attach", "step"):
        assert (timm_run(opt, use) - expected).abs().max() <= 1e-6, use


def test_timm_factory_does_not_decay_the_factors() -> None:
    _, optimizer, scales = timm_case("adamw")
    decays = {
        id(param): group["weight_decay"]
        for group in optimizer.param_groups
        for param in group["params"]
    }
    assert {decays[id(gamma)] for gamma in scales.values()} == {0.0}
    assert set(decays.values()) == {0.0, 0.05}


def test_timm_lookahead_stays_attached_when_its_state_is_restored() -> None:
    _, first, _ = timm_case("lookahead_adamw")
    _, optimizer, scales = timm_case("lookahead_adamw")
    pf.attach(optimizer, scales, pf.Polarization(LAM, T))
    optimizer.load_state_dict(first.state_dict())
    with pytest.raises(pf.StepError, match="attached to this optimizer already"):
        pf.attach(optimizer, scales, pf.Polarization(LAM, T))


@pytest.mark.parametrize("first", [2.0**10, 2.0**60])
def test_timm_loss_scaler(first: float) -> None:
    """As in timm's training script; the larger scale makes the first steps overflow."""
    code, batches = example("timm_optimizer"), digits(STEPS)
    scaler_class = pytest.importorskip("timm.utils").NativeScaler

    def case() -> tuple[nn.Module, Optimizer, pf.ScalingFactors]:
        torch.manual_seed(0)
        model = code.network()
        scales = pf.scaling_factors(model, batches[0][0][:1], residual="expand")
        near_the_ends(scales)
        return model, code.create_optimizer_v2(model, opt="momentum", lr=LR, momentum=0.9), scales

    new_scaler = lambda: GradScaler("cpu", init_scale=first, backoff_factor=2.0**-30)  # noqa: E731
    expected = plain_loop(*case(), batches, scaler=new_scaler(), clip=0.5)
    unpenalized = plain_loop(*case(), batches, scaler=new_scaler(), clip=0.5, lam=0.0)

    model, optimizer, scales = case()
    pf.attach(optimizer, scales, pf.Polarization(LAM, T))
    native = scaler_class("cpu")
    native._scaler = new_scaler()
    model.train()
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        native(loss, optimizer, clip_grad=0.5, parameters=model.parameters())
    assert_pruned_alike(factors(scales), expected, unpenalized, 1e-6)
