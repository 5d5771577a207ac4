"""The Triton kernels on a real GPU: as the CPU backend, with no wait, copy or recompilation."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402
from support.backends import random_gammas  # noqa: E402
from support.oracles import L1, POLARIZATION, REGULARIZERS, VARIANTS, centers  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from polarfast.kernels import table_of  # noqa: E402
from polarfast.kernels.table import Penalty, SgdStep  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

SMALL = [64, 3, 1000, 256]  # one launch for the global mean
LARGE = [4096, 64, 5000, 1]  # three
SGD = SgdStep(lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True, upper=1.0)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-13}


class Factors:
    """γ with gradients and momentum buffers on one device, and their table."""

    def __init__(self, sizes, device, dtype=torch.float32):
        def rows(seed):
            return [p.detach().to(device) for p in random_gammas(sizes, dtype, seed=seed)]

        self.params = [torch.nn.Parameter(row) for row in rows(0)]
        for param, grad in zip(self.params, rows(1), strict=True):
            param.grad = grad
        self.params[1].requires_grad_(False)  # frozen: counted and left
        self.momenta = rows(2)
        self.state = {
            p: {"momentum_buffer": m} for p, m in zip(self.params, self.momenta, strict=True)
        }
        names = [f"{i}.weight" for i in range(len(sizes))]
        weights = [1.0 + 0.25 * i for i in range(len(sizes))]
        self.table = table_of(names, self.params, weights)
        self.table.centers = centers(len(sizes))
        self.table.refresh(self.state)

    def values(self):
        grads = [p.grad for p in self.params]
        return torch.cat([x.detach().double().cpu() for x in (*self.params, *grads, *self.momenta)])

    def everything(self, lam=0.01, t=1.2):
        """Each op once, with every launch plan; returns nothing that waits."""
        self.table.refresh(self.state)
        for kind, per_layer in REGULARIZERS:
            self.table.add_subgradient_(Penalty(kind, lam, t, per_layer))
            self.table.sgd_step_(Penalty(kind, lam, t, per_layer), SGD)
        for penalty in VARIANTS.values():
            self.table.sgd_step_(penalty, SGD)
        self.table.clamp_(0.75)
        self.table.valley()


@pytest.fixture(params=[SMALL, LARGE], ids=["small", "large"])
def sizes(request):
    return request.param


def assert_agree(gpu, cpu, dtype):
    """Roundings differ (fused multiply-add); a half-precision result may fall to the next value."""
    torch.testing.assert_close(gpu.values(), cpu.values(), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("kind", "per_layer"), REGULARIZERS)
def test_cpu_backend_agrees(kind, per_layer, dtype, sizes):
    gpu, cpu = Factors(sizes, "cuda", dtype), Factors(sizes, "cpu", dtype)
    for factors in (gpu, cpu):
        factors.table.add_subgradient_(Penalty(kind, 0.1, 1.2, per_layer))
    assert_agree(gpu, cpu, dtype)
    for factors in (gpu, cpu):
        factors.table.sgd_step_(Penalty(kind, 0.1, 1.2, per_layer), SGD)
        factors.table.clamp_(0.75)
    assert_agree(gpu, cpu, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_valleys_are_those_of_the_cpu(dtype, sizes):
    summary, counts = Factors(sizes, "cuda", dtype).table.valley()
    expected, expected_counts = Factors(sizes, "cpu", dtype).table.valley()
    assert torch.equal(counts.cpu(), expected_counts)
    torch.testing.assert_close(summary.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_same_bits_every_time(sizes):
    results = []
    for _ in range(3):
        factors = Factors(sizes, "cuda")
        factors.everything()
        results.append(factors.values())
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_scale_and_found_inf_are_read_on_the_gpu(sizes):
    gpu, cpu = Factors(sizes, "cuda"), Factors(sizes, "cpu")
    for factors in (gpu, cpu):
        scale = torch.tensor(512.0, device=factors.table.device)
        factors.table.add_subgradient_(Penalty(POLARIZATION, 1e-4, 1.2, False), scale)
        fine = torch.zeros(1, device=factors.table.device)
        amp = {"grad_scale": scale, "found_inf": fine}
        factors.table.sgd_step_(Penalty(POLARIZATION, 1e-4, 1.2, False), SGD, **amp)
    assert_agree(gpu, cpu, torch.float32)
    before = gpu.values()
    found = torch.ones(1, device="cuda")
    gpu.table.sgd_step_(Penalty(POLARIZATION, 1e-4, 1.2, False), SGD, found_inf=found)
    gpu.table.clamp_(0.1, found)
    assert torch.equal(gpu.values(), before)


@pytest.mark.guard
def test_nothing_waits_for_the_gpu(sizes):
    factors = Factors(sizes, "cuda")
    factors.everything()
    torch.cuda.set_sync_debug_mode("error")
    try:
        factors.everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_is_compiled_for_new_numbers(sizes, monkeypatch):
    Factors(sizes, "cuda").everything()
    compiled = []

    def note(**details):
        compiled.append(details["repr"])

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    for lam, t in ((1.0, 0.0), (1e-30, 16.0), (0.5, -1.0)):
        Factors([size + 16 for size in sizes], "cuda").everything(lam, t)
    assert compiled == []


def device_events(work):
    """Names of what the GPU did."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        work()
        torch.cuda.synchronize()
    return [e.name for e in profiler.events() if e.device_type == DeviceType.CUDA]


