"""Run a model once and write down which channels are the same channel.

The real, eager forward runs under a `TorchDispatchMode`; so control flow, structured outputs and
every way to write a module need no special case, and an operator without a rule pins the channels
that flow through it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import TracingError
from . import calls, rules
from .graph import Graph
from .pointwise import pointwise
from .recorder import Recorder, pinned_ids


class _DryRun(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        # The rules themselves compute with ids; those operators are not the model's.
        with torch.utils._python_dispatch._disable_current_modes():
            record(self.recorder, func, args, kwargs, out)
        return out


def record(
    rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    """Apply the rule for one executed operator."""
    name: str = func.overloadpacket.__name__
    plain = name.rstrip("_") if not name.startswith("__") else name
    if not any(rec.value(tensor) is not None for tensor in rules.tensors_in((args, kwargs))):
        if not rules.parameter_view(rec, plain, args, out):
            for tensor in rules.tensors_in((args, kwargs)):
                rec.use_whole(tensor)
        return
    if plain in rules.FORGET:
        return
    rule = _RULES.get(plain)
    first = rec.value(args[0]) is not None if args and isinstance(args[0], Tensor) else False
    if rule is not None:
        rule(rec, args, out)
    elif "batch_norm" in plain and isinstance(out, tuple):
        calls.batch_norm(rec, func._overloadname, args, out[0])
    elif plain in rules.FREE_MOVES:
        rules.movement(rec, func, args, out)
    elif plain in ("view", "_unsafe_view", "reshape") and first:
        rules.view(rec, func, args, out)
    elif plain in rules.CUTS and first:
        rules.CUTS[plain](rec, func, args, out)
    elif plain in rules.SPATIAL and first:
        rules.spatial(rec, func, args, out)
    elif plain in rules.REDUCTIONS and first and isinstance(out, Tensor):
        rules.reduction(rec, func, args, kwargs, out)
    elif plain in rules.SAME and first:
        rules.same(rec, args, out)
    elif (
        (torch.Tag.pointwise in func.tags or plain in rules.POINTWISE)
        and isinstance(out, Tensor)
        and not kwargs.get("out")
    ):
        pointwise(rec, plain, args, out)
    else:
        rules.opaque(rec, func, (args, kwargs), out)


_RULES: Mapping[str, Callable[[Recorder, tuple[Any, ...], Any], None]] = {
    "convolution": calls.convolution,
    "addmm": calls.addmm,
    "mm": calls.mm,
}


def trace(model: nn.Module, example_inputs: Any) -> Graph:
    """The channels of `model`, from one forward in eval mode (and one in train mode where that
    reads further layers).

    Args:
        model: any eager module; left exactly as found (modes, buffers, gradients, random state).
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.

    Raises:
        TracingError: the model is scripted or compiled ahead, its forward fails on these inputs, or
            it returns no tensor.
    """
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise TracingError(
            "the model is scripted (TorchScript): prune the eager model, then script the slim one"
        )
    recorder = Recorder(model)
    with _as_found(model):
        model.eval()
        _run(model, example_inputs, recorder)
        if _unread(model, recorder):
            # Auxiliary heads and the like run in train mode only; they read channels all the same.
            model.train()
            _run(model, example_inputs, recorder)
    graph = recorder.finish()
    graph.unread = tuple(_unread(model, recorder))
    return graph


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """`model` on a tensor, a tuple of positional inputs, or a dict of keyword inputs."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def _run(model: nn.Module, example_inputs: Any, recorder: Recorder) -> None:
    source = recorder.node([])
    recorder.graph.inputs.append(source)
    for tensor in rules.tensors_in(
        example_inputs if isinstance(example_inputs, (tuple, list, dict)) else (example_inputs,)
    ):
        recorder.values[tensor] = recorder.start(pinned_ids(tensor), source)
    try:
        with torch.no_grad(), _DryRun(recorder):
            out = call_model(model, example_inputs)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        mode = "train" if model.training else "eval"
        raise TracingError(
            f"the model's forward failed in {mode} mode on the example inputs: {error}. "
            "Pass example_inputs as the model takes them: a tensor, a tuple of positional or a "
            "dict of keyword inputs"
            + (
                " (with a batch of 2 or more, for layers that only run in train mode)"
                if model.training
                else ""
            )
        ) from error
    outputs = [value for leaf in _leaves(out) if (value := recorder.value(leaf)) is not None]
    if not outputs:
        raise TracingError("the model's output holds no tensor that depends on the example inputs")
    for value in outputs:
        recorder.pin(value.ids, "is an output of the network")
        recorder.graph.outputs.append(value.node)


def _leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _unread(model: nn.Module, recorder: Recorder) -> list[str]:
    """Parameters of layers that never ran."""
    return [name for name, _ in model.named_parameters() if name not in recorder.used]


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Put back train/eval modes, buffers and random state."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted(
        {
            t.device.index or 0
            for t in (*model.parameters(), *model.buffers())
            if t.device.type == "cuda"
        }
    )
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, saved in buffers:
                    if not torch.equal(buffer, saved):
                        buffer.copy_(saved)
