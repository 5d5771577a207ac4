"""A slim model comes back from its file, without its code being run from it."""

import subprocess
import sys
import textwrap

import pytest
import torch
from support.nets import Residual, X, chain, empty, prepared

import polarfast as pf


def made(residual="expand", emptied=()):
    model, scales = prepared(Residual, residual)
    empty(scales, emptied)
    plan = pf.plan(model, X, scales)
    return pf.slim(model, plan), plan


def build():
    return Residual().double().eval()


@pytest.mark.parametrize("emptied", [(), ("first.4.weight",), ("first.1.weight",)])
@pytest.mark.parametrize("residual", ["keep", "expand", "couple"])
def test_round_trip_is_bit_identical(tmp_path, residual, emptied):
    slim, plan = made(residual, [name for name in emptied if residual == "expand"])
    path = tmp_path / "slim.pt"
    pf.save(slim, plan, path)
    loaded = pf.load(path, build)
    assert torch.equal(loaded(X), slim(X))
    assert pf.load_plan(path).to_json() == plan.to_json()
    assert [p.name for p in tmp_path.iterdir()] == ["slim.pt"]
    (tmp_path / "other").touch()  # no more private than any new file
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    # A loaded model can be saved again, and fine-tuned.
    pf.save(loaded, plan, path)
    loaded.train()(X).sum().backward()


@pytest.mark.slow
def test_in_a_fresh_process(tmp_path):
    slim, plan = made("expand")
    pf.save(slim, plan, tmp_path / "slim.pt")
    torch.save((X, slim(X)), tmp_path / "expected.pt")
    code = """
        import sys, torch
        import polarfast as pf
        from support.nets import Residual
        slim = pf.load(sys.argv[1] + "/slim.pt", build=lambda: Residual().double().eval())
        x, y = torch.load(sys.argv[1] + "/expected.pt")
        assert torch.equal(slim(x), y)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], check=True)


def test_a_lower_precision_comes_back(tmp_path):
    slim, plan = made()
    slim = slim.to(torch.bfloat16)
    pf.save(slim, plan, tmp_path / "slim.pt")
    loaded = pf.load(tmp_path / "slim.pt", lambda: Residual().eval())
    assert {param.dtype for param in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded(X.bfloat16()), slim(X.bfloat16()))


def test_wrapped_models_are_saved_without_their_wrapper(tmp_path):
    slim, plan = made()
    pf.save(torch.nn.DataParallel(slim), plan, tmp_path / "slim.pt")
    assert torch.equal(pf.load(tmp_path / "slim.pt", build)(X), slim(X))


class _Other(Residual):
    """The same modules and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.more = torch.nn.Linear(2, 2)


def test_errors(tmp_path):
    slim, plan = made()
    path = tmp_path / "slim.pt"
    with pytest.raises(pf.FileFormatError, match="not made by polarfast"):
        pf.save(chain(), plan, path)
    assert not path.exists()
    pf.save(slim, plan, path)
    with pytest.raises(pf.PlanError, match="'first.0' that this model has not"):
        pf.load(path, chain)
    with pytest.raises(pf.PlanError, match="build.. makes another network"):
        pf.load(path, _Other)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(pf.FileFormatError, match="damaged"):
        pf.load(path, build)
    torch.save({"format": "polarfast-model", "version": 7}, path)
    with pytest.raises(pf.FileFormatError, match="version 7"):
        pf.load(path, build)
    torch.save([1, 2], path)
    with pytest.raises(pf.FileFormatError, match="not a polarfast"):
        pf.load(path, build)
    with pytest.raises(FileNotFoundError):
        pf.load(tmp_path / "none.pt", build)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    slim, plan = made()
    path = tmp_path / "slim.pt"
    pf.save(slim, plan, path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        pf.save(slim, plan, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_arguments_in_another_order(tmp_path):
    torch.manual_seed(0)
    model = chain().double().eval()
    scales = pf.scaling_factors(model, X)
    plan = pf.plan(model, X, scales, "percentile", value=0.3)
    slim = pf.slim(model, plan)
    with pytest.raises(pf.ArgumentError, match="the slim model comes first"):
        pf.save(plan, slim, tmp_path / "slim.pt")
    assert not list(tmp_path.iterdir())
    pf.save(slim, plan, tmp_path / "slim.pt")
    with pytest.raises(pf.ArgumentError, match="a function that makes the original network"):
        pf.load(tmp_path / "slim.pt", build=chain())
