"""How far the predictions of a variant are from its uncompressed student, and how much of that is noise."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from eval.core.artifacts import read_manifest, verify_artifact
from eval.core.documents import Batch, Document
from eval.core.errors import UserError
from eval.core.jobs import Report
from eval.core.records import (
    Agreement,
    Rerun,
    provenance,
    write_record,
)
from eval.core.study import Study
from eval.engines import Engine, load_engine, subject_of
from eval.metrics.likelihood import Predict, likeliest_tokens, prepare_batches, require_finite, split_scores
from eval.score.agreement_records import student_folder
from eval.score.devices import CPU, device_name, settle_device

PIECE = 2**16  # entries of one comparison: its dozen intermediates stay in a core's cache
RERUN_DOCUMENTS = 4  # so many give the noise floor
OTHER_THREADS = 2


class DocumentDivergences(NamedTuple):
    """Columns with one entry per document."""

    tokens: list[int]
    flips: list[int]
    kl_bits: list[float]


@torch.no_grad()
def flips_and_kl(one: Tensor, other: Tensor, batch: Batch) -> Tensor:
    """[2, N] for the tokens under the mask: 1 where the likeliest differ, and KL(one || other) in bits."""
    parts, other = [], other.to(one.device)
    for left, right in zip(split_scores(one, batch, PIECE), split_scores(other, batch, PIECE), strict=True):
        flips = likeliest_tokens(left) != likeliest_tokens(right)
        bits = kl_divergence(left.log_softmax(-1), right.log_softmax(-1)) / math.log(2)
        parts.append(torch.stack([flips, bits]))
    return torch.cat(parts, 1)[:, batch.targets[0].to(one.device)]


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats [n], from normalised log-probabilities [n, V].

    As p and q both sum to 1, it is the sum of p (q/p - 1 - log(q/p)), of which no term is negative: two runs
    that differ by rounding alone give no difference of large numbers (Schulman 2020, "Approximating KL
    divergence"). Where q is far above p, p q/p is taken as q, which cannot overflow.
    """
    p, gap = log_p.exp(), log_q - log_p
    near = p * (gap.expm1() - gap)
    far = log_q.exp() - p - p * gap
    return torch.where(p > 0, torch.where(gap < 1, near, far), log_q.exp()).sum(-1)


def document_divergences(
    one: Predict, other: Predict, engine: Engine, documents: list[Document], context: int
) -> DocumentDivergences:
    """Flips and divergence of two models that share the tokenizer of `engine`, by document.

    Raises:
        UserError: a divergence is not finite.
    """
    place = {document.id: i for i, document in enumerate(documents)}
    sums = torch.zeros(2, len(place), dtype=torch.float64)
    tokens = torch.zeros(len(place), dtype=torch.int64)
    for batch in prepare_batches(documents, engine.tokenizer, context, engine.scoring_tokens):
        counts = batch.mask.sum(1)
        where = torch.tensor([place[name] for name in batch.documents]).repeat_interleave(counts)
        sums.index_add_(1, where, flips_and_kl(one(batch), other(batch), batch).double().cpu())
        tokens.index_add_(0, where, torch.ones_like(where))
    require_finite(documents, sums[1])
    return DocumentDivergences(tokens.tolist(), sums[0].long().tolist(), sums[1].tolist())


def predict_in_other_batches(engine: Engine) -> Predict:
    """The engine on one row at a time, without padding; a batch of one row becomes two equal rows."""

    def predict(batch: Batch) -> Tensor:
        if len(batch.ids) == 1:
            return engine.logits(_batch_part(batch, [0, 0], batch.input_ids.shape[1]))[:1]
        lengths = batch.attention_mask.sum(1).tolist()
        rows = [engine.logits(_batch_part(batch, [i], length))[0] for i, length in enumerate(lengths)]
        whole = rows[0].new_zeros(*batch.input_ids.shape, rows[0].shape[-1])  # of a classifier: its classes
        for i, row in enumerate(rows):
            whole[i, : len(row)] = row
        return whole

    return predict


def _batch_part(batch: Batch, rows: list[int], length: int) -> Batch:
    """Some rows of a batch, cut to a length."""
    given = None if batch.given is None else batch.given[rows, :length]
    ids, documents, domains = (
        [column[i] for i in rows] for column in (batch.ids, batch.documents, batch.domains)
    )
    return Batch(
        ids, documents, domains, batch.input_ids[rows, :length], batch.attention_mask[rows, :length], given
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def predict_with_other_threads(name: str, folder: Path) -> Predict:
    """The model once more, with another number of threads."""
    before = torch.get_num_threads()
    engine = load_engine(name, folder, threads=OTHER_THREADS)
    torch.set_num_threads(before)

    def predict(batch: Batch) -> Tensor:
        with threads(OTHER_THREADS):
            return engine.logits(batch)

    return predict


def measure_noise(
    engine: Engine, name: str, documents: list[Document], context: int, device: str = CPU
) -> dict[str, Rerun]:
    """The engine against itself, in batches of another size and, on a CPU, with other threads."""
    others = {"batch": predict_in_other_batches(engine)}
    if device == CPU:
        others["threads"] = predict_with_other_threads(name, engine.folder)
    reruns = {}
    for change, predict in others.items():
        columns = document_divergences(engine.logits, predict, engine, documents[:RERUN_DOCUMENTS], context)
        reruns[change] = Rerun(
            tokens=sum(columns.tokens), flips=sum(columns.flips), kl_bits=math.fsum(columns.kl_bits)
        )
    return reruns


def record_agreement(
    run: Path,
    study: Study,
    folder: Path,
    documents: list[Document],
    report: Report = lambda share: None,
    device: str = CPU,
) -> Agreement:
    """Compares the variant in `folder` with its student on some documents, and writes the record.

    Both run on one CPU thread, or on one GPU where the engines of both do.

    Raises:
        UserError: an artifact is damaged, the two have different vocabularies, or one is not finite.
    """
    manifest = verify_artifact(folder)
    subject = subject_of(manifest)
    parent, data = student_folder(run, subject), run / "data"
    student = verify_artifact(parent)
    engines = [subject_of(student).engine, subject.engine]
    device = settle_device(engines, device, subject.label)
    student_engine = load_engine(engines[0], parent, device=device)
    engine = load_engine(engines[1], folder, device=device)
    if student_engine.vocabulary != engine.vocabulary:
        raise UserError(
            f"variant {folder}",
            f"{engine.vocabulary} rows of output, its student has {student_engine.vocabulary}",
            f"make it again from this student: absorb compress --study {run}",
        )
    context = study.data.context
    try:
        columns = document_divergences(student_engine.logits, engine.logits, engine, documents, context)
        report(0.7)
        reruns = measure_noise(engine, subject.engine, documents, context, device)
    except UserError as error:
        raise UserError(f"comparing {folder}: {error.thing}", error.problem, error.fix) from error
    record = Agreement(
        **subject.model_dump(),
        data=read_manifest(data).hash,
        student=student.hash,
        id=[document.id for document in documents],
        **columns._asdict(),
        reruns=reruns,
        provenance=provenance(manifest.hash, study.hash(), device_name(device)),
    )
    write_record(run, record)
    return record
