"""`verify` tells right from wrong, and `slim` refuses what is wrong."""

import re

import pytest
import torch
from support.nets import Bottlenecks, X, chain, prepared
from torch import Tensor

import polarfast as pf
from polarfast.slimming import slim as slimming


def planned(build=chain):
    model, scales = prepared(build)
    return model, pf.plan(model, X, scales, method="fixed")


def test_a_right_model_is_exact():
    model, plan = planned()
    report = pf.verify(model, pf.slim(model, plan), plan, X)
    assert report.exact and report.rel_error < 1e-12 and report.variation > 0
    assert report.rel_error == report.max_abs_diff / report.variation
    assert "equal to rounding" in str(report)


@pytest.mark.parametrize("name", ["0.weight", "1.bias", "1.running_mean", "3.weight", "10.bias"])
def test_any_wrong_number_is_found(name):
    model, plan = planned()
    slim = pf.slim(model, plan)
    with torch.no_grad():
        slim.state_dict()[name].view(-1)[0] += 1e-4
    report = pf.verify(model, slim, plan, X)
    assert not report.exact and report.rel_error > 1e-9
    assert "NOT equal" in str(report)


def test_an_untrained_network_does_not_pass_vacuously():
    """Its output hardly varies, so an absolute comparison would accept a wrong slim model."""
    model = chain().double().eval()
    scales = pf.scaling_factors(model, X)
    with torch.no_grad():
        for gamma in scales.values():
            gamma.mul_(1e-2)
            gamma[:4] = 0
    plan = pf.plan(model, X, scales, method="fixed", value=1e-4)
    slim = pf.slim(model, plan)
    with torch.no_grad():
        slim[0].weight.copy_(slim[0].weight.flip(0))
    report = pf.verify(model, slim, plan, X)
    assert report.max_abs_diff < 1e-2 and report.rel_error > 1e-2 and not report.exact


def test_a_network_that_diverged_is_named():
    model, plan = planned()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(pf.VerificationError, match="NaN or inf.*diverged"):
        pf.slim(model, plan)


def test_slim_raises_on_a_wrong_result(monkeypatch):
    model, plan = planned()
    write = slimming.write_edits

    def wrong(*args):
        edits = write(*args)
        edits.tensors["1.weight"] = edits.tensors["1.weight"].flip(0)
        return edits

    monkeypatch.setattr(slimming, "write_edits", wrong)
    with pytest.raises(pf.VerificationError, match="verify=False"):
        pf.slim(model, plan)
    pf.slim(model, plan, verify=False)


def test_what_cannot_be_exact_is_named():
    class Bent(Bottlenecks):
        """Not only means of what the last convolution writes are read."""

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.fc((x + self.block(x)).relu().mean((2, 3)))

    model, plan = planned(Bent)
    slim = pf.slim(model, plan)
    report = pf.verify(model, slim, plan, X)
    assert list(report.notes) == ["block.6.weight"]
    # How far what is there is from the mean, which is folded, and the way out.
    note = report.notes["block.6.weight"]
    assert re.search(r"differs .*, by up to \d+% .* mean .*add_gates", note)
    assert not report.exact and "block.6.weight" in str(report)
    none = pf.verify(model, pf.slim(model, plan, fold="none"), plan, X)
    assert none.exact and not none.notes
