"""What is shipped, and what a person reads when it cannot be built."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from support import ROOT

import polarfast

SHIPPED = ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "csrc", "polarfast"]

# Stands in for the C++ compiler: makes the files it is asked for, empty.
COMPILER = """\
    #!{python}
    import pathlib, sys
    if "--version" in sys.argv:
        print("stand-in 1.0")
    for flag, path in zip(sys.argv, sys.argv[1:]):
        if flag in ("-o", "-MF"):
            target = sys.argv[sys.argv.index("-o") + 1]
            pathlib.Path(path).write_text(f"{{target}}:\\n" if flag == "-MF" else "")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the sources: building leaves nothing behind in the tree."""
    root = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, root)
    return root


def setup_py(source: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=source,
        env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
    )


def last_line(done: subprocess.CompletedProcess) -> str:
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_sdist_holds_the_sources_and_no_binary(source, tmp_path):
    done = setup_py(source, "sdist", "-d", str(tmp_path))
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("polarfast-*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").glob("*.[ch]*")}
    wanted |= {"setup.py", "pyproject.toml", "LICENSE", "polarfast/kernels/table.py"}
    assert wanted <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


@pytest.mark.slow
def test_wheel_holds_no_sources_that_it_does_not_need(source, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(textwrap.dedent(COMPILER).format(python=sys.executable))
    compiler.chmod(0o755)
    done = setup_py(
        source,
        "bdist_wheel",
        "-d",
        str(tmp_path),
        CXX=str(compiler),
        CC=str(compiler),
        TORCH_DONT_CHECK_COMPILER_ABI="1",
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("polarfast-*.whl"))) as wheel:
        names = wheel.namelist()
        metadata = next(name for name in names if name.endswith("METADATA"))
        required = wheel.read(metadata).decode()
    assert sum(name.startswith("polarfast/_C.") and name.endswith(".so") for name in names) == 1
    assert {"polarfast/py.typed", "polarfast/_C.pyi", "polarfast/kernels/table.py"} <= set(names)
    others = [
        name
        for name in names
        if not name.endswith((".py", ".pyi", ".so", ".yaml", "py.typed"))
        and ".dist-info/" not in name
    ]
    page = {f"polarfast/engine/report/page.{kind}" for kind in ("css", "js")}
    assert set(others) == page, "what the report is made of, and nothing else"
    assert not [name for name in names if name.startswith(("csrc", "tests", "benchmarks"))]
    unconditional = [
        line
        for line in required.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert unconditional == ["Requires-Dist: torch>=2.10"]


@pytest.mark.slow
def test_no_compiler_is_said_in_one_sentence(source):
    done = setup_py(source, "build_ext", CXX="/nowhere/to-be-found-c++")
    assert done.returncode != 0
    assert "no C++ compiler ('/nowhere/to-be-found-c++' not found)" in last_line(done)


@pytest.fixture
def stand_in_torch(tmp_path):
    def make(init: str) -> str:
        (tmp_path / "torch" / "utils").mkdir(parents=True)
        (tmp_path / "torch" / "__init__.py").write_text(init)
        (tmp_path / "torch" / "utils" / "__init__.py").touch()
        (tmp_path / "torch" / "utils" / "cpp_extension.py").touch()
        return str(tmp_path)

    return make


@pytest.mark.parametrize("version", ["2.9.1+cu126", "1.13.0"])
def test_old_torch_is_said_in_one_sentence(source, stand_in_torch, version):
    path = stand_in_torch(f"__version__ = {version!r}")
    done = setup_py(source, "build_ext", PYTHONPATH=path)
    assert done.returncode != 0
    assert last_line(done) == f"polarfast: torch {version} is too old; install torch >= 2.10."


def test_missing_torch_is_said_in_one_sentence(source, stand_in_torch):
    path = stand_in_torch("raise ImportError('no torch here')")
    done = setup_py(source, "build_ext", PYTHONPATH=path)
    assert done.returncode != 0
    assert last_line(done).startswith("polarfast: torch cannot be imported here")


@pytest.mark.slow
def test_import_needs_torch_alone_and_little_time():
    """In a fresh interpreter, after torch; its own time, the best of three."""
    code = (
        "import time, torch; before = time.process_time(); import polarfast; "
        "print(time.process_time() - before); import sys; "
        "extras = {'torchvision', 'triton', 'matplotlib', 'sklearn', 'rich', 'yaml'}; "
        "print(*extras & set(sys.modules))"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        )
        taken, _, modules = done.stdout.partition("\n")
        assert modules.strip() == ""
        seconds.append(float(taken))
        if seconds[-1] < 0.3:
            break
    assert min(seconds) < 0.3, seconds


@pytest.mark.slow
def test_missing_extension_is_said_in_one_sentence():
    code = "import sys; sys.modules['polarfast._C'] = None; import polarfast.kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "polarfast's compiled extension does not load" in last_line(done)
    assert "pip install --no-build-isolation ." in last_line(done)


def test_public_names() -> None:
    """Loaded when asked for, the same to type checkers, and no module bears one of them."""
    source = ast.parse((ROOT / "polarfast" / "__init__.py").read_text())
    typed = next(node for node in source.body if isinstance(node, ast.If))
    imported = {alias.name for node in typed.body for alias in node.names}  # type: ignore[attr-defined]
    assert imported == set(polarfast.__all__)
    for name in polarfast.__all__:
        assert not isinstance(getattr(polarfast, name), ModuleType)
        assert importlib.util.find_spec(f"polarfast.{name}") is None


def test_operators_are_there_for_who_has_torch() -> None:
    code = "import torch, polarfast; print(torch.ops.polarfast.put_back.default._schema.name)"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert shown.strip() == "polarfast::put_back"
