"""Files of `torch.save` are read, and nothing that they say is run."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from lowkey.core.errors import LowkeyError
from lowkey.core.files.torch_archive import Unmade, read_torch_archive


def saved(path, value, **options):
    torch.save(value, path, **options)
    return path


def read(path):
    return read_torch_archive(path, "weights", "give others")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_and_containers_are_read(tmp_path, dtype):
    whole = torch.randn(4, 6).to(dtype)
    module = torch.nn.Linear(3, 2).to(dtype)
    value = {
        "module": [module.state_dict(), OrderedDict(part=whole[1:3, ::2].T)],
        "again": whole,
        "parameter": module.weight,
        "plain": (1, -70000, 2**40, 0.5, "text", None, True, False, [], {}, (1, 2), (1, 2, 3, 4)),
    }
    found = read(saved(tmp_path / "file.pt", value))
    assert found["plain"] == value["plain"] and list(found) == list(value)
    for name, t in module.state_dict().items():
        assert torch.equal(found["module"][0][name], t)
    assert torch.equal(found["module"][1]["part"], whole[1:3, ::2].T)
    assert torch.equal(found["again"], whole) and torch.equal(found["parameter"], module.weight)


def test_what_is_no_tensor_is_named_and_not_made(tmp_path):
    found = read(saved(tmp_path / "file.pt", {"loss": np.arange(5.0), "kept": torch.ones(2)}))
    assert isinstance(found["loss"], Unmade) and "numpy" in found["loss"].name
    assert torch.equal(found["kept"], torch.ones(2))


class Attack:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_function_that_a_file_names_is_not_called(tmp_path):
    target = tmp_path / "made"
    path = saved(tmp_path / "file.pt", {"a": Attack(target), "b": torch.ones(1)})
    found = read(path)
    assert found["a"] == Unmade("posix.mkdir", (str(target),)) and not target.exists()
    torch.load(path, weights_only=False)  # which calls it
    assert target.exists()


def rewritten(path, change):
    """The same archive with other contents of some entries; `change` gives bytes or None for no entry."""
    out = path.with_name("other.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            if (data := change(name, old.read(name))) is not None:
                new.writestr(name, data)
    return out


def damaged(kind, path):
    whole = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "text":
        path.write_text("no archive at all")
    elif kind == "short storage":
        return rewritten(path, lambda name, data: data[:-4] if "/data/" in name else data)
    elif kind == "no storage":
        return rewritten(path, lambda name, data: None if "/data/" in name else data)
    elif kind == "no program":
        return rewritten(path, lambda name, data: None if name.endswith("data.pkl") else data)
    elif kind == "cut program":
        return rewritten(path, lambda name, data: data[:-9] if name.endswith("data.pkl") else data)
    elif kind == "no list":  # items for a number
        return rewritten(path, lambda name, data: b"\x80\x02K\x01(K\x02e." if name.endswith(".pkl") else data)
    elif kind == "other instruction":
        return rewritten(
            path, lambda name, data: b"\x80\x04\x8c\x01a\x94." if name.endswith(".pkl") else data
        )
    elif kind == "missing":
        path.unlink()
    return path


KINDS = ["truncated", "text", "short storage", "no storage", "no program", "cut program", "no list"]


@pytest.mark.parametrize("kind", [*KINDS, "other instruction", "missing"])
def test_damage_is_one_line(tmp_path, kind):
    path = damaged(kind, saved(tmp_path / "file.pt", {"a": torch.ones(3)}))
    with pytest.raises(LowkeyError, match="give others") as error:
        read(path)
    assert "\n" not in str(error.value)


def test_a_compressed_entry_is_not_unpacked(tmp_path):
    path, out = saved(tmp_path / "file.pt", {"a": torch.zeros(2**20)}), tmp_path / "small.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(LowkeyError, match="compressed or too large"):
        read(out)
