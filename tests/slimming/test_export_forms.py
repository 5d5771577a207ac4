"""Slim models compiled, traced, copied, pickled, in other formats and precisions, and trained on
several processes.
"""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from support.export import CASES, distance, make
from support.nets import Residual
from torch import Tensor, nn

import polarfast as pf
from polarfast.layers import convert_sync_batchnorm

COMPILED = ["keep", "expand", "emptied branch", "gates"]


def ready(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A float32 copy of a case's slim model, an example, and the float64 model's output for it."""
    torch._dynamo.reset()
    exact, _ = make(name)
    images = torch.randn(CASES[name].shapes()[0])
    with torch.no_grad():
        expected = exact(images.double())
    return copy.deepcopy(exact).float(), images, expected


def train_step(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The gradients of a step, in training mode."""
    model.train()(images).square().mean().backward()
    return [param.grad for param in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compile(name):
    slim, images, expected = ready(name)
    plain = copy.deepcopy(slim).double()
    compiled = torch.compile(slim, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert distance(compiled(images), expected) < 1e-5
    exact = train_step(plain, images.double())
    for found, gradient in zip(train_step(compiled, images), exact, strict=True):
        torch.testing.assert_close(found.double(), gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_compile_with_inductor():
    slim, images, expected = ready("emptied branch")
    with torch.no_grad():
        assert distance(torch.compile(slim, fullgraph=True)(images), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch would like torch.export used
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", CASES)
def test_trace(name):
    slim, images, _ = ready(name)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(slim, images), file)
    file.seek(0)
    traced = torch.jit.load(file)
    assert "polarfast::" not in str(traced.inlined_graph)
    for shape in CASES[name].shapes():
        images = torch.randn(shape)
        with torch.no_grad():
            assert distance(traced(images), make(name)[0](images.double())) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_copies(name):
    slim, images, expected = ready(name)
    result = slim(images)
    assert torch.equal(copy.deepcopy(slim)(images), result)
    assert torch.equal(pickle.loads(pickle.dumps(slim))(images), result)
    slim.to(memory_format=torch.channels_last)
    last = slim(images.to(memory_format=torch.channels_last))
    assert distance(last, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_low_precision(name, dtype):
    slim, images, expected = ready(name)
    bound = 100 * torch.finfo(dtype).eps  # a few roundings to a layer
    with torch.no_grad():
        with torch.autocast("cpu", dtype):
            assert distance(slim(images), expected) < bound
        converted = slim.to(dtype)(images.to(dtype))
    assert converted.dtype == dtype
    assert distance(converted, expected) < bound


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
from support.export import make
from torch.nn.parallel import DistributedDataParallel

rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
model = DistributedDataParallel(make("emptied branch")[0])  # would wait for unused parameters
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
batch = torch.randn(4, 3, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
for _ in range(3):  # in eval mode: statistics of half a batch are not those of the whole
    optimizer.zero_grad()
    model(batch[2 * rank : 2 * rank + 2]).square().mean().backward()
    optimizer.step()
single = make.__wrapped__("emptied branch")[0]
optimizer = torch.optim.SGD(single.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    single(batch).square().mean().backward()
    optimizer.step()
for found, expected in zip(model.parameters(), single.parameters(), strict=True):
    torch.testing.assert_close(found, expected)
"""


@pytest.mark.slow
def test_two_processes_train_an_emptied_branch(tmp_path):
    command = [sys.executable, "-c", DISTRIBUTED, str(tmp_path / "store")]
    processes = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    try:
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("name", ["keep", "expand", "emptied branch"])
def test_sync_batchnorm(name, tmp_path):
    slim, images, expected = ready(name)
    norms = [m for m in slim.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert convert_sync_batchnorm(slim) is slim
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    with torch.no_grad():
        assert distance(slim(images), expected) < 1e-5
    pf.save(slim, make(name)[1], tmp_path / "slim.pt")
    with torch.no_grad():  # the file knows places, not classes
        loaded = pf.load(tmp_path / "slim.pt", lambda: Residual().eval())
        assert distance(loaded(images), expected) < 1e-5


def test_sync_batchnorm_with_gates_and_refused():
    model = Residual().eval()
    images = torch.randn(2, 3, 10, 10)
    gates = pf.add_gates(model, images, residual="expand")
    with torch.no_grad():
        for gate in gates.values():
            gate.uniform_(0.5, 1.5)
        expected = model(images)
        assert distance(convert_sync_batchnorm(model)(images), expected.double()) < 1e-5
    assert len(gates) == 4
    assert all(model.get_parameter(name) is gate for name, gate in gates.items())

    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Own(4))
    with pytest.raises(pf.ArgumentError, match="2 is a Own"):
        convert_sync_batchnorm(model)
    assert type(model[1]) is nn.BatchNorm2d
