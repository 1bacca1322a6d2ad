"""`absorb`: the way from a teacher with a method to a release, what is done in a run, and what comes next.

absorb [--study RUN]          the flow, what is done, what comes next
absorb COMMAND [ARGUMENTS]    the same as the module beside it; absorb COMMAND --help lists its arguments
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from eval.core.errors import Parser, UserError, entry, require_one_of

MODULES = {
    "train": "distill.train",
    "compress": "compress.run",
    "score": "eval.score",
    "agreement": "eval.score.agreement",
    "cost": "eval.cost",
    "load": "eval.cost.load",
    "import": "eval.score.import",
    "merge": "eval.cost.merge",
    "power": "eval.gate.power",
    "gate": "eval.gate",
    "test-set": "eval.gate.test_set",
    "challenge": "eval.challenge",
    "try": "eval.challenge.first_look",
    "compare": "eval.compare",
    "report": "eval.report",
    "sign": "eval.signoff",
    "release": "eval.release",
    "recheck": "eval.watch.recheck",
    "monitor": "eval.watch.monitor",
    "serve": "eval.serve",
    "rollout": "eval.watch.rollout",
    "why": "eval.why",
}
ALIASES = {"watch": "recheck"}
FLOW = {
    "train": "bases, teachers with and without the method, students S1, S0 and CE",
    "compress": "every recipe for S1 and S0 of every seed",
    "score": "bits per byte of every model",
    "cost": "latency, memory and size on a target",
    "gate": "PASS, FAIL or INCONCLUSIVE",
    "report": "table.md, table.csv and report.html",
    "sign": "who answers for a variant",
    "release": "a folder that can be shipped",
    "recheck": "watch: the contract of a release on new documents",
}
SIDE_COMMANDS = {
    "agreement": "flips and KL of variants beside their noise",
    "load": "latency under open-loop load",
    "import": "scores that were made elsewhere, for the same gate",
    "merge": "joins records of other machines",
    "power": "seeds and documents that see the asked share",
    "test-set": "opens the test documents for one variant",
    "challenge": "the study again with one thing changed at a time",
    "serve": "a release and its fallback over HTTP, as the rollout says",
    "monitor": "a release on traffic, for cron: is the method fading, or the world harder?",
    "rollout": "a release stage by stage beside its fallback: PROMOTE, HOLD or ROLL BACK",
    "why": "from the paper to the last look at a release: what it was made from, who answers for it",
    "compare": "the methods of several studies in one table, and parts left out",
    "try": "a first look at a method of yours, in a minute or two",
}
UNREADABLE = "gate.json cannot be read"
START = "absorb train --config tiny"


class Step(NamedTuple):
    """One command of the flow in a run: what is there, whether that is all, and what is missing."""

    command: str
    done: bool
    state: str = ""
    missing: str = ""


def find_run(study: str | None) -> Path | None:
    """The run folder asked for, the one that one stands in, or the newest below runs/."""
    if study is not None:
        run = Path(study)
        if not study or not run.is_dir():
            from eval.core.study import load_study

            run = load_study(study).folder
        if not (run / "study.yaml").is_file():
            raise UserError(f"--study {study}", "no run folder", "give a folder that `absorb train` made")
        return run
    if Path("study.yaml").is_file() and Path("data").is_dir():
        return Path()
    runs = sorted(Path("runs").glob("*/study.yaml"), key=lambda path: path.stat().st_mtime)
    return runs[-1].parent if runs else None


def _count(run: Path, wanted: list[str]) -> tuple[bool, str]:
    there = sum((run / name).is_file() for name in wanted)
    return there == len(wanted), f"{there} of {len(wanted)}"


def _newer(path: Path, sources: list[Path]) -> bool:
    """True if `path` was written after all of `sources`."""
    there = [source for source in sources if source.is_file()]
    return path.is_file() and all(source.stat().st_mtime <= path.stat().st_mtime for source in there)


def steps(run: Path) -> Iterator[Step]:
    """What is done in a run, by the files that each command leaves; of costs their settings and bytes too."""
    from eval.core.checks import Artifacts, is_measured, read_unbuilt
    from eval.core.plan import budget_of_run  # pydantic takes a moment: help needs none of it
    from eval.core.records import read_costs
    from eval.core.study import CHANGED, load_study, recipe_names

    study = load_study(run)
    names, seeds, unbuilt = recipe_names(study)[1:], study.seeds, read_unbuilt(run)
    trained = [f"students/{arm}/s{seed}/manifest.json" for arm in study.student_arms for seed in seeds]
    done, state = _count(run, trained)
    yield Step("train", done and not (run / CHANGED).is_file(), f"{state} students")
    recipes = [name for name in names if name not in unbuilt]
    pairs = [(recipe, arm, seed) for recipe in recipes for arm in ("S1", "S0") for seed in seeds]
    done, state = _count(run, [f"variants/{r}/{arm}/s{seed}/manifest.json" for r, arm, seed in pairs])
    failed = "".join(f"; {name} was not built: {why}" for name, why in unbuilt.items() if name in names)
    yield Step("compress", done, f"{state} variants{failed}")
    models = [("plain", arm, seed) for arm in ("B", *study.student_arms) for seed in seeds] + pairs
    done, state = _count(run, [f"records/score/{r}/{arm}-s{seed}.json" for r, arm, seed in models])
    yield Step("score", done, f"{state} models")
    targets = {name: target for name, target in budget_of_run(study).targets.items() if target.required}
    artifacts, costs, measured = Artifacts(run, study), read_costs(run), {}
    for name, target in targets.items():
        measurable = [("plain", arm) for arm in ("S1", "B")]
        if target.device == "cpu":  # elsewhere not every engine runs
            measurable += [(recipe, "S1") for recipe in recipes]
        wanted = [(recipe, artifacts.hash_of(arm, seeds[0], recipe)) for recipe, arm in measurable]
        measured[name] = artifacts.rounds(costs, name, wanted)
    missing = next((name for name, rounds in measured.items() if not is_measured(rounds)), "")
    counts = {
        name: f"{len(rounds) - rounds.count(None)} of {len(rounds)}" for name, rounds in measured.items()
    }
    state = ", ".join(f"{name}: {count} variants" for name, count in counts.items())
    yield Step("cost", not missing, state, missing)
    judged = _newer(run / "gate.json", [run / "study.yaml", *run.glob("records/*/**/*.json")])
    verdict = _read_verdict(run / "gate.json")
    older = ", of records that have changed since" if verdict and not judged else ""
    yield Step("gate", judged and verdict != UNREADABLE, verdict + older)
    yield Step("report", judged and _newer(run / "report.html", [run / "gate.json"]))
    signed = sorted(path.name for path in run.glob("signoff/*.intoto.jsonl"))
    yield Step("sign", bool(signed), ", ".join(signed), "" if verdict.startswith("PASS") else verdict)
    built = sorted(path.parent.name for path in run.glob("release/*/contract.yaml"))
    yield Step("release", bool(built), ", ".join(built))


def _read_verdict(path: Path) -> str:
    """The verdict in gate.json with its reason; empty if there is none yet."""
    if not path.is_file():
        return ""
    try:
        gate = json.loads(path.read_text(encoding="utf-8"))
        return f"{gate['verdict']}: {gate['reason']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return UNREADABLE


def next_command(run: Path, step: Step) -> str:
    if step.command == "sign" and step.missing:  # there is nothing to ship without a waiver
        if step.missing.startswith("FAIL"):
            return (
                "change the recipes, the budget's targets or the training: the reasons stand in report.html"
            )
        return f"absorb power --study {run}   # how many seeds and documents would decide"
    given = {
        "train": f"--config {run}",
        "cost": f"--study {run} --target {step.missing}",
        "sign": f'--study {run} --variant RECIPE --by "YOUR NAME" --key KEY  # sign --new-key KEY makes one',
        "release": f'--study {run} --variant RECIPE --owner "YOUR TEAM" --key KEY --public KEY.pub',
    }
    return f"absorb {step.command} {given.get(step.command, f'--study {run}')}"


def show(run: Path | None) -> None:
    """The flow, with what is done of it in `run`."""
    from eval.core.commands import LOG
    from eval.core.jobs import find_holder

    print(" → ".join([*list(FLOW)[:-1], "watch"]))
    known = {} if run is None else {step.command: step for step in steps(run)}
    print(f"\nrun folder {run.resolve()}\n" if run is not None else "\nno run folder here\n")
    holder = find_holder(run) if run is not None else ""
    for command, meaning in FLOW.items():
        step = known.get(command)
        mark = " " if step is None else "✔" if step.done else "·"
        print(
            f"  {mark} absorb {command:<9} {meaning}" + (f"  [{step.state}]" if step and step.state else "")
        )
    print("\n  beside them:")
    for command, meaning in SIDE_COMMANDS.items():
        print(f"    absorb {command:<9} {meaning}")
    left = next((step for step in known.values() if not step.done), None)
    if run is not None and holder:
        print(f"\nnext: process {holder} is at work in this run: wait for it; {run / LOG} holds its lines")
    elif run is None:
        print(f"\nnext: {START}   # a study is a YAML file, or the name of one in configs/studies")
    elif left is not None:
        print(f"\nnext: {next_command(run, left)}")
    else:
        place = run / "release" / known["release"].state.split(", ")[0]
        print(f"\nnext: absorb recheck --release {place} --data NEW.jsonl")


def refuse_shadows() -> None:
    """Python takes modules from the folder that one stands in before its own.

    Raises:
        UserError: one there has the name of a module of the standard library.
    """
    for path in sorted(Path().glob("*.py")):
        if path.stem in sys.stdlib_module_names:
            problem = "has the name of a module of Python, which would be loaded in its place"
            raise UserError(str(path), problem, "rename it, or call this in another folder")


@entry
def main() -> None:
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):
        refuse_shadows()
        module = MODULES[require_one_of("absorb: command", ALIASES.get(words[0], words[0]), list(MODULES))]
        os.environ["ABSORB_TYPED"] = f"absorb {words[0]}"
        os.execv(sys.executable, [sys.executable, "-m", module, *words[1:]])
    listed = "\n".join(f"  {name:<10} python -m {module}" for name, module in MODULES.items())
    parser = Parser(
        prog="absorb",
        description=__doc__,
        epilog=f"commands:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--study", metavar="RUN", help="a run folder (default: here, else the newest in runs/)"
    )
    show(find_run(parser.parse_args().study))


if __name__ == "__main__":
    main()
