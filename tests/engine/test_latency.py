"""`polarfast latency`, and runs whose share to cut is one of the time."""

import json
from dataclasses import replace

import pytest
from support import clocks
from support.engine import TINY

import polarfast as pf
from polarfast.cli import main
from polarfast.engine.recipe import Pruning, Sparsity, to_yaml
from polarfast.errors import ArgumentError


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Measured by the command, of the tiny recipe's network."""
    folder = tmp_path_factory.mktemp("latency")
    (folder / "tiny.yaml").write_text(to_yaml(TINY))
    out = folder / "times.json"
    options = ["--out", str(out), "--batch", "2", "--step", "2", "--seconds", "0.1"]
    with pytest.MonkeyPatch.context() as monkeypatch, clocks.pretended(monkeypatch):
        assert main(["latency", str(folder / "tiny.yaml"), *options]) == 0
    return out


def test_the_command_writes_a_table(table):
    found = pf.LatencyTable.load(table)
    assert found.inputs["shape"][0] == 2 and found.step == 2 and found.ms > 0


def test_a_run_prunes_by_time(table, tmp_path, capsys, monkeypatch):
    pruning = Pruning(of="latency", latency=str(table))
    sparsity = Sparsity(lam=0.1, regularizer="flops-target", cut=0.2)
    recipe = replace(TINY, pruning=pruning, sparsity=sparsity)
    (tmp_path / "tiny.yaml").write_text(to_yaml(recipe))
    out = tmp_path / "run"
    with clocks.pretended(monkeypatch):
        assert main(["run", str(tmp_path / "tiny.yaml"), "--out", str(out)]) == 0
    assert "steered to cut 20 % of the time" in capsys.readouterr().out
    plan = pf.PruningPlan.from_json((out / "plan.json").read_text())
    assert plan.latency is not None and plan.latency.measured is not None
    results = json.loads((out / "results.json").read_text())
    assert results["macs"]["dense"] == plan.macs_before // 2  # of an image
    for name, kept in plan.kept.items():
        width = kept.numel() + len(plan.layers[name].constant)
        assert width % 2 == 0 or width == plan.layers[name].channels


def test_settings_that_do_not_go_together():
    with pytest.raises(ArgumentError, match="polarfast latency RECIPE writes the file"):
        Pruning(of="latency")
    with pytest.raises(ArgumentError, match="give both"):
        Pruning(latency="times.json")


def test_a_share_of_the_time_out_of_reach_is_refused_before_training(table, tmp_path, capsys):
    pruning = Pruning("percentile", cut=0.99, of="latency", latency=str(table))
    recipe = replace(TINY, pruning=pruning)
    (tmp_path / "tiny.yaml").write_text(to_yaml(recipe))
    assert main(["run", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run")]) == 1
    assert "of the time is out of reach" in capsys.readouterr().err
