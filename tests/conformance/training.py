"""The assertions on a network that is trained further: every parameter, flag and state tensor of
the pruned network against the place in the original that it came from.
"""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from . import checks, oracles
from .case import Case
from .pruners import Pruner

Optimizer = torch.optim.Optimizer
OPTIMIZERS: dict[str, Callable[[Iterable[dict]], Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9, weight_decay=1e-2),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=1e-4, amsgrad=True),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-2),
}


def groups(model: nn.Module) -> list[dict]:
    """Two parameter groups: norms and biases learn more slowly and do not decay."""
    few = [param for param in model.parameters() if param.dim() == 1]
    many = [param for param in model.parameters() if param.dim() > 1]
    return [{"params": many}, {"params": few, "lr": 5e-5, "weight_decay": 0.0}]


def step(model: nn.Module, optimizer: Optimizer, inputs: Tensor) -> None:
    """One step on a loss that reads every output, whatever its size."""
    optimizer.zero_grad()
    outputs = [leaf for leaf in oracles.leaves(model(inputs)) if leaf.requires_grad]
    sum(output.square().mean().log() for output in outputs).backward()
    optimizer.step()


def places(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    """Name -> for every element of a pruned parameter, its flat index in the original's. Found by
    value, which `oracles.randomize` and a training step make unlike each other; for norms by
    their running variance.
    """
    found, vars_before, vars_after = {}, oracles.variances(before), oracles.variances(after)
    originals = dict(before.named_parameters())
    for name, param in after.named_parameters():
        weight = f"{name.rpartition('.')[0]}.weight"
        if weight in vars_after:
            found[name] = _lookup(vars_before[weight], vars_after[weight])
        else:
            found[name] = _lookup(originals[name].detach(), param.detach())
    return found


def _lookup(table: Tensor, values: Tensor) -> Tensor:
    ranked, order = table.flatten().sort()
    assert bool(ranked.diff().gt(0).all()), "two elements are alike"
    wanted, back = values.flatten().sort()  # looked up in order, which takes half as long
    at = torch.searchsorted(ranked, wanted).clamp(max=len(ranked) - 1)
    assert torch.equal(ranked[at], wanted), "an element that the original does not have"
    return torch.empty_like(back).scatter_(0, back, order[at]).view(values.shape)


def trained(case: Case, optimizer: str) -> tuple[nn.Module, Optimizer]:
    """The network after two steps. BatchNorm uses its running statistics, so that a channel that is
    0 stays without influence on all others."""
    model = checks.prepared(case)
    made = OPTIMIZERS[optimizer](groups(model))
    for seed in (11, 12):
        step(model, made, case.inputs(seed=seed))
    return model, made


def check_further_step(pruner: Pruner, case: Case, mode: str, optimizer: str) -> None:
    """A further step of the pruned network moves what is left as the same step of the original."""
    model, made = trained(case, optimizer)
    inputs = case.inputs()
    asked = oracles.half(model, pruner.prunable(model, inputs, mode))
    oracles.set_zero(model, asked, beta=True)
    oracles.silence(model, case.inputs(seed=5))
    asked = oracles.zeros(model, asked)
    original, reference = copy.deepcopy((model, made))
    pruned = pruner.prune(model, inputs, mode, asked, "none", made)
    small = pruned.model
    origin = places(original, small)
    check_groups(original, reference, small, made)
    check_state(original, reference, small, made, origin)
    starts = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in (original, small)]
    step(original, reference, case.inputs(seed=13))
    step(small, made, case.inputs(seed=13))
    wanted, got = dict(original.named_parameters()), dict(small.named_parameters())
    for name, place in origin.items():
        moved = (wanted[name].detach() - starts[0][name]).flatten()[place]
        difference = (got[name].detach() - starts[1][name] - moved).abs().amax()
        assert difference <= 1e-9 * moved.abs().amax(), name


def check_groups(before: nn.Module, old: Optimizer, after: nn.Module, new: Optimizer) -> None:
    """Every parameter is in the group that it was in, and nothing else is."""
    names = {id(param): name for name, param in before.named_parameters()}
    left = dict(after.named_parameters())
    for one, two in zip(old.param_groups, new.param_groups, strict=True):
        wanted = {names[id(param)] for param in one["params"]} & set(left)
        assert {id(left[name]) for name in wanted} == {id(param) for param in two["params"]}
        settings = [{k: v for k, v in group.items() if k != "params"} for group in (one, two)]
        assert settings[0] == settings[1]


