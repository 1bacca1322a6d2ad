"""Scores made elsewhere (vLLM, lm-evaluation-harness, anything) as records of a run, for the same gate.

    python -m eval.score.import --study RUN --export documents.jsonl
    python -m eval.score.import --study RUN --arm S1 --seed 0 --artifact HASH --by "vllm 0.11" FILE

The first writes the documents that decide, one a line: slice, id, sha256, and the text whose bits count
(after its prompt, if it has one). FILE has one JSON object a line: slice, id, sha256 of the text, and `bits`,
or `nats`, or `logprobs` (of each of its tokens, in nats; null for one that is given). A line of the sample
log of lm-evaluation-harness, whose `doc` is a line of the export, is taken as it is. HASH is the `hash` in
the manifest of what was scored. docs/quality.md has an example.
"""

import json
import math
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval.core.artifacts import read_manifest, text_sha256, write_text
from eval.core.checks import CONTROL, FALLBACK, TAUGHT, TEACHERS, Artifacts, artifact_folder
from eval.core.commands import NewFile, new_parser, study_from_command, text_line, write_json
from eval.core.documents import Document, cluster_names, json_objects
from eval.core.documents.encoding import text_ids
from eval.core.errors import UserError, entry, require_one_of
from eval.core.jobs import lock_folder
from eval.core.records import (
    PLAIN,
    Documents,
    Machine,
    Provenance,
    Score,
    each_score,
    record_path,
    write_record,
)
from eval.core.records.measured import MOST, MOST_COUNT
from eval.core.study import Study, recipe_names
from eval.engines import load_tokenizer, subject_of
from eval.score.corruptions import slice_documents, slice_names

MEASURES = ("bits", "nats", "logprobs")
FIX = "score the export of this run again: absorb import --study RUN --export FILE"
Key = tuple[str, str]  # slice, id


def document_sha256(document: Document) -> str:
    """Of what is scored and what it is scored after: another prompt gives other bits."""
    whole = [document.prompt, document.text] if document.prompt else document.text
    text = whole if isinstance(whole, str) else json.dumps(whole, ensure_ascii=False, sort_keys=True)
    return text_sha256(text)


def documents_of(study: Study) -> dict[Key, Document]:
    """Every document that decides a verdict, in the order of records; never a test document."""
    data, damage = study.folder / "data", study.data.corruptions
    names = slice_names(data, damage)
    return {(name, one.id): one for name in names for one in slice_documents(data, name, damage)}


def export_lines(study: Study) -> Iterator[str]:
    for (name, _), one in documents_of(study).items():
        prompt = {"prompt": one.prompt} if one.prompt else {}
        row = {"slice": name, "id": one.id, "sha256": document_sha256(one), **prompt, "text": one.text}
        yield json.dumps(row, ensure_ascii=False) + "\n"


def read_row(where: str, row: dict[str, Any]) -> tuple[Key, str, float, int | None]:
    """Slice and id, hash of the text, bits, and the number of tokens where the line says it.

    Raises:
        UserError: a field is missing, or what it holds is no likelihood.
    """
    if "doc" in row and "filtered_resps" in row:  # a sample of lm-evaluation-harness, loglikelihood_rolling
        try:
            first = row["filtered_resps"][0]
            likelihood = float(first[0] if isinstance(first, list) else first)
            row = {**row["doc"], "nats": -likelihood}
        except (TypeError, ValueError, IndexError, KeyError) as error:
            problem = f"no sample of loglikelihood_rolling: {type(error).__name__}"
            raise UserError(where, problem, "give the samples as lm-evaluation-harness wrote them") from error
    for name in ("slice", "id", "sha256"):
        if not isinstance(row.get(name), str):
            raise UserError(f"{where}: {name}", repr(row.get(name)), "give it as a text, as in the export")
    given = [name for name in MEASURES if row.get(name) is not None]
    if len(given) != 1:
        fix = f"give exactly one of {', '.join(MEASURES)}"
        raise UserError(where, f"{len(given)} of them given", fix)
    value, tokens = row[given[0]], row.get("tokens")
    if given[0] == "logprobs":
        known = [one for one in value if one is not None] if isinstance(value, list) else []
        usable = known and all(_is_number(one) and -math.inf < one <= 0 for one in known)
        value, tokens = (-sum(known) if usable else value), len(known)
    if not _is_number(value) or not 0 <= value <= MOST / 2:  # nats, too, are then at most MOST bits
        raise UserError(f"{where}: {given[0]}", repr(value)[:60], "give a finite likelihood of at most 1")
    if tokens is not None and (type(tokens) is not int or not 1 <= tokens <= MOST_COUNT):
        fix = "give the number of predicted tokens, or leave it out"
        raise UserError(f"{where}: tokens", repr(tokens)[:60], fix)
    bits = value if given[0] == "bits" else value / math.log(2)
    return (row["slice"], row["id"]), row["sha256"], float(bits), tokens


