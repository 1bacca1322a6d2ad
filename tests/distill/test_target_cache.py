"""Targets on disk: the teacher's own answers, found by row, few bytes, refused when foreign or damaged."""

import numpy as np
import pytest
import torch

from distill.losses.chunked import slice_target
from distill.losses.divergences import distillation_loss
from distill.losses.teacher_output import Dense, Sampled, TopK
from distill.teachers.cache import CachedTeacher, link_shards, shard_batches, write_shards
from distill.teachers.codec import make_codec
from distill.teachers.target_source import batch_tokens
from eval.core.artifacts import Key, build_artifact, read_manifest
from eval.core.documents import Row, batches, collate
from eval.core.errors import UserError
from eval.core.sections import Loss, Targets

FORMS = ["dense", "sampled", "top_k"]
LINEAGE = {"teacher": "t", "tokenizer": "k", "data": "d"}


def rows(count=9, vocabulary=320, longest=20):
    """Rows of unequal lengths; one is given in part, and one holds two packed ones."""
    generator = torch.Generator().manual_seed(0)
    tokens = [
        [0, *torch.randint(1, vocabulary, (2 + (i * 7) % (longest - 2),), generator=generator).tolist()]
        for i in range(count)
    ]
    plain = [Row(f"d{i}", "code", 0, t) for i, t in enumerate(tokens[:-2])]
    given, packed = tokens[-2], tokens[-1]
    parts = ((2, 0), (len(packed) - 2, 0))
    return [*plain, Row("g", "code", 3, given, given=1), Row("p", "code", 0, packed, packed=parts)]


def teacher_of(vocabulary=320, sharpness=3.0):
    """Says the same of a token whatever stands around it, so that batches cannot matter."""
    generator = torch.Generator().manual_seed(1)
    table = torch.log_softmax(sharpness * torch.randn(97, vocabulary, generator=generator), -1)
    return lambda batch: Dense(table[batch.input_ids[:, :-1][batch.mask] % 97])


def codec_of(name, vocabulary=320, temperature=1.0, **settings):
    return make_codec(Targets(form=name, k=16, **settings), vocabulary, temperature)


def cache(folder, codec, some, teacher, **how):
    """The artifact, made as a study makes it."""
    write_shards(folder / "parts", some, teacher, codec, pad=0, report=lambda share: None, **how)
    facts = {**LINEAGE, **codec.facts}
    with build_artifact(
        folder / "t", kind="targets", name="t", key=Key("k"), parents={}, facts=facts
    ) as aside:
        facts |= link_shards(folder / "parts", aside, sum(row.predicted for row in some))
    return folder / "t"


@pytest.mark.parametrize("name", FORMS)
def test_kept_targets_are_the_teachers_in_any_order_and_batch(tmp_path, name):
    some, teacher, codec = rows(), teacher_of(), codec_of(name)
    cached = CachedTeacher(cache(tmp_path, codec, some, teacher), some, codec, LINEAGE)
    drawn = {}
    for chosen in ([row] for row in some):
        drawn[chosen[0].id] = cached(collate(chosen, 0))
    for chosen in (some[:3], some[:2:-1]):
        batch = collate(chosen, 0)
        target, wanted = cached(batch), teacher(batch).log_probs
        single = [drawn[row.id] for row in chosen]
        if isinstance(target, Dense):
            # fp16 carries 11 bits, and log-probabilities here reach -20: half a unit in the last place.
            torch.testing.assert_close(target.log_probs.float(), wanted, atol=2**-7, rtol=0)
            assert torch.equal(target.log_probs, torch.cat([s.log_probs for s in single]))
        elif isinstance(target, Sampled):
            assert (target.counts.sum(1) == 50).all()
            whole = torch.zeros_like(wanted).scatter_add(1, target.ids, target.counts)
            alone = [torch.zeros(len(s.ids), 320).scatter_add(1, s.ids, s.counts) for s in single]
            assert torch.equal(whole, torch.cat(alone))
            assert float(wanted.exp()[whole > 0].min()) > 0
            torch.testing.assert_close(
                target.entropy, torch.special.entr(wanted.exp()).sum(1), atol=2**-9, rtol=0
            )
        else:
            values, ids = wanted.topk(16, dim=1)
            assert torch.equal(target.ids, ids)
            assert bool((target.log_probs <= values).all()), "rounded down: the tail is not negative"
            torch.testing.assert_close(target.log_probs, values, atol=2**-7, rtol=0)


