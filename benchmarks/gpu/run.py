"""Everything that needs a GPU, in one command of at most nine minutes: builds, checks, measures.

    python benchmarks/gpu/run.py [--stages b,d] [--wheels DIR] [--out DIR] [--files DIR]
    TRITON_INTERPRET=1 python benchmarks/gpu/run.py --device cpu     # what a CPU can do of it

See the README beside this file.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from runner import Results, Stage, run_stages

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

#: Letter -> title, seconds, work of worker.py; the time-outs add up to less than nine minutes.
STAGES = {
    "a": ("build the extension", 60, "build"),
    "b": ("one step beside the CPU", 40, "agreement"),
    "c": ("tests marked gpu", 90, "marked_tests"),
    "d": ("real loops", 130, "loops"),
    "e": ("captured steps", 30, "replays"),
    "f": ("b under compute-sanitizer memcheck", 40, "agreement"),
    "g": ("timings", 120, "timings"),
    "h": ("profiler trace", 25, "trace"),
}
FIRST = "ab"  # without these the rest is worth nothing
GPU_ONLY = "ef"
SANITIZER = ["--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "9"]
#: Every tensor in an allocation of its own: a read beyond it is seen.
UNCACHED = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]


def stages(letters: str, device: str, folder: Path, patience: float = 1.0) -> list[Stage]:
    """The stages of these letters, in the order of a run; each may take `patience` times longer."""
    chosen = []
    for key, (title, seconds, work) in STAGES.items():
        if key not in letters:
            continue
        command = [sys.executable, "-u", str(HERE / "worker.py"), work]
        command += ["--device", device, "--folder", str(folder)]
        if key == "f":
            tool = _sanitizer()
            command = [*UNCACHED, tool or "compute-sanitizer", *SANITIZER, *command]
        skipped = ""
        if key in GPU_ONLY and device != "cuda":
            skipped = "needs a GPU"
        elif key == "f" and tool is None:
            skipped = "compute-sanitizer is not installed here"
        chosen.append(Stage(key, title, patience * seconds, command, key in FIRST, skipped))
    return chosen


def _sanitizer() -> str | None:
    beside = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which("compute-sanitizer", path=beside)


def machine(device: str, revision: str | None) -> dict[str, str]:
    """What results depend on, found without loading torch."""
    name, driver = f"cpu {platform.machine()}", ""
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        name, _, driver = _said(query).partition("\n")[0].partition(", ")
    found = {"device": name or "unknown GPU"}
    found |= {package: _version(package) for package in ("torch", "triton")}
    found |= {"driver": driver} if driver else {}
    found["python"] = platform.python_version()
    found["revision"] = revision or _revision()
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _revision() -> str:
    said = _said(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"])
    return said or "unknown (no git here)"


def _said(command: list[str]) -> str:
    """What a command prints; nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def install(wheels: Path, folder: Path) -> str:
    """Unpack wheels into a folder of the run, for the import path of its stages."""
    site = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    command += ["--no-compile", "--upgrade", "--target", str(site)]
    subprocess.run([*command, *map(str, sorted(wheels.glob("*.whl")))], check=True)
    return str(site)


def environment(folder: Path, wheels: Path | None) -> dict[str, str]:
    paths = [install(wheels, folder)] if wheels else []
    paths += filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # equal bits in and out of a graph
        "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", "lo"),  # there may be no other
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stages", default="".join(STAGES), help="letters, as in b,d (all of them)"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--patience", type=float, default=1, help="factor of all time-outs")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that this machine lacks")
    parser.add_argument("--revision", help="of the sources, where there is no git")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results", help="for the results")
    parser.add_argument(
        "--files", type=Path, default=ROOT / "runs" / "gpu", help="for the log and the trace"
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    folder = arguments.files.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    found = machine(arguments.device, arguments.revision)
    slug = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    results = Results(found, arguments.out / f"gpu-{slug}")
    log = folder / "log.txt"
    log.write_text("")
    run_stages(
        stages(arguments.stages, arguments.device, folder, arguments.patience),
        results,
        log,
        environment(folder, arguments.wheels),
        lambda line: print(line, flush=True),
    )
    print(f"\n{results.markdown()}\nwritten: {results.path}.md and .json; log: {log}")
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())