def _is_number(value: Any) -> bool:
    """A number that float64 can hold: JSON has whole numbers of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def read_columns(run: Path, study: Study, path: Path) -> Documents:
    """The scores of a file as the columns of a record, in the order of the run's own records.

    Raises:
        UserError: a document is missing, comes twice, is unknown or has another text; the first is named.
    """
    known, rows = documents_of(study), dict[Key, tuple[float, int | None]]()
    for where, _, row in json_objects(path, "scores", "write one JSON object a line"):
        key, sha256, bits, tokens = read_row(where, row)
        thing = f"{where}: document {key[1]!r} of slice {key[0]!r}"
        if key not in known:
            raise UserError(thing, "the run scores none of that name", FIX)
        if sha256 != (now := document_sha256(known[key])):
            raise UserError(thing, f"its text has sha256 {sha256[:12]}, the run's has {now[:12]}", FIX)
        if key in rows:
            raise UserError(thing, "a second score of it", "leave one out")
        if known[key].prompt and {"doc", "filtered_resps"} <= row.keys():
            problem = (
                "loglikelihood_rolling of a document with a prompt: what stands before the text counts too"
            )
            raise UserError(
                thing, f"{problem}, or is not read", "give `bits`, `nats` or `logprobs` of the text"
            )
        rows[key] = bits, tokens
    if missing := [key for key in known if key not in rows]:
        name, document = missing[0]
        raise UserError(f"scores {path}", f"no score of {len(missing)}, first {document!r} of {name!r}", FIX)
    clusters: list[str] = []
    for name in dict.fromkeys(name for name, _ in known):
        of_slice = [one for (other, _), one in known.items() if other == name]
        clusters += cluster_names(of_slice, study.data.cluster_of(name))
    counted = {key: rows[key][1] for key in known}
    tokenizer = load_tokenizer(run / f"base/s{study.seeds[0]}") if None in counted.values() else None
    counts = [n or len(text_ids(tokenizer, known[key].text)) for key, n in counted.items()]
    return Documents(
        id=[document for _, document in known],
        cluster=clusters,
        slice=[name for name, _ in known],
        bytes=[one.bytes for one in known.values()],
        tokens=counts,
        bits=[rows[key][0] for key in known],
    )


def expected_artifact(run: Path, arm: str, seed: int, recipe: str) -> tuple[str, str]:
    """Hash and engine of the model of an arm; of a teacher that which its student was made from."""
    place = artifact_folder(run, arm, seed, recipe)
    if place is not None:
        manifest = read_manifest(place)
        return manifest.hash, subject_of(manifest).engine
    student = next(one for one, teacher in TAUGHT.items() if teacher == arm)
    return read_manifest(run / "students" / student / f"s{seed}").parents["teacher"], "method"


def import_scores(
    study: Study, path: Path, *, arm: str, seed: int, recipe: str, artifact: str, by: str
) -> Score:
    """The record of a file of scores, checked as those of the run are.

    Raises:
        UserError: the model is not one of the study, or not that of the hash, or was scored before.
    """
    run = study.folder
    require_one_of("--arm", arm, [FALLBACK, *TEACHERS, *study.student_arms])
    require_one_of("--recipe", recipe, recipe_names(study))
    if seed not in study.seeds:
        raise UserError("--seed", seed, f"the study has {study.seeds}")
    if recipe != PLAIN and arm not in TAUGHT:
        raise UserError("--recipe", f"{recipe!r} of {arm}", f"variants are of {', '.join(TAUGHT)}")
    expected, engine = expected_artifact(run, arm, seed, recipe)
    if artifact != expected:
        problem = f"{artifact[:12]} was scored, the run holds {expected[:12]}"
        raise UserError("--artifact", problem, "score the bytes that lie in the run")
    machine = Machine(host="elsewhere", system="unknown", cpu="unknown", isa="unknown", cores=0, device=by)
    record = Score(
        arm=arm,
        seed=seed,
        recipe=recipe,
        engine=engine,
        by=by,
        data=read_manifest(run / "data").hash,
        documents=read_columns(run, study, path),
        provenance=Provenance(
            artifact=artifact,
            config=study.hash(),
            machine=machine,
            versions={"scored by": by},
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        ),
    )
    place = record_path(run, record)
    if place.is_file() and any(
        record_path(run, one) == place for one in Artifacts(run, study).current(each_score(run))
    ):
        raise UserError(f"record {place}", "scored before", "delete the one that is not meant")
    return record


@entry
def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="scores of one model, one document a line")
    parser.add_argument(
        "--export", type=Path, action=NewFile, metavar="FILE", help="write the documents to score, and end"
    )
    parser.add_argument("--arm", help=f"B, T0, T1, S1, {CONTROL} or CE")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--recipe", default=PLAIN)
    parser.add_argument("--artifact", metavar="HASH", help="`hash` of the manifest of what was scored")
    parser.add_argument("--by", type=text_line, help="what scored it, with its version")
    study, args = study_from_command(parser, measures=True)
    if args.export is not None:
        write_text(args.export, "".join(lines := list(export_lines(study))))
        print(f"{len(lines)} documents in {args.export}")
        return
    given = {name: getattr(args, name) for name in ("file", "arm", "seed", "artifact", "by")}
    if absent := [name for name, value in given.items() if not str("" if value is None else value).strip()]:
        raise UserError("eval.score.import", f"no {', '.join(absent)}", "give them, or --export FILE")
    given["path"] = given.pop("file")
    with lock_folder(study.folder):
        record = import_scores(study, recipe=args.recipe, **given)
        path = write_record(study.folder, record)
    print(f"{path}: {len(record.documents.id)} documents scored by {record.by}")
    write_json(args.json, path.as_posix())


if __name__ == "__main__":
    main()
