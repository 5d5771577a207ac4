"""Calls that nobody should make are refused, or right (support/hostile.py; `make sanitize`)."""

import pytest
import torch
from support.hostile import main


def test_no_call_is_neither_refused_nor_right():
    ends = main(500)
    assert sum(ends.values()) == 500
    for op in ("gather_channels", "put_back", "put_back_norm", "table"):
        assert ends[f"{op}: right"] >= 10 and ends[f"{op}: refused"] >= 10


VECTOR, INDEX, WIDE = torch.ones(3), torch.tensor([0, 2, 4]), torch.ones(6)
ARGUMENTS = {
    "gather_channels": {"weight": torch.ones(8, 5), "out_index": INDEX, "in_index": INDEX},
    "put_back": {"kept": torch.ones(2, 3), "index": INDEX, "constant": WIDE},
    "put_back_norm": {
        "input": torch.ones(2, 3),
        **{"index": INDEX, "constant": WIDE, "weight": VECTOR, "bias": VECTOR},
        **{"mean": VECTOR, "var": VECTOR, "eps": 1e-5},
    },
}
EVERY = [(op, name) for op, given in ARGUMENTS.items() for name in given if name != "eps"]


@pytest.mark.parametrize(("op", "name"), EVERY)
@pytest.mark.parametrize("but", [True, False])
def test_one_argument_on_another_device_is_refused(op, name, but):
    """And all but one; torch's own operators would fail, or return what was never written."""
    given = {
        k: v.to("meta") if isinstance(v, torch.Tensor) and (k == name) == but else v
        for k, v in ARGUMENTS[op].items()
    }
    with pytest.raises(RuntimeError, match="all tensors must be on one device, and .* on meta"):
        getattr(torch.ops.polarfast, op)(**given)


@pytest.mark.parametrize(("op", "name"), EVERY)
@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, lambda x: None], ids=["sparse", "None"])
def test_what_is_no_dense_tensor_is_refused(op, name, make):
    if name in ("bias", "out_index", "in_index") and make(VECTOR) is None:
        return
    with pytest.raises(RuntimeError):
        getattr(torch.ops.polarfast, op)(**{**ARGUMENTS[op], name: make(ARGUMENTS[op][name])})


def test_gather_has_no_gradient_and_says_so():
    weight = torch.ones(8, 5, requires_grad=True)
    found = torch.ops.polarfast.gather_channels(weight, INDEX, None)
    with pytest.raises(RuntimeError, match="gather_channels is not differentiable"):
        found.sum().backward()


def test_sizes_that_no_memory_holds_are_refused():
    """An expanded tensor claims them for nothing; the process must survive it."""
    weight, often = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    for given in (
        (weight.expand(2**50), None, None),
        (torch.ones(4, 3), often.expand(2**50), None),
        (torch.ones(4, 3), None, often.expand(2**50)),
    ):
        with pytest.raises((RuntimeError, MemoryError)):
            torch.ops.polarfast.gather_channels(*given)
    nothing = torch.ops.polarfast.gather_channels(torch.empty(4, 0), often.expand(2**50), None)
    assert nothing.shape == (2**50, 0)
    assert torch.ops.polarfast.gather_channels(torch.empty(2**40, 0), None, None).shape[0] == 2**40
