"""Compiles what TritonTable launches, for GPUs that need not be there; prints one JSON line each.

Run by test_triton_compile.py in a process of its own, as the interpreter excludes the compiler. Its
methods run with the launch itself replaced by a recorder, so that every kernel is compiled with
the very arguments, block sizes and warps that they give it.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from polarfast.kernels.table import Penalty, SgdStep, Table
from polarfast.kernels.triton_table import TRITON_DTYPES, TritonTable
from support.backends import random_gammas, table_of
from support.oracles import REGULARIZERS, VARIANTS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SGD = SgdStep(lr=0.1, weight_decay=1e-4, upper=1.0)


class Recorder:
    """Stands in for JITFunction.run."""

    def __init__(self) -> None:
        self.launches: list[tuple[JITFunction, dict[str, Any], int]] = []

    def __call__(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any):
        num_warps = kwargs.pop("num_warps")
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        self.launches.append((kernel, named, num_warps))


def source(kernel: JITFunction, arguments: dict[str, Any]) -> ASTSource:
    """What Triton would compile for a call with these arguments."""
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            signature[parameter.name] = parameter.annotation_type or mangle_type(value)
    return ASTSource(kernel, signature, constants)


def spilled_bytes(compiled: Any) -> int:
    """Local memory for each thread: nothing but spilled registers can be in it here."""
    if "amdgcn" in compiled.asm:
        fields = r"\.(?:[sv]gpr_spill_count|private_segment_fixed_size): +(\d+)"
        return sum(map(int, re.findall(fields, compiled.asm["amdgcn"])))
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [str(cuobjdump), "-res-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (line,) = re.findall(r"REG:.*", usage)
    return sum(int(re.search(rf"{field}:(\d+)", line)[1]) for field in ("STACK", "LOCAL"))


def calls(table: Table, scalar: Tensor | None) -> dict[str, Callable[[], object]]:
    """Every method × kind; `scalar` serves as grad_scale and found_inf."""
    found: dict[str, Callable[[], object]] = {
        "clamp": lambda: table.clamp_(1.0, scalar),
        "valley": table.valley,
    }
    for kind, per_layer in REGULARIZERS:
        penalty = Penalty(kind, 1e-4, 1.2, per_layer)
        name = f"kind {kind}, per layer" if per_layer else f"kind {kind}"
        found[f"subgradient, {name}"] = lambda p=penalty: table.add_subgradient_(p, scalar)
        found[f"SGD, {name}"] = lambda p=penalty: table.sgd_step_(p, SGD, scalar, scalar)
    if scalar is None:  # in float32, once
        for name in ("weighted", "not through", "squared"):
            found[f"SGD, {name}"] = lambda p=VARIANTS[name]: table.sgd_step_(p, SGD)
    return found


def main(targets: list[str]) -> None:
    recorder = Recorder()
    JITFunction.run = lambda kernel, *args, **kwargs: recorder(kernel, *args, **kwargs)
    sizes = {"small": [64, 100], "large": [TritonTable.FLAT_SIZE, 64]}
    spilled: dict[tuple[str, str], int] = {}
    for dtype, (size, rows) in itertools.product(TRITON_DTYPES, sizes.items()):
        table = table_of(random_gammas(rows, dtype), "triton")
        scalars = [torch.ones(()), None] if dtype == torch.float32 else [torch.ones(())]
        for scalar, target in itertools.product(scalars, targets):
            for call, launch in calls(table, scalar).items():
                recorder.launches.clear()
                launch()
                kernels = {}
                for kernel, arguments, num_warps in recorder.launches:
                    code = source(kernel, arguments)
                    if (code.hash(), target) not in spilled:
                        options = {"num_warps": num_warps}
                        compiled = triton.compile(code, target=TARGETS[target], options=options)
                        spilled[code.hash(), target] = spilled_bytes(compiled)
                    kernels[kernel.__name__] = spilled[code.hash(), target]
                line = {"call": call, "size": size, "dtype": str(dtype), "amp": scalar is not None}
                print(json.dumps(line | {"target": target, "spilled": kernels}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
