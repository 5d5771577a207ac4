"""Files of tensors, as `torch.save` writes them: checked byte by byte before anything is built.

Torch reads such a file without comparing its checksums, and takes sizes and strides from it as they
stand. Here the file is first held against the one layout that `torch.save` writes (each byte has
one meaning and most have one value), each member against its CRC, and the pickled structure is run
once on stand-ins, so that what does not fit is refused before a tensor of it exists.
"""

import copy
import io
import math
import os
import pickle
import pickletools
import struct
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from .documents import check_extent
from .errors import FileFormatError
from .storage import open_file, write_atomically

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_NARROW = 0xFFFFFFFF  # in a field of 32 bits: the value stands in 64 bits elsewhere
_CHUNK = 2**20
#: Steps of a pickled structure: so many in any case, and more in larger files. A tensor takes 30.
STEPS, BYTES_A_STEP = 400_000, 256
#: Bytes that a tensor may stand for by repeating its storage, as an expanded buffer does.
REPEATED = 2**20
#: What `pickle` writes in protocol 2 for plain data and tensors.
_OPCODES = frozenset(
    "PROTO STOP MARK GLOBAL REDUCE BUILD BINPERSID NONE NEWTRUE NEWFALSE BININT BININT1 BININT2"
    " LONG1 LONG4 BINFLOAT BINUNICODE EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3"
    " APPEND APPENDS SETITEM SETITEMS BINPUT LONG_BINPUT BINGET LONG_BINGET".split()
)


class _Damaged(Exception):
    """What is wrong with a file, in words."""


def write_tensors(path: Path, content: Any) -> None:
    """Write tensors, numbers and strings, whole or not at all, for `read_tensors`."""
    import torch
    from torch.serialization import get_crc32_options, set_crc32_options

    def write(file: Path) -> None:
        given = get_crc32_options()
        set_crc32_options(True)  # a program may have turned them off
        try:
            torch.save(_unrepeated(content), file)
        finally:
            set_crc32_options(given)

    write_atomically(path, write)


def _unrepeated(content: Any) -> Any:
    """The content, tensors that repeat their storage (`expand`) written out."""
    import torch

    if isinstance(content, torch.Tensor):
        if content.layout != torch.strided or content.is_contiguous():
            return content
        full = content.numel() * content.element_size() > content.untyped_storage().nbytes()
        return content.contiguous() if full else content
    if isinstance(content, dict):
        parts = {key: _unrepeated(part) for key, part in content.items()}
        if all(parts[key] is part for key, part in content.items()):
            return content
        written = copy.copy(content)  # a state dict has attributes
        written.update(parts)
        return written
    if type(content) in (list, tuple):
        return type(content)(map(_unrepeated, content))
    return content


def read_tensors(path: str | os.PathLike[str], hint: str) -> Any:
    """What `write_tensors` or `torch.save` wrote, on the CPU, without running code from it.

    Args:
        path: the file.
        hint: what a reader of the error should do.

    Raises:
        FileFormatError: the file is damaged, or holds more than tensors and plain data.
        FileNotFoundError: there is no such file.
    """
    import torch  # here alone: the command line's options need none of it

    with open_file(path, hint) as file:
        try:
            members = _check_archive(file)
            structure = next((n for n in members if n.endswith("/data.pkl")), None)
            if structure is None:
                raise _Damaged("it has no member data.pkl")
            _check_structure(members[structure].read(file), structure, members)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        except _Damaged as error:
            raise FileFormatError(
                f"'{path}' is damaged or no file of polarfast's: {error}; {hint}"
            ) from error
        except Exception as error:  # torch raises half a dozen unrelated types
            raise FileFormatError(
                f"'{path}' cannot be read, it is damaged or no file of polarfast's "
                f"({type(error).__name__}); {hint}"
            ) from error


# --- the archive


@dataclass(frozen=True)
class _Member:
    """Where the bytes of a member of the archive are, in all or of its data."""

    name: bytes
    flags: int
    crc: int
    size: int
    offset: int
    start: int = 0

    def read(self, file: IO[bytes]) -> bytes:
        file.seek(self.start)
        return file.read(self.size)


def _check_archive(file: IO[bytes]) -> dict[str, _Member]:
    """Hold the whole file against what `torch.save` writes.

    Returns:
        Name -> member.
    """
    length = os.fstat(file.fileno()).st_size
    file.seek(0)
    if file.read(4) != b"PK\3\4":
        raise _Damaged(
            "it does not begin as torch.save begins a file (one from before torch 1.6 has no "
            "checksums: write it anew with torch.save)"
        )
    directory, entries = _end_of(file, length)
    members: dict[str, _Member] = {}
    position = 0
    for entry in entries:
        name = entry.name.decode("utf-8", "replace")
        if name in members:
            raise _Damaged(f"member {name} is there twice")
        members[name] = member = _located(file, entry, position, name)
        position = _end_of_member(file, member, name)
    if position != directory:
        raise _Damaged("there is more or less between its members than torch.save writes")
    return members


