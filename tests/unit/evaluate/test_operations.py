"""The count of operations and of reads against functions that are counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lowkey.evaluate.operations import counted_operations

X = torch.arange(12.0).view(3, 4)
MASK = X > 5
# what is called, the operations by name, and how many values are read
COUNTED = {
    "arithmetic": (lambda: X * 2 + X, {"aten.mul.Tensor": 1, "aten.add.Tensor": 1}, 0),
    "views": (lambda: X.view(4, 3).t(), {"aten.view.default": 1, "aten.t.default": 1}, 0),
    "in place": (lambda: X.clone().add_(1), {"aten.clone.default": 1, "aten.add_.Tensor": 1}, 0),
    "composite": (lambda: X.flatten(), {"aten.view.default": 1}, 0),
    "matrices": (lambda: X.mT @ X, {"aten.transpose.int": 1, "aten.mm.default": 1}, 0),
    "slices": (lambda: X[1:, 0], {"aten.slice.Tensor": 1, "aten.select.int": 1}, 0),
    "nothing": (lambda: (X.shape, len(X), X.data_ptr(), X.stride()), {}, 0),
    "memory": (lambda: X.numpy(), {"aten.detach.default": 1}, 0),
}
ONE = torch.tensor(1)
READS = {
    "item": (lambda: ONE.item(), 1),
    "tolist": (lambda: X.tolist(), 1),
    "bool": (lambda: 5 if ONE else 6, 1),
    "int": (lambda: int(ONE), 1),
    "float": (lambda: float(ONE), 1),
    "range": (lambda: range(ONE), 1),
    "index": (lambda: [7, 8][ONE], 1),
    "slice": (lambda: X[:ONE], 1),
    "size": (lambda: torch.zeros(ONE, 2), 1),
    "format": (lambda: f"{ONE:.1f}", 1),
    "repr": (lambda: repr(X), 1),
    "in": (lambda: 3 in X, 1),
    "equal": (lambda: torch.equal(X, X), 1),
    "allclose": (lambda: torch.allclose(X, X), 1),
    "all": (lambda: bool((X == X).all()), 1),
    "a list of tensors": (lambda: torch.tensor([ONE, ONE]), 1),
    "nonzero": (lambda: X.nonzero(), 1),
    "where": (lambda: torch.where(MASK), 1),
    "argwhere": (lambda: torch.argwhere(MASK), 1),
    "masked_select": (lambda: X.masked_select(MASK), 1),
    "mask": (lambda: X[MASK], 1),
    "mask behind a slice": (lambda: X[:, MASK[0]], 1),
    "rows into a mask": (lambda: X.clone().__setitem__(MASK, torch.zeros(6)), 1),
    "mask and places": (lambda: X.clone().__setitem__((X[:, 0] > 0, torch.tensor([0, 1])), 1.0), 1),
    "index_put": (lambda: X.clone().index_put_((MASK,), torch.ones(()), accumulate=True), 1),
    "unique": (lambda: X.unique(), 1),
    "unique_consecutive": (lambda: X.unique_consecutive(), 1),
    "repeats": (lambda: X.repeat_interleave(torch.tensor([1, 2, 0]), 0), 1),
    "bincount": (lambda: torch.bincount(torch.tensor([0, 1])), 1),
    "two": (lambda: (ONE.item(), X.tolist(), X.sum()), 2),
    # without a value
    "where of three": (lambda: torch.where(MASK, X, 0), 0),
    "a number into a mask": (lambda: X.clone().__setitem__(MASK, 1.0), 0),
    "masked_fill": (lambda: X.masked_fill(MASK, 0), 0),
    "places": (lambda: X[torch.tensor([0, 2])], 0),
    "repeats of a known total": (lambda: X.repeat_interleave(torch.tensor([1, 2, 0]), 0, output_size=3), 0),
    "repeats by a number": (lambda: X.repeat_interleave(2, 0), 0),
    "a list of numbers": (lambda: torch.tensor([1, 2]), 0),
    "as_tensor": (lambda: torch.as_tensor(X), 0),
    "top": (lambda: X.topk(2), 0),
    "to": (lambda: X.to(torch.float16).cpu(), 0),
    "iteration": (lambda: list(X), 0),
}
BUS = {  # from a GPU, which torch imitates here; it cannot imitate copies to one
    "to the CPU": (lambda x: x.cpu(), 1),
    "to the CPU at leisure": (lambda x: x.to("cpu", non_blocking=True), 0),
    "into CPU memory": (lambda x: torch.zeros(3, 4).copy_(x), 1),
    "into CPU memory at leisure": (lambda x: torch.zeros(3, 4).copy_(x, non_blocking=True), 0),
    "between dtypes": (lambda x: x.half(), 0),
    "a number of Python": (lambda x: x * 2 + 1, 0),
}


@pytest.mark.parametrize("name", COUNTED)
def test_operations_are_counted_by_name(name):
    call, operations, reads = COUNTED[name]
    with counted_operations() as count:
        call()
    assert (dict(count.by_name), count.value_reads) == (operations, reads)
    assert count.operations == sum(operations.values())


@pytest.mark.parametrize("name", READS)
def test_reads_are_counted_once(name):
    call, reads = READS[name]
    with counted_operations() as count:
        call()
    assert count.value_reads == reads, count.reads_by_place


@pytest.mark.parametrize("name", BUS)
def test_a_copy_from_a_gpu_is_a_read(name):
    call, reads = BUS[name]
    with FakeTensorMode():
        x = torch.empty(3, 4, device="cuda")
        with counted_operations() as count:
            call(x)
    assert count.value_reads == reads, count.reads_by_place


def test_a_read_is_named_with_its_line():
    with counted_operations() as count:
        for _ in range(3):
            X.sum().item()  # this line
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (place,) = count.reads_by_place
    line = next(n for n, text in enumerate(lines, 1) if text.endswith("# this line"))
    assert place == f"_local_scalar_dense at evaluate/test_operations.py:{line}"
    assert count.reads_by_place[place] == 3


def test_only_the_block_is_counted():
    (X + X).sum().item()
    with counted_operations() as outer:
        X + X
        with counted_operations() as inner:
            ONE.item()
    ONE.item()
    assert (inner.operations, inner.value_reads) == (1, 1)
    assert (outer.operations, outer.value_reads) == (2, 1)


def test_a_block_that_fails_counts_no_more():
    with pytest.raises(ZeroDivisionError), counted_operations() as count:
        X.tolist()
        1 / 0  # noqa: B018
    X.tolist()
    assert count.value_reads == 1


def test_what_is_disabled_for_compilers_is_counted():
    @torch.compiler.disable
    def inside(x):
        return (x + 1).sum().item(), x.tolist()

    with counted_operations() as count:
        inside(X)
    assert (count.operations, count.value_reads) == (3, 2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_composite_operations_are_taken_apart_in_every_mode(mode):
    linear = torch.nn.Linear(4, 2)
    with mode(), counted_operations() as count:
        y = linear(X)
        torch.allclose(y, y)
    assert count.by_name["aten.addmm.default"] == 1 and "aten.linear.default" not in count.by_name
    assert count.value_reads == 1


def test_outcomes_are_those_without_the_count():
    def call():
        return X[MASK].tolist(), (X @ X.mT).sum().item(), torch.unique(X % 3).tolist(), repr(X)

    wanted = call()
    with counted_operations():
        assert call() == wanted
