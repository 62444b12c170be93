"""Reads what `torch.save` wrote, without running anything that the file says.

Such a file is a zip archive. One entry of it is a program for a stack machine that makes objects, and may
call any function of any module. Here its instructions are only parsed: containers, numbers and texts are
made, the few calls that make tensors are known, and every other call becomes an `Unmade` that says what was
asked for.
"""

from __future__ import annotations

import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowkey.core.errors import LowkeyError
from lowkey.core.files.reading import opened_file

if TYPE_CHECKING:
    from torch import Tensor

MOST_ARCHIVE, MOST_PROGRAM = 2**33, 2**24  # bytes
PROGRAM = "data.pkl"
# What a file of tensors needs. Instructions that only push their argument:
PUSHING = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINBYTES", "SHORT_BINBYTES", "BINSTRING", "SHORT_BINSTRING"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
STORAGES = {
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.DoubleStorage": "float64",
}


@dataclass(frozen=True)
class Unmade:
    """What a file asks for and is not made.

    Args:
        name: of the function or class.
        arguments: what it would be called with; None for itself.
    """

    name: str
    arguments: tuple | None = None


def read_torch_archive(path: Path, what: str, remedy: str) -> Any:
    """The containers, numbers, texts and tensors of a file that `torch.save` wrote.

    Tensors may have strides of 0, so look at shapes before copying one.

    Args:
        path: the file.
        what: what it is, for messages.
        remedy: what the user should do instead, for messages.

    Raises:
        LowkeyError: for a file that is no such archive, or damaged.
    """
    with opened_file(path, what, MOST_ARCHIVE, remedy) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                (program,) = (n for n in archive.namelist() if n.rpartition("/")[2] == PROGRAM)
                return _Machine(archive, program.removesuffix(PROGRAM)).run()
        except (
            *(zipfile.BadZipFile, ValueError, IndexError, KeyError, TypeError, AttributeError),
            *(RuntimeError, OverflowError, NotImplementedError, EOFError),
        ) as error:
            reason = " ".join(str(error).split())[:80]
            raise LowkeyError(
                f"{what} {str(path)!r}: is not read as a file of torch.save ({reason}); {remedy}"
            ) from None


class _Machine:
    """The stack machine of one archive.

    Args:
        archive: the archive.
        root: what the names of its entries begin with.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        self.archive, self.root = archive, root
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """What the program makes. Raises: ValueError and others for a program that is not known here."""
        for code, argument, _ in pickletools.genops(self._entry(PROGRAM, MOST_PROGRAM)):
            if code.name == "STOP":
                return self.stack.pop()
            self._step(code.name, argument)
        raise ValueError("it ends too early")

    def _entry(self, name: str, most: int) -> bytes:
        """An entry of the archive, which must be stored as it is."""
        known = self.archive.getinfo(self.root + name)
        if known.compress_type != zipfile.ZIP_STORED or known.file_size > most:
            raise ValueError(f"its entry {name!r} is compressed or too large")
        return self.archive.read(known)

    def _step(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        stack = self.stack
        if name in PUSHING:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._marked()
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._marked()
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(Unmade(argument.replace(" ", ".")))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._called(function.name, arguments))
        elif name == "BUILD":  # attributes of an object: none that we make has any
            stack.pop()
        elif name == "BINPERSID":
            stack.append(self._storage(*stack.pop()))
        elif name != "PROTO":
            raise ValueError(f"its instruction {name} is none that a file of tensors needs")

    def _marked(self) -> list[Any]:
        """Everything above the newest mark, taken from the stack."""
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def _called(self, name: str, arguments: tuple) -> Any:
        """What a call of a known function gives; an `Unmade` for all others."""
        if name == "collections.OrderedDict" and not arguments:
            return {}
        if name == "torch._utils._rebuild_parameter":
            return arguments[0]
        if name == "torch._utils._rebuild_tensor_v2":
            storage, offset, size, stride = arguments[:4]
            return storage.as_strided(size, stride, offset)
        return Unmade(name, arguments)

    def _storage(self, kind: str, dtype: Unmade, key: str, device: str, count: int) -> Tensor:
        """All numbers (count) of one storage."""
        import torch

        if kind != "storage" or dtype.name not in STORAGES:
            return torch.empty(0)  # of no tensor that is wanted
        numbers = torch.frombuffer(
            bytearray(self._entry(f"data/{key}", MOST_ARCHIVE)), dtype=getattr(torch, STORAGES[dtype.name])
        )
        if len(numbers) != count:
            raise ValueError(f"storage {key!r} holds {len(numbers)} numbers and not {count}")
        return numbers
