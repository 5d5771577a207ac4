"""Networks that choose among their scores: rounding alone changes what they return."""

import pytest
import torch
from support.hard_nets import Net, body, tail
from support.masked import masked
from support.nets import X, conv_bn, prepared, zero
from torch import Tensor, nn

import polarfast as pf
from polarfast.slimming import slim as slimming
from polarfast.slimming.verify import Decisions


def ranked(n: nn.Module, x: Tensor) -> Tensor:
    """Features at the places of the highest scores, which hang on the last digits."""
    x = n.b(n.a(x))
    scores = n.score(x).flatten(1).mul(1e16).sin().mul(2e-14).add(1)
    top = scores.topk(20).indices
    places = x.flatten(2).gather(2, top.unsqueeze(1).expand(-1, x.shape[1], -1))
    first, at = places.max(2)
    kept = places[..., (places.mean((0, 1)) > 0).nonzero().flatten()]
    return torch.cat([n.end(places.unsqueeze(3)), first, at.double().floor() * 0, kept.sum(2)], 1)


def detector() -> nn.Module:
    return Net(
        ranked, a=body(3, 8), b=nn.Sequential(*conv_bn(8, 6), nn.ReLU(), nn.Conv2d(6, 6, 1)),
        score=nn.Conv2d(6, 1, 1), end=nn.Sequential(*tail(6)),
    )  # fmt: skip


def test_the_slim_model_is_given_the_original_choice():
    model, scales = prepared(detector)
    plan = pf.plan(model, X, scales, "fixed")
    slim = pf.slim(model, plan)
    reference = masked(model, plan, False)
    with torch.no_grad():
        assert not torch.allclose(reference(X), slim(X))  # the places are others
    report = pf.verify(model, slim, plan, X)
    assert report.exact and report.decided and "choice" in str(report)
    with torch.no_grad():
        slim.end[-1].weight.add_(1e-3)
    assert not pf.verify(model, slim, plan, X).exact


@pytest.mark.parametrize(
    "decide",
    [
        lambda x: x.topk(3, -1).indices, lambda x: x.sort(dim=1, descending=True).indices,
        lambda x: x.topk(3, dim=0).values, lambda x: x.kthvalue(2, 0).values,
        lambda x: x.argmax(1), lambda x: x > 0, lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0].shape[0] + torch.zeros(()), lambda x: x.floor(), lambda x: x.long(),
        lambda x: x.clone().round_(), lambda x: torch.where(x.gt(0.1), 1.0, 2.0),
        lambda x: x.max(1).indices, lambda x: x.median(1).indices,
    ],
)  # fmt: skip
def test_decisions_are_taken_over_and_values_are_not(decide):
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 6, 6, generator=generator).mul(3)
    recorded = Decisions()
    with recorded:
        wanted = decide(one)
    with recorded.replay():
        got = decide(two)
    assert recorded.taken and got.shape == wanted.shape
    own = decide(two)
    assert own.shape != got.shape or not torch.equal(own, got)
    same_values = torch.equal(got, wanted)
    assert same_values or torch.isin(got, two).all()  # its own numbers, at the other's places


@pytest.mark.parametrize(
    "decide",
    [
        lambda x: x.argmax(1), lambda x: x > 0, lambda x: x.sign(), lambda x: (9 * x).long(),
        lambda x: x + (x.round() - x), lambda x: x.clone().round_(), lambda x: x.topk(2, 1).indices,
        lambda x: x.masked_fill(x < 0, -torch.inf).argmax(1),
    ],
)  # fmt: skip
def test_no_decision_hides_what_it_was_taken_from(decide):
    model, scales = prepared(
        lambda: Net(lambda n, x: decide(n.b(n.a(x))), a=body(3, 8), b=nn.Conv2d(8, 4, 1))
    )
    plan = pf.plan(model, X, scales, "fixed")
    slim = pf.slim(model, plan)
    assert pf.verify(model, slim, plan, X).exact
    with torch.no_grad():
        slim.b.weight.add_(torch.randn_like(slim.b.weight))
    report = pf.verify(model, slim, plan, X)
    assert not report.exact and report.max_abs_diff > 0


def test_nothing_is_decided_where_all_is_continuous():
    with Decisions() as recorded:
        body().double()(X)
        nn.functional.max_pool2d(X, 2)
        X.max(1).values.clamp(0, 1)
    assert [name for name, *_ in recorded.taken] == ["max"]


@pytest.mark.slow
def test_detectors(monkeypatch):
    models = pytest.importorskip("torchvision").models.detection
    torch.manual_seed(0)
    model = models.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3, width_mult=0.35
    ).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.normal_(0, 0.3)
    x = ([torch.rand(3, 320, 320)],)
    scales = pf.scaling_factors(model, x, residual="expand")
    zero(scales)
    plan = pf.plan(model, x, scales, "fixed")
    slim = pf.slim(model, plan)  # compared on the original's choice of boxes
    assert plan.macs < plan.macs_before and len(slim(*x)[0]["boxes"]) > 0
    write = slimming.write_edits

    def wrong(*args):
        edits = write(*args)
        name = "head.classification_head.module_list.0.1.bias"
        edits.tensors[name] = model.get_parameter(name).double() + 0.01
        return edits

    monkeypatch.setattr(slimming, "write_edits", wrong)
    with pytest.raises(pf.VerificationError, match="not what the plan says"):
        pf.slim(model, plan)
