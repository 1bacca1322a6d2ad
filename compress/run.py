"""Makes the variants of a study: every recipe applied to S1 and to its control S0, for every seed.

python -m compress.run --study runs/default
"""

import sys

from eval.core.artifacts import read_manifest
from eval.core.commands import add_json, new_parser, study_from_command, write_json
from eval.core.errors import EXIT_ERROR, EXIT_PASS, UserError, entry
from eval.core.jobs import lock_folder
from eval.core.study import recipe_names


@entry
def main() -> int:
    parser = new_parser(__doc__)
    add_json(parser)
    study, args = study_from_command(parser, stages=("variant",))
    if not study.folder.is_dir():
        raise UserError(
            f"run folder {study.folder}",
            "missing",
            "train the students first: absorb train --config STUDY",
        )
    # This import takes seconds: a mistake in the study is reported before it.
    from compress.pipeline import ARMS, make_variants

    with lock_folder(study.folder):
        count, failures = make_variants(study)
    total = (len(study.recipes) - len(failures)) * len(ARMS) * len(study.seeds)
    print(f"variants: {total} in {study.folder / 'variants'}, {count} made now")
    names = [name for name in recipe_names(study)[1:] if name not in failures]
    root, seeds = study.folder / "variants", study.seeds
    places = [root / name / arm / f"s{seed}" for name in names for arm in ARMS for seed in seeds]
    variants = {m.name: {"hash": m.hash, **m.facts} for m in map(read_manifest, places)}
    write_json(args.json, {"built": count, "failures": failures, "variants": variants})
    for name, why in failures.items():
        print(f"error: recipe {name} was not built: {why}", file=sys.stderr)
    return EXIT_ERROR if failures else EXIT_PASS


if __name__ == "__main__":
    main()
