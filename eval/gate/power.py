"""Before a study: how many seeds and clusters of documents see the asked share, and what sees this plan?

    python -m eval.gate.power --study runs/pilot [--plan STUDY.yaml] [--gain X] [--share R] [--among M]
        [--json FILE]

The pilot is a run whose bases, teachers and students are scored: two seeds and a few documents will do, but
say little about how seeds differ; the intervals show how little. Variances and, unless given, the teacher's
gain and the share of the gain retained (kept share) are those of the pilot's uncompressed student. Whoever
will pick among M variants that a target can afford plans with `--among M`: Holm asks alpha / M of the first,
for the retention alone: the assay is one test for all variants.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from eval.core.budget import Budget, load_budget
from eval.core.checks import Artifacts
from eval.core.commands import (
    count,
    new_console,
    new_parser,
    positive,
    stamp_line,
    study_from_command,
    write_json,
)
from eval.core.errors import UserError, entry, require_one_of
from eval.core.plan import budget_of_run
from eval.core.records import PLAIN, VALIDATION, each_score
from eval.core.study import Study, load_study
from eval.gate.evidence import Evidence, ScoreTables, build_evidence, wanted_models
from eval.gate.quality import BOOTSTRAP_SEED, GAIN, PLAN_LEVEL, PLANS, estimate, kept_gain, surplus
from eval.stats.crossed import Array, crossed_mean
from eval.stats.power import (
    GOAL,
    MOST_CLUSTERS,
    MOST_SEEDS,
    Components,
    clusters_for,
    components,
    effect_for,
    power,
    sample_components,
    seeds_for,
)

ENDS = [(1 - PLAN_LEVEL) / 2, (1 + PLAN_LEVEL) / 2]


@dataclass(frozen=True)
class PlannedTest:
    """One test to plan: a pilot's table of the statistic, and its mean if the what-if were true."""

    name: str
    table: Array  # [S, C] of the pilot
    effect: float
    seeds: int  # of the plan
    clusters: int
    alpha: float
    assumptions: dict[str, float | None]  # from which the effect follows


def read_pilot(folder: Path, study: Study) -> Evidence:
    """Scores of the uncompressed models; costs and variants are of no matter to a plan."""
    artifacts = Artifacts(folder, study)
    tables = ScoreTables(artifacts, each_score(folder), wanted_models(study, [PLAIN]))
    return build_evidence(tables, [PLAIN], {})


def planned_clusters(evidence: Evidence, plan: Study, name: str) -> int:
    """Of validation as the plan asks, with as many documents to a cluster as in the pilot; of shifted slices
    the pilot alone knows how many there are.
    """
    documents, clusters = len(evidence.columns[name]), len(evidence.clusters[name].starts)
    if name == VALIDATION and plan != evidence.study:
        return max(2, round(plan.data.validation * clusters / documents))
    return clusters


def list_tests(
    evidence: Evidence, budget: Budget, plan: Study, gain: float | None, share: float | None, among: int
) -> list[PlannedTest]:
    """The assay and retention of every slice that the budget asks for.

    Raises:
        UserError: the pilot shows no teacher gain, so that it has no kept share, and none was given.
    """
    tests = []
    for name, f in {VALIDATION: budget.f, **budget.slices}.items():
        slices = list(evidence.columns)
        require_one_of(f"budget {budget.name!r}: slice without any scored document", name, slices)
        teacher, student = evidence.gain(name, GAIN), evidence.gain(name, kept_gain(PLAIN))
        if gain is None and share is None:
            true_gain = float(teacher.mean())
            true_share = float(student.mean()) / true_gain if true_gain > 0 else None
            effect = float((student - f * teacher).mean())
        else:
            true_gain = gain if gain is not None else float(teacher.mean())
            if (share is None or gain is None) and teacher.mean() <= 0:  # no share of it is kept
                problem = f"no teacher gain on {name} ({teacher.mean():+.4f} bits/byte)"
                fix = "give the gain and the share to plan for with --gain and --share"
                raise UserError(f"pilot {evidence.folder}", problem, fix)
            true_share = share if share is not None else float(student.mean() / teacher.mean())
            effect = (true_share - f) * true_gain
        size = len(plan.seeds), planned_clusters(evidence, plan, name)
        assumptions = {"gain": true_gain, "share": true_share, "asked_share": f}
        retention = surplus(evidence, PLAIN, name, f)
        levels = budget.alpha, budget.alpha / among
        tests.append(PlannedTest(f"assay on {name}", teacher, true_gain, *size, levels[0], assumptions))
        tests.append(PlannedTest(f"retention on {name}", retention, effect, *size, levels[1], assumptions))
    return tests


def interval(values: Array) -> list[float | None]:
    """The middle of the draws; a bound beyond what was searched is null."""
    ends = np.quantile(values, ENDS, method="nearest")
    return [float(end) if np.isfinite(end) else None for end in ends]


