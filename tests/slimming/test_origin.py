"""The way back: the original, given its slim model's tensors, computes what the slim model does."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import nets
from torch import nn

import polarfast as pf
from polarfast.slimming.origin import Origin

SMALL = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


NETS = {
    "chain": nets.chain,
    "silu": lambda: nets.chain(nn.SiLU),
    "residual": nets.Residual,
    "bottlenecks": nets.Bottlenecks,
    "branches": nets.Branches,
    "grouped": nets.Grouped,
}


def pruned(name, residual, fold, seed):
    x = SMALL
    torch.manual_seed(seed)
    model = NETS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1.0)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    scales = pf.scaling_factors(model, x, residual=residual)
    with torch.no_grad():
        for gamma in scales.values():
            gamma[torch.rand(gamma.numel()) < 0.5] = 0
    return model.eval(), x, pf.plan(model, x, scales, "fixed", value=0.0, fold=fold)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(sorted(NETS)),
    st.sampled_from(["keep", "expand", "couple"]),
    st.sampled_from(["exact", "none"]),
    st.integers(0, 99),
)
def test_the_original_computes_what_the_slim_model_does(name, residual, fold, seed):
    model, x, plan = pruned(name, residual, fold, seed)
    slim = pf.slim(model, plan)
    other = NETS[name]().eval()  # whatever its weights are
    slim.polarfast_info.origin.write_back(slim, other)
    with torch.no_grad():
        torch.testing.assert_close(other(x), slim(x), rtol=1e-4, atol=1e-4)
    # A slim model made from it anew is the same one.
    scales = pf.scaling_factors(other, x, residual=residual)
    again = pf.plan(other, x, scales, "fixed", value=0.0, fold=fold)
    assert again.macs <= plan.macs
    torch.testing.assert_close(pf.slim(other, again)(x), slim(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(NETS))
def test_nothing_that_stays_is_lost(name):
    """Back and cut again, every tensor and state is bit for bit what it was."""
    model, x, plan = pruned(name, "keep", "none", 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model.train()(x).square().mean().backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        for gamma, kept in ((model.get_parameter(n), k) for n, k in plan.kept.items()):
            gamma[[i for i in range(gamma.numel()) if i not in set(kept.tolist())]] = 0
    slim = pf.slim(model, plan, optimizer=optimizer)
    before = copy.deepcopy(slim.state_dict())
    states = [{**optimizer.state[p]} for p in slim.parameters()]
    origin = slim.polarfast_info.origin
    origin.write_back(slim, model)
    origin.restore_optimizer(optimizer, slim, model)
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
    again = pf.slim(model, plan, optimizer=optimizer)
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    for param, state in zip(again.parameters(), states, strict=True):
        for key, value in state.items():
            assert torch.equal(optimizer.state[param][key], value)


def test_a_second_cut_is_traced_back_to_the_first_original():
    model, x, plan = pruned("grouped", "keep", "none", 2)
    first = pf.slim(model, plan)
    scales = pf.scaling_factors(first, x)
    with torch.no_grad():
        next(iter(scales.values()))[:1] = 0
    second = pf.slim(first, pf.plan(first, x, scales, "fixed", value=0.0))
    other = nets.Grouped().eval()
    second.polarfast_info.origin.write_back(second, other)
    torch.testing.assert_close(other(x), second(x), rtol=1e-4, atol=1e-4)


def test_it_is_kept_in_the_file(tmp_path):
    model, _, plan = pruned("residual", "expand", "exact", 3)
    slim = pf.slim(model, plan)
    pf.save(slim, plan, tmp_path / "slim.pt")
    loaded = pf.load(tmp_path / "slim.pt", nets.Residual)
    mine, theirs = slim.polarfast_info.origin, loaded.polarfast_info.origin
    assert isinstance(theirs, Origin) and mine.to_data() == theirs.to_data()


def test_a_bias_that_the_original_lacks():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3, bias=False)),
    ).eval()
    nn.init.ones_(model[1].bias)
    scales = pf.scaling_factors(model, SMALL)
    with torch.no_grad():
        model[1].weight[::2] = 0
    slim = pf.slim(model, pf.plan(model, SMALL, scales, "fixed", value=0.0))
    with pytest.raises(pf.PlanError, match=r"a bias that the original lacks \(3.bias\)"):
        slim.polarfast_info.origin.write_back(slim, model)
