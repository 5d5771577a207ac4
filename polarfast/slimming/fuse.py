"""`fuse`: normalizations folded into the layers before them, for inference."""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..copies import double_copy
from ..errors import ArgumentError, VerificationError
from ..inputs import (
    Inputs,
    Operators,
    call_model,
    device_of,
    dtype_of,
    plain_eager,
    tensors_in,
    unwrap,
)
from ..layers import (
    CONVS,
    NORMS,
    TRANSPOSED,
    PutBack,
    PutBackAlone,
    drop_gate,
    gated_modules,
    multiply_outputs,
    own_forward,
    plain_type,
)
from ..sharding import refuse_sharded
from .verify import compare_networks


@torch.no_grad()
def fuse(model: nn.Module, example_inputs: Any = None, *, verify: bool = True) -> nn.Module:
    """A network for inference: each normalization is folded into the convolution or linear layer
    whose output it alone reads, gates into their layers. What puts channels back still does.

    The result computes what the network computes in eval mode, and is not for training; save the
    slim model itself (`pf.save`) and fuse what was loaded. What cannot be folded (a normalization
    of a sum, one that also activates, a layer that runs twice) is as before.

    Args:
        model: a slim model, or any other; left as found.
        example_inputs: as for `plan`; by default inputs like those that the slim model was made
            with.
        verify: compare the result with `model` in float64 before handing it over.

    Returns:
        A new module in eval mode.

    Raises:
        ArgumentError: the model is sharded, or `example_inputs` are missing.
        VerificationError: the result does not equal the model; that would be a bug.
    """
    model = unwrap(model)
    refuse_sharded(model)
    examples = _examples(model, example_inputs)
    if verify:
        double = double_copy(model).eval()
        report = compare_networks(
            double, _fused(double, examples), examples, torch.float64, claimed=None
        )
        if not report.exact:
            raise VerificationError(
                f"the fused network does not equal the model: {report}. This is a bug in polarfast;"
                " please report the network"
            )
    return _fused(model, examples)


def _examples(model: nn.Module, given: Any) -> Inputs:
    if given is not None:
        return Inputs.of(given)
    spec = getattr(getattr(model, "polarfast_info", None), "inputs", None)
    if not spec:
        raise ArgumentError(
            "example_inputs: pass what the model takes; only models made by this version of pf.slim"
            " remember it"
        )
    return Inputs((spec,))


def _fused(model: nn.Module, examples: Inputs) -> nn.Module:
    own = copy.deepcopy(model).eval()
    for _, module in list(gated_modules(own)):
        assert isinstance(module, nn.Module)
        for tensor in (module.weight, module.bias):
            if isinstance(tensor, Tensor):
                multiply_outputs(module, tensor.data, module.gate.data)
        drop_gate(module)
    if hasattr(own, "polarfast_info"):  # its shapes are no longer a slim model's
        del own.polarfast_info
    inputs = examples.make(device=device_of(own), dtype=dtype_of(own), seed=0)
    for layer_name, norm_name in _pairs(own, inputs):
        layer, norm = own.get_submodule(layer_name), own.get_submodule(norm_name)
        if isinstance(norm, PutBack):
            after: nn.Module = PutBackAlone(norm.put_back_index, norm.put_back_constant)
        else:
            after = nn.Identity()
        _fold(layer, norm)
        own.set_submodule(norm_name, after.eval())
    return own


def _fold(layer: nn.Module, norm: nn.Module) -> None:
    """Let a layer compute what its norm makes of it: factor·(y − mean) + β. (Torch's own
    `fuse_conv_bn_eval` refuses grouped transposed convolutions.)
    """
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm) and isinstance(layer.weight, Tensor)
    assert norm.running_mean is not None and norm.running_var is not None
    wide = torch.promote_types(layer.weight.dtype, torch.float32)
    mean, var = norm.running_mean.to(wide), norm.running_var.to(wide)
    factor = torch.rsqrt(var + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.to(wide)
    own = layer.bias
    bias = (own.to(wide) - mean if isinstance(own, Tensor) else -mean) * factor
    if norm.bias is not None:
        bias = bias + norm.bias.to(wide)
    weight = layer.weight.to(wide, copy=True)
    multiply_outputs(layer, weight, factor)
    kept = layer.weight.requires_grad
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype), kept)
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), kept)


def _pairs(model: nn.Module, inputs: Any) -> list[tuple[str, str]]:
    """Layers and the norms that alone read what they write: names."""
    uses = _Uses(model)
    with plain_eager(), uses:
        call_model(model, inputs)
    found = []
    for run in uses.runs:
        once = uses.layers[run.layer] == 1 and len(run.readers) == 1
        norm = run.readers[0] if once else None
        if norm is not None and uses.norms[norm] == 1:
            found.append((run.layer, norm))
    return found


@dataclass(eq=False)
class _Run:
    """One call of a layer, and who reads its output: names of norms, None for anything else."""

    layer: str
    readers: list[str | None]


class _Uses(Operators):
    """Notes who reads what convolutions and linear layers write.

    Attributes:
        runs: calls of layers that something can be folded into.
        layers, norms: how often each ran.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.runs: list[_Run] = []
        self.layers: Counter[str] = Counter()
        self.norms: Counter[str] = Counter()
        self._written: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._weights: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._means: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for name, module in model.named_modules():
            if _takes(module):
                self._weights[module.weight] = name
            elif _goes(module):
                self._means[module.running_mean] = name

    def operator(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = tensors_in((args, kwargs))
        norm = next((self._means[t] for t in tensors if t in self._means), None)
        if norm is not None:
            self.norms[norm] += 1
        for tensor in tensors:
            if tensor in self._written:
                run = self._written[tensor]
                run.readers.append(norm if tensor is args[0] else None)
        out = func(*args, **kwargs)
        layer = next((self._weights[t] for t in tensors if t in self._weights), None)
        if layer is None:
            return out
        if func.overloadpacket.__name__ == "t":
            self._weights[out] = layer
            return out
        self.layers[layer] += 1
        if isinstance(out, Tensor):
            self._written[out] = _Run(layer, [])
            self.runs.append(self._written[out])
        return out


def _takes(module: nn.Module) -> bool:
    """Whether a norm can be folded into a layer."""
    plain = plain_type(module)
    fits = issubclass(plain, (*CONVS, *TRANSPOSED, nn.Linear)) and own_forward(module)
    weight = module._parameters.get("weight")
    return fits and weight is not None and weight.numel() > 0


def _goes(module: nn.Module) -> bool:
    """Whether a norm does no more than that: y = a·x + b, and has running statistics."""
    if plain_type(module) not in NORMS or getattr(module, "running_mean", None) is None:
        return False
    return not isinstance(module, PutBack) or bool(module.put_back_index.numel())