def _end_of(file: IO[bytes], length: int) -> tuple[int, list[_Member]]:
    """Where the list of members begins, and the list, which lie at the end of the file."""
    ending = _END64.size + _LOCATOR.size + _END.size  # torch writes all three, however small
    if length < ending:
        raise _Damaged("it is cut short")
    file.seek(length - ending)
    wide, locator, found = file.read(_END64.size), file.read(_LOCATOR.size), file.read(_END.size)
    if found[:4] != b"PK\5\6":
        raise _Damaged("its end is missing: it is cut short, or something was added")
    _, _, by, needs, _, _, _, count, size, start = _END64.unpack(wide)
    short = (min(count, 0xFFFF), min(count, 0xFFFF), min(size, _NARROW), min(start, _NARROW))
    if (
        wide != _END64.pack(b"PK\6\6", 44, by, needs, 0, 0, count, count, size, start)
        or locator != _LOCATOR.pack(b"PK\6\7", 0, length - ending, 1)
        or found != _END.pack(b"PK\5\6", 0, 0, *short, 0)
        or start + size != length - ending
        or size < count * _CENTRAL.size
    ):
        raise _Damaged("its end is damaged, or it is cut short")
    file.seek(start)
    return start, _entries(file.read(size), count)


def _entries(listed: bytes, count: int) -> list[_Member]:
    members, position = [], 0
    for _ in range(count):
        if len(listed) - position < _CENTRAL.size:
            raise _Damaged("its list of members is damaged")
        (mark, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment,
         disk, internal, external, offset) = _CENTRAL.unpack_from(listed, position)  # fmt: skip
        position += _CENTRAL.size
        name = listed[position : position + name_length]
        extra = listed[position + name_length : position + name_length + extra_length]
        position += name_length + extra_length
        if mark != b"PK\1\2" or comment or disk or internal or external:
            raise _Damaged(f"the entry of member {_shown(name)} is damaged")
        if method or packed != size:
            raise _Damaged(f"member {_shown(name)} is compressed, which torch.save never does")
        size, packed, offset = _wide(extra, [size, packed, offset], name)
        if packed != size:
            raise _Damaged(f"the entry of member {_shown(name)} is damaged")
        members.append(_Member(name, flags, crc, size, offset))
    if position != len(listed):
        raise _Damaged("its list of members is damaged")
    return members


def _wide(extra: bytes, values: list[int], name: bytes) -> list[int]:
    """Sizes and offset, from the extra field where they are too large for 32 bits."""
    wide = [number for number, value in enumerate(values) if value == _NARROW]
    if not wide and not extra:
        return values
    if extra[:4] != struct.pack("<2H", 1, 8 * len(wide)) or len(extra) != 4 + 8 * len(wide):
        raise _Damaged(f"the entry of member {_shown(name)} is damaged")
    for number, value in zip(wide, struct.unpack(f"<{len(wide)}Q", extra[4:]), strict=True):
        values[number] = value
    return values


def _located(file: IO[bytes], entry: _Member, position: int, name: str) -> _Member:
    """The member with the place of its data, which its own header must agree on."""
    file.seek(position)
    header = file.read(_LOCAL.size)
    if entry.offset != position or len(header) < _LOCAL.size:
        raise _Damaged(f"member {name} is not where it should be")
    mark, _, flags, method, _, _, crc, packed, size, name_length, extra = _LOCAL.unpack(header)
    deferred = bool(flags & 8)  # CRC and size stand behind the data
    stated = (0, 0, 0) if deferred else (entry.crc, entry.size, entry.size)
    wide = not deferred and entry.size >= _NARROW
    if wide:
        stated = (entry.crc, _NARROW, _NARROW)
    agrees = (mark, flags, method, name_length) == (b"PK\3\4", entry.flags, 0, len(entry.name))
    if not agrees or (crc, packed, size) != stated or file.read(name_length) != entry.name:
        raise _Damaged(f"the header of member {name} is damaged")
    start = position + _LOCAL.size + name_length + extra
    return _Member(entry.name, flags, entry.crc, entry.size, entry.offset, start)


def _end_of_member(file: IO[bytes], member: _Member, name: str) -> int:
    """Compare the data with its CRC; returns where the member ends."""
    file.seek(member.start)
    crc, left = 0, member.size
    while left:
        chunk = file.read(min(left, _CHUNK))
        if not chunk:
            raise _Damaged(f"member {name} is cut short")
        crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    if crc != member.crc:
        raise _Damaged(f"member {name} is not what was written (its CRC differs)")
    end = member.start + member.size
    if member.flags & 8:
        narrow = struct.pack("<4s3I", b"PK\7\10", crc, *[min(member.size, _NARROW)] * 2)
        wide = struct.pack("<4sI2Q", b"PK\7\10", crc, member.size, member.size)
        behind = file.read(len(wide))
        # Torch writes wide ones for large members only, and where the archive itself is.
        found = next((each for each in (wide, narrow) if behind.startswith(each)), None)
        if found is None:
            raise _Damaged(f"the end of member {name} is damaged")
        end += len(found)
    return end


