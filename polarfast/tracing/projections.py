"""Rules for the operators that read channels: convolutions, linear layers, batch normalization."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..inputs import tensors_in
from .graph import NormCall, ProjectionCall
from .recorder import ParameterView, Recorder, spread
from .sizes import channels_of


def convolution(rec: Recorder, args: tuple[Any, ...], out: Tensor) -> None:
    """aten.convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding,
    groups)
    """
    x, weight, bias, _, padding, _, transposed, _, groups = args
    project(
        rec,
        x,
        weight,
        bias,
        out,
        groups=groups,
        transposed=transposed,
        padded=any(padding),
        taps=math.prod(weight.shape[2:]),
        # A transposed convolution's multiplications are counted over its input positions.
        positions=(x if transposed else out).numel() // (x if transposed else out).shape[1],
    )


def convolution_shape(args: tuple[Any, ...]) -> list[int]:
    """The shape of what aten.convolution (arguments as above) returns."""
    x, weight, _, stride, padding, dilation, transposed, output_padding, groups = args
    shape = [x.shape[0], weight.shape[1] * groups if transposed else weight.shape[0]]
    for i, size in enumerate(x.shape[2:]):
        s, p, d = (each[i % len(each)] for each in (stride, padding, dilation))
        reach = d * (weight.shape[2 + i] - 1)
        if transposed:
            shape.append((size - 1) * s - 2 * p + reach + output_padding[i] + 1)
        else:
            shape.append((size + 2 * p - reach - 1) // s + 1)
    return shape


def convolution_fits(args: tuple[Any, ...]) -> bool:
    """Whether the input of aten.convolution has the channels that its weight reads."""
    x, weight, *_, transposed, _, groups = args
    return bool(x.shape[1] == (weight.shape[0] if transposed else weight.shape[1] * groups))


def addmm(rec: Recorder, args: tuple[Any, ...], out: Tensor) -> None:
    """aten.addmm(bias, input, weight.t())"""
    bias, x, weight_t = args[:3]
    _linear(rec, x, weight_t, bias, out)


def mm(rec: Recorder, args: tuple[Any, ...], out: Tensor) -> None:
    """aten.mm(input, weight.t())"""
    _linear(rec, args[0], args[1], None, out)


def _linear(rec: Recorder, x: Tensor, weight_t: Tensor, bias: Tensor | None, out: Tensor) -> None:
    view = rec.view(weight_t)
    if rec.value(x) is None or view is None or view.dims != (1, 0):
        unknown_projection(rec, (x, weight_t, bias), out)
        return
    project(rec, x, view, bias, out, positions=out.numel() // out.shape[-1])


def project(
    rec: Recorder,
    x: Tensor,
    weight: Tensor | ParameterView,
    bias: Tensor | None,
    out: Tensor,
    *,
    positions: int,
    groups: int = 1,
    transposed: bool = False,
    padded: bool = False,
    taps: int = 1,
) -> None:
    """A convolution or linear layer: reads the channels along dimension 1 and writes new ones."""
    value = rec.value(x)
    view = weight if isinstance(weight, ParameterView) else _as_it_is(rec, weight)
    bias_view = _as_it_is(rec, bias)
    if value is None or view is None or (bias is not None and bias_view is None):
        unknown_projection(rec, (x, weight, bias), out)
        return
    inputs = rec.channels(value, 1)
    depthwise = groups > 1 and groups == inputs.numel()
    if depthwise and view.name not in rec.convolutions and channels_of(rec.groups) is None:
        rec.pin(value.ids, f"the network's code fixes the groups of its convolution by {view.name}")
        for operand in (weight, bias):
            rec.use_whole(operand)
        rec.put_pinned(out, [value])
        return
    if view.name in rec.queries:
        rec.pin(
            value.ids,
            f"is the query of {rec.queries[view.name]}, a torch.nn.MultiheadAttention, whose input "
            "is as wide as its heads together",
        )
    if depthwise:
        outputs = inputs.repeat_interleave(out.shape[1] // groups)
        rec.axis(view.name, 0, inputs if transposed else outputs)
    else:
        out_dim, in_dim = (1, 0) if transposed else (0, 1)
        outputs = _writes(rec, view.name, out.shape[1])
        for dim, ids in ((out_dim, outputs), (in_dim, inputs)):
            rows = ids.view(groups, -1)
            rec.balance(rows)  # groups stay equal in size
            rec.axis(view.name, dim, rows if dim == 1 and groups > 1 else ids)
    if bias_view is not None:
        rec.axis(bias_view.name, 0, outputs)
    node = rec.node([value.node])
    call = ProjectionCall(
        weight=view.name,
        bias=bias_view.name if bias_view else None,
        inputs=inputs,
        outputs=outputs,
        groups=groups,
        depthwise=depthwise,
        transposed=transposed,
        padded=padded,
        counted=rec.counting,
        positions=positions,
        taps=taps,
    )
    rec.put(out, spread(outputs, out.shape, 1), [value])
    rec.written[out] = _place(rec, call)
    tracked = rec.values[out]
    tracked.node, tracked.depth = node, value.depth + 1


def _as_it_is(rec: Recorder, tensor: Tensor | None) -> ParameterView | None:
    """A parameter, unless it is transposed or repeated."""
    view = rec.view(tensor)
    return view if view is not None and view.dims == tuple(range(len(view.dims))) else None


def _place(rec: Recorder, call: ProjectionCall) -> int:
    """Where a call is among the graph's: where it was, if a further example makes the same call."""
    calls = rec.graph.projections
    if rec.again:
        for index, known in enumerate(calls):
            same = known.weight == call.weight and torch.equal(known.inputs, call.inputs)
            if same and torch.equal(known.outputs, call.outputs):
                return index
    calls.append(call)
    return len(calls) - 1


