"""`LatencyTable` against a machine on which each operator's time is known."""

import json

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support import clocks
from support.nets import (
    Bottlenecks,
    Branches,
    Grouped,
    Residual,
    SqueezeExcite,
    X,
    chain,
    conv_bn,
    settle,
    zero,
)
from torch import nn

import polarfast as pf
from polarfast.engine.models import build as build_model
from polarfast.latency import grid

NETS = [chain, Residual, Bottlenecks, Branches, Grouped, SqueezeExcite]


def resnet20():
    torch.manual_seed(0)
    model, x = build_model("resnet20", 10, 3).eval(), torch.randn(2, 3, 16, 16)
    scales = pf.scaling_factors(model, x, residual="expand")
    with torch.no_grad():
        for gamma in scales.values():
            gamma.uniform_()
    return model, x, scales


def measured(model, inputs=X, **options):
    return pf.LatencyTable.measure(model, inputs, seconds=1e-9, progress=False, **options)


@pytest.mark.parametrize("residual", ["keep", "expand", "couple"])
@pytest.mark.parametrize("build", NETS)
def test_what_is_predicted_is_what_the_slim_model_takes(build, residual, monkeypatch):
    model = settle(build(), X)
    with clocks.pretended(monkeypatch):
        table = measured(model, step=1)
    assert table.ms == pytest.approx(clocks.of(model, X))
    scales = pf.scaling_factors(model, X, residual=residual)
    for seed, share in enumerate((0.0, 0.3, 0.6)):
        zero(scales, share, seed)
        plan = pf.plan(model, X, scales)
        slim = pf.slim(model, plan)
        assert table.latency(plan) == pytest.approx(clocks.of(slim, X), rel=0.02)


@given(
    a=st.floats(0, 1), b=st.floats(0, 1), c=st.floats(0, 1), d=st.floats(0, 1),
    n_in=st.integers(1, 64), n_out=st.integers(1, 96), step=st.sampled_from([1, 4, 8, 16]),
)  # fmt: skip
def test_products_of_widths_are_interpolated_exactly(a, b, c, d, n_in, n_out, step):
    def time(i, o):
        return a + b * i + c * o + d * i * o

    rows, columns = grid.widths(64, step), grid.widths(96, step)
    times = {(i, o): time(i, o) for i in rows for o in columns}
    n_in, n_out = grid.at_edge(n_in, 64, step), grid.at_edge(n_out, 96, step)
    assert grid.across(times, rows, columns, n_in, n_out) == pytest.approx(time(n_in, n_out))


@given(st.integers(1, 4096), st.sampled_from([1, 3, 8, 16, 64]))
def test_widths_are_whole_steps(full, step):
    found = grid.widths(full, step)
    assert found == sorted(set(found)) and found[-1] == full and found[0] == min(step, full)
    assert all(width % step == 0 or width == full for width in found)
    assert len(found) <= grid.PARTS + 1


def test_a_plan_of_a_share_of_the_time(monkeypatch):
    """Reached, with widths at the edges of steps; on a machine with stairs."""
    model, x, scales = resnet20()
    with clocks.pretended(monkeypatch, stairs=8):
        table = measured(model, x, step=8)
        for cut in (0.2, 0.5):
            plan = pf.plan(model, x, scales, cut=cut, of="latency", latency=table)
            slim = pf.slim(model, plan)
            real = 1 - clocks.of(slim, x, 8) / clocks.of(model, x, 8)
            assert plan.latency.cut >= cut and abs(real - cut) <= 0.03
            assert plan.latency.cut_measured == pytest.approx(real)
            assert abs(plan.latency.error) < 0.02
            for name, kept in plan.kept.items():
                width = kept.numel() + len(plan.layers[name].constant)
                assert width % 8 == 0 or width == scales[name].numel()
            assert pf.PruningPlan.from_json(plan.to_json()).latency == plan.latency
            assert f"{plan.latency.cut:.1%}" in str(plan)
        reach = pf.reachable(model, x, scales, latency=table)
        with pytest.raises(pf.PlanError, match="of the time is out of reach"):
            pf.plan(model, x, scales, cut=reach.latency[1] + 0.01, of="latency", latency=table)


def test_where_the_machine_is_not_as_predicted_the_target_is_corrected(monkeypatch):
    """Here whole networks have a fixed part that no operator has."""
    model, x, scales = resnet20()
    with clocks.pretended(monkeypatch):
        table = measured(model, x)
        whole = clocks.of(model, x)
        monkeypatch.setattr(
            "polarfast.latency.table.median_latencies",
            lambda models, inputs, *rest: [clocks.of(m, inputs) + 0.3 * whole for m in models],
        )
        plan = pf.plan(model, x, scales, cut=0.4, of="latency", latency=table)
        assert abs(plan.latency.cut_measured - 0.4) <= 0.03 < abs(plan.latency.cut - 0.4)
        assert plan.asked["cut"] == 0.4 and not any("were to go" in r for r in plan.remarks)
        # Most of the time is out of pruning's reach.
        monkeypatch.setattr(
            "polarfast.latency.table.median_latencies",
            lambda models, inputs, *rest: [clocks.of(m, inputs) + 9 * whole for m in models],
        )
        with pytest.warns(UserWarning, match=r"40% of the time were to go, \d+% go as measured"):
            plan = pf.plan(model, x, scales, cut=0.4, of="latency", latency=table)
        assert any("were to go" in remark for remark in plan.remarks)


