"""`python -m eval.score.agreement`: how far the predictions of variants are from their uncompressed student.

Flips are the share of next tokens whose likeliest prediction differs; KL(student || variant) is in bits per
token. Beside each stands its noise: the difference of the variant from itself in another batch or with other
threads. Variants that have a record of the same bytes, student, data and study, and of as many documents or
more, are left alone.
"""

from rich.table import Table

from eval.core.artifacts import read_manifest
from eval.core.checks import Artifacts
from eval.core.commands import (
    count,
    level_text,
    new_console,
    new_parser,
    stamp_line,
    study_from_command,
    write_json,
)
from eval.core.documents import Document, cluster_names, read_documents
from eval.core.errors import entry
from eval.core.gate_file import Difference
from eval.core.jobs import Job, lock_folder, run_jobs
from eval.core.plan import budget_of_run
from eval.core.records import VALIDATION, read_agreements
from eval.core.study import Study, recipe_names
from eval.engines import subject_of
from eval.score.agreement_records import ALPHA, estimate_agreement, uncompared_variants, variant_folders
from eval.score.devices import add_device, deal_out, find_devices

Agreements = dict[str, dict[str, Difference]]  # recipe -> flips, kl


def compare_run(study: Study, device: str = "auto", most: int | None = None) -> int:
    """Compares the variants that have no record yet, on `most` documents if given; returns how many."""
    from eval.score.divergence import record_agreement  # torch takes a second to import: not for --help

    run = study.folder
    documents = spread_evenly(read_documents(run / "data", VALIDATION), most)
    jobs = [
        Job(subject_of(read_manifest(folder)).label, record_agreement, (run, study, folder, documents))
        for folder in uncompared_variants(run, study, len(documents))
    ]
    run_jobs("agreement", *deal_out(jobs, find_devices(device), study.workers))
    return len(jobs)


def spread_evenly(documents: list[Document], most: int | None) -> list[Document]:
    """At most so many of the documents, from all of them at equal distances."""
    if most is None or most >= len(documents):
        return documents
    return [documents[i * len(documents) // most] for i in range(most)]


def estimate_agreements(study: Study, alpha: float = ALPHA) -> Agreements:
    """Of every recipe that has records: the share of flips, and KL(student || variant) in bits per token."""
    artifacts, agreements = Artifacts(study.folder, study), Agreements()
    records = list(artifacts.current(read_agreements(study.folder)))  # others are of other documents
    documents = read_documents(study.folder / "data", VALIDATION)
    names = cluster_names(documents, study.data.cluster_of(VALIDATION))
    clusters = {document.id: name for document, name in zip(documents, names, strict=True)}
    for recipe in recipe_names(study)[1:]:
        flips, kl = estimate_agreement(
            [r for r in records if r.recipe == recipe], study.seeds, clusters, alpha
        )
        if flips and kl:
            agreements[recipe] = {"flips": flips, "kl": kl}
    return agreements


def agreement_table(agreements: Agreements, level: float) -> Table:
    names = ("recipe", "flips", "noise", "KL, bits/token", "noise")
    table = Table(*names, title=f"against the student, {level_text(level)} intervals")
    table.caption = stamp_line("compared")
    for recipe, differences in agreements.items():
        flips, kl = differences["flips"], differences["kl"]
        noise = f"{100 * flips.floor:.3g} %", f"{kl.floor:.3g}"
        table.add_row(recipe, _cell(flips, 100, " %"), noise[0], _cell(kl, 1, ""), noise[1])
    return table


def _cell(difference: Difference, factor: float, unit: str) -> str:
    text = f"{factor * difference.value:.3g}{unit}"
    if difference.low is None or difference.high is None:
        return text
    return f"{text} [{factor * difference.low:.3g}, {factor * difference.high:.3g}]"


@entry
def main() -> None:
    parser = new_parser(__doc__)
    add_device(parser)
    about = "at most so many of the validation documents, at equal distances (default: all)"
    parser.add_argument("--documents", type=count, metavar="N", help=about)
    study, args = study_from_command(parser, measures=True)
    read_manifest(study.folder / "data")  # a run that has none ends here, before anything is written
    with lock_folder(study.folder):
        done = compare_run(study, args.device, args.documents)
    alpha = budget_of_run(study).alpha
    agreements = estimate_agreements(study, alpha)
    new_console().print(agreement_table(agreements, 1 - 2 * alpha))
    print(
        f"compared {done} variants, {len(variant_folders(study.folder, study)) - done} were compared before"
    )
    if done and (study.folder / "gate.json").is_file():
        print(f"gate.json is older than these: run absorb gate --study {study.folder} again")
    write_json(args.json, agreements)


if __name__ == "__main__":
    main()
