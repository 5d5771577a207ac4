"""The paper's networks: MACs as torch counts them, shapes, the option-A shortcut."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from polarfast.engine import models
from polarfast.errors import ArgumentError, FileFormatError


def macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(shape))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (models.resnet(56), 125_485_696),
        (models.vgg16_bn(), 313_463_808),
    ],
)
def test_macs_are_the_papers(model: nn.Module, expected: int) -> None:
    assert macs(model, (1, 3, 32, 32)) == expected


def test_parameters_of_resnet20() -> None:
    # He et al. 2016, Table 6: 0.27 M.
    assert sum(p.numel() for p in models.resnet(20).parameters()) == 269_722


def test_classes_and_channels() -> None:
    assert models.build("resnet8", 100, 1)(torch.zeros(2, 1, 16, 16)).shape == (2, 100)
    assert models.build("vgg16", 7, 3)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_shortcut_slices_and_pads() -> None:
    block = models.BasicBlock(2, 4, stride=2)
    x = torch.randn(3, 2, 5, 6)
    out = block.shortcut(x)
    assert out.shape == (3, 4, 3, 3)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, 0].any() and not out[:, 3].any()


@pytest.mark.parametrize("depth", [2, 18, 50 - 1, -4])
def test_depth_that_does_not_exist(depth: int) -> None:
    with pytest.raises(ArgumentError, match=f"depth={depth}"):
        models.resnet(depth)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ArgumentError, match="'resnet21'.*resnet20"):
        models.build("resnet21", 10, 3)


def test_weights_beside_other_things_and_in_the_old_format(tmp_path: Path) -> None:
    model = models.build("resnet8", 10, 1)
    state = model.state_dict()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3])  # holds a Counter
    torch.save({"model": state, "schedule": schedule.state_dict()}, tmp_path / "more.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("more.pt", "old.pt"):
        other = models.build("resnet8", 10, 1)
        with pytest.warns(UserWarning, match="read by torch alone, which does not find all damage"):
            models.load_weights(other, str(tmp_path / name))
        assert all(torch.equal(part, state[key]) for key, part in other.state_dict().items())
    whole = bytearray((tmp_path / "more.pt").read_bytes())
    whole[len(whole) // 2] ^= 1
    (tmp_path / "more.pt").write_bytes(whole)
    with pytest.raises(FileFormatError, match="CRC"):
        models.load_weights(other, str(tmp_path / "more.pt"))
