"""Scores of a teacher: measured where it runs, because no checkpoint contains its method."""

from distill.teachers.run import AnyTeacher, teacher_tokenizer
from distill.trainer.loop import accelerator
from eval.core.artifacts import read_manifest
from eval.core.documents import tokens_per_batch
from eval.core.records import Score, each_score, provenance, write_record
from eval.core.study import Study
from eval.score.scoring import score_documents, score_kinds


def score_teacher(
    study: Study,
    side: str,
    seeds: list[int],
    teacher: AnyTeacher,
    teacher_hash: str,
) -> None:
    """Writes one score record for each seed that shares this teacher."""
    data, tokenizer = study.folder / "data", teacher_tokenizer(study, side, seeds[0])
    size = tokens_per_batch(len(tokenizer), accelerator().device)
    for kind in score_kinds(study):
        documents = score_documents(
            teacher.log_probs,
            data,
            tokenizer,
            study.data.context,
            kind=kind,
            cluster_of=study.data.cluster_of,
            corruptions=study.data.corruptions,
            batch_tokens=size,
        )
        for seed in seeds:
            record = Score(
                kind=kind,
                arm=side,
                seed=seed,
                engine="method",
                data=read_manifest(data).hash,
                documents=documents,
                provenance=provenance(teacher_hash, study.hash()),
            )
            write_record(study.folder, record)


def is_scored(study: Study, side: str, seeds: list[int], teacher_hash: str) -> bool:
    """True if every seed has all its records of this teacher and study."""
    scored = {
        (r.kind, r.seed)
        for kind in score_kinds(study)
        for r in each_score(study.folder, kind)
        if (r.arm, r.provenance.artifact, r.provenance.config) == (side, teacher_hash, study.hash())
    }
    return scored >= {(kind, seed) for kind in score_kinds(study) for seed in seeds}
