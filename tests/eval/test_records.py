"""Records: what was written is read again, and what cannot be true is refused."""

import math
import os

import pytest
from pydantic import ValidationError

from eval.core.errors import UserError
from eval.core.records import (
    CostRecord,
    Documents,
    Process,
    Score,
    provenance,
    read_costs,
    read_scores,
    write_record,
)

COLUMNS = {
    "id": ["a", "b", "a"],
    "slice": ["validation", "validation", "far"],
    "bytes": [10, 20, 30],
    "tokens": [4, 8, 12],
    "bits": [20.0, 41.5, 60.25],
}


def score(**changes):
    fields = {"arm": "S1", "seed": 2, "engine": "torch", "data": "d" * 64, "documents": Documents(**COLUMNS)}
    return Score(**{**fields, "provenance": provenance("a" * 64, "c" * 64), **changes})


def measured(**changes):
    process = Process(prefill_ms=[1.5, 2.5], decode_ms=[0.25], load_s=0.5, peak_memory_bytes=2**20)
    fields = {
        "arm": "S1",
        "seed": 0,
        "recipe": "int8",
        "engine": "openvino",
        "target": "cpu",
        "disk_bytes": 9,
    }
    settings = {"prompt_tokens": 8, "new_tokens": 2, "threads": 1, "processes": [process, process]}
    return CostRecord(**{**fields, **settings, "provenance": provenance("a" * 64, "c" * 64), **changes})


def test_records_are_read_as_they_were_written(tmp_path):
    one, other = score(), score(arm="T1", recipe="plain", engine="method")
    cost = measured()
    paths = [write_record(tmp_path, record) for record in (one, other, cost)]
    assert [p.relative_to(tmp_path).as_posix() for p in paths] == [
        "records/score/plain/S1-s2.json",
        "records/score/plain/T1-s2.json",
        "records/cost/cpu/int8/S1-s0.json",
    ]
    assert read_scores(tmp_path) == [one, other]
    assert read_costs(tmp_path) == [cost]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_run_without_records_has_none(tmp_path):
    assert (read_scores(tmp_path), read_costs(tmp_path)) == ([], [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": [20.0, math.nan, 1.0]}, "document 'b' has nan bits"),
        ({"bits": [20.0, 1.0, math.inf]}, "document 'a' has inf bits"),
        ({"bits": [20.0, 1.0, -0.5]}, "document 'a' has -0.5 bits"),
        ({"bytes": [10, 0, 30]}, "document 'b' has 0 bytes"),
        ({"correct": [4, 9, 12]}, "document 'b' has 8 tokens, of which 9 are correct"),
        ({"correct": [4, -1, 12]}, "document 'b' has 8 tokens, of which -1 are correct"),
        ({"tokens": [4, -8, 12]}, "document 'b' has -8 tokens"),
        ({"slice": ["far"] * 3}, "appears twice"),
        ({"tokens": [4, 8]}, "must have the same"),
        ({name: [] for name in COLUMNS}, "at least 1"),
    ],
)
def test_impossible_columns_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        Documents(**{**COLUMNS, **changes})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"arm": "S1"}'])
def test_a_damaged_record_is_named(tmp_path, text):
    path = write_record(tmp_path, score())
    path.write_text(text)
    with pytest.raises(UserError, match=r"record .*S1-s2\.json: .*delete it and measure again"):
        read_scores(tmp_path)


def test_provenance_says_where_and_with_what():
    source = provenance("a", "c", "Some GPU", "1.2")
    assert (source.machine.device, source.machine.driver) == ("Some GPU", "1.2")
    assert source.machine.cores == len(os.sched_getaffinity(0))
    assert source.machine.isa
    assert {"python", "torch", "transformers"} <= set(source.versions)
    assert source.time.endswith("+00:00")


def test_a_record_of_another_schema_is_refused_with_its_file(tmp_path):
    path = write_record(tmp_path, score())
    path.write_text(path.read_text().replace('"schema_version":1', '"schema_version":2'))
    with pytest.raises(UserError, match=r"S1-s2\.json: schema_version: found 2, expected 1; delete it"):
        read_scores(tmp_path)
