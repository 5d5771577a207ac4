"""Builds polarfast._C, the CPU kernels, against libtorch's stable ABI.

One build serves every torch from 2.10 on.
"""

import os
import shlex
import shutil
import subprocess
import sys

from setuptools import Extension, setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "polarfast: torch cannot be imported here; install torch >= 2.10 first, "
        "or build without --no-build-isolation."
    )
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
    sys.exit(f"polarfast: torch {torch.__version__} is too old; install torch >= 2.10.")

# No debug information. Nothing that depends on this machine's processor (csrc/simd.h), and no fused
# multiply-add, so that all processors give the same bits. Trapping math would keep comparisons from
# being vectorized.
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fopenmp-simd",
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]
# "address,undefined" for `make sanitize`: the same code, with each access checked.
SANITIZE = os.environ.get("POLARFAST_SANITIZE", "")
CHECKS = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"] if SANITIZE else []
if SANITIZE:
    FLAGS += [*CHECKS, "-O1", "-g", "-fno-omit-frame-pointer"]
SOURCES = (
    "schemas simd strides coefficients polarize valley gather put_back table roster module"
).split()


class Build(cpp_extension.BuildExtension):
    """torch's own build command, which first looks whether there is a compiler to call."""

    def build_extensions(self) -> None:
        compiler = shlex.split(cpp_extension.get_cxx_compiler())
        if shutil.which(compiler[0]) is None:
            sys.exit(
                f"polarfast: no C++ compiler ({compiler[0]!r} not found); "
                "install g++ or clang, or set CXX to one."
            )
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
        told = {
            "POLARFAST_COMPILER": version.partition("\n")[0],
            "POLARFAST_FLAGS": " ".join(FLAGS),
            "POLARFAST_TORCH": torch.__version__,
        }
        self.extensions[0].define_macros += [(name, f'"{text}"') for name, text in told.items()]
        super().build_extensions()


setup(
    ext_modules=[
        Extension(
            "polarfast._C",
            [os.path.join("csrc", f"{name}.cpp") for name in SOURCES],
            include_dirs=cpp_extension.include_paths(),
            library_dirs=cpp_extension.library_paths(),
            libraries=["torch_cpu"],
            extra_compile_args=FLAGS,
            extra_link_args=CHECKS,
            language="c++",
        )
    ],
    cmdclass={"build_ext": Build},
)