def plan_test(test: PlannedTest) -> dict[str, object]:
    """Figures of one test, each with the interval that the pilot's variances leave."""
    mean = crossed_mean(test.table)
    if mean.problem:
        raise UserError(f"pilot: {test.name}", mean.problem, "take a pilot of two seeds or more that differ")
    s, c, effect, alpha = test.seeds, test.clusters, test.effect, test.alpha
    sampled = sample_components(test.table, PLANS, BOOTSTRAP_SEED)

    def figures(parts: Components) -> dict[str, Array]:
        return {
            "power": power(parts, effect, s, c, alpha),
            "seeds_for_80": seeds_for(parts, effect, c, alpha),
            "clusters_for_80": clusters_for(parts, effect, s, alpha),
            "effect_for_80": effect_for(parts, s, c, alpha),
        }

    points, ends = figures(components(test.table)), figures(sampled)
    pilot = estimate(test.table, alpha)
    return {
        "test": test.name,
        "seeds": s,
        "clusters": c,
        "alpha": alpha,
        **test.assumptions,
        "effect": effect,
        "pilot": pilot.model_dump(exclude={"p"}),
        **{
            name: {"value": float(v) if np.isfinite(v) else None, "interval": interval(ends[name])}
            for name, v in points.items()
        },
    }


def cell(figure: dict, style: str = "{:,.0f}") -> str:
    """`12 [5, 40]`; where no number that was searched is enough, `none`."""

    def one(value: float | None) -> str:
        return "none" if value is None else style.format(value)

    low, high = figure["interval"]
    return f"{one(figure['value'])} [{one(low)}, {one(high)}]"


def render_table(rows: list[dict], among: int) -> Table:
    table = Table(
        title=f"Power, for a pick among {among}; in brackets what the pilot's variances leave open, 80 %",
        caption="effect: what is held to be true; least: what 80 % of repetitions of this plan would see; "
        f"80 % of repetitions pass with so many; none: not even {MOST_SEEDS} seeds, or "
        f"{MOST_CLUSTERS:,} clusters; a document that is like no other is a cluster of its own",
    )
    columns = (
        "test",
        "level",
        "plan",
        "effect, bits/byte",
        "power now",
        "seeds",
        "clusters",
        "least effect, bits/byte",
        "least share",
    )
    for name in columns:
        table.add_column(name)
    for row in rows:
        visible, share = row["effect_for_80"], "-"
        if row["test"].startswith("retention") and row["gain"] > 0:
            share = f"{row['asked_share'] + visible['value'] / row['gain']:.2f}"
        table.add_row(
            row["test"],
            f"{row['alpha']:.3g}",
            f"{row['seeds']} seeds x {row['clusters']} clusters",
            f"{row['effect']:+.4f}",
            cell(row["power"], "{:.0%}"),
            cell(row["seeds_for_80"]),
            cell(row["clusters_for_80"]),
            cell(visible, "{:.4f}"),
            share,
        )
    return table


def plan_sentence(rows: list[dict]) -> str:
    """The plan in a sentence: the test that asks most decides."""
    blind = [row["test"] for row in rows if row["seeds_for_80"]["value"] is None]
    if blind:
        return f"no number of seeds up to {MOST_SEEDS} sees {', '.join(blind)}: the true effect is too small"
    most = max(rows, key=lambda row: row["seeds_for_80"]["value"])
    weak = [row["test"] for row in rows if row["power"]["value"] < GOAL]
    now = f"the present plan sees all of it with {GOAL:.0%} or more"
    if weak:
        now = f"the present plan is too small for {', '.join(weak)}"
    seeds = f"{most['seeds_for_80']['value']:.0f} seeds"
    return f"{now}; of all tests {most['test']} asks for most: {seeds} see it with {GOAL:.0%}"


@entry
def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--plan", help="the study that is planned, a YAML file; default: the pilot itself")
    parser.add_argument(
        "--budget", help="another budget than the run's fixed one, or that of --plan: a name or a YAML file"
    )
    parser.add_argument(
        "--gain", type=positive, help="plan for this teacher gain, bits/byte, not the pilot's"
    )
    parser.add_argument(
        "--share", type=positive, help="plan for this true share of the gain retained, not the pilot's"
    )
    parser.add_argument(
        "--among", type=count, default=1, help="affordable variants to pick from (default: 1)"
    )
    study, args = study_from_command(parser, measures=True)
    folder = study.folder
    plan = load_study(args.plan) if args.plan else study
    budget = load_budget(plan, args.budget) if args.plan else budget_of_run(study, args.budget)
    pilot, among = read_pilot(folder, study), args.among
    rows = [plan_test(test) for test in list_tests(pilot, budget, plan, args.gain, args.share, among)]
    console = new_console()
    console.print(render_table(rows, among))
    console.print(plan_sentence(rows), soft_wrap=True)
    console.print(stamp_line("planned"), soft_wrap=True)
    plan_figures = {"alpha": budget.alpha, "among": among, "goal": GOAL, "level": PLAN_LEVEL, "tests": rows}
    write_json(args.json, {"pilot": str(folder), **plan_figures})


if __name__ == "__main__":
    main()
