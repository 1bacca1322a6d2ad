"""Scores: bits of every validation and shifted document, for one model at a time."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eval.core.artifacts import MANIFEST, read_manifest, verify_artifact
from eval.core.checks import CONTROL, STUDENT, Artifacts
from eval.core.documents import Document, cluster_names, slices_of_test
from eval.core.errors import UserError
from eval.core.jobs import Report
from eval.core.records import Bins, Documents, Kind, Score, each_score, provenance, write_record
from eval.core.sections import Corruption
from eval.core.study import Study, recipe_names
from eval.engines import REMAKE, first_line, load_engine, subject_of, subject_of_record
from eval.metrics.classes import ClassPredictions
from eval.metrics.functions import bits_per_byte
from eval.metrics.likelihood import BATCH_TOKENS, Likelihoods, Predict, likelihoods
from eval.score.corruptions import slice_documents, slice_names
from eval.score.devices import CPU, device_name, settle_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("id", "cluster", "slice", "bytes", "tokens", "bits", "correct")
CONTEXT = 256  # tokens of a window, where nobody says another number


def model_folders(run: Path, study: Study) -> list[Path]:
    """Bases, students and variants of the study that exist; those of earlier settings are left out."""
    tops = ["base", *(f"students/{arm}" for arm in study.student_arms)]
    tops += [f"variants/{recipe}/{arm}" for recipe in recipe_names(study)[1:] for arm in (STUDENT, CONTROL)]
    places = (run / top / f"s{seed}" for top in tops for seed in study.seeds)
    return [place for place in places if (place / MANIFEST).is_file()]


def score_documents(
    predict: Predict,
    data: Path,
    tokenizer: "PreTrainedTokenizerBase",
    context: int,
    *,
    kind: Kind = "score",
    cluster_of: Callable[[str], str] = lambda name: "none",
    corruptions: Sequence[Corruption] = (),
    batch_tokens: int = BATCH_TOKENS,
    report: Report = lambda share: None,
) -> Documents:
    """Bits and correct tokens of all documents of `slice_names`, in that order; see `likelihoods`.

    For the kind `test` they are those of `slices_of_test(data)`, and no others. `cluster_of` says of a slice
    what its documents are not independent by; see `cluster_names`.

    Raises:
        UserError: a slice or a document is empty, or a likelihood is not finite.
    """
    columns: dict[str, list] = {name: [] for name in COLUMNS}
    classes: dict[str, list] = {"predicted": [], "brier": []}
    calibration = {}
    slices = slices_of_test(data) if kind == "test" else slice_names(data, corruptions)
    for done, name in enumerate(slices, start=1):
        documents = slice_documents(data, name, corruptions)
        if not documents:
            raise UserError(
                f"slice {name!r}", f"no documents in {data}", "give the slice sources that hold some"
            )
        seen = ClassPredictions(predict)
        asked: Predict = predict if documents[0].label is None else seen
        result = likelihoods(asked, documents, tokenizer, context, batch_tokens)
        columns["id"] += [document.id for document in documents]
        columns["cluster"] += cluster_names(documents, cluster_of(name))
        columns["slice"] += [name] * len(documents)
        columns["bytes"] += [document.size for document in documents]
        columns["tokens"] += result.tokens
        columns["bits"] += result.bits
        columns["correct"] += result.correct
        if documents[0].label is not None:
            classes["predicted"] += [seen.predicted[document.id] for document in documents]
            classes["brier"] += [seen.brier[document.id] for document in documents]
        calibration[name] = Bins(**result.bins._asdict())
        report(done / len(slices))
    labelled = classes if classes["predicted"] else {}
    return Documents(**columns, **labelled, calibration=calibration)


def score_kinds(study: Study) -> list[Kind]:
    """The kinds of score that a teacher needs: it can only run where it is trained, so the test comes now."""
    return ["score", "test"] if study.data.test else ["score"]


def score_folder(
    run: Path,
    study: Study,
    folder: Path,
    report: Report = lambda share: None,
    kind: Kind = "score",
    device: str = CPU,
    twins: Sequence[Path] = (),
) -> None:
    """Scores the artifact `folder` of a run on one CPU thread or a GPU, by its own engine; writes the record.

    Args:
        twins: folders of the same bytes, for which the same is written: the base of other seeds.

    Raises:
        UserError: the artifact is damaged, cannot be loaded, or gives a likelihood that is not finite.
    """
    manifest = verify_artifact(folder)
    subject = subject_of(manifest)
    device = settle_device([subject.engine], device, subject.label)
    engine = load_engine(subject.engine, folder, device=device)
    tokenizer, data = engine.tokenizer, run / "data"
    size = engine.scoring_tokens
    try:
        documents = score_documents(
            engine.borrowed,
            data,
            tokenizer,
            study.data.context,
            kind=kind,
            cluster_of=study.data.cluster_of,
            corruptions=study.data.corruptions,
            batch_tokens=size,
            report=report,
        )
    except UserError as error:
        raise UserError(f"scoring {folder}: {error.thing}", error.problem, error.fix) from error
    for place in (folder, *twins):
        twin = read_manifest(place)
        assert twin.hash == manifest.hash, place
        record = Score(
            **subject_of(twin).model_dump(),
            kind=kind,
            data=read_manifest(data).hash,
            documents=documents,
            provenance=provenance(manifest.hash, study.hash(), device_name(device)),
        )
        write_record(run, record)


def score(
    folder: str | Path,
    texts: Sequence[str | Document],
    context: int | None = None,
    engine: str = "torch",
    device: str = CPU,
) -> Likelihoods:
    """Bits, predicted and correct tokens of each text under the model in `folder`; writes nothing.

    Args:
        folder: a model in the standard format of `engine`: a transformers folder for `torch`.
        context: tokens per window, the boundary token included: 2 or more, and at most the model's positions;
            by default 256, or all positions where they are fewer.
        device: cpu, or cuda where the engine runs on it.

    Raises:
        UserError: the model cannot be loaded, `texts` are none or one text, `context` does not fit, or a text
            is empty, holds half of a character, or has no finite likelihood.
    """
    documents = _as_documents(texts)
    if context is not None and (not isinstance(context, int) or context < 2):
        raise UserError("context", repr(context), "give a whole number of tokens, 2 or more")
    loaded = load_engine(engine, Path(folder), device=device)
    positions = _positions(Path(folder))
    if context is None:
        context = min(CONTEXT, positions or CONTEXT)
    if positions is not None and context > positions:
        raise UserError("context", context, f"give {positions} at most: {folder} has no more positions")
    return likelihoods(loaded.borrowed, documents, loaded.tokenizer, context, loaded.scoring_tokens)


def _as_documents(texts: Sequence[str | Document]) -> list[Document]:
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise UserError("texts", repr(texts)[:60], "give a list of texts, such as ['one', 'two']")
    documents = [Document(str(i), "", one) if isinstance(one, str) else one for i, one in enumerate(texts)]
    if not documents:
        raise UserError("texts", "there are none", "give one or more")
    for i, document in enumerate(documents):
        if not isinstance(document, Document):
            raise UserError(f"texts[{i}]", repr(document)[:60], "give a str or a Document")
        try:
            json.dumps([document.text, document.prompt], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"texts[{i}]", f"{error.reason} at {error.start}", "take that character out"
            ) from error
    if len({document.id for document in documents}) < len(documents):
        raise UserError("texts", "two have the same id", "give each Document an id of its own")
    return documents


def _positions(folder: Path) -> int | None:
    """How many tokens a model can tell apart by their place, where its config.json says so."""
    from transformers import AutoConfig  # takes seconds to import

    if not (folder / "config.json").is_file():
        return None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError) as error:
        raise UserError(f"config of {folder}", f"cannot be read ({first_line(error)})", REMAKE) from error
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def unscored_folders(run: Path, study: Study) -> list[Path]:
    """Model folders of a run without a record of their own bytes, this data and this study."""
    artifacts = Artifacts(run, study)
    scored = {subject_of_record(record) for record in artifacts.current(each_score(run))}
    return [f for f in model_folders(run, study) if subject_of(artifacts.manifest(f)) not in scored]


def corpus_bits_per_byte(records: list[Score]) -> dict[tuple[str, str], dict[str, float]]:
    """(recipe, arm) -> slice -> bits per byte, the documents of all seeds pooled."""
    pooled: dict[tuple[str, str], dict[str, tuple[list[float], list[int]]]] = {}
    for record in records:
        slices = pooled.setdefault((record.recipe, record.arm), {})
        columns = record.documents
        for name, bits, size in zip(columns.slice, columns.bits, columns.bytes, strict=True):
            pair = slices.setdefault(name, ([], []))
            pair[0].append(bits)
            pair[1].append(size)
    return {
        model: {name: bits_per_byte(bits, sizes) for name, (bits, sizes) in slices.items()}
        for model, slices in pooled.items()
    }
