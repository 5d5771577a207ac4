"""Why a slim model is not what it should be: what the network does is named, and only what cannot
be the user's asks for a report, with a program that shows it.
"""

import copy
import math
import random
import types

import pytest
import torch
from support.nets import Bottlenecks, Residual, X, chain, conv_bn, prepared
from torch import nn

import polarfast as pf
from polarfast.reproduction import LIMIT, REQUEST
from polarfast.slimming import slim as slimming
from polarfast.tracing import dryrun

CALLS: list[int] = []


class Body(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b = nn.Sequential(*conv_bn(3, 8)), nn.Sequential(*conv_bn(8, 6))
        self.fc, self.between = nn.Linear(6, 4), between

    def forward(self, x):
        x = self.between(self, self.a(x).relu())
        return self.fc(self.b(x).relu().mean((2, 3)))


def slim_of(between, change=lambda model: None):
    model, scales = prepared(lambda: Body(between))
    plan = pf.plan(model, X, scales, "fixed", value=0.0)
    change(model)
    return pf.slim(model, plan)


# --- what the network does


COUNTS = {
    "power": lambda m, x: x * x.shape[1] ** -0.5,
    "square root": lambda m, x: x / math.sqrt(x.size(1)),
    "inverse": lambda m, x: x * (1 / x.shape[1]),
    "share": lambda m, x: x + x.shape[1] * 0.1,
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_network_that_computes_with_the_number_of_channels(name):
    says = r"computes with a number of channels of a\.1\.weight \("
    with pytest.raises(pf.VerificationError, match=says) as error:
        slim_of(COUNTS[name])
    assert REQUEST not in str(error.value) and "verify=False" in str(error.value)


SHOWN = {
    "x / x.shape[1]": lambda m, x: x / x.shape[1],
    "x.shape[1] * x": lambda m, x: x.shape[1] * x,
    "operand": lambda m, x: torch.mul(x, x.shape[1]),
    "all elements": lambda m, x: x.sum((2, 3), keepdim=True) / (x[0, :, 0, 0].numel()) + x,
}


@pytest.mark.parametrize("name", SHOWN)
def test_where_a_tensor_is_given_that_number_it_is_seen_at_once(name):
    scales = pf.scaling_factors(Body(SHOWN[name]), X.float())
    assert "their number is an argument" in scales.pinned["a.1.weight"]


HIDDEN = {
    "float first": lambda m, x: x * (1.0 / x.shape[1]),
    "attribute": lambda m, x: x / m.a[0].out_channels,
    "weight": lambda m, x: x * m.a[1].weight.numel(),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_number_that_does_not_show_is_found_out_all_the_same(name):
    """The slim model's numbers are right in a network of the original's width."""
    with pytest.raises(pf.VerificationError, match="code computes with a number of ch") as error:
        slim_of(HIDDEN[name])
    assert REQUEST not in str(error.value)


def test_where_that_cannot_be_found_out_it_is_not_called_a_bug_outright():
    """A bias is created, for which the original has no place."""

    class Bare(Body):
        def __init__(self, between):
            super().__init__(between)
            self.b = nn.Conv2d(8, 6, 1, bias=False)

    model, scales = prepared(lambda: Bare(HIDDEN["float first"]))
    plan = pf.plan(model, X, scales, "fixed", value=0.0)
    with pytest.raises(pf.VerificationError, match="Unless the network's code goes by a number"):
        pf.slim(model, plan)


def test_a_number_of_channels_that_is_only_looked_at_does_no_harm():
    seen = []

    def between(model, x):
        seen.append(float(x.shape[1]) / 2)
        assert x.shape[1] / 2 > 1
        return x

    assert slim_of(between).a[0].out_channels < 8 and seen


@pytest.mark.parametrize(
    "between",
    [lambda m, x: x * (CALLS.append(0) or len(CALLS)), lambda m, x: x * random.random()],
    ids=["counter", "python's numbers"],
)
def test_a_network_that_is_not_the_same_twice(between):
    with pytest.raises(pf.VerificationError, match="another output when it runs a second") as error:
        slim_of(between)
    assert REQUEST not in str(error.value)


def test_a_network_whose_code_was_changed_after_the_plan():
    def change(model):
        model.between = lambda m, x: x.flip(1)

    with pytest.raises(pf.VerificationError, match="has changed since .*make the plan anew$") as e:
        slim_of(lambda m, x: x, change)
    assert REQUEST not in str(e.value)


def test_a_hook_that_goes_by_a_width():
    def hooked():
        model = Body(lambda m, x: x)
        model.a.register_forward_hook(lambda module, args, out: out * len(module[1].weight))
        return model

    model, scales = prepared(hooked)
    plan = pf.plan(model, X, scales, "fixed", value=0.0)
    with pytest.raises(
        pf.VerificationError, match=r"Without the forward hooks on a it is"
    ) as error:
        pf.slim(model, plan)
    assert REQUEST not in str(error.value)
    assert len(model.a._forward_hooks) == 1


# --- what is ours


class Functional(nn.Module):
    """Operators and a parameter of its own; two inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Sequential(*conv_bn(3, 8)), nn.Sequential(*conv_bn(8, 6))
        self.scale, self.fc = nn.Parameter(torch.rand(6, 1, 1)), nn.Linear(6, 4)

    def forward(self, x, more):
        x = nn.functional.relu(self.b(self.a(x).relu()) * self.scale)
        return self.fc(x.mean((2, 3))) + more.sum(1, keepdim=True)


class Branching(Functional):
    """torch.fx cannot follow it."""

    def forward(self, x, more):
        if x.sum() > 1e9:
            return more
        return super().forward(x, more)


PAIR = (X, torch.randint(0, 5, (3, 7)))
REBUILT = {
    "chain": (chain, X, "keep"),
    "residual": (Residual, X, "expand"),
    "two inputs": (Functional, PAIR, "keep"),
    "named inputs": (Functional, {"x": PAIR[0], "more": PAIR[1]}, "keep"),
}


def broken(monkeypatch):
    """From now on, one tensor of every slim model is wrong."""
    write = slimming.write_edits

    def wrong(*args):
        edits = write(*args)
        name = next(iter(edits.tensors))
        edits.tensors[name] = edits.tensors[name] + 0.1
        return edits

    monkeypatch.setattr(slimming, "write_edits", wrong)


def failed(build, x, residual):
    """A network, its plan, and the program that its failure prints."""
    torch.manual_seed(0)
    model = build().double().eval()
    scales = pf.scaling_factors(model, x, residual=residual)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.normal_(0, 1)
        for gamma in scales.values():
            gamma[::2] = 0
    plan = pf.plan(model, x, scales, "fixed", value=0.0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(pf.VerificationError) as error:
        pf.slim(model, plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    told, _, program = str(error.value).partition(f"{REQUEST}:\n\n")
    assert told.startswith("the slim model is not what the plan says") and program
    assert len(program) <= LIMIT
    return model, plan, program


def run(program, **names):
    exec(compile(program, "report", "exec"), names)
    return types.SimpleNamespace(**names)


@pytest.mark.parametrize("name", REBUILT)
def test_the_program_of_a_report_fails_in_the_same_way(name, monkeypatch):
    with monkeypatch.context() as patch:
        broken(patch)
        _, _, program = failed(*REBUILT[name])
        with pytest.raises(pf.VerificationError, match="not what the plan says"):
            run(program)
    run(program)  # and no longer once the fault is mended


def test_a_fault_in_a_network_that_counts_is_still_ours(monkeypatch):
    broken(monkeypatch)
    with pytest.raises(pf.VerificationError, match=REQUEST.replace("'", ".")):
        slim_of(COUNTS["square root"])


@pytest.mark.parametrize("build", [Branching, Bottlenecks], ids=["branching", "large"])
def test_what_the_program_lacks_is_said(build, monkeypatch, tmp_path):
    x = PAIR if build is Branching else X
    with monkeypatch.context() as patch:
        broken(patch)
        if build is Bottlenecks:
            patch.setattr("polarfast.reproduction.LIMIT", 850)
        model, plan, program = failed(build, x, "keep")
        assert len(program) <= (LIMIT if build is Branching else 850)
        assert f"TO BE FILLED IN: the code that makes the network ({build.__module__}." in program
        filled = program.replace("model = ...", "model = given")
        if build is Bottlenecks:
            assert "TO BE ATTACHED: the plan" in program
            (tmp_path / "plan.json").write_text(plan.to_json())
            patch.chdir(tmp_path)
        with pytest.raises(pf.VerificationError, match="not what the plan says"):
            run(filled, given=copy.deepcopy(model).float())
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        run(filled, given=copy.deepcopy(model).float())


@pytest.mark.parametrize("name", REBUILT)
def test_a_rule_that_fails_asks_for_a_report_too(name, monkeypatch):
    build, x, _ = REBUILT[name]
    record = dryrun.record

    def wrong(recorder, func, *rest):
        if func is torch.ops.aten.relu.default:
            raise KeyError("nothing there")
        record(recorder, func, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(dryrun, "record", wrong)
        with pytest.raises(pf.TracingError, match="rule for aten.relu.default fails") as error:
            pf.scaling_factors(build().double(), x)
        program = str(error.value).partition(f"{REQUEST}:\n\n")[2]
        assert 0 < len(program) <= LIMIT
        with pytest.raises(pf.TracingError, match="rule for aten.relu.default fails"):
            run(program)
    assert len(run(program).model.state_dict()) == len(build().state_dict())
