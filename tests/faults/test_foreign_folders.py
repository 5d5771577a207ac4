"""A report over folders that are damaged, or that others made: it says what it cannot read."""

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml
from support.damage import MESSAGE, flips, truncations
from support.report_runs import RECIPE, RESULTS, gammas, metrics, plan, widths, write_run

from polarfast.engine.report import write_report
from polarfast.engine.report.reading import read_runs
from polarfast.engine.yamls import sealed_yaml

pytestmark = pytest.mark.faults
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 7, 10**30, -(10**300), 1e308, -1e308, 1e-320, math.nan, math.inf, ""),
    *("x", "1", "<b>", "\x00", "\ud800", "x" * 5000, [], {}, [[]], {"a": 1}, {"": []}, [None] * 9),
)
TENSORS: tuple[Any, ...] = (
    *(torch.zeros(0), torch.zeros(3), torch.full((8,), math.nan), torch.full((8,), -math.inf)),
    *(torch.full((8,), 1e30), torch.zeros(3, 6, 100), torch.zeros(12, 3, 100, dtype=torch.int32)),
    *(torch.full((12, 3, 100), -5, dtype=torch.int32), torch.ones(12, 3, 100, dtype=torch.long)),
    *(torch.ones(8, dtype=torch.bool), torch.ones(8, dtype=torch.cfloat), torch.tensor(3.0)),
    torch.full((12, 3, 100), 2**31 - 1, dtype=torch.int32),
)


def altered(data: Any, random: Random, others: tuple[Any, ...] = VALUES) -> Any:
    """The data with something in it replaced, taken out, or put in twice."""
    data = copy.deepcopy(data)
    part = data
    while True:
        keys = list(part) if isinstance(part, dict) else list(range(len(part)))
        if not keys:
            return random.choice(others)
        key = random.choice(keys)
        inner = part[key]
        if not isinstance(inner, (dict, list)) or not len(inner) or random.random() < 0.3:
            break
        part = inner
    fate = random.random()
    if fate < 0.15:
        del part[key]
    elif fate < 0.25 and isinstance(part, dict):
        part[random.choice(("x", "", "\ud800", key + "\n"))] = part.pop(key)
    else:
        part[key] = random.choice(others)
    return data


def _recipe(random: Random) -> bytes:
    values = altered({**RECIPE, "data": {"name": "digits", "validation": 0.1}}, random)
    return sealed_yaml(yaml.safe_dump(values)).encode()


def _plan(random: Random) -> bytes:
    data = json.loads(plan(widths(3)).to_json())
    del data["digest"]
    return json.dumps(altered(data, random)).encode()


def _results(random: Random) -> bytes:
    return json.dumps(altered(json.loads(json.dumps(RESULTS.to_dict())), random)).encode()


def _metrics(random: Random) -> bytes:
    lines = metrics(12, 6, 18)
    for _ in range(random.randint(1, 3)):
        place = random.randrange(len(lines))
        lines[place] = altered(lines[place], random)
    if random.random() < 0.2:
        random.shuffle(lines)
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _gammas(random: Random, path: Path) -> None:
    torch.save(altered(gammas(widths(3), 12), random, (*TENSORS, *TENSORS, *VALUES)), path)


TEXTS: dict[str, Callable[[Random], bytes]] = {
    "recipe.yaml": _recipe,
    "plan.json": _plan,
    "results.json": _results,
    "metrics.jsonl": _metrics,
}
NAMES = (*TEXTS, "gammas.pt")


def put_in_place(path: Path, random: Random) -> str:
    """Something else in the place of a file."""
    content = path.read_bytes()
    kind = random.choice(("folder", "empty", "utf-16", "latin-1", "noise", "another", "twice"))
    path.unlink()
    if kind == "folder":
        path.mkdir()
        return kind
    other = path.parent / random.choice([name for name in NAMES if name != path.name])
    path.write_bytes({
        "empty": b"",
        "utf-16": content.decode("latin-1").encode("utf-16"),
        "latin-1": "γ = é\n".encode() + b"\xe9\xff" + content,
        "noise": random.randbytes(2000),
        "another": other.read_bytes(),
        "twice": content + content,
    }[kind])  # fmt: skip
    return kind


def _run(folder: Path) -> Path:
    run = write_run(folder, layers=3)
    (run / "recipe.yaml").write_text(sealed_yaml(yaml.safe_dump(RECIPE)), encoding="utf-8")
    assert not read_runs([run])[0].unread
    return run


def reported(run: Path, out: Path, what: str) -> bool:
    """Write the page; whether something could not be read."""
    page = write_report([run], out).read_text(encoding="utf-8")
    assert page.endswith("</html>\n"), what
    assert not re.search(r' (d|x|y|transform|viewBox)="[^"]*(nan|inf|e[-+])', page), what
    (record,) = read_runs([run])
    for line in record.unread:
        assert str(run) in line and len(line) < MESSAGE, f"{what}: {line[:200]}"
    assert len(record.unread) < 9, what
    return bool(record.unread)


@pytest.mark.parametrize("name", NAMES)
def test_values_of_other_kinds(
    tmp_path: Path, name: str, tries: int, told: Callable[[str], None]
) -> None:
    run, outcomes = _run(tmp_path / "run"), Counter[str]()
    for seed in range(tries):
        random = Random(seed)
        if name in TEXTS:
            (run / name).write_bytes(TEXTS[name](random))
        else:
            _gammas(random, run / name)
        unread = reported(run, tmp_path / "report.html", f"{name}, seed {seed}")
        outcomes["named" if unread else "shown"] += 1
    told(f"{name}: {tries} with other values: {dict(outcomes)}")


@pytest.mark.parametrize("name", NAMES)
def test_bits_ends_and_other_files(
    tmp_path: Path, name: str, tries: int, told: Callable[[str], None]
) -> None:
    run, outcomes = _run(tmp_path / "run"), Counter[str]()
    path, random = run / name, Random(0)
    whole = path.read_bytes()
    for change in (flips, truncations):
        for what, content in change(whole, tries // 2):
            path.write_bytes(content)
            unread = reported(run, tmp_path / "report.html", what)
            outcomes["named" if unread else "shown"] += 1
    for _ in range(min(tries // 2, 40)):
        path.write_bytes(whole)
        kind = put_in_place(path, random)
        unread = reported(run, tmp_path / "report.html", kind)
        outcomes["named" if unread else "shown"] += 1
        if path.is_dir():
            path.rmdir()
    told(f"{name}: {sum(outcomes.values())} damaged or replaced: {dict(outcomes)}")
