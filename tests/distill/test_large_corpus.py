"""What grows with a corpus: numbers of each document, in memory or in files, and never its text."""

import json
import random
import tracemalloc

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from distill.data import near_duplicates, spool
from distill.data.near_duplicates import NearDuplicates, write_signatures
from distill.data.parse import content_hash
from distill.data.split import prepare
from distill.data.spool import HashSet, Spool, document_line, short_hash
from eval.core.documents import Document, read_documents
from eval.core.study import load_study
from tests.distill.test_split import SPLITS
from tests.helpers import text, tiny_study


def test_a_set_of_hashes_is_a_set(monkeypatch):
    monkeypatch.setattr(spool, "RECENT", 7)
    rng, numbers, known = random.Random(0), HashSet(), set()
    drawn = [rng.randrange(1, 300) * 2**55 for _ in range(2000)] + [0, 2**64 - 1]
    for number in drawn:
        assert (number in numbers) == (number in known)
        numbers.add(number)
        known.add(number)


def test_documents_come_back_from_the_spool_in_the_group_that_they_got(tmp_path):
    documents = [Document(f"d{i}", "x", f"text {i}", "a prompt", f"g{i // 2}", "file:1") for i in range(6)]
    with Spool(tmp_path / "documents") as kept:
        for document in documents:
            kept.add(document)
        kept.regroup(np.array([0, 1, 0, 3]))
        kept.add(Document("late", "x", "later", group="own"))
        found = [kept.document(i) for i in range(7)]
        assert [d.group for d in found] == ["g0", "g0", "g0", "g1", "g2", "g2", "own"]
        assert [d.text for d in found] == [*(d.text for d in documents), "later"]
        assert kept.line(1) == document_line(documents[1])
        assert json.loads(kept.line(2))["sha256"] == content_hash("text 2", "a prompt")
        assert kept.groups.tolist() == [short_hash(d.group) for d in found]


def similar_documents(number, words=60):
    """Some in a row are the one before with words changed: near, nearer, or no longer near."""
    rng, known = random.Random(0), [f"word{i}" for i in range(300)]
    current = rng.choices(known, k=words)
    for i in range(number):
        if rng.random() < 0.4:
            current = rng.choices(known, k=words)
        else:
            current = [word if rng.random() < 0.97 else rng.choice(known) for word in current]
        yield Document(f"d{i}", "x", " ".join(current))


@pytest.mark.parametrize("share", [2**24, pytest.param(30_000, marks=pytest.mark.slow)])
def test_the_index_on_disk_finds_what_that_of_datasketch_finds(tmp_path, monkeypatch, share):
    """In one share, or in several by processes of their own; in blocks smaller than the corpus."""
    threshold = 0.6
    monkeypatch.setattr(near_duplicates, "SHARE", share)
    monkeypatch.setattr(near_duplicates, "BATCH", 32)
    documents = list(similar_documents(120))
    with Spool(tmp_path / "documents") as kept:
        for document in documents:
            kept.add(document)
        write_signatures(kept, tmp_path / "signatures")
    index = NearDuplicates(tmp_path / "signatures", threshold)
    lsh, known, expected = MinHashLSH(threshold=threshold, num_perm=128), {}, set()
    for i, document in enumerate(documents):
        words = document.text.lower().split()
        minhash = MinHash(num_perm=128)
        minhash.update_batch({" ".join(words[j : j + 5]).encode() for j in range(len(words) - 4)})
        expected |= {(j, i) for j in lsh.query(minhash) if minhash.jaccard(known[j]) >= threshold}
        lsh.insert(i, minhash)
        known[i] = minhash
    assert len(expected) > 20
    found = {(min(pair), max(pair)) for pair in index.pairs().tolist()}
    assert found <= expected
    assert components(found) == components(expected)
    other = Document("other", "x", "quite another text of some words that is not there")
    assert not index.find(other)
    assert all(index.find(document) for document in documents[::20])


def components(pairs):
    sets = []
    for pair in pairs:
        joined = set(pair).union(*(one for one in sets if one & set(pair)))
        sets = [one for one in sets if not one & joined] + [joined]
    return sorted(map(sorted, sets))


@pytest.mark.parametrize("near", [None, 0.8])
def test_memory_grows_by_some_numbers_a_document(tmp_path, monkeypatch, near):
    """Texts of 6 KB, some more or five times as many: what is added is far less than a text for each."""
    monkeypatch.setattr(near_duplicates, "BATCH", 64)
    peaks = []
    for count in (20, 50, 250):  # the first one imports what is imported late
        folder = tmp_path / str(count)
        folder.mkdir()
        texts = [" ".join(f"{word}{i}-{j}" * 6 for j, word in enumerate(text("prose", i).split()))
                 for i in range(count)]  # fmt: skip
        (folder / "large.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
        assert sum(map(len, texts)) > 6000 * count
        source = {"kind": "dataset", "path": "json", "data_files": str(folder / "large.jsonl")}
        data = {"documents": [source], "shifted": {}, "near_duplicates": near}
        study = load_study(tiny_study(folder), **{f"data__{key}": value for key, value in data.items()})
        tracemalloc.start()
        prepare(study)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert sum(len(read_documents(study.folder / "data", split)) for split in SPLITS) == count
    assert (peaks[2] - peaks[1]) / 200 < 600