@settings(deadline=None, max_examples=10, phases=[Phase.generate])
@given(st.integers(0, 10**6))
def test_a_predictor_says_what_the_plan_says(seed):
    model = settle(Residual(), X)
    with pytest.MonkeyPatch.context() as monkeypatch, clocks.pretended(monkeypatch):
        table = measured(model, step=2)
        scales = pf.scaling_factors(model, X, residual="expand")
        predict = pf.CutPredictor(model, X, scales, of="latency", latency=table)
        zero(scales, (seed % 10) / 10, seed)
        plan = pf.plan(model, X, scales, round_to=2, method="valley")
        assert predict.cut() == pytest.approx(1 - table.latency(plan) / table.ms)


def test_a_file_is_what_was_measured(tmp_path, monkeypatch):
    model = settle(Residual(), X)
    with clocks.pretended(monkeypatch):
        table = measured(model)
    table.save(tmp_path / "table.json")
    again = pf.LatencyTable.load(tmp_path / "table.json")
    scales = pf.scaling_factors(model, X, residual="expand")
    zero(scales)
    plan = pf.plan(model, X, scales)
    assert again.latency(plan) == table.latency(plan)
    assert (again.setting, again.inputs, again.ms) == (table.setting, table.inputs, table.ms)
    data = json.loads((tmp_path / "table.json").read_text())
    for key, value in (
        ("ms", data["ms"] * 2),
        ("step", 0),
        ("version", 2),
        ("others", {"a": [[]]}),
    ):
        (tmp_path / "other.json").write_text(json.dumps({**data, key: value}))
        with pytest.raises(pf.FileFormatError, match="is no latency table"):
            pf.LatencyTable.load(tmp_path / "other.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(pf.FileFormatError, match='no "format"'):
        pf.LatencyTable.load(tmp_path / "other.json")


def test_what_a_table_does_not_hold_for_is_refused(monkeypatch):
    model = settle(Residual(), X)
    scales = pf.scaling_factors(model, X)
    with clocks.pretended(monkeypatch):
        table = measured(model)
        plan = pf.plan(model, X, scales, cut=0.1)
        other = settle(Branches(), X)
        with pytest.raises(pf.PlanError, match=r"inputs of sizes \[3, 3, 10, 10\]"):
            pf.plan(model, X[:1], scales, cut=0.1, of="latency", latency=table)
        with pytest.raises(pf.PlanError, match="no time for"):
            pf.plan(other, X, pf.scaling_factors(other, X), cut=0.1, of="latency", latency=table)
        with pytest.raises(pf.PlanError, match=r"without round_to=8 \(the latency table's step\)"):
            pf.plan(model, X, scales, cut=0.1, of="latency", latency=table)
        with pytest.raises(pf.ArgumentError, match="needs latency="):
            pf.plan(model, X, scales, cut=0.1, of="latency")
        with pytest.raises(pf.PlanError, match="pass model="):
            table.latency(pf.PruningPlan.from_json(plan.to_json()))
        assert table.latency(pf.PruningPlan.from_json(plan.to_json()), model) == table.latency(plan)
        monkeypatch.setattr("polarfast.latency.table.device_name", lambda device: "another CPU")
        with pytest.raises(pf.ArgumentError, match="does not fit this machine .another CPU, not"):
            table.check(model, plan)
        # Predicted all the same, for that machine.
        plan = pf.plan(model, X, scales, cut=0.02, of="latency", latency=table)
        assert plan.latency.cut >= 0.02 and plan.latency.measured is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"step": 0}, "step=0"),
        ({"step": 1.5}, "step=1.5"),
        ({"seconds": 0}, "seconds=0"),
        ({"error": -1}, "error=-1"),
        ({"memory_format": torch.preserve_format}, "memory_format="),
    ],
)
def test_arguments(options, message):
    with pytest.raises(pf.ArgumentError, match=message):
        pf.LatencyTable.measure(chain(), X.float(), **options)


def test_the_model_is_left_as_found_and_real_times_are_positive():
    model = settle(Residual(), X).float().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = pf.LatencyTable.measure(
        model, X.float(), memory_format=torch.channels_last, seconds=0.5, progress=False
    )
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert table.ms > 0 and table.setting.memory_format == "channels_last"
    assert "steps of 8 channels" in repr(table)


