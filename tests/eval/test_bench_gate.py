"""The benchmark of the gate makes a run that the gate judges; its figures are not held here."""

from scripts.bench_gate import Size, gate_rows


def test_a_small_study_is_judged():
    (row,) = gate_rows(Size(seeds=2, recipes=1, documents=20), times=1)
    assert (row["seeds"], row["variants"], row["documents"]) == (2, 1, 20)
    assert row["seconds"] > 0
    assert 10 < row["peak, MiB"] < 1000
