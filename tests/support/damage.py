"""Files with one bit or their end changed, and files that are made to cost more than they weigh."""

import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from polarfast.errors import PolarfastError

MESSAGE = 2000  # characters of a refusal, at most


def flips(content: bytes, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """The content with one bit changed, anywhere; half of them where headers are."""
    random = Random(seed)
    bits = 8 * len(content)
    ends = [*range(min(bits, 8 * 600)), *range(max(0, bits - 8 * 1200), bits)]
    for number in range(count):
        place = random.choice(ends) if number % 2 else random.randrange(bits)
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        yield f"bit {place % 8} of byte {place // 8}", bytes(changed)


def truncations(content: bytes, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """The content without its end."""
    random = Random(seed)
    for number in range(count):
        length = number if number < 5 else random.randrange(len(content))
        yield f"cut to {length} bytes", content[:length]


def same(first: Any, second: Any) -> bool:
    """Whether two contents are equal to the bit."""
    if isinstance(first, torch.Tensor):
        return (
            isinstance(second, torch.Tensor)
            and first.dtype == second.dtype
            and first.shape == second.shape
            and torch.equal(first.double().nan_to_num(7), second.double().nan_to_num(7))
        )
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def found_or_harmless(
    path: Path, read: Callable[[Path], Any], changes: Iterator[tuple[str, bytes]]
) -> Counter[str]:
    """Read the file after each change, which must be found, and named, or have no effect.

    Args:
        read: what the file holds, with what was said of it, if that is no error, under "unread".
    """
    whole = path.read_bytes()
    right, outcomes = read(path), Counter[str]()
    try:
        for what, changed in changes:
            path.write_bytes(changed)
            try:
                content = read(path)
            except PolarfastError as error:
                assert path.name in str(error), f"{what}: not named in {error}"
                assert len(str(error)) < MESSAGE, what
                outcomes["found"] += 1
                continue
            if same(content, right):
                outcomes["no effect"] += 1
            else:
                assert isinstance(content, dict) and content.get("unread"), f"{what}: went unseen"
                assert any(path.name in line for line in content["unread"]), what
                assert len("".join(content["unread"])) < MESSAGE, what
                outcomes["found"] += 1
    finally:
        path.write_bytes(whole)
    return outcomes


def cost(read: Callable[[], Any]) -> tuple[str, float, float]:
    """What a refusal says (nothing: it was none), its seconds of processor time, and the MB that
    the process grew by at most.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before, start = _peak(), time.process_time()
    message = ""
    try:
        read()
    except PolarfastError as error:
        message = str(error)
    return message, time.process_time() - start, (_peak() - before) / 2**10


def _peak() -> int:
    """Largest memory of this process since the last look, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def rezipped(path: Path, members: dict[str, bytes], compressed: bool = False) -> None:
    """A file of `torch.save` with other members, everything about the archive being right.

    Args:
        members: name behind the folder in the archive -> content, for those that change.
    """
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    folder = next(iter(contents)).partition("/")[0]
    contents |= {f"{folder}/{name}": content for name, content in members.items()}
    if compressed:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
        return
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, content in contents.items():
        inner = name.partition("/")[2]
        if inner not in ("version", ".format_version", ".data/serialization_id"):
            writer.write_record(inner, content, len(content))
    writer.write_end_of_file()
