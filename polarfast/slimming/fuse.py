"""`fuse`: normalizations folded into the layers before them, for inference."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..copies import copy_of, double_copy
from ..errors import ArgumentError, PlanError, VerificationError
from ..inputs import Inputs, device_of, dtype_of, tensors_in, unwrap
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
from ..running import Operators, call_model, plain_eager, tensors_of
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
        report = compare_networks(double, _fused(double, examples), examples, torch.float64)
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
            "example_inputs: pass what the model takes; only slim models remember it, fused"
            " ones do not"
        )
    examples = Inputs((spec,))
    try:
        examples.make(device=device_of(model), dtype=dtype_of(model), seed=0)
    except PlanError as error:
        raise ArgumentError(
            "example_inputs: pass what the model takes; of inputs whose values have a meaning it "
            "only remembers the sizes"
        ) from error
    return examples


def _fused(model: nn.Module, examples: Inputs) -> nn.Module:
    own = copy_of(model).eval()
    for _, module in list(gated_modules(own)):
        assert isinstance(module, nn.Module)
        for tensor in (module.weight, module.bias):
            if isinstance(tensor, Tensor):
                multiply_outputs(module, tensor.data, module.gate.data)
        drop_gate(module)
    if hasattr(own, "polarfast_info"):  # its shapes are no longer a slim model's
        del own.polarfast_info
    for layer_name, norm_name in _pairs(own, examples):
        layer, norm = own.get_submodule(layer_name), own.get_submodule(norm_name)
        if isinstance(norm, PutBack):
            after: nn.Module = PutBackAlone(norm.put_back_index, norm.put_back_constant)
        else:
            after = nn.Identity()
        _fold(layer, norm)
        for parent in list(own.modules()):  # a module may have several names
            for key, child in parent._modules.items():
                if child is norm:
                    parent._modules[key] = after.eval()
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


def _pairs(model: nn.Module, examples: Inputs) -> list[tuple[str, str]]:
    """Names of layers, and of the norms that alone read what they write, whatever the example."""
    found: list[list[tuple[str, str]]] = []
    for inputs in examples.each(device=device_of(model), dtype=dtype_of(model), seed=0):
        network = copy_of(model)  # a run may change it
        uses = _Uses(network)
        with plain_eager(), uses:
            out = call_model(network, inputs)
        uses.read_by_others(tensors_of(out))
        found.append(uses.pairs())
    return [pair for pair in found[0] if all(pair in others for others in found[1:])]


@dataclass(eq=False)
class _Run:
    """One call of a layer, and who reads its output: names of norms, None for anything else."""

    layer: str
    readers: list[str | None]


class _Uses(Operators):
    """Notes who reads what convolutions and linear layers write."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._runs: list[_Run] = []
        self._layers: Counter[str] = Counter()  # how often each runs
        self._norms: Counter[str] = Counter()  # how often tensors of each are read
        self._written: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        #: weight -> its layer ("": none that a norm can be folded into), whether it was transposed
        self._weights: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._of_norms: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if weight is not None and not isinstance(module, nn.modules.batchnorm._NormBase):
                # Of two modules with one weight neither can change it.
                shared = weight in self._weights
                self._weights[weight] = (name if _takes(module) and not shared else "", False)
            elif _goes(module):
                for key in ("weight", "bias", "running_mean", "running_var"):
                    tensor = getattr(module, key)
                    if tensor is not None:
                        self._of_norms[tensor] = name

    def operator(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kind = func.overloadpacket.__name__
        tensors = tensors_in((args, kwargs))
        norms = {self._of_norms[tensor] for tensor in tensors if tensor in self._of_norms}
        normalizes = len(norms) == 1 and ("batch_norm" in kind or kind == "put_back_norm")
        for norm in norms:
            self._norms[norm] += 1 if normalizes else 2
        norm = next(iter(norms)) if normalizes else None
        for tensor in tensors:
            if tensor in self._written:
                self._written[tensor].readers.append(norm if tensor is args[0] else None)
        out = func(*args, **kwargs)
        for tensor in tensors:
            if tensor in self._weights:
                self._note(kind, tensor, args, out)
        return out

    def _note(self, kind: str, weight: Tensor, args: Any, out: Any) -> None:
        """Note what was done with a layer's weight."""
        layer, transposed = self._weights[weight]
        if kind == "t":
            self._weights[out] = (layer, not transposed)
            return
        if transposed:
            fits = kind in ("mm", "addmm") and weight is args[-1]
        else:
            fits = kind == "convolution" and weight is args[1]
        self._layers[layer] += 1 if fits else 2
        if fits and layer:
            self._written[out] = _Run(layer, [])
            self._runs.append(self._written[out])

    def read_by_others(self, tensors: list[Tensor]) -> None:
        """Note what the network returns."""
        for tensor in tensors:
            if tensor in self._written:
                self._written[tensor].readers.append(None)

    def pairs(self) -> list[tuple[str, str]]:
        """Layers that ran once, and what alone read their output, if that is a norm read once."""
        return [
            (run.layer, norm)
            for run in self._runs
            if len(run.readers) == 1
            and (norm := run.readers[0]) is not None
            and (self._layers[run.layer], self._norms[norm]) == (1, 1)
        ]


def _takes(module: nn.Module) -> bool:
    """Whether a norm can be folded into a layer: torch's own, whose weight and bias are its own."""
    plain = plain_type(module)
    weight = module._parameters.get("weight")
    return (
        issubclass(plain, (*CONVS, *TRANSPOSED, nn.Linear))
        and own_forward(module)
        and "bias" in module._parameters
        and weight is not None
        and weight.numel() > 0
    )


def _goes(module: nn.Module) -> bool:
    """Whether a norm does no more than that: y = a·x + b, by running statistics."""
    if plain_type(module) not in NORMS or getattr(module, "running_mean", None) is None:
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    return not isinstance(module, PutBack) or bool(module.put_back_index.numel())