def check_state(
    before: nn.Module, old: Optimizer, after: nn.Module, new: Optimizer, origin: dict[str, Tensor]
) -> None:
    """Every state tensor is cut as its parameter is."""
    originals, left = dict(before.named_parameters()), dict(after.named_parameters())
    active = {name for name in origin if originals[name] in old.state}
    assert set(new.state) == {left[name] for name in active}, "state of what is not there"
    for name in active:
        place, state, cut = origin[name], old.state[originals[name]], new.state[left[name]]
        assert set(state) == set(cut)
        for key, value in state.items():
            whole = value.flatten()[place] if value.shape == originals[name].shape else value
            assert torch.equal(cut[key], whole), f"{name}: {key}"


def check_likeness(pruner: Pruner, case: Case, mode: str) -> None:
    """float32, channels_last, frozen parameters, mixed modes, hooks and grads: as found. Then a
    training step in train mode."""
    model, asked, inputs = checks.zeroed(pruner, case, mode, beta=True)
    model = model.float().to(memory_format=torch.channels_last)
    calls: list[str] = []
    for number, (name, module) in enumerate(model.named_modules()):
        module.train(number % 3 == 0)
        for param in module.parameters(recurse=False):
            param.requires_grad_(number % 5 != 0)
        if number % 7 == 1:
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model.register_buffer("extra", torch.arange(3))
    original = copy.deepcopy(model)
    small = pruner.prune(model, inputs.float(), mode, asked, "none").model
    old, new = dict(original.named_parameters()), dict(small.named_parameters())
    assert list(old) == list(new)
    for name, param in new.items():
        assert param.dtype == old[name].dtype and param.grad is None, name
        assert param.requires_grad == old[name].requires_grad, name
        if param.dim() == 4 and param.numel():
            assert param.is_contiguous(memory_format=torch.channels_last), name
    assert torch.equal(small.extra, original.extra)
    was = {name: module.training for name, module in original.named_modules()}
    assert {n: m.training for n, m in small.named_modules() if n in was} == was
    assert {name: b.dtype for name, b in original.named_buffers()}.items() <= {
        name: b.dtype for name, b in small.named_buffers()
    }.items()
    called = []
    for one in (original, small):
        calls.clear()
        oracles.outputs(one, inputs.float())
        called.append(list(calls))
    assert called[0] == called[1]
    small.train()
    step(small, torch.optim.SGD(small.parameters(), 1e-6), case.inputs(batch=4).float())
    assert all(bool(param.isfinite().all()) for param in small.parameters())


def check_again(pruner: Pruner, case: Case, mode: str) -> None:
    """The same channels removed from a network built anew with the same weights give the same
    network, bit for bit; from an averaged (EMA) copy, what the averaged one computes without them.
    """
    beta = not case.exact or pruner.best_fold != "exact"
    trial = checks.run(pruner, case, mode, pruner.best_fold, beta)
    fresh = case.build().double().eval()
    fresh.load_state_dict(trial.original.state_dict())
    twin = pruner.again(fresh, trial.pruned)
    assert oracles.same(twin, trial.pruned.model, trial.probe)
    averaged = average(trial.original)
    oracles.set_zero(averaged, trial.asked, beta)
    if beta:
        oracles.silence(averaged, trial.inputs)
    small = pruner.again(averaged, trial.pruned)
    reference = oracles.masked(averaged, trial.pruned.removed, beta)
    assert oracles.error(reference, small, trial.probe) < oracles.TOLERANCE


@torch.no_grad()
def average(model: nn.Module) -> nn.Module:
    """The exponential moving average that torch keeps of a network whose parameters move."""
    utils = torch.optim.swa_utils
    kept = utils.AveragedModel(model, multi_avg_fn=utils.get_ema_multi_avg_fn(0.5))
    moved = copy.deepcopy(model)
    for param in moved.parameters():
        param += 0.02 * param.std(correction=0) * torch.randn_like(param)
    for source in (model, moved):
        kept.update_parameters(source)
    return kept.module
