"""Inputs whose values have a meaning, several examples, and networks that draw random numbers."""

import copy
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from support.nets import zero
from torch import nn
from torchvision.ops import roi_align

import polarfast as pf
from polarfast.tracing.meaning import inputs_of, meaning


def block(c_in, c_out, kernel=3):
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())


def half(model, inputs, examples=None):
    """Settled, half of γ at 0, and its plan."""
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    settle_with(model, inputs)
    scales = pf.scaling_factors(model, examples or inputs)
    zero(scales)
    return pf.plan(model, examples or inputs, scales, "fixed", value=0.0)


def settle_with(model, inputs):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias)
            module.momentum = 1.0
    model.train()(*inputs)
    model.eval()


def close(model, slim, *inputs):
    with torch.no_grad():
        torch.testing.assert_close(slim(*inputs), model(*inputs), rtol=1e-3, atol=1e-4)


class Regions(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.out = nn.Sequential(block(3, 16), block(16, 8)), nn.Linear(72, 4)

    def forward(self, x, boxes):
        return self.out(roi_align(self.body(x), boxes.to(x.dtype), 3).flatten(1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_boxes_are_used_as_given(dtype):
    """Others would be outside of the image, and their batch index outside of memory."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 24, 24)
    boxes = torch.tensor([[0, 1, 1, 20, 20], [1, 3, 4, 22, 21]], dtype=dtype)
    model = Regions()
    plan = half(model, (x, boxes))
    close(model, pf.slim(model, plan), x, boxes)
    assert meaning(model, (x, boxes)) == (frozenset({1}) if dtype.is_floating_point else set())
    # Read from a file, the plan has no boxes.
    read = pf.PruningPlan.from_json(plan.to_json())
    with pytest.raises(pf.PlanError, match=r"have a meaning.*slim\(model, plan, inputs="):
        pf.slim(model, read)
    close(model, pf.slim(model, read, inputs=(x, boxes)), x, boxes)


class Masked(nn.Module):
    """Padded sequences: what lies behind each length is 0."""

    def __init__(self):
        super().__init__()
        self.a, self.na = nn.Conv1d(8, 24, 5, padding=2), nn.BatchNorm1d(24)
        self.b, self.nb = nn.Conv1d(24, 16, 1), nn.BatchNorm1d(16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x, lengths):
        places = torch.arange(x.shape[2], device=x.device)
        mask = (places[None] < lengths[:, None]).unsqueeze(1)
        x = F.relu(self.na(self.a(x))) * mask
        return self.fc(F.relu(self.nb(self.b(x))).mean(2))


class Switched(nn.Module):
    """Features are let through where the image is bright."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = block(3, 16), block(16, 12, 1), nn.Linear(12, 4)

    def forward(self, x):
        bright = (x.mean((1, 2, 3), keepdim=True) > 0).to(x.dtype)
        return self.fc(self.b(self.a(x) * bright).mean((2, 3)))


class Conditioned(nn.Module):
    """Features are scaled by what is looked up for a label."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = block(3, 16), block(16, 12, 1), nn.Linear(12, 4)
        self.table = nn.Embedding(5, 1)

    def forward(self, x, label):
        return self.fc(self.b(self.a(x) * self.table(label)[:, :, None, None]).mean((2, 3)))


class Indexed(Conditioned):
    """The same, by indexing."""

    def forward(self, x, label):
        factor = self.table.weight[label][:, :, None, None]
        return self.fc(self.b(self.a(x) * factor).mean((2, 3)))


IMAGES = torch.rand(4, 3, 12, 12) + 0.5
LABELS = torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (Masked, (torch.randn(4, 8, 30), torch.full((4,), 30))),
        (Switched, (IMAGES,)),
        (Conditioned, (IMAGES, LABELS)),
        (Indexed, (IMAGES, LABELS)),
    ],
)
def test_what_depends_on_an_input_is_no_constant(build, inputs):
    """Though it is the same in all of the examples."""
    torch.manual_seed(0)
    model = build()
    plan = half(model, inputs)
    assert any("depends on the input" in why for why in plan.inexact.values())
    close(model, pf.slim(model, plan), *inputs)


class Written(nn.Module):
    """An activation function written with a comparison: decides over what layers made."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = block(3, 16), block(16, 12, 1), nn.Linear(12, 4)

    def forward(self, x):
        x = self.a[1](self.a[0](x))
        return self.fc(self.b(torch.where(x > 0, x, 0.1 * x)).mean((2, 3)))


def test_comparisons_of_constants_are_constant():
    torch.manual_seed(0)
    model = Written()
    plan = half(model, IMAGES)
    assert not plan.inexact
    close(model, pf.slim(model, plan), IMAGES)


class Batch(nn.Module):
    """Notes how many samples it runs on; so many frames are one."""

    seen: ClassVar[list[int]] = []

    def __init__(self, frames):
        super().__init__()
        self.a, self.b, self.fc = block(3, 16), block(16, 8), nn.Linear(8, 4)
        self.frames = frames

    def forward(self, x):
        self.seen.append(len(x))
        x = self.b(self.a(x))
        return self.fc(x.view(-1, self.frames, *x.shape[1:]).mean((1, 3, 4)))


def test_a_large_batch_costs_no_more_than_a_small_one():
    """Constants and the slim model are checked on two samples of it."""
    torch.manual_seed(0)
    x, model = torch.randn(64, 3, 8, 8), Batch(1)
    plan = half(model, x)
    Batch.seen.clear()
    plan = pf.plan(model, x, pf.scaling_factors(model, x), "fixed", value=0.0)
    slim = pf.slim(model, plan)
    large = [count for count in Batch.seen if count > 3]
    assert large == [64, 64, 64]  # two traces, and one look at whether samples are samples
    assert len(Batch.seen) > 5
    assert plan.inputs["shape"] == [64, 3, 8, 8]
    close(model, slim, x)
    Batch.seen.clear()
    pf.slim(model, pf.PruningPlan.from_json(plan.to_json()))
    assert [count for count in Batch.seen if count > 3] == [64, 64]


def test_a_batch_that_cannot_be_smaller_stays():
    torch.manual_seed(0)
    x, model = torch.randn(16, 3, 8, 8), Batch(8)
    plan = half(model, x)
    Batch.seen.clear()
    slim = pf.slim(model, plan)
    assert {count for count in Batch.seen if count > 2} == {16}
    close(model, slim, x)


class TimeFirst(nn.Module):
    """(T, N, C): the first dimension is no batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(8, 16, 5, padding=2), nn.BatchNorm1d(16)
        self.pool, self.out = nn.AvgPool1d(3, 1, 1), nn.Conv1d(16, 4, 1)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x.permute(1, 2, 0))))
        return self.out(self.pool(x)).permute(2, 0, 1)


class OneByOne(TimeFirst):
    """The same of a batch of images."""

    def forward(self, x):
        return super().forward(x.flatten(2).permute(2, 0, 1)).permute(1, 2, 0)


def test_only_samples_can_be_left_out():
    torch.manual_seed(0)
    sequence, images = torch.randn(30, 4, 8), torch.randn(30, 8, 4, 4)
    assert not inputs_of(TimeFirst(), sequence).divisible
    for given in (images, images.double()):
        model = OneByOne().to(given.dtype)
        assert inputs_of(model, given).divisible
        assert inputs_of(model, given).few().specs[0]["shape"] == [2, 8, 4, 4]
    assert not inputs_of(OneByOne().bfloat16(), images.bfloat16()).divisible  # too coarse to tell
    assert not inputs_of(OneByOne(), images[:2]).divisible


@pytest.mark.parametrize(
    "output",
    [
        lambda y: y > 0, lambda y: y.argmax(1), lambda y: torch.complex(y, y), lambda y: y[:, :0],
        lambda y: (y, {"sign": y.sign().bool()}),
    ],
)  # fmt: skip
def test_samples_of_any_dtype_can_be_left_out(output):
    class Net(OneByOne):
        def forward(self, x):
            return output(super().forward(x))

    torch.manual_seed(0)
    assert inputs_of(Net(), torch.randn(30, 8, 4, 4)).divisible


@pytest.mark.parametrize("output", [lambda y: y > y.mean(0), lambda y: y.argmax(0)])
def test_samples_that_are_compared_are_all_needed(output):
    class Net(OneByOne):
        def forward(self, x):
            return output(super().forward(x))

    torch.manual_seed(0)
    assert not inputs_of(Net(), torch.randn(30, 8, 4, 4)).divisible


class Tasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(block(3, 16), block(16, 12))
        self.first, self.second = nn.Conv2d(12, 4, 1), nn.Conv2d(12, 6, 1)

    def forward(self, x, task=0):
        x = self.body(x)
        return self.second(x) if task else self.first(x)


def test_modules_that_never_ran_are_named():
    torch.manual_seed(0)
    model, x = Tasks(), torch.randn(2, 3, 12, 12)
    with pytest.warns(UserWarning, match="1 modules did not run on the example inputs: second"):
        scales = pf.scaling_factors(model, x)
    assert scales.pinned["second.weight"] == "did not run on the example inputs"
    zero(scales)
    plan = pf.plan(model.eval(), x, scales, "fixed", value=0.0)
    assert "second.weight: did not run" in str(plan)
    slim = pf.slim(model, plan)
    close(model, slim, x)
    with pytest.raises(pf.PlanError, match="reads 12 channels and is given 6: it did not run"):
        slim(x, 1)


class Domains(nn.Module):
    """A norm for each domain, of which one runs."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(16)])

    def forward(self, x, domain=0):
        return self.out(F.relu(self.norms[domain](self.conv(x))))


def test_a_domain_that_never_ran_is_named():
    torch.manual_seed(0)
    model, x = Domains(), torch.randn(2, 3, 12, 12)
    with pytest.warns(UserWarning, match=r"1 modules did not run on the example inputs: norms\.1"):
        plan = half(model, x)
    assert "norms.1.weight: did not run" in str(plan)
    slim = pf.slim(model, plan)
    close(model, slim, x)
    with pytest.raises(pf.PlanError, match=r"reads 16 channels and is given \d+: it did not run"):
        slim(x, 1)


class Bank(nn.Module):
    """Weights that an input chooses among."""

    def __init__(self):
        super().__init__()
        self.first, self.last = block(3, 16), nn.Sequential(block(8, 8), nn.AdaptiveAvgPool2d(1))
        self.bank = nn.ParameterList([nn.Parameter(torch.randn(8, 16, 1, 1)) for _ in range(3)])

    def forward(self, x, which):
        return self.last(F.conv2d(self.first(x), self.bank[int(which)]))


def test_parameters_that_were_not_chosen_are_named():
    torch.manual_seed(0)
    x, model = torch.randn(2, 3, 8, 8), Bank().eval()
    with pytest.warns(UserWarning, match="1 modules did not run on the example inputs: bank"):
        scales = pf.scaling_factors(model, (x, torch.tensor(1)))
    assert scales.pinned["bank.0"] == "did not run on the example inputs"
    examples = [(x, torch.tensor(which)) for which in range(3)]
    slim = pf.slim(model, half(model, examples[0], examples))
    for example in examples:
        close(model, slim, *example)


class Optional(nn.Module):
    """Works with and without a mask."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = block(3, 16), block(16, 8, 1), nn.Linear(8, 4)

    def forward(self, x, mask=None):
        x = self.a(x)
        return self.fc(self.b(x if mask is None else x * mask).mean((2, 3)))


@pytest.mark.parametrize("named", [False, True])
def test_examples_with_and_without_an_optional_input(named):
    """What the mask hides is no constant; without it nothing shows that."""
    torch.manual_seed(0)
    x, mask = torch.randn(2, 3, 8, 8), (torch.rand(2, 1, 8, 8) < 0.5).float()
    model = Optional()
    alone = half(model, x)
    assert not alone.inexact
    examples = [{"x": x}, {"x": x, "mask": mask}] if named else [x, (x, mask), (x, None)]
    plan = half(model, x, examples)
    assert "depends on the input" in plan.inexact["b.0.weight"]
    pf.slim(model, plan)
    report = pf.verify(model, pf.slim(model, plan), plan, examples)
    assert not report.exact


def test_an_example_of_each_use():
    torch.manual_seed(0)
    model, x = Tasks(), torch.randn(2, 3, 12, 12)
    plan = half(model, x, examples=[(x, 0), (x, 1)])
    slim = pf.slim(model, plan)
    for task in (0, 1):
        close(model, slim, x, task)
    with pytest.raises(pf.ArgumentError, match=r"example_inputs\[1\] has other inputs"):
        pf.plan(model, [(x, 0), (0, x)], pf.scaling_factors(model, (x, 0)))
    with pytest.raises(pf.ArgumentError, match="at least one example"):
        pf.plan(model, [], pf.scaling_factors(model, (x, 0)))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = block(3, 16), block(16, 12), nn.Conv2d(12, 3, 1)
        self.strength = nn.Parameter(torch.rand(16, 1, 1))

    def forward(self, x):
        x = self.a(x)
        noise = torch.randn(x.shape[0], 1, *x.shape[2:], dtype=x.dtype, device=x.device)
        return self.out(self.b(x + self.strength * noise))


def test_the_same_random_numbers_on_both_sides():
    torch.manual_seed(0)
    model, x = Noisy(), torch.randn(2, 3, 12, 12)
    plan = half(model, x)
    state = torch.get_rng_state()
    slim = pf.slim(model, plan)
    assert pf.verify(model, slim, plan, x).exact
    assert torch.equal(torch.get_rng_state(), state)


class OwnNoise(Noisy):
    def forward(self, x):
        x = self.a(x)
        return self.out(self.b(x * torch.rand_like(x)))


def test_random_numbers_that_follow_the_channels_are_not_called_a_bug():
    torch.manual_seed(0)
    model, x = OwnNoise(), torch.randn(2, 3, 12, 12)
    plan = half(model, x)
    with pytest.raises(pf.VerificationError, match="draws random numbers in eval mode") as error:
        pf.slim(model, plan)
    assert "bug" not in str(error.value)


def test_a_plan_that_is_not_exact_says_so():
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="pf.plan: .*1 layer.*b.0.weight.*depends on the input"):
        plan = half(Switched(), IMAGES)
    assert "not exact: b.0.weight: depends on the input" in str(plan)


def test_a_forward_that_copies_would_share_is_refused():
    model = nn.Sequential(block(3, 16), block(16, 8), nn.Conv2d(8, 3, 1))
    layers = list(model)

    def forward(x):
        for layer in layers:
            x = layer(x)
        return x

    model.forward = forward
    with pytest.raises(pf.TracingError, match="forward of the model was replaced by a function"):
        pf.scaling_factors(model, torch.randn(2, 3, 12, 12))


def test_an_optimizer_of_another_model_is_refused():
    model, x = (
        nn.Sequential(block(3, 16), block(16, 8), nn.Conv2d(8, 3, 1)),
        torch.randn(2, 3, 9, 9),
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    copied = copy.deepcopy(model)
    plan = half(copied, x)
    before = [*optimizer.param_groups[0]["params"]]
    with pytest.raises(pf.PlanError, match="none of this model's parameters"):
        pf.slim(copied, plan, optimizer=optimizer)
    assert all(a is b for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))


class Blurred(nn.Module):
    """A depthwise convolution without a norm between a pruned layer and its reader."""

    def __init__(self, alike, groups="module"):
        super().__init__()
        self.a, self.b, self.fc = block(3, 16), block(16, 12, 1), nn.Linear(12, 5)
        self.blur = nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False)
        self.groups, self.channels = groups, 16
        if alike:
            taps = torch.tensor([1.0, 2.0, 1.0])
            self.blur.weight.data.copy_((taps[:, None] * taps / 16).expand(16, 1, 3, 3))
        if groups != "module":
            self.register_buffer("taps", self.blur.weight.detach().clone())
            del self.blur

    def forward(self, x):
        x = self.a(x)
        if self.groups == "module":
            x = self.blur(x)
        else:
            groups = x.shape[1] if self.groups == "asked" else self.channels
            x = F.conv2d(x, self.taps, stride=2, padding=1, groups=groups)
        return self.fc(self.b(x).mean((2, 3)))


@pytest.mark.parametrize("groups", ["module", "asked"])
def test_a_constant_through_a_depthwise_convolution_without_a_norm(groups):
    torch.manual_seed(0)
    model, x = Blurred(alike=True, groups=groups), torch.randn(4, 3, 16, 16)
    plan = half(model, x)
    assert len(plan.kept["a.1.weight"]) == 8 and not plan.inexact
    slim = pf.slim(model, plan)
    close(model, slim, x)
    close(model, slim, torch.randn(2, 3, 31, 20))


def test_taps_of_each_channel_s_own_are_named_or_the_channel_stays():
    """As in a separable convolution: what several channels leave behind has several borders. One
    channel alone could be replaced by a constant one only, and no channel would be saved.
    """
    for gone, named in ((1, False), (8, True)):
        torch.manual_seed(0)
        model, x = Blurred(alike=False), torch.randn(4, 3, 16, 16)
        settle_with(model, (x,))
        scales = pf.scaling_factors(model, x)
        with torch.no_grad():
            scales["a.1.weight"][:gone] = 0
        plan = pf.plan(model, x, scales, "fixed", value=0.0)
        assert ("b.0.weight" in plan.inexact) == named
        assert (len(plan.kept["a.1.weight"]) < 16) == named
        slim = pf.slim(model, plan)
        if not named:
            close(model, slim, x)
            close(model, slim, torch.randn(2, 3, 31, 20))


def test_groups_that_the_code_fixes_pin():
    model, x = Blurred(alike=True, groups="fixed"), torch.randn(4, 3, 16, 16)
    scales = pf.scaling_factors(model, x)
    assert "fixes the groups" in scales.pinned["a.1.weight"] and "b.1.weight" in scales