@pytest.mark.parametrize("name", ["dense", "sampled"])
def test_the_mean_gradient_over_many_draws_tends_to_the_full_one(tmp_path, name):
    """Through the disk: 5,000 tokens of one distribution, each with draws of its own, at T = 2."""
    some = [Row(f"d{i}", "code", 0, [0] * 26) for i in range(200)]
    logs = torch.log_softmax(2 * torch.randn(60, generator=torch.Generator().manual_seed(2)), -1)
    codec, tokens, loss = codec_of(name, 60, temperature=2.0), 5000, Loss(weight=1.0, temperature=2.0)
    folder = cache(tmp_path, codec, some, lambda batch: Dense(logs.expand(int(batch.mask.sum()), -1)))
    cached = CachedTeacher(folder, some, codec, LINEAGE)(collate(some, 0))

    def gradient(target):
        logits = torch.linspace(-1, 1, 60).requires_grad_()
        labels = torch.zeros(tokens, dtype=torch.int64)
        part = slice_target(target, 0, tokens)
        value = distillation_loss(logits.expand(tokens, -1), labels, part, loss) / tokens
        value.backward()
        return logits.grad.double(), float(value.detach())

    wanted, value = gradient(Dense(logs.expand(tokens, -1)))
    mean, near = gradient(cached)
    p = torch.softmax(logs.double() / 2, -1)
    error = 2 * (p * (1 - p) / (tokens * 50)).sqrt()  # T^2 / T; the largest, that of independent draws
    assert float(error.max()) < 0.02 * float(wanted.abs().max()), "two percent of bias would be seen"
    assert float(((mean - wanted) / error).abs().max()) < 4
    assert near == pytest.approx(value, abs=2e-3)


@pytest.mark.parametrize(("vocabulary", "sharpness"), [(1024, 0.0), (1024, 3.0), (32000, 0.0), (32000, 3.0)])
def test_at_most_80_bytes_per_token_at_50_draws(tmp_path, vocabulary, sharpness):
    """Every byte of the artifact, whatever the teacher says: flat here, or as sharp as a trained one."""
    some = [Row(f"d{i}", "code", 0, torch.randint(0, vocabulary, (128,)).tolist()) for i in range(6)]
    folder = cache(tmp_path, codec_of("sampled", vocabulary), some, teacher_of(vocabulary, sharpness))
    manifest = read_manifest(folder)
    assert manifest.facts["tokens"] == 6 * 127
    assert manifest.bytes / manifest.facts["tokens"] == pytest.approx(
        manifest.facts["bytes_per_token"], abs=0.01
    )
    assert manifest.facts["bytes_per_token"] <= 80


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.glob("shard-*")}


def test_what_goes_on_after_a_stop_has_batches_of_the_same_size(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.teachers.target_source.tokens_per_batch", lambda vocabulary, device: 64)
    assert batch_tokens(tmp_path / "parts", 320) == 64
    monkeypatch.setattr("distill.teachers.target_source.tokens_per_batch", lambda vocabulary, device: 128)
    assert batch_tokens(tmp_path / "parts", 320) == 64, "other memory is free now"
    assert batch_tokens(tmp_path / "other", 320) == 128


@pytest.mark.parametrize("name", FORMS)
def test_shards_depend_neither_on_processes_nor_on_a_stop(tmp_path, monkeypatch, name):
    monkeypatch.setattr("distill.teachers.cache.SHARD_TOKENS", 20)
    monkeypatch.setattr("distill.teachers.cache.tokens_per_batch", lambda vocabulary: 24)
    some, teacher, codec = rows(16), teacher_of(), codec_of(name)
    assert len(list(shard_batches(some, 0, codec))) > 3
    one = shard_bytes(cache(tmp_path / "one", codec, some, teacher))
    for process in (1, 0):
        how = {"process": process, "processes": 2, "pad": 0, "report": lambda share: None}
        write_shards(tmp_path / "two" / "parts", some, teacher, codec, **how)
    assert shard_bytes(tmp_path / "two" / "parts") == one

    calls = []

    def failing(batch):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(batch.ids)
        return teacher(batch)

    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path / "stopped", codec, some, failing)
    left = sorted((tmp_path / "stopped" / "parts").glob("shard-*.safetensors"))
    assert left
    assert len(left) < len(one)
    times = [path.stat().st_mtime_ns for path in left]
    calls.clear()
    assert (
        shard_bytes(cache(tmp_path / "stopped", codec, some, lambda b: calls.append(b.ids) or teacher(b)))
        == one
    )
    assert [path.stat().st_mtime_ns for path in left] == times
    assert len(calls) < len(list(batches(some, 0, 24))), "what was done is not done again"


