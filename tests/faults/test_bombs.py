"""Small files that describe something huge are refused quickly, in little memory, in few words."""

import json
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.damage import MESSAGE, cost, rezipped
from support.nets import Residual, X, prepared
from support.report_runs import write_run

import polarfast as pf
from polarfast.engine.folder import load_checkpoint, read_plan, save_tensors
from polarfast.engine.recipe import load_recipe
from polarfast.engine.report.reading import read_runs

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc"),
]
MB, SECONDS = 100, 1.0
HUGE = 10**12
DEEP = "[" * 3000 + "]" * 3000


def _plan() -> dict[str, Any]:
    model, scales = prepared(Residual, "expand")
    data = json.loads(pf.plan(model, X, scales).to_json())
    del data["digest"]  # a stranger would make one
    return data


def _layer(data: dict[str, Any], **change: Any) -> dict[str, Any]:
    next(iter(data["layers"].values())).update(change)
    return data


def _text(data: Any) -> str:
    return data if isinstance(data, str) else json.dumps(data)


PLANS: dict[str, Callable[[], Any]] = {
    "a range past the layer": lambda: _layer(_plan(), kept=[[0, HUGE]]),
    "a range in a huge layer": lambda: _layer(_plan(), channels=HUGE, kept=[[0, HUGE - 1]]),
    "many large layers": lambda: {
        **_plan(),
        "layers": {
            str(i): {"channels": 2**22, "kept": [[0, 2**22 - 1]], "threshold": None,
                     "constant": [], "note": ""}
            for i in range(500)
        },
    },
    "ranges that repeat": lambda: _layer(_plan(), kept=[[0, 5]] * 10**5),
    "constants that repeat": lambda: _layer(_plan(), constant=[1] * 10**6),
    "huge inputs": lambda: {**_plan(), "inputs": {"shape": [HUGE, HUGE], "dtype": "float32"}},
    "inputs of many dimensions": lambda: {
        **_plan(), "inputs": {"shape": [9] * 10**5, "dtype": "float32"}
    },
    "deep inputs": lambda: _text(_plan()).replace('"float64"', DEEP),
    "nothing but brackets": lambda: DEEP,
    "deep mappings": lambda: '{"format":' * 3000 + "1" + "}" * 3000,
    "a long number": lambda: _text(_plan()).replace('"macs": ', f'"macs": {"9" * 4000}'),
    "a longer number": lambda: _text(_plan()).replace('"macs": ', f'"macs": {"9" * 10**6}'),
    "many empty lists": lambda: "[" + "[]," * 700_000 + "[]]",
    "a long name": lambda: {**_plan(), "x" * 10**6: 1},
    "a long value": lambda: {**_plan(), "residual": "x" * 10**6},
}  # fmt: skip


@pytest.mark.parametrize("kind", PLANS)
def test_plans(tmp_path: Path, kind: str, told: Callable[[str], None]) -> None:
    path = tmp_path / "plan.json"
    path.write_text(_text(PLANS[kind]()), encoding="utf-8")
    _refused(path, lambda: read_plan(path), told, kind)


def _refused(path: Path, read: Callable[[], Any], told: Callable[[str], None], kind: str) -> None:
    size = path.stat().st_size
    message, seconds, grown = cost(read)
    told(f"{path.name}, {kind}: {size} bytes refused in {seconds:.2f} s, {grown:.0f} MB")
    assert message and path.name in message and len(message) < MESSAGE
    assert seconds < 5 * SECONDS  # of a slow machine that is doing other things
    assert grown < MB + size / 2**20


# --- files of tensors


def _slim(folder: Path) -> Path:
    model, scales = prepared(Residual, "expand")
    plan = pf.plan(model, X, scales)
    pf.save(pf.slim(model, plan), plan, folder / "slim.pt")
    return folder / "slim.pt"


