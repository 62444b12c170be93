"""A seeded mutator of files: bytes, JSON values, tensors, and files that are no regular files."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from artefacts import Artefact
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowkey.core.files.reading import CHECKSUM, KIND, digest, json_digest, tensor_marks

HOSTILE: list[Any] = [
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        3,
        7,
        2**31,
        2**63,
        10**30,
        10**400,
        0.5,
        -0.0,
        1e308,
        1e-320,
        "",
        "x",
        "0",
        "1",
        "\ud800",
        "a\nb",
    ),
    *([], {}, [[]], [0], [-1, 10**9], {"a": 1}, "x" * 5000, [[[[1]]]], float("nan"), float("inf")),
]
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.int16,
)


def damaged_bytes(data: bytes, r: random.Random) -> bytes:
    at = r.randrange(len(data) + 1)
    stop = min(len(data), at + r.choice([1, 1, 8, 100]))
    kind = r.randrange(7)
    if kind == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << r.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + r.randbytes(stop - at) + data[stop:]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data + r.choice([b"\0", b" ", b"}", data[:100], r.randbytes(10)])
    if kind == 4:
        return data[:at] + data[stop:]
    if kind == 5:
        return data[:at] + data[at:stop] * 2 + data[stop:]
    return r.choice(
        [b"", b"{", b"[" * 5000, b'{"a":' * 5000, b"\xff\xfe", b"\0" * 64, b"null", b"1" * 6000, b"NaN"]
    )


def damaged_json(text: str, r: random.Random, vouched: bool) -> str:
    """One place of the tree is something else; vouched: with a checksum that fits."""
    value = json.loads(text)
    places = [p for p in _places(value) if not (vouched and p == (CHECKSUM,))]
    place = r.choice(places)
    inside = value
    for name in place[:-1]:
        inside = inside[name]
    kind, last = r.randrange(4), place[-1]
    if kind == 0 and isinstance(inside, dict):
        del inside[last]
    elif kind == 1 and isinstance(inside[last], int | float) and not isinstance(inside[last], bool):
        inside[last] = r.choice(
            [inside[last] + 1, inside[last] - 1, -inside[last], inside[last] * 1.5, 2 * inside[last]]
        )
    elif kind == 2 and isinstance(inside[last], list):
        inside[last] = r.choice(
            [inside[last][:-1], inside[last] * 2, inside[last][::-1], [*inside[last], r.choice(HOSTILE)]]
        )
    else:
        inside[last] = r.choice(HOSTILE)
    if vouched:
        value[CHECKSUM] = json_digest(value)
    written = json.dumps(value)
    return written.replace("{", '{"format": 1, "format": 1, ', 1) if r.random() < 0.02 else written


def _places(value: object, path: tuple = ()) -> list[tuple]:
    pairs = (
        value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    )
    return [place for name, inside in pairs for place in [(*path, name), *_places(inside, (*path, name))]]


def damaged_tensors(found: dict[str, Tensor], r: random.Random) -> dict[str, Tensor]:
    name = r.choice(sorted(found))
    t, kind = found[name], r.randrange(11)
    if kind == 0:
        found.pop(name)
    elif kind == 1:
        found[r.choice([f"{name}x", "7.keys", "x", f"0.{name}"])] = (
            found.pop(name) if r.random() < 0.5 else t.clone()
        )
    elif kind == 2:
        found[name] = t.to(r.choice(DTYPES))
    elif kind == 3:
        found[name] = t.flatten()
    elif kind == 4:
        found[name] = t.unsqueeze(0)
    elif kind == 5 and t.ndim:
        dim = r.randrange(t.ndim)
        found[name] = t.narrow(dim, 0, max(0, t.shape[dim] - 1)) if t.shape[dim] else t
    elif kind == 6 and t.ndim:
        found[name] = torch.cat([t, t], r.randrange(t.ndim))
    elif kind == 7 and t.ndim > 1:
        found[name] = t.transpose(0, r.randrange(1, t.ndim))
    elif kind == 8:
        found[name] = t.new_zeros(r.choice([(), (0,), (1,), (1, 1), (2, 2, 2, 2)]))
    elif t.numel():
        flat = t.flatten().clone()
        at = r.randrange(flat.numel())
        wild = [0, 1, -1, 2**31, -(2**31), 2**62, 10**6, float("nan"), float("inf"), 1e30, -5.0]
        flat[at] = _value(r.choice(wild), t.dtype) if kind == 9 else flat[r.randrange(flat.numel())]
        found[name] = flat.view(t.shape)
    return {name: t.contiguous().clone() for name, t in found.items()}


def _value(wild: float, dtype: torch.dtype) -> float:
    if dtype == torch.bool or dtype.is_floating_point:
        return wild
    info = torch.iinfo(dtype)
    return max(info.min, min(info.max, int(wild))) if wild == wild and abs(wild) < 2**70 else info.max


def mutate(artefact: Artefact, r: random.Random) -> tuple[Callable[[], None], bool, str]:
    """Damage one file. Returns what restores it, whether its checksums fit, and a description."""
    file = r.choice(artefact.files())
    before, vouched = {file: file.read_bytes()}, False
    kind = r.random()
    if kind < 0.02:
        return _special(file, before[file], r), False, f"{file.name}: special"
    if file.suffix == ".json" and kind < 0.75 and len(before[file]) < 2**20:
        vouched = kind < 0.5
        file.write_text(damaged_json(before[file].decode(), r, vouched))
    elif file.name in artefact.tensors and kind < 0.75:
        vouched, told = True, artefact.tensors[file.name]
        changed, (marked, _) = damaged_tensors(load_copy(file), r), tensor_marks(file, "file")
        save_file(changed, file, metadata={KIND: f"{marked} {digest(changed)}"})
        if told is not None:
            about = file.with_name(told)
            before[about] = about.read_bytes()
            value = json.loads(before[about]) | {"tensors_sha256": digest(changed)}
            about.write_text(json.dumps(value | {CHECKSUM: json_digest(value)}))
    else:
        file.write_bytes(damaged_bytes(before[file], r))
    return (
        lambda: [p.write_bytes(data) for p, data in before.items()] and None,
        vouched,
        f"{file.name}: {'vouched' if vouched else 'plain'}",
    )


def load_copy(file: Path) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in load_file(file).items()}


def _special(file: Path, data: bytes, r: random.Random) -> Callable[[], None]:
    """What is no regular file, or one without end."""
    file.unlink()
    kind = r.randrange(6)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to("/dev/zero")
    elif kind == 3:
        file.symlink_to(file)
    elif kind == 4:
        with file.open("wb") as out:
            out.write(data)
            out.truncate(2**42)

    def back() -> None:
        if file.is_dir() and not file.is_symlink():
            file.rmdir()
        else:
            file.unlink(missing_ok=True)
        file.write_bytes(data)

    return back