def _writes(rec: Recorder, weight: str, count: int) -> Tensor:
    """Ids of the channels that a weight writes: the same ones at each of its calls."""
    for call in rec.graph.projections:
        if call.weight == weight:
            return call.outputs
    return rec.fresh(count)


def unknown_projection(rec: Recorder, operands: tuple[Any, ...], out: Tensor) -> None:
    """A product whose weight is not a parameter of the model."""
    reason = "read by a product whose weight is not a plain parameter (computed, or an activation)"
    refuse(rec, operands, out, reason)


def refuse(rec: Recorder, operands: tuple[Any, ...], out: Any, reason: str) -> None:
    """Nothing that flows into this can be removed."""
    sources = [value for operand in operands if (value := rec.value(operand)) is not None]
    for value in sources:
        rec.pin(value.ids, reason)
    for operand in operands:
        rec.use_whole(operand)
    for result in tensors_in(out) if sources else ():
        rec.put_pinned(result, sources)


def batch_norm(rec: Recorder, overload: str, args: tuple[Any, ...], outs: Any) -> None:
    """aten.native_batch_norm and siblings: (input, weight, bias, running_mean, running_var, …) to
    (output, the batch's mean and deviation in train mode, …).
    """
    out, *statistics = outs
    x, tensors = args[0], list(args[1:3] if overload == "no_stats" else args[1:5])
    value = rec.value(x)
    views = [_as_it_is(rec, tensor) for tensor in tensors]
    gates = {view.gate for view in views[:2] if view}
    if (
        value is None
        or len(gates) > 1
        or any(
            tensor is not None and view is None for tensor, view in zip(tensors, views, strict=True)
        )
    ):
        refuse(
            rec, (x, *tensors), outs, "normalized with parameters that are computed, not plain ones"
        )
        return
    inputs = rec.channels(value, 1)
    weight, bias, mean, var = names = [
        *(view.name if view else None for view in views),
        *[None] * (4 - len(views)),
    ]
    previous = [call for call in rec.graph.norms if weight is not None and call.weight == weight]
    gate = views[0].gate if views[0] else None
    for name in (*names, gate):
        if name is not None:
            rec.axis(name, 0, inputs)
    # One id per distinct channel: a repeated input channel stays one channel on the way out.
    outputs = previous[0].outputs if previous else _renamed(rec, inputs)
    node = rec.node([value.node])
    source = rec.written.get(x)
    rec.graph.norms.append(
        NormCall(weight, bias, mean, var, inputs, outputs, source, value.depth, node, gate)
    )
    rec.put(out, spread(outputs, out.shape, 1), [value])
    rec.values[out].node = node
    rec.normed[out] = len(rec.graph.norms) - 1
    for each in statistics:
        if each.shape == inputs.shape:
            rec.put(each, inputs, [value])


def gate(rec: Recorder, x: Tensor, factor: Tensor, out: Tensor) -> None:
    """An activation times a gate: part of the normalization that wrote it, or a call of its own."""
    value, view = rec.values[x], rec.views[factor]
    name = view.name
    dim = out.dim() - factor.dim() + (view.dims.index(0) if 0 in view.dims else 0)
    index = rec.normed.get(x)
    if index is not None:
        norm = rec.graph.norms[index] = replace(rec.graph.norms[index], gate=name)
        rec.axis(name, 0, norm.inputs)
        rec.put(out, value.ids, [value])
        return
    inputs = rec.channels(value, dim)
    rec.axis(name, 0, inputs)
    previous = [call for call in rec.graph.norms if call.gate == name]
    outputs = previous[0].outputs if previous else _renamed(rec, inputs)
    node = rec.node([value.node])
    source = rec.written.get(x)
    rec.graph.norms.append(
        NormCall(None, None, None, None, inputs, outputs, source, value.depth, node, name)
    )
    rec.put(out, spread(outputs, out.shape, dim), [value])
    rec.values[out].node = node


def _renamed(rec: Recorder, ids: Tensor) -> Tensor:
    distinct, place = torch.unique(ids, return_inverse=True)
    return rec.fresh(distinct.numel())[place]
