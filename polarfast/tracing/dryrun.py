"""Run a model once and write down which channels are the same channel.

The real, eager forward runs under a `TorchDispatchMode`; so control flow, structured outputs and
every way to write a module need no special case, and an operator without a rule pins the channels
that flow through it.
"""

import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..copies import tensors_of_model
from ..errors import TracingError
from ..inputs import Inputs, tensors_in
from ..reproduction import request
from ..running import (
    Operators,
    copied_inputs,
    enlarged,
    first_of,
    modes_kept,
    plain_eager,
    tensors_of,
)
from . import operations
from .graph import Graph
from .operators import record
from .projections import convolution_fits, convolution_shape
from .recorder import Recorder, pinned_ids
from .sizes import SizeTracking


class _RuleError(TracingError):
    """A rule fails, whatever the model is."""


class _DryRun(Operators):
    """Follows the channels through every operator that runs.

    Args:
        recorder: what is told.
        hollow: convolutions return zeros, for a pass whose numbers do not matter.
    """

    def __init__(self, recorder: Recorder, hollow: bool = False) -> None:
        super().__init__()
        self.recorder, self.hollow = recorder, hollow

    def operator(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self.recorder.see(tensors_in((args, kwargs)))
        if self.hollow and func is torch.ops.aten.convolution.default and convolution_fits(args):
            out = args[0].new_zeros(convolution_shape(args))
        else:
            out = func(*args, **kwargs)
        rec = self.recorder
        calls = len(rec.graph.projections), len(rec.graph.norms)
        try:
            # The rules themselves compute with ids; those operators are not the model's.
            with torch.utils._python_dispatch._disable_current_modes():
                record(rec, func, args, kwargs, out)
                if rec.operations is not None and rec.counting and not rec.again:
                    operations.note(rec, func, args, kwargs, calls)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            raise _RuleError(f"polarfast's rule for {func} fails: {error}") from error
        return out


def trace(model: nn.Module, example_inputs: Any, with_operations: bool = False) -> Graph:
    """The channels of `model`, from one forward in eval mode (and one in train mode where that
    reads further layers).

    Args:
        model: any eager module; left exactly as found (modes, buffers, gradients, random state).
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs; or a
            list of several of these, of which each runs.
        with_operations: write down what the first example runs (`Graph.operations`).

    Raises:
        ArgumentError: as `Inputs.of`.
        TracingError: the model is scripted or compiled ahead, a forward was replaced by a function,
            it fails on these inputs, or it returns no tensor.
    """
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise TracingError(
            "the model is scripted (TorchScript): prune the eager model, then script the slim one"
        )
    if any(tensor.is_meta for tensor in tensors_of_model(model).values()):
        raise TracingError(
            "the model is on the meta device, where tensors have no values: make it on a real one, "
            "or model.to_empty(device=...) and load its weights first"
        )
    Inputs.of(example_inputs)  # refuses what are no inputs
    first = first_of(example_inputs)
    if isinstance(first, torch.Tensor) and first.numel() == 0:
        raise TracingError(
            f"example_inputs has shape {list(first.shape)} and no element: give a batch of at least"
            " one"
        )
    recorder = Recorder(model)
    if with_operations:
        recorder.operations = []
    with as_found(model):
        try:
            model.eval()
        except NotImplementedError as error:
            raise TracingError(
                f"the model has no eval mode ({error}), as what torch.export returns: prune the "
                "eager model, then export the slim one"
            ) from error
        _refuse_functions(model)
        with _reported(model, example_inputs):
            _run_all(model, example_inputs, recorder)
    recorder.graph.unrun = _unrun(model, recorder)
    recorder.graph.operations = tuple(recorder.operations or ())
    return recorder.finish()


def _run_all(model: nn.Module, example_inputs: Any, recorder: Recorder) -> None:
    """Every example in eval mode, and one in train mode where that reads further layers."""
    _run(model, example_inputs, recorder)
    for example in example_inputs[1:] if isinstance(example_inputs, list) else ():
        recorder.again = True
        _run(model, example, recorder)
    recorder.again = False
    unread = _unread(model, recorder)
    if unread:
        # Auxiliary heads and the like run in train mode only; they read channels all the same.
        recorder.counting = False
        model.train()
        _run_in_training(model, example_inputs, recorder, unread[0])


@contextmanager
def _reported(model: nn.Module, example_inputs: Any) -> Iterator[None]:
    """Where a rule fails: ask for a report."""
    try:
        yield
    except _RuleError as error:
        found = request(model, example_inputs, "pf.scaling_factors(model, x)")
        raise TracingError(f"{error}; {found}") from error


@contextmanager
def _in_parts(model: nn.Module) -> Iterator[None]:
    """Without oneDNN, in which an LSTM is one operator that no rule takes apart."""
    if not any(isinstance(module, nn.LSTM) for module in model.modules()):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the switch itself speaks of other devices
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def _refuse_functions(model: nn.Module) -> None:
    """Raise TracingError for a forward that copies of the model would share."""
    for name, module in model.named_modules():
        if name and "_orig_mod" in module._modules:
            raise TracingError(
                f"{name} is compiled (torch.compile): prune the network as it is before that, then "
                "compile the slim one"
            )
        if isinstance(vars(module).get("forward"), types.FunctionType):
            raise TracingError(
                f"the forward of {name or 'the model'} was replaced by a function, which goes on "
                "using this model's own layers in every copy of it, slim ones too: make it a method"
                " (model.forward = types.MethodType(function, model), with self for the model), or "
                "write a subclass"
            )


def _run_in_training(
    model: nn.Module, example_inputs: Any, recorder: Recorder, unread: str
) -> None:
    """Which channels are read does not depend on how many images there are and how large; whether
    the forward runs does: auxiliary heads may not work on small images, normalizations in train
    mode not on a single one.
    """
    why = f"{unread} runs in train mode only, if at all"
    graph = recorder.graph
    try:
        recorder.graph = graph.copy()
        _run(model, example_inputs, recorder, why)
        return
    except TracingError as error:
        first = error
    for larger in (1, 2, 4):
        try:
            recorder.graph = graph.copy()
            _run(model, enlarged(example_inputs, larger), recorder, why, hollow=True)
            return
        except TracingError:
            continue
    raise first


#: What a forward may raise beside the usual, on inputs that it does not expect.
_OTHERS = (AssertionError, AttributeError)


def _run(
    model: nn.Module, example_inputs: Any, recorder: Recorder, why: str = "", hollow: bool = False
) -> None:
    source = recorder.node([])
    recorder.graph.inputs.append(source)
    args, kwargs = copied_inputs(example_inputs)
    for tensor in tensors_in((args, kwargs)):
        recorder.values[tensor] = recorder.start(pinned_ids(tensor), source)
    try:
        with plain_eager(), _in_parts(model), SizeTracking(recorder), _DryRun(recorder, hollow):
            out = model(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError, *_OTHERS) as error:
        hint = f" ({why}: a batch of 2 or more may help)" if why else ""
        raise TracingError(
            f"the model's forward failed in {'train' if why else 'eval'} mode on the example "
            f"inputs: {error}. Pass example_inputs as the model takes them: a tensor, a tuple of "
            f"positional or a dict of keyword inputs, without labels{hint}"
        ) from error
    outputs = [value for leaf in tensors_of(out) if (value := recorder.value(leaf)) is not None]
    if not outputs:
        raise TracingError(
            "the model's output holds no tensor that depends on the example inputs: pass inputs "
            "with which it returns one (a detector may need images in which it finds something)"
        )
    for value in outputs:
        recorder.pin(value.ids, "is an output of the network")
        recorder.graph.outputs.append(value.node)


def _unread(model: nn.Module, recorder: Recorder) -> list[str]:
    """Modules none of whose own parameters was used."""
    return [
        name
        for name, module in model.named_modules()
        if name
        and module._parameters
        and any(p is not None for p in module._parameters.values())
        and not any(f"{name}.{key}" in recorder.used for key in module._parameters)
    ]


def _unrun(model: nn.Module, recorder: Recorder) -> dict[str, str]:
    """Modules with parameters of their own, none of which any operator was given (of lists and
    dicts of parameters: not all) -> the name of the first that was not.
    """
    found = {}
    for name, module in model.named_modules():
        own = [param for param in module._parameters.values() if param is not None]
        views = [recorder.view(param) for param in own]
        names = [view.name for view in views if view is not None]
        unseen = [each for each in names if each not in recorder.seen]
        each_alone = isinstance(module, (nn.ParameterList, nn.ParameterDict))
        if unseen and (each_alone or len(unseen) == len(names)):
            found[name] = unseen[0]
    return found


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Put back train/eval modes, buffers (their objects and their values) and random state."""
    stores = [
        (module._buffers, dict(module._buffers))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)  # whose buffers nobody replaces
    ]
    tensors = tensors_of_model(model).values()
    buffers = [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)]
    values = [(buffer, buffer.detach().clone()) for buffer in buffers]
    devices = sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), modes_kept(model):
        try:
            yield
        finally:
            for store, saved in stores:
                store.clear()
                store.update(saved)
            with torch.no_grad():
                for buffer, value in values:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
