"""Results are the same to the last bit for any thread count and any instruction set."""

import os
import subprocess
import sys

import pytest
import torch
from support import TESTS
from support.backends import bits, random_gammas
from support.oracles import REGULARIZERS, centers

from polarfast.kernels import ScaleTable
from polarfast.kernels.table import Penalty, SgdStep


def three_steps() -> list[bytes]:
    params = random_gammas([1, 17, 300, 5000])
    state = {param: {"momentum_buffer": torch.zeros_like(param)} for param in params}
    table = ScaleTable([str(i) for i in range(len(params))], params)
    table.centers = centers(len(params))
    for kind, per_layer in REGULARIZERS:
        table.refresh(state)
        penalty = Penalty(kind, 0.1, 1.2, per_layer)
        table.add_subgradient_(penalty)
        table.sgd_step_(penalty, SgdStep(lr=0.1, momentum=0.9, upper=1.0))
    return [bits(tensor) for param in params for tensor in (param, param.grad)]


def put_backs() -> list[bytes]:
    """Norms that put channels back, of widths that fill vectors and others; NaN among them."""
    torch.manual_seed(0)
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for width, kept in ((16, 5), (37, 36), (300, 150)):
            index = torch.randperm(width)[:kept].sort().values
            x = torch.randn(2, kept, 7, 5).to(dtype)
            x[0, 0, 0], x[1, -1, 2] = float("nan"), float("inf")
            numbers = [torch.rand(kept, dtype=dtype) + 0.5 for _ in range(4)]
            constant = torch.randn(width).to(dtype)
            for layout in (torch.contiguous_format, torch.channels_last):
                args = (x.contiguous(memory_format=layout), index, constant)
                out = torch.ops.polarfast.put_back_norm(*args, *numbers, 1e-5)
                copied = torch.ops.polarfast.put_back(*args)
                found += [bits(each.nan_to_num(7).flatten()) for each in (out, copied)]
    return found


def test_same_bits_for_any_thread_count():
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(three_steps() + put_backs())
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_same_bits_for_any_instruction_set():
    code = (
        "import hashlib, test_polarize_bits; from polarfast import _C; "
        "found = test_polarize_bits.three_steps() + test_polarize_bits.put_backs(); "
        "print(_C.build_info()['simd'], hashlib.sha256(b''.join(found)).hexdigest())"
    )
    found = {}
    paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    for level in ("baseline", "avx2", "best"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "POLARFAST_SIMD": level, "PYTHONPATH": paths},
            cwd=os.path.dirname(__file__),
            capture_output=True,
            text=True,
            check=True,
        )
        name, digest = done.stdout.split()
        found[name] = digest
    assert "baseline" in found
    assert len(set(found.values())) == 1, found