@pytest.mark.guard
@pytest.mark.parametrize("op", ["subgradient", "SGD", "clamp", "valley"])
@pytest.mark.parametrize(("kind", "per_layer"), REGULARIZERS)
def test_launches_and_copies(op, kind, per_layer, sizes):
    """At most three kernels, one where n allows, and no copy of any kind in steady state."""
    factors = Factors(sizes, "cuda")
    table = factors.table
    work = {
        "subgradient": lambda: table.add_subgradient_(Penalty(kind, 0.1, 1.2, per_layer)),
        "SGD": lambda: table.sgd_step_(Penalty(kind, 0.1, 1.2, per_layer), SGD),
        "clamp": lambda: table.clamp_(0.9),
        "valley": lambda: table.valley(),  # it reads the addresses itself
    }[op]

    def step():
        if op != "valley":
            table.refresh(factors.state)
        work()

    step()
    three = op in ("subgradient", "SGD") and sizes == LARGE
    three = three and kind == POLARIZATION and not per_layer
    events = device_events(step)
    assert len(events) == (3 if three else 1), events
    assert not [name for name in events if name.startswith("Mem")]


@pytest.mark.guard
def test_moved_gradients_cost_one_copy(sizes):
    """As `zero_grad(set_to_none=True)` moves them, and nothing waits for it."""
    factors = Factors(sizes, "cuda")

    def step():
        factors.table.refresh(factors.state)
        factors.table.sgd_step_(Penalty(L1, 0.1), SGD)

    def move():
        for param in factors.params:
            param.grad = param.grad.clone()

    step()
    move()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    move()
    copies = [name for name in device_events(step) if name.startswith("Memcpy")]
    assert len(copies) == 1 and "HtoD" in copies[0], copies


@pytest.mark.parametrize("kind", [POLARIZATION, L1])
def test_graph_capture_and_replay(kind, sizes):
    """Four replays of a captured step are four eager steps, to the bit."""
    eager, captured = Factors(sizes, "cuda"), Factors(sizes, "cuda")

    def step(factors):
        factors.table.refresh(factors.state)
        factors.table.sgd_step_(Penalty(kind, 0.01, 1.2, False), SGD)

    for factors in (eager, captured):
        step(factors)
    for _ in range(4):
        step(eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured)
    for _ in range(4):
        graph.replay()
    assert torch.equal(captured.values(), eager.values())
    for factors in (eager, captured):  # what was captured is not taken as sent
        step(factors)
    assert torch.equal(captured.values(), eager.values())