def test_flops_target_aims_at_a_share_of_the_time(monkeypatch):
    torch.manual_seed(0)
    model, x = chain().float(), X.float()
    scales = pf.scaling_factors(model, x)
    pf.init_scales(scales, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    with clocks.pretended(monkeypatch):
        table = measured(model, x, step=2)
        target = pf.FlopsTarget(model, x, scales, cut=0.3, steps=200, of="latency", latency=table)
        assert "time to cut 30.0%" in repr(target)
        labels = torch.randint(0, 5, (3,))
        for _ in range(200):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), labels).backward()
            pf.step(optimizer, scales, target)
        plan = pf.plan(model, x, scales, round_to=2)
        cut = 1 - table.latency(plan) / table.ms
    assert cut == pytest.approx(target.live, abs=1e-6) and abs(cut - 0.3) < 0.03


class Tokens(nn.Module):
    """Linear layers on three dimensions, an attention and an LSTM behind a CNN."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 16), nn.ReLU())
        self.into, self.norm = nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16)
        self.out = nn.Linear(16, 8, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 6, batch_first=True)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = self.norm(self.into(x).transpose(1, 2)).relu().transpose(1, 2)
        x = self.out(x)
        return self.lstm(x + self.attention(x, x, x)[0])[0]


class Odd(nn.Module):
    """A norm in front, depthwise convolutions with several multiples, transposed ones, groups."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.BatchNorm2d(3)
        self.stem = nn.Sequential(*conv_bn(3, 12), nn.ReLU())
        self.one = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.four = nn.Conv2d(12, 48, 3, padding=1, groups=12)
        self.mix = nn.Sequential(*conv_bn(48, 16, 1), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 32, 2, stride=2, groups=16)
        self.groups = nn.Conv2d(32, 8, 1, groups=4)
        self.read = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x):
        x = self.stem(self.front(x))
        x = self.mix(self.four(self.one(x)))
        return self.read(self.groups(self.up(x)))


@pytest.mark.parametrize("build", [Tokens, Odd])
def test_other_layers(build, monkeypatch):
    model = settle(build(), X)
    with clocks.pretended(monkeypatch):
        table = measured(model, step=1)
    scales = pf.scaling_factors(model, X, residual="expand")
    zero(scales, 0.5)
    plan = pf.plan(model, X, scales)
    slim = pf.slim(model, plan)
    before, after = clocks.of(model, X), clocks.of(slim, X)
    if build is Odd:  # torch takes an LSTM as one operator, a trace its parts
        assert table.latency(plan) == pytest.approx(after, rel=0.02)
    assert table.latency(plan) / table.ms == pytest.approx(after / before, rel=0.1)


def test_gates_cost_nothing(monkeypatch):
    """Nor do they have to be there when the table is made."""
    model = settle(Bottlenecks(), X)
    with clocks.pretended(monkeypatch):
        table = measured(model, step=1)
        pf.add_gates(model, X, where="")
        gated = measured(model, step=1)
    assert gated.ms == table.ms
    gates = pf.scaling_factors(model, X).select(r"gate$")
    zero(gates)
    plan = pf.plan(model, X, gates)
    for each in (table, gated):
        took = clocks.of(pf.slim(model, plan), X)
        assert each.latency(plan) == pytest.approx(took, rel=0.02)


def test_a_slim_model_can_be_measured(monkeypatch):
    model = settle(Residual(), X)
    scales = pf.scaling_factors(model, X, residual="expand")
    zero(scales)
    slim = pf.slim(model, pf.plan(model, X, scales))
    with clocks.pretended(monkeypatch):
        assert measured(slim).ms == pytest.approx(clocks.of(slim, X))


def test_time_that_rises_again(monkeypatch):
    """Where few channels are slow, the largest share lies before the end."""
    model, x, scales = resnet20()
    product = clocks.Machine._product

    def slow_when_narrow(self, name, args, out):
        narrow = min(args[0].shape[1] if name == "convolution" else 99, out.shape[1]) < 6
        return product(self, name, args, out) + (0.02 if narrow else 0.0)

    monkeypatch.setattr(clocks.Machine, "_product", slow_when_narrow)
    with clocks.pretended(monkeypatch):
        table = measured(model, x, step=4)
        reach = pf.reachable(model, x, scales, latency=table)
        assert reach.latency[1] > 0.1
        plan = pf.plan(model, x, scales, cut=0.1, of="latency", latency=table)
        assert plan.latency.cut >= 0.1
        pf.FlopsTarget(model, x, scales, cut=0.05, of="latency", latency=table)


def test_a_small_share_is_not_nothing(monkeypatch):
    model, x, scales = resnet20()
    with clocks.pretended(monkeypatch):
        table = measured(model, x, step=1)
        plan = pf.plan(model, x, scales, cut=0.02, of="latency", latency=table)
        assert plan.latency.cut_measured == pytest.approx(0.02, abs=0.005)
