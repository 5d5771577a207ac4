"""The runner of benchmarks/gpu: stages that crash, hang or are killed, and what is on disk then."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from support import ROOT

GPU = ROOT / "benchmarks" / "gpu"

WRITES = """
import json, os
def row(name, **cells):
    with open(os.environ["ROWS"], "a") as file:
        file.write(json.dumps({"table": "numbers", "row": name, "cells": cells}) + "\\n")
"""


@pytest.fixture
def runner(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(GPU))
    import runner

    return runner


@pytest.fixture
def run(runner, tmp_path):
    """Runs stages given as (key, program, options); returns the results and what was announced."""

    def run_programs(*programs):
        stages = [
            runner.Stage(key, f"stage {key}", options.pop("seconds", 30), python(text), **options)
            for key, text, options in programs
        ]
        results, said = runner.Results({"device": "a device"}, tmp_path / "results"), []
        runner.run_stages(stages, results, tmp_path / "log.txt", {"GIVEN": "here"}, said.append)
        return results, said

    return run_programs


def python(text: str) -> list[str]:
    return [sys.executable, "-c", WRITES + text]


def test_rows_and_files_are_there_after_each_stage(run, tmp_path):
    sees = f"""
found = json.load(open({str(tmp_path / "results.json")!r}))
row("seen", stages=len(found["stages"]), first=found["stages"][0]["rows"][0]["cells"]["n"])
print(os.environ["GIVEN"])
"""
    results, _ = run(("a", "row('one', n=1)", {}), ("b", sees, {}))
    assert [outcome.status for outcome in results.outcomes] == ["passed", "passed"]
    assert results.outcomes[1].rows[0]["cells"] == {"stages": 1, "first": 1}
    assert results.outcomes[1].note == "here"
    assert not results.failed
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "log.txt",
        "results.json",
        "results.md",
    ]


def test_a_crash_is_told_and_the_rest_goes_on(run, tmp_path):
    crashes = "row('before', n=1); raise OSError('out of luck')"
    refused = "row('fine', n=1); print(json.dumps({'table': 't', 'row': 'r', 'cells': {}, "
    refused += "'failed': 'two is not three'}), file=open(os.environ['ROWS'], 'a'))"
    results, said = run(("a", crashes, {}), ("b", refused, {}), ("c", "row('after', n=2)", {}))
    assert [outcome.status for outcome in results.outcomes] == ["failed", "failed", "passed"]
    assert results.outcomes[0].note == "OSError: out of luck"
    assert len(results.outcomes[0].rows) == 1
    assert results.failed
    assert "two is not three" in "\n".join(said)
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_nothing_follows_a_stage_without_which_it_is_worthless(run):
    results, said = run(("a", "raise SystemExit(3)", {"stops": True}), ("b", "row('b')", {}))
    assert [outcome.key for outcome in results.outcomes] == ["a"]
    assert "nothing after it is run" in said[-1]


@pytest.mark.slow
def test_a_hanging_stage_is_killed_with_its_children(run, tmp_path):
    beats = f"import time\nwhile True: open({str(tmp_path / 'beat')!r}, 'a').write('.')"
    beats += "; time.sleep(0.01)"
    hangs = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {beats!r}])
while not os.path.exists({str(tmp_path / "beat")!r}): time.sleep(0.01)
row("whole", n=1)
open(os.environ["ROWS"], "a").write('{{"table": "hal')
time.sleep(60)
"""
    start = time.monotonic()
    results, _ = run(("a", hangs, {"seconds": 2}), ("b", "row('after', n=2)", {}))
    assert time.monotonic() - start < 30
    assert [outcome.status for outcome in results.outcomes] == ["timed out", "passed"]
    assert [row["row"] for row in results.outcomes[0].rows] == ["whole"]
    size = os.path.getsize(tmp_path / "beat")
    time.sleep(0.2)
    assert os.path.getsize(tmp_path / "beat") == size


def test_children_of_a_stage_that_ends_are_not_left(run, tmp_path):
    program = f"""
import subprocess, sys
print(subprocess.Popen(["sleep", "60"]).pid, file=open({str(tmp_path / "pid")!r}, "w"))
"""
    run(("a", program, {}))
    time.sleep(0.1)
    state = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_the_table_reads(run, tmp_path):
    program = "row('a|b', **{'µs': [1.25, 1.0, 2345.6], 'n': 26560}); row('c', share=0.5)"
    run(("a", program, {}), ("b", "", {"skipped": "there is none"}))
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert lines[0] == "# a device"
    assert "| a\\|b | 1.25 (1–2,346) | 26,560 |  |" in lines
    assert "| c |  |  | 0.5 |" in lines
    assert "| b: stage b | skipped | 0.0 | there is none |" in lines


def test_all_stages_fit_into_nine_minutes(runner, monkeypatch):
    import run as script
    import worker

    assert "".join(script.STAGES) == "abcdefgh"
    assert sum(stage.seconds for stage in script.stages("abcdefgh", "cuda", Path("."))) <= 540
    assert {work for _, _, work in script.STAGES.values()} == set(worker.WORKS)
    for work, module in worker.WORKS.items():
        assert f"\ndef {work}(device: str" in (GPU / f"{module}.py").read_text()


def test_the_command_writes_its_results(tmp_path):
    command = [sys.executable, str(GPU / "run.py"), "--device", "cpu", "--stages", "e,f"]
    command += ["--out", str(tmp_path / "out"), "--files", str(tmp_path / "files")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").glob("gpu-cpu*.json")
    found = json.loads(path.read_text())
    assert [stage["status"] for stage in found["stages"]] == ["skipped", "skipped"]
    assert found["machine"]["torch"] != "missing"
    assert "needs a GPU" in done.stdout
