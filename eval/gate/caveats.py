"""What a verdict is conditional on, in sentences that stand beside it."""

from collections import Counter

from eval.core.budget import Budget, load_budget
from eval.core.errors import UserError
from eval.core.records import PLAIN
from eval.core.study import Study
from eval.gate.evidence import TEACHERS, Evidence
from eval.stats.crossed import PASS


def list_caveats(e: Evidence) -> list[str]:
    """Plain sentences; none where there is nothing to say."""
    return [*shared_teacher(e), *two_seeds(e), *early_records(e), *test_look(e)]


def other_budget(study: Study, budget: Budget) -> list[str]:
    """The study's own was fixed before the run; another one may have been chosen after it."""
    try:
        own = load_budget(study)
    except UserError:  # it does not lie here
        own = None
    return [] if budget == own else [f"judged by budget {budget.name!r}; the study asks {study.budget!r}"]


def shared_teacher(e: Evidence) -> list[str]:
    """Seeds that share a teacher say nothing about how much another draw of that teacher would differ."""
    made, seeds = TEACHERS[0], e.study.seeds
    counts = Counter(e.artifacts[f"{made}/s{seed}/{PLAIN}"] for seed in seeds)
    if len(seeds) < 2 or len(counts) == len(seeds):
        return []
    if len(counts) == 1:
        return [
            f"all {len(seeds)} seeds share one teacher {made} ({next(iter(counts))[:12]}): the verdict holds "
            "for this very teacher, and another one made in the same way may differ"
        ]
    return [
        f"{len(seeds)} seeds share {len(counts)} teachers {made}: how much teachers differ is seen "
        f"{len(counts)} times only, and the bounds of its gain may be too narrow"
    ]


def two_seeds(e: Evidence) -> list[str]:
    if len(e.study.seeds) != 2:
        return []
    return ["two seeds tell little of others: a false PASS is somewhat likelier than alpha, and power is low"]


def early_records(e: Evidence) -> list[str]:
    if not e.early:
        return []
    return [
        f"{len(e.early)} record(s) are dated before their artifact was made, the first {e.early[0]}: the "
        "bytes are those that were measured, so either they were made again since, or a clock went back"
    ]


def test_look(e: Evidence) -> list[str]:
    """The test documents are blind once, for what was judged then, and do not always agree."""
    found = [
        f"opening {one.number} of the test documents ended in {one.verdict} for {one.recipe}: documents "
        "that nothing was chosen by do not confirm it"
        for one in e.openings
        if one.verdict not in (None, PASS)
    ]
    if len(e.openings) > 1:
        found.append(
            f"the test documents were opened {len(e.openings)} times: only the first look was blind to "
            "what others had said"
        )
    return found
