"""How much of what the MACs promise becomes time: a pruning of 54 % of the MACs (2.17×) in each way
of running a network, for one image and for 32.

γ are random (each layer's times a factor of its own), widths whole multiples of 8, residual
channels put back ("expand"). Dense and slim network, both fused (`pf.fuse`), take turns; medians
over repeats. Eager in torch's usual layout and in channels_last, torch.compile, ONNX Runtime.

Expected: more of the promise with 32 images than with one, where loading weights and starting
operators count; most of it from ONNX Runtime and channels_last, which spend least between
convolutions. MobileNetV2, half of whose time is no matrix product, keeps less than ResNet-50.

    OMP_NUM_THREADS=1 python benchmarks/bench_modes.py [--models resnet50 ...] [--batches 1 32]
"""

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from bench_latency import randomize
from torch import Tensor, nn

import polarfast as pf

MODELS = ("resnet50", "mobilenet_v2")
CUT = 0.54
Run = Callable[[], object]


def eager(network: nn.Module, x: Tensor) -> Run:
    return lambda: network(x)


def channels_last(network: nn.Module, x: Tensor) -> Run:
    laid_out = copy.deepcopy(network).to(memory_format=torch.channels_last)
    last = x.to(memory_format=torch.channels_last)
    return lambda: laid_out(last)


def compiled(network: nn.Module, x: Tensor) -> Run:
    program = torch.compile(network)
    return lambda: program(x)


def onnx_runtime(network: nn.Module, x: Tensor) -> Run:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        torch.onnx.export(network, (x,), file, dynamo=True, input_names=["x"], verbose=False)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(file), settings)
    given = {"x": x.numpy()}
    return lambda: session.run(None, given)


MODES: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    "eager": eager,
    "channels_last": channels_last,
    "torch.compile": compiled,
    "ONNX Runtime": onnx_runtime,
}


@torch.inference_mode()
def turns(runs: list[Run], repeats: int) -> list[list[float]]:
    """ms of each run, in turns, after one to warm up."""
    found: list[list[float]] = [[] for _ in runs]
    for number in range(repeats + 1):
        for run, mine in zip(runs, found, strict=True):
            start = time.perf_counter()
            run()
            if number:
                mine.append(1e3 * (time.perf_counter() - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each pair of networks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| network, images | mode | dense, ms | slim, ms | times faster | of the promise |")
    print("|---|---|---:|---:|---:|---:|", flush=True)
    for name in options.models:
        torch.manual_seed(0)
        dense = torchvision.models.get_model(name).eval()
        x = torch.randn(1, 3, options.size, options.size)
        scales = pf.scaling_factors(dense, x, residual="expand")
        randomize(scales, 0)
        plan = pf.plan(dense, x, scales, cut=CUT, round_to=8)
        networks = [pf.fuse(dense, x), pf.fuse(pf.slim(dense, plan, verify=False))]
        promise = 1 / (1 - plan.flops_reduction)
        for batch in options.batches:
            images = torch.randn(batch, 3, options.size, options.size)
            for mode, prepare in MODES.items():
                torch._dynamo.reset()
                with torch.no_grad():
                    runs = [prepare(network, images) for network in networks]
                    first = time.perf_counter()
                    turns(runs, 1)
                repeats = max(5, int(options.seconds / ((time.perf_counter() - first) / 2)))
                whole, small = turns(runs, min(repeats, 200))
                ratios = [a / b for a, b in zip(whole, small, strict=True)]
                low, ratio, high = statistics.quantiles(ratios, n=4)
                print(
                    f"| {name}, {batch} | {mode} | {statistics.median(whole):.1f} | "
                    f"{statistics.median(small):.1f} | {ratio:.2f} [{low:.2f}, {high:.2f}] | "
                    f"{ratio / promise:.0%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