@pytest.mark.parametrize("name", FORMS)
def test_foreign_targets_are_refused(tmp_path, name):
    some, codec = rows(), codec_of(name)
    folder = cache(tmp_path, codec, some, teacher_of())
    for key, value in LINEAGE.items():
        with pytest.raises(UserError, match=rf"targets .*made with {key} {value}, this study has x"):
            CachedTeacher(folder, some, codec, {**LINEAGE, key: "x"})
    other = [Row(r.document, r.domain, r.index, [*r.tokens[:-1], 5], r.given, r.packed) for r in some]
    with pytest.raises(UserError, match="row d0#0 with these tokens"):
        CachedTeacher(folder, other, codec, LINEAGE)
    with pytest.raises(UserError, match="row new#0 with these tokens"):
        CachedTeacher(folder, [Row("new", "code", 0, [1, 2])], codec, LINEAGE)


def test_another_form_temperature_or_number_of_draws_is_refused(tmp_path):
    some, codec = rows(), codec_of("sampled")
    folder = cache(tmp_path, codec, some, teacher_of())
    for other, message in (
        (codec_of("sampled", temperature=2.0), "temperature 1.0, this study has 2.0"),
        (codec_of("sampled", draws=20), "draws 50, this study has 20"),
        (codec_of("top_k"), "form sampled, this study has top_k"),
        (codec_of("sampled", vocabulary=319), "vocabulary 320, this study has 319"),
    ):
        with pytest.raises(UserError, match=message):
            CachedTeacher(folder, some, other, LINEAGE)


@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "more"])
def test_damaged_targets_are_refused(tmp_path, harm):
    some, codec = rows(), codec_of("sampled")
    path = cache(tmp_path, codec, some, teacher_of()) / "shard-00000.safetensors"
    content = bytearray(path.read_bytes())
    path.unlink()  # the scratch folder links to the same bytes
    if harm == "cut":
        path.write_bytes(content[:-100])
    elif harm == "flip":
        content[-7] ^= 1
        path.write_bytes(content)
    elif harm == "more":
        path.write_bytes(content)
        path.with_name("shard-00001.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"artifact .*shard-0000\d"):
        CachedTeacher(path.parent, some, codec, LINEAGE)


def test_more_ids_than_the_vocabulary_has_are_refused():
    with pytest.raises(UserError, match=r"targets\.k: 16, must be below the vocabulary of 16"):
        codec_of("top_k", vocabulary=16)


def test_a_full_disk_is_reported_before_the_teacher_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "distill.teachers.cache.shutil.disk_usage", lambda path: type("D", (), {"free": 1000})
    )
    with pytest.raises(UserError, match=r"set targets\.source: online, or targets\.form: sampled"):
        cache(tmp_path, codec_of("dense"), rows(), None)


def test_top_k_reads_back_as_ids_of_any_size(tmp_path):
    some, codec = rows(3), codec_of("top_k", vocabulary=70_000)
    folder = cache(tmp_path, codec, some, teacher_of(70_000))
    target = CachedTeacher(folder, some, codec, LINEAGE)(collate(some, 0))
    assert isinstance(target, TopK)
    assert np.array_equal(target.ids, teacher_of(70_000)(collate(some, 0)).log_probs.topk(16, dim=1).indices)
