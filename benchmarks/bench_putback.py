"""What it costs to put channels back at their places ("expand"), end to end; prints a table.

    OMP_NUM_THREADS=1 python benchmarks/bench_putback.py [--size 224] [--seconds 6] [--batches 1 8]

ResNet-50 and CIFAR's ResNet-56 (at its 32×32) with half of the channels of every layer removed:

    now       as polarfast does it: one kernel for norm and put-back in eval mode, one for the
              put-back in training;
    plain     torch's operators: norm, a full-width tensor of constants, index_copy into it;
    bound     norm and put-back take no time (memory is handed out, nothing is written to it): what
              any fusion with the addition could win at most, in eval mode;
    keep      residual="keep" instead: the branches' last layers stay whole, nothing is put back.

Expected, reasoned beside a prototype. In units of one full-width output, half of its channels kept:
plain writes and reads 1 for the norm, 1 for the constants, 1 for the copy; with the addition's 3
that is 6. Now: half is read, 1 written, 3 for the addition, 4.5. ResNet-50's branches put out 22 MB
for an image of 224×224; 1.5 times that at some 8 GB/s is 4 ms of about 60. In channels_last
index_copy goes element by element, so there much more. A fusion with the addition would save 1.5
more at most, most of which sits in the cache for one image.

Last: norm, put-back, addition and ReLU of one block under torch.compile, in the form in which
polarfast hands it to compilers and as index_copy.

First, the kernel alone (norm and put-back of half of the channels) beside torch's norm of all of
them, which reads twice as much and writes as much. Expected: no slower in either layout.

CPU time of this process, medians, the forms in turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

import polarfast as pf
from polarfast.engine.models import build
from polarfast.kernels.put_back import put_back_by_reading, put_back_ref
from polarfast.layers import PutBack

NOW = PutBack.forward


def plain(self: PutBack, input: Tensor) -> Tensor:
    kept = super(PutBack, self).forward(input)
    return put_back_ref(kept, self.put_back_index, self.put_back_constant)


def bound(self: PutBack, input: Tensor) -> Tensor:
    width = self.put_back_constant.numel()
    shape = (input.shape[0], width, *input.shape[2:])
    last = not input.is_contiguous()
    return torch.empty(
        shape, memory_format=torch.channels_last if last else torch.contiguous_format
    )


def half(model: nn.Module, size: int, residual: str) -> nn.Module:
    """The slim model of a network half of whose γ are 0."""
    generator = torch.Generator().manual_seed(0)
    example = torch.rand(1, 3, size, size, generator=generator)
    scales = pf.scaling_factors(model, example, residual=residual)
    with torch.no_grad():
        for gamma in scales.values():
            gamma.uniform_(0.5, 1.0, generator=generator)
            gamma[torch.randperm(gamma.numel(), generator=generator)[: gamma.numel() // 2]] = 0
    return pf.slim(model, pf.plan(model, example, scales, "fixed"), verify=False)


def medians(forms: dict[str, Callable[[], object]], seconds: float, least: int) -> dict[str, float]:
    """ms of CPU time of each form."""
    for form in forms.values():
        form()
    times: dict[str, list[float]] = {name: [] for name in forms}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times["now"]) < least:
        for name, form in forms.items():
            start = time.process_time()
            form()
            times[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(passes) for name, passes in times.items()}


def show(title: str, found: dict[str, float]) -> None:
    cells = [f"{name} {ms:9.2f} ({ms / found['now']:.2f}×)" for name, ms in found.items()]
    print(f"{title:44}{'   '.join(cells)}", flush=True)


def forms_of(
    expanded: nn.Module, kept: nn.Module, run: Callable[[nn.Module], object], names: list[str]
) -> dict[str, Callable[[], object]]:
    forwards = {"now": NOW, "plain": plain, "bound": bound}

    def form(name: str) -> Callable[[], object]:
        def call() -> object:
            PutBack.forward = forwards.get(name, NOW)  # type: ignore[method-assign]
            try:
                return run(kept if name == "keep" else expanded)
            finally:
                PutBack.forward = NOW  # type: ignore[method-assign]

        return call

    return {name: form(name) for name in names}


def bench(name: str, make: Callable[[], nn.Module], size: int, args: argparse.Namespace) -> None:
    expanded, kept = (half(make(), size, residual) for residual in ("expand", "keep"))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        layout = "channels_last" if memory_format == torch.channels_last else "contiguous"
        for model in (expanded, kept):
            model.to(memory_format=memory_format).eval()
        for batch in args.batches:
            x = torch.rand(batch, 3, size, size).to(memory_format=memory_format)

            @torch.inference_mode()
            def infer(model: nn.Module, x: Tensor = x) -> object:
                return model(x)

            forms = forms_of(expanded, kept, infer, ["now", "plain", "bound", "keep"])
            torch.testing.assert_close(forms["plain"](), forms["now"](), rtol=1e-3, atol=1e-3)
            show(f"{name} {layout} eval, batch {batch}", medians(forms, args.seconds, 5))
        x = torch.rand(8, 3, size, size).to(memory_format=memory_format)

        def train(model: nn.Module, x: Tensor = x) -> None:
            model.train()
            model.zero_grad()
            model(x).square().mean().backward()
            model.eval()

        forms = forms_of(expanded, kept, train, ["now", "plain", "keep"])
        show(f"{name} {layout} training, batch 8", medians(forms, args.seconds, 5))


def bench_compiled(seconds: float) -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(256, generator=generator)[:128].sort().values
    constant, norm = torch.rand(256, generator=generator), nn.BatchNorm2d(128).eval()
    x, shortcut = (torch.rand(8, c, 56, 56, generator=generator) for c in (128, 256))

    def compiled(put_back: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        block = torch.compile(
            lambda x, shortcut: torch.relu(put_back(norm(x), index, constant) + shortcut)
        )
        return torch.inference_mode()(lambda: block(x, shortcut))

    forms = {"now": compiled(put_back_by_reading), "plain": compiled(put_back_ref)}
    torch.testing.assert_close(forms["now"](), forms["plain"]())
    show("compiled block, 128 of 256×56×56, batch 8", medians(forms, seconds, 5))


def bench_kernel(seconds: float) -> None:
    """One norm that puts half of its channels back, beside torch's norm of the full width."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        layout = "channels_last" if memory_format == torch.channels_last else "contiguous"
        for batch, width, side in ((16, 16, 32), (1, 256, 56), (1, 2048, 7)):
            kept = width // 2
            index = torch.randperm(width).chunk(2)[0].sort().values
            full = torch.rand(batch, width, side, side).to(memory_format=memory_format)
            half = full[:, :kept].contiguous(memory_format=memory_format)
            wide = [torch.rand(width) + 0.5 for _ in range(4)]
            narrow = [each[:kept].contiguous() for each in wide]
            arguments = (half, index, wide[0], *narrow, 1e-5)
            forms = {
                "now": lambda a=arguments: torch.ops.polarfast.put_back_norm(*a),
                "norm": lambda x=full, w=wide: torch.native_batch_norm(x, *w, False, 0.1, 1e-5),
            }
            title = f"kernel {layout}, {batch}×{width}×{side}×{side}"
            show(title, medians(forms, seconds / 6, 50))


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of putting channels back.")
    parser.add_argument("--size", type=int, default=224, help="of ResNet-50's images")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each line")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, ms of CPU time, medians")
    torch.manual_seed(0)
    bench_kernel(args.seconds)
    bench("ResNet-56", lambda: build("resnet56", 10, 3), 32, args)
    bench("ResNet-50", torchvision.models.resnet50, args.size, args)
    bench_compiled(args.seconds)


if __name__ == "__main__":
    main()
