"""What a bug report needs: versions, how the extension was built, SIMD level, threads, GPUs."""

import importlib.util
import os
import platform
from importlib import metadata

import torch

OPTIONAL = ("triton", "torchvision", "numpy", "onnx")


def report() -> str:
    """One 'name: value' line for each fact, in a fixed order. Needs torch alone."""
    facts = {"polarfast": _version("polarfast"), **_system(), **_extension(), **_gpus()}
    for name in OPTIONAL:
        facts.setdefault(name, _version(name))
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _system() -> dict[str, str]:
    return {
        "python": f"{platform.python_version()} ({platform.platform()})",
        "torch": torch.__version__,
        "processor": f"{_processor()}, {os.cpu_count()} CPUs",
        "threads": f"{torch.get_num_threads()} within an op, "
        f"{torch.get_num_interop_threads()} between ops",
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _extension() -> dict[str, str]:
    if importlib.util.find_spec("polarfast._C") is None:
        return {"extension": "not built: pip install --no-build-isolation . compiles it"}
    from .kernels import build_info

    build = build_info()
    return {
        "extension": f"built with torch {build['torch']}, for torch >= {build['torch_target']}",
        "compiler": build["compiler"],
        "build flags": build["flags"],
        "SIMD level": build["simd"],
    }


def _gpus() -> dict[str, str]:
    facts = {"CUDA of torch": torch.version.cuda or torch.version.hip or "none"}
    if not torch.cuda.is_available():
        return facts | {"GPUs": "none that torch can use"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        facts[f"GPU {index}"] = f"{gpu.name}, {memory:.0f} GiB, {gpu.major}.{gpu.minor}"
    return facts