def _with_info(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = torch.load(path, weights_only=True)
    info = json.loads(data["info"])
    change(info)
    torch.save({**data, "info": json.dumps(info)}, path)


def huge_shapes(path: Path) -> None:
    def change(info: dict[str, Any]) -> None:
        info["structure"]["shapes"]["first.0.weight"] = [2**15, 2**15]

    _with_info(path, change)


def huge_new_tensors(path: Path) -> None:
    def change(info: dict[str, Any]) -> None:
        info["structure"]["shapes"]["first.4.put_back_index"] = [2**30]
        info["structure"]["shapes"]["first.4.put_back_constant"] = [2**30]

    _with_info(path, change)


def huge_way_back(path: Path) -> None:
    def change(info: dict[str, Any]) -> None:
        info["origin"]["index"]["first.1.weight"]["0"] = [[0, HUGE]]

    _with_info(path, change)


def deep_info(path: Path) -> None:
    data = torch.load(path, weights_only=True)
    torch.save({**data, "info": DEEP}, path)


def many_shapes(path: Path) -> None:
    def change(info: dict[str, Any]) -> None:
        info["structure"]["shapes"] |= {f"x{i}": [2**20] for i in range(50_000)}

    _with_info(path, change)


def compressed(path: Path) -> None:
    rezipped(path, {"data/0": bytes(2**28)}, compressed=True)


def _pickled(operators: bytes) -> Callable[[Path], None]:
    return lambda path: rezipped(path, {"data.pkl": b"\x80\x02" + operators + b"."})


def _global(name: str, *arguments: bytes) -> bytes:
    return b"c" + name.replace(".", "\n", name.count(".")).encode() + b"(" + b"".join(arguments)


_STORAGE = b"(X\7\0\0\0storagectorch\nDoubleStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuJ%stQ"


def _tensor(size: bytes, stride: bytes) -> Callable[[Path], None]:
    """A tensor of that size in the file's first storage."""

    def make(path: Path) -> None:
        import zipfile

        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data/0"))
            count = archive.getinfo(name).file_size // 8
        storage = _STORAGE.replace(b"%s", struct.pack("<i", count))
        tensor = (
            b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + size + b"\x85"
            + stride + b"\x85\x89ccollections\nOrderedDict\n)RtR"
        )  # fmt: skip
        _pickled(b"}X\1\0\0\0a" + tensor + b"s")(path)

    return make


def _doubling() -> bytes:
    """A list of two of a list of two of …"""
    parts = [b"]q\0"]
    for depth in range(1, 30):
        parts.append(b"]q" + bytes([depth]) + (b"h" + bytes([depth - 1]) + b"a") * 2)
    return b"".join(parts)


TENSORS: dict[str, Callable[[Path], None]] = {
    **{
        make.__name__: make
        for make in (huge_shapes, huge_new_tensors, huge_way_back, deep_info, many_shapes)
    },
    "compressed": compressed,
    "past its storage": _tensor(b"J\xff\xff\xff\x7f", b"K\1"),
    "over and over": _tensor(b"\x8a\6" + HUGE.to_bytes(6, "little"), b"K\0"),
    "a large array of bytes": _pickled(b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R"),
    "bytes that double": _pickled(b"c_codecs\nencode\nX\1\0\0\0aX\x0e\0\0\0unicode_escape\x86R"),
    "lists of lists": _pickled(_doubling()),
    "many lists": _pickled(b"(" + b"]" * 2**20 + b"l"),
    "many sets": _pickled(b"(" + b"\x8f" * 2**20 + b"l"),
    "deep lists": _pickled(b"]" * 3000 + b"a" * 2999),
    "code": _pickled(pickle.dumps(print, 2)[2:-1]),
    "attributes of what is called": _pickled(b"ctorch\nFloatStorage\n}X\5\0\0\0dtypeNsb"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_slim_files(tmp_path: Path, kind: str, told: Callable[[str], None]) -> None:
    path = _slim(tmp_path)
    TENSORS[kind](path)
    _refused(path, lambda: pf.load(path, lambda: Residual().double().eval()), told, kind)


@pytest.mark.parametrize("kind", list(TENSORS)[5:])
def test_checkpoints(tmp_path: Path, kind: str, told: Callable[[str], None]) -> None:
    path = tmp_path / "00000001.pt"
    save_tensors(path, {"format": 2, "a": torch.zeros(10**4, dtype=torch.double)})
    TENSORS[kind](path)
    _refused(path, lambda: load_checkpoint(path), told, kind)


# --- recipes, journals, logs


def _repeats(first: str, each: str) -> str:
    """Nine times nine times nine … of the first."""
    lines, names = [f"a: &a {first}"], "abcdefghi"
    for before, name in zip(names, names[1:], strict=False):
        lines.append(f"{name}: &{name} {each.replace('%', ', '.join([f'*{before}'] * 9))}")
    return "\n".join(lines)


RECIPES = {
    "aliases": _repeats("[x, x, x, x, x, x, x, x, x]", "[%]"),
    "aliases that merge": _repeats("{x: 1}", "{<<: [%]}"),
    "itself": "a: &a [*a, *a]",
    "brackets": "a: " + DEEP,
    "dashes": "- " * 3000 + "a",
    "indentation": "\n".join(" " * depth + "a:" for depth in range(250)),
    "a long number": "seed: " + "9" * 5000,
    "a number of another base": "seed: 0x" + "f" * 5000,
    "a long list": "a: [" + "x, " * 9000 + "]",
    "a long text": "a: '" + "x" * 10**6 + "'",
    "a long key": "x" * 9000 + ": 1",
    "many keys": "\n".join(f"a{i}: 1" for i in range(3500)),
}  # fmt: skip


@pytest.mark.parametrize("kind", RECIPES)
def test_recipes(tmp_path: Path, kind: str, told: Callable[[str], None]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPES[kind], encoding="utf-8")
    _refused(path, lambda: load_recipe(path), told, kind)


JOURNALS = {
    "deep": DEEP,
    "a long number": '{"lam": ' + "9" * 10**6 + "}",
    "many lists": "[" + "[]," * 600_000 + "[]]",
    "a long key": '{"' + "x" * 10**6 + '": 1}',
    "a long value": '{"lam": "' + "x" * 10**6 + '", "t": 1, "cut": 1, "epochs": 1}',
}


@pytest.mark.parametrize("kind", JOURNALS)
def test_journals(tmp_path: Path, kind: str, told: Callable[[str], None]) -> None:
    path = tmp_path / "search.jsonl"
    search = lambda: pf.search(lambda lam, t: iter([0.4]), cut=0.4, journal=path)  # noqa: E731
    search()
    header = path.read_text().splitlines()[0]
    path.write_text(f"{header}\n{JOURNALS[kind]}\n", encoding="utf-8")
    _refused(path, search, told, kind)


LOGS = {
    "recipe.yaml": RECIPES["aliases"],
    "results.json": '{"seconds": 1' + "0" * 4000 + "}",
    "metrics.jsonl": '{"stage": "a", "epoch": 1, "index": 1000000000, "loss": 1}\n' * 1000,
    "plan.json": DEEP,
}


@pytest.mark.parametrize("name", LOGS)
def test_reports(tmp_path: Path, name: str, told: Callable[[str], None]) -> None:
    run = write_run(tmp_path / "run")
    path = run / name
    path.write_text(LOGS[name], encoding="utf-8")
    whole: list[str] = []

    def read() -> None:
        (record,) = read_runs([run])
        whole.extend(record.unread)
        raise pf.PolarfastError("; ".join(record.unread))

    _refused(path, read, told, "in a report")