def _shown(name: bytes) -> str:
    return name[:100].decode("utf-8", "replace")


# --- the pickled structure


def _check_structure(pickled: bytes, name: str, members: Mapping[str, _Member]) -> None:
    """Run the structure on stand-ins: only plain data and tensors, each within its storage."""
    prefix = name.removesuffix("data.pkl")
    total = sum(member.size for member in members.values())
    most = STEPS + total // BYTES_A_STEP
    try:
        for number, (opcode, _, _) in enumerate(pickletools.genops(pickled)):
            if opcode.name not in _OPCODES:
                raise _Damaged(f"member {name} holds more than tensors and plain data")
            if number > most:
                raise _Damaged(f"member {name} describes more than a file of this size holds")
        content = _StandIns(pickled, prefix, members).load()
    except _Damaged:
        raise
    except Exception as error:  # a made-up pickle makes nearly anything be raised
        raise _Damaged(f"member {name} is no structure ({type(error).__name__})") from error
    import torch

    if wrong := check_extent(content, most, (_Tensor, torch.dtype)):
        raise _Damaged(f"member {name} {wrong}")


class _Fixed:
    """Something that a pickle can name and call, and that it cannot change."""

    __slots__ = ()


class _Storage(NamedTuple):
    """A kind of storage, or one of a number of bytes."""

    item: int
    size: int = 0


class _Tensor(_Fixed):
    """A tensor that fits into its storage."""

    __slots__ = ()


class _RebuildTensor(_Fixed):
    """In place of `torch._utils._rebuild_tensor_v2` and `_v3`."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> _Tensor:
        item = storage.item
        if len(rest) > 2 and (wide := getattr(rest[2], "itemsize", None)):
            item = wide  # of dtypes without a storage of their own
        numbers = (offset, *size, *stride)
        if not all(type(n) is int and 0 <= n < 2**62 for n in numbers) or len(size) != len(stride):
            raise _Damaged("a tensor's sizes are no sizes")
        if len(size) > 64:
            raise _Damaged("a tensor has too many dimensions")
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if math.prod(size) and (last + 1) * item > storage.size:
            raise _Damaged("a tensor is larger than its storage")
        if math.prod(size) * item > max(storage.size, REPEATED):
            raise _Damaged("a tensor repeats its storage many times")
        return _Tensor()


class _RebuildParameter(_Fixed):
    """In place of `torch._utils._rebuild_parameter`."""

    __slots__ = ()

    def __call__(self, tensor: Any, *_: Any) -> _Tensor:
        if not isinstance(tensor, _Tensor):
            raise _Damaged("a parameter is made of no tensor")
        return tensor


class _Shape(_Fixed):
    """In place of `torch.Size`."""

    __slots__ = ()

    def __call__(self, sizes: Any) -> tuple[int, ...]:
        return tuple(sizes)


#: What a pickle may call, and what is called in its place.
_CALLED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_tensor_v3"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    ("torch", "Size"): _Shape(),
}
#: Kinds of storages, and bytes of their items.
_STORAGES = {
    ("torch.storage", "UntypedStorage"): 1,
    **{
        ("torch", f"{kind}Storage"): item
        for item, kinds in {
            1: "Byte Char Bool",
            2: "Short Half BFloat16",
            4: "Int Float",
            8: "Long Double ComplexFloat",
            16: "ComplexDouble",
        }.items()
        for kind in kinds.split()
    },
}


class _StandIns(pickle.Unpickler):
    """Runs a pickle of `torch.save`, tensors being `_Tensor`."""

    def __init__(self, pickled: bytes, prefix: str, members: Mapping[str, _Member]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._prefix, self._members = prefix, members

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) in _CALLED:
            return _CALLED[module, name]
        if (module, name) in _STORAGES:
            return _Storage(_STORAGES[module, name])
        found = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(found, torch.dtype):
            return found
        raise _Damaged(f"it holds a {module[:100]}.{name[:100]}, not only tensors and plain data")

    def persistent_load(self, pid: Any) -> _Storage:
        tag, kind, key, _, count = pid
        member = self._members.get(f"{self._prefix}data/{key}")
        if tag != "storage" or type(count) is not int or member is None:
            raise _Damaged(f"a tensor lies in a member {str(key)[:100]} that is not there")
        if kind.item * count != member.size:
            raise _Damaged(f"member data/{key} has another size than its tensor")
        return _Storage(kind.item, member.size)
