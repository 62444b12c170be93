"""Packed documents against documents alone; where tokens come from and which are held out."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pico
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lowkey
from lowkey.core import text
from lowkey.core.types import LowkeyError
from lowkey.generate import stream_text
from lowkey.models import loading
from lowkey.pretraining.corpus import documents, prepare
from lowkey.pretraining.models import build
from lowkey.pretraining.recipe import Data
from lowkey.pretraining.rows import IGNORED, Order, Stream

LENGTH = 24


def stream(lengths: list[int], seed: int = 0) -> Stream:
    """Random documents of these lengths."""
    ids = np.random.default_rng(seed).integers(1, pico.VOCAB, sum(lengths)).astype(np.uint16)
    return Stream(ids, np.concatenate([[0], np.cumsum(lengths)]), text_bytes=1)


def written_out(found: Stream, row: int, length: int) -> tuple[list[int], list[int], list[int]]:
    """(ids, positions, targets) of a row, token by token."""
    document_of = [d for d, (a, b) in enumerate(pairwise(found.starts)) for _ in range(a, b)]
    ids, positions, targets = [], [], []
    for place in range(row * length, (row + 1) * length):
        same = place > row * length and document_of[place] == document_of[place - 1]
        ids.append(int(found.ids[place]))
        positions.append(positions[-1] + 1 if same else 0)
        next_is_ours = place + 1 < len(found.ids) and document_of[place + 1] == document_of[place]
        targets.append(int(found.ids[place + 1]) if next_is_ours else IGNORED)
    return ids, positions, targets


@pytest.mark.parametrize("lengths", [[10, 30, 1, 1, 5, 60, 24, 24, 3], [200], [1] * 60])
def test_rows_are_what_a_loop_over_tokens_gives(lengths):
    found = stream(lengths)
    numbers = np.arange(found.rows(LENGTH))[::-1].copy()
    batch = found.batch(numbers, LENGTH)
    for n, row in enumerate(numbers):
        parts = tuple(x[n].tolist() for x in (batch.ids, batch.positions, batch.targets))
        assert parts == written_out(found, int(row), LENGTH)
    assert found.targets(numbers, LENGTH) == int((batch.targets != IGNORED).sum())


@pytest.mark.parametrize("lengths", [[10, 30, 1, 1, 5, 60, 24, 24, 3], [25], [24], [2]])
def test_all_rows_predict_every_token_but_the_first_once(lengths):
    found = stream(lengths)
    rows = np.arange(-(-(len(found.ids) - 1) // LENGTH))
    targets = found.batch(rows, LENGTH).targets
    kept = targets[targets != IGNORED].tolist()
    assert kept == [int(t) for n, t in enumerate(found.ids) if n not in found.starts]
    assert found.predicted == len(kept) == found.targets(rows, LENGTH)


def test_a_row_behind_the_end_predicts_nothing():
    found = stream([30, 20])
    assert (found.batch(np.array([found.rows(LENGTH) + 1]), LENGTH).targets == IGNORED).all()


@pytest.mark.parametrize("make", [pico.build, pico.attached])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_packed_documents_do_not_leak(family, make):
    """Logits of a document in a row are those of the document alone, and do not move when another document
    changes.
    """
    model, found = make(family), stream([9, 6, 9])
    changed = Stream(
        np.where(np.arange(24) < 9, (found.ids + 7) % 90 + 1, found.ids).astype(np.uint16), found.starts, 1
    )

    @torch.no_grad()
    def logits(which: Stream) -> torch.Tensor:
        batch = which.batch(np.array([0]), LENGTH)
        return model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits[0]

    packed = logits(found)
    for a, b in ((0, 9), (9, 15), (15, 24)):
        ids = torch.tensor(found.ids[a:b].astype(np.int64))[None]
        assert torch.allclose(model(ids, use_cache=False).logits[0], packed[a:b], atol=1e-5)
    assert torch.equal(logits(changed)[9:], packed[9:])
    assert not torch.allclose(logits(changed)[:9], packed[:9], atol=1e-2)
    with torch.no_grad():  # without positions it would leak: the test can fail
        ids = torch.tensor(found.ids.astype(np.int64))[None]
        assert not torch.allclose(model(ids, use_cache=False).logits[0, 9:], packed[9:], atol=1e-2)


def test_the_order_is_a_permutation_per_epoch_addressed_by_step():
    order, rows = Order(rows=10, per_step=4, seed=3), 10
    seen = np.concatenate([order.at(step) for step in range(5)])
    assert sorted(seen[:rows]) == sorted(seen[rows:]) == list(range(rows))
    assert seen[:rows].tolist() != seen[rows:].tolist()
    assert order.at(3).tolist() == seen[12:16].tolist()
    assert Order(10, 4, 4).at(0).tolist() != order.at(0).tolist()


# -- where tokens come from

TEXTS = [f"document {n}: " + "a few words and more " * (n + 1) for n in range(12)]


def as_jsonl(folder: Path) -> Data:
    path = folder / "a.jsonl"
    path.write_text("\n".join(json.dumps({"body": t}) for t in TEXTS) + "\n\n")
    return Data(path=str(path), text_field="body")


def as_parquet(folder: Path) -> Data:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": TEXTS}), folder / "a.parquet")
    return Data(path=str(folder / "a.parquet"), text_field="body")


def as_folder(folder: Path) -> Data:
    for n, document in enumerate(TEXTS):
        (folder / f"{n:02}.txt").write_text(document)
    (folder / "notes.md").write_text("is not read")
    return Data(path=str(folder))


def as_dataset(folder: Path) -> Data:
    """`datasets` itself reads the .jsonl."""
    pytest.importorskip("datasets")
    return Data(
        path="json",
        text_field="body",
        options={"data_files": as_jsonl(folder).path, "cache_dir": str(folder / "hub")},
    )


@pytest.mark.parametrize("write", [as_jsonl, as_parquet, as_folder, as_dataset])
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_every_source_gives_the_same_documents(tmp_path, write):
    assert list(documents(write(tmp_path))) == TEXTS


def test_the_embedded_text_is_the_default():
    assert list(documents(Data())) == [text.embedded_text("calibration")]


def words(corpus, part: Stream) -> list[str]:
    return [
        corpus.tokenizer.decode(part.ids[a:b], skip_special_tokens=True) for a, b in pairwise(part.starts)
    ]


def test_tokens_are_the_texts_and_held_out_documents_are_whole(tmp_path):
    corpus = prepare(
        Data(path=as_jsonl(tmp_path).path, text_field="body", vocab_size=280, held_out=0.3),
        tmp_path / "tokens",
    )
    kept, held = words(corpus, corpus.training), words(corpus, corpus.held_out)
    assert sorted(kept + held) == sorted(TEXTS) and kept and held
    assert kept == [t for t in TEXTS if t not in held]
    assert 0.1 < len(corpus.held_out.ids) / (len(corpus.held_out.ids) + len(corpus.training.ids)) <= 0.3
    assert corpus.held_out.text_bytes == sum(len(t.encode()) for t in held)
    first, last = corpus.training.starts[0], corpus.training.starts[1] - 1
    assert (
        corpus.training.ids[first] == corpus.tokenizer.bos_token_id
        and corpus.training.ids[last] == corpus.tokenizer.eos_token_id
    )
    assert len(corpus.tokenizer) == 280 and corpus.training.ids.dtype == np.uint16


def test_of_one_document_the_end_is_held_out(tmp_path):
    corpus = prepare(Data(held_out=0.1), tmp_path)
    whole = corpus.tokenizer(text.embedded_text("calibration"), add_special_tokens=False).input_ids
    found = [*corpus.training.ids, *corpus.held_out.ids]
    assert [t for t in found if t not in corpus.tokenizer.all_special_ids] == whole
    assert len(corpus.held_out.ids) == pytest.approx(0.1 * len(found), abs=1)
    total = corpus.training.text_bytes + corpus.held_out.text_bytes
    assert total == len(text.embedded_text("calibration").encode())


def test_tokens_are_made_once_and_again_when_the_text_changes(tmp_path):
    data = Data(
        path=as_jsonl(tmp_path).path, text_field="body", vocab_size=280, cache=str(tmp_path / "shared")
    )
    labels: list[str] = []

    def heard(items, label, total=None):
        labels.append(label)
        return iter(items)

    first = prepare(data, tmp_path / "a", heard)
    assert labels == ["training the tokenizer", "tokenizing"]
    assert prepare(data, tmp_path / "b", heard).fingerprint == first.fingerprint
    assert len(labels) == 2 and not (tmp_path / "b").exists()
    Path(data.path).write_text(json.dumps({"body": "something else, " * 40}))
    assert prepare(data, tmp_path / "c", heard).fingerprint != first.fingerprint
    assert len(labels) == 4


def test_reading_stops_after_max_tokens(tmp_path):
    few = prepare(
        Data(path=as_jsonl(tmp_path).path, text_field="body", held_out=0.0, max_tokens=40), tmp_path
    )
    assert (
        words(few, few.training) == TEXTS[: len(few.training.starts) - 1] and 40 <= len(few.training.ids) < 80
    )
    assert few.held_out is None


def test_a_tokenizer_is_trained_on_about_as_much_as_is_read(tmp_path):
    """What lies far behind max_tokens is not opened, damaged or not."""
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS * 3) + "\nnot json")
    with mock.patch("lowkey.pretraining.corpus.TOKENIZED_AT_ONCE", 100):
        few = prepare(Data(path=str(path), vocab_size=280, held_out=0.0, max_tokens=100), tmp_path)
    assert len(few.training.ids) >= 100 and len(few.tokenizer) == 280
    with pytest.raises(LowkeyError, match="line 37 is not JSON"):
        prepare(Data(path=str(path), vocab_size=280), tmp_path)


def test_a_long_document_is_one_document_whatever_the_pieces(tmp_path):
    """Cut before a line, else before a word, else anywhere."""
    lines, line, word = "some words\nand more\n" * 60, "words and no line " * 60, "x" * 900
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": t}) for t in (lines, line, "short", word))
    )
    data = Data(path=str(tmp_path / "a.jsonl"), held_out=0.0)
    whole = prepare(data, tmp_path / "whole")
    with mock.patch("lowkey.pretraining.corpus.TOKENIZED_AT_ONCE", 100):
        cut = prepare(data, tmp_path / "cut")
    assert words(cut, cut.training) == words(whole, whole.training) == [lines, line, "short", word]
    assert cut.training.text_bytes == whole.training.text_bytes


def test_halves_of_surrogate_pairs_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d\\ude00 b \\ud800 c"}')
    assert list(documents(Data(path=str(tmp_path / "a.jsonl")))) == ["a \U0001f600 b \ufffd c"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: Data(path=str(f / "nothing.jsonl")), "no such file or folder"),
        (lambda f: Data(path="nothing.txt"), "no such file or folder"),
        (lambda f: Data(path=str(f / "latin.jsonl")), "line 2 is not JSON .*utf-8"),
        (lambda f: Data(path=str(f / "empty")), "no .txt, .jsonl, .parquet"),
        (lambda f: Data(path=str(f / "a.md")), "none of .txt"),
        (lambda f: Data(path=as_jsonl(f).path), "it has body"),
        (lambda f: Data(path=str(f / "bad.jsonl")), "line 2 is not JSON"),
        (lambda f: Data(path=str(f / "blank.jsonl")), "holds no text"),
        (lambda f: Data(path=str(f / "bad.parquet")), "cannot be read"),
        (lambda f: Data(tokenizer=str(f / "nothing")), "tokenizer"),
    ],
)
def test_bad_data_is_one_line(tmp_path, make, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.md").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnot json')
    (tmp_path / "latin.jsonl").write_bytes('{"text": "a"}\n{"text": "\u00e9"}'.encode("latin-1"))
    (tmp_path / "blank.jsonl").write_text('{"text": "  "}')
    (tmp_path / "bad.parquet").write_text("x")
    with pytest.raises(LowkeyError, match=message) as error:
        prepare(make(tmp_path), tmp_path / "tokens")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "tokens").glob("*"))


# -- a tokenizer whose ids have gaps


def with_gaps(folder: Path) -> Path:
    """A folder with a tokenizer of 28 tokens whose ids go up to 70000, more than 16 bits."""
    known = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxy ")} | {"z": 70000, "?": 200}
    raw = Tokenizer(models.WordLevel(known, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?").save_pretrained(folder)
    return folder


def test_token_files_are_as_wide_as_the_largest_id(tmp_path):
    (tmp_path / "text.txt").write_text("a zoo " * 200)
    data = Data(path=str(tmp_path / "text.txt"), tokenizer=str(with_gaps(tmp_path / "tokenizer")), held_out=0)
    found = prepare(data, tmp_path / "tokens")
    assert found.training.ids[:6].tolist() == [0, 25, 70000, 14, 14, 25]


def test_a_model_has_a_row_for_every_id(tmp_path):
    tokenizer = loading.load_tokenizer(str(with_gaps(tmp_path)))
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    assert build(small, tokenizer, 16).config.vocab_size == 70001
    with pytest.raises(
        LowkeyError,
        match=r"model.vocab_size 300: the tokenizer's ids go up to 70000; "
        r"leave it out, or give at least 70001",
    ):
        build({**small, "vocab_size": 300}, tokenizer, 16)


def test_ids_beyond_the_embedding_are_refused(tmp_path):
    model, tokenizer = pico.attached("llama"), loading.load_tokenizer(str(with_gaps(tmp_path)))
    assert text.encode(tokenizer, "abc", model).tolist() == [0, 1, 2]
    for run in (
        lambda: text.encode(tokenizer, "a zoo", model),
        lambda: lowkey.calibrate(model, tokenizer, "a zoo " * 500, sample=lowkey.Sample(4, 16)),
        lambda: stream_text(model, tokenizer, "a zoo", lowkey.make_cache(model), 1, None),
        lambda: lowkey.recover(
            model, tokenizer, pico.plan(model), "a zoo " * 500, settings=lowkey.Recovery(length=16)
        ),
    ):
        with pytest.raises(
            LowkeyError, match="tokenizer: gives the id 70000, and the model's embedding has 97 rows"
        ):
            run()


@pytest.mark.parametrize("wrong", ["a\udcff", "\ud800"])
def test_a_text_that_is_no_unicode_is_refused(wrong):
    with pytest.raises(LowkeyError, match="holds a lone surrogate"):
        text.encode(pico.tokenizer(), wrong)
