"""Files of tensors: what torch.save writes comes back, in whatever way; nothing else does."""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.damage import same
from torch.serialization import get_crc32_options, set_crc32_options

from polarfast.archives import read_tensors, write_tensors
from polarfast.errors import FileFormatError

DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32),
    *(torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.uint16),
    torch.float8_e4m3fn,
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(24).view(2, 3, 4).to(dtype)
    content = {"all": tensor, "part": tensor[1, ::2], "turned": tensor.transpose(0, 2)}
    write_tensors(tmp_path / "a.pt", content | {"none": tensor[:0], "one": tensor[0, 0, 0]})
    found = read_tensors(tmp_path / "a.pt", "")
    for name, expected in content.items():
        assert found[name].dtype == dtype and found[name].tolist() == expected.tolist()


def test_parameters_ties_and_state_dicts(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    tied = model[0].weight.detach()
    content: dict[str, Any] = {"state": model.state_dict(), "a": tied, "b": tied[1:]}
    torch.save({**content, "p": torch.nn.Parameter(torch.ones(2))}, tmp_path / "a.pt")
    found = read_tensors(tmp_path / "a.pt", "")
    assert isinstance(found["state"], OrderedDict) and same(found["state"], content["state"])
    assert found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner)
    | st.dictionaries(st.text() | st.integers(-9, 2**40), inner),
    max_leaves=20,
)  # fmt: skip


@given(PLAIN)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_plain_data_comes_back(tmp_path: Path, content: Any) -> None:
    write_tensors(tmp_path / "a.pt", content)
    assert read_tensors(tmp_path / "a.pt", "") == content


def test_files_have_checksums_whatever_a_program_has_turned_off(tmp_path: Path) -> None:
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        write_tensors(tmp_path / "a.pt", torch.ones(3))
        assert not get_crc32_options()
    finally:
        set_crc32_options(before)
    assert read_tensors(tmp_path / "a.pt", "").tolist() == [1, 1, 1]


def test_what_is_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for content in (b"", b"PK", b"PK\3\4" * 99, pickle.dumps([1]), bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"a\.pt' is damaged.*take a copy"):
            read_tensors(path, "take a copy")
    torch.save([torch.ones(2)], path, _use_new_zipfile_serialization=False)
    with pytest.raises(FileFormatError, match=r"before torch 1\.6"):
        read_tensors(path, "")
    torch.save({1, 2}, path)
    with pytest.raises(FileFormatError, match="set"):
        read_tensors(path, "")
    path.unlink()
    path.mkdir()
    with pytest.raises(FileFormatError, match=r"a\.pt' is no file"):
        read_tensors(path, "")


def test_damage_is_named_with_its_member(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(100), "b": torch.full((100,), 7)}, path)
    whole = path.read_bytes()
    place = whole.index(torch.full((100,), 7).numpy().tobytes())
    for content, named in (
        (whole[: place + 9] + b"\1" + whole[place + 10 :], "a/data/1 is not what was written"),
        (whole[:-200], "cut short|end is missing|is damaged"),
        (whole + b"\0", "something was added"),
        (b"\0" + whole, "does not begin"),
    ):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=named):
            read_tensors(path, "")


def test_what_repeats_its_storage_is_written_out(tmp_path: Path) -> None:
    content = {"std": torch.ones(1).expand(3).view(1, 3, 1, 1), "list": [torch.ones(1).expand(9)]}
    write_tensors(tmp_path / "a.pt", content)
    assert same(read_tensors(tmp_path / "a.pt", ""), content)
    large = {"mask": torch.zeros(1).expand(2**20)}  # 4 MB
    write_tensors(tmp_path / "a.pt", large)
    assert same(read_tensors(tmp_path / "a.pt", ""), large)
    torch.save(content, tmp_path / "b.pt")  # as it is: little
    assert same(read_tensors(tmp_path / "b.pt", ""), content)
    torch.save(large, tmp_path / "b.pt")
    with pytest.raises(FileFormatError, match="repeats its storage many times"):
        read_tensors(tmp_path / "b.pt", "")


def test_a_program_that_maps_files_into_memory(tmp_path: Path) -> None:
    from torch.utils.serialization import config

    write_tensors(tmp_path / "a.pt", {"a": torch.ones(2)})
    config.load.mmap = True
    try:
        assert same(read_tensors(tmp_path / "a.pt", ""), {"a": torch.ones(2)})
    finally:
        config.load.mmap = False
