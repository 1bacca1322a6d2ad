"""Brings a release to its users stage by stage: PROMOTE, HOLD or ROLL BACK, as often as one looks.

    python -m eval.watch.rollout start --rollout FOLDER --release RELEASE --plan plan.yaml --by WHO --key KEY
    python -m eval.watch.rollout step --rollout FOLDER --log requests.jsonl --by WHO --key KEY
    python -m eval.watch.rollout step --rollout FOLDER --roll-back WHY --by WHO --key KEY
    python -m eval.watch.rollout state --rollout FOLDER --public KEY.pub

A step reads the requests since the last one, adds a signed line to FOLDER/log.jsonl and writes
FOLDER/rollout.json, which routers and the release's loader obey. Exit codes of a step: 0 promoted, 1 rolled
back, 2 hold, 3 error; of `state`: 0 running or complete, 1 rolled back, 3 the log does not hold.
docs/rollout.md has the plan.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError
from rich.table import Table
from rich.text import Text

from eval.core.artifacts import MANIFEST, file_sha256, write_text
from eval.core.commands import add_json, new_console, new_parser, stamp_line, text_line, write_json
from eval.core.config import read_yaml, validate_config
from eval.core.documents import json_objects
from eval.core.errors import EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_PASS, UserError, entry, expected_text
from eval.core.jobs import lock_folder
from eval.report.format import significant
from eval.signoff.keys import Trusted, private_key, read_trusted
from eval.watch.chain import (
    State,
    Step,
    append_step,
    has_state,
    key_ids,
    keys_path,
    keys_to_know,
    known_keys,
    last_hash,
    log_path,
    looks_of,
    read_steps,
    require_log,
    write_state,
)
from eval.watch.decision import (
    HOLD,
    PROMOTE,
    ROLL_BACK,
    Decision,
    Finding,
    Sums,
    decide,
    findings,
    signed_amount,
    sums_of,
)
from eval.watch.routing import ARMS, MEASURES, Arm, Plan, Request, Reward, arm_of, key_hash, now
from eval.watch.verify import checked

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

STEP_EXITS = {PROMOTE: EXIT_PASS, ROLL_BACK: EXIT_FAIL, HOLD: EXIT_INCONCLUSIVE}
COLOURS = {PROMOTE: "green", ROLL_BACK: "red", HOLD: "yellow", "START": "green"}


def make_folder(folder: Path) -> None:
    """Raises UserError where something else lies in its place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"rollout {folder}", "a file is in its place", "name a new folder") from error


def require_new(folder: Path) -> None:
    """Raises UserError where a rollout has begun."""
    if log_path(folder).exists():
        raise UserError(f"rollout {folder}", "is there already", "name a new folder: a plan is fixed once")


def first_step(args: argparse.Namespace) -> tuple[Step, "Signer"]:
    """Which release, to whom, and by which plan, and whose key signs that; nothing is written yet."""
    require_new(Path(args.rollout))
    release = Path(args.release)
    plan = validate_config(Plan, read_yaml(Path(args.plan), "rollouts"), args.plan)
    contract, target = checked(release, trusted_of(args), args.target)
    signer, time = private_key(args.key), now()
    state = State(
        release=file_sha256(release / MANIFEST),
        contract=contract.name,
        owner=contract.owner,
        target=target,
        status="running",
        stage=1,
        step=1,
        time=time,
        reason=args.why,
        plan=plan,
    )
    step = Step(
        number=1,
        previous=None,
        time=time,
        by=args.by,
        public_key=signer.public_key.keyval["public"],
        decision="START",
        reason=args.why,
        by_hand=True,
        stage=1,
        state=state,
    )
    return step, signer


def start(folder: Path, first: Step, signer: "Signer") -> Step:
    """Writes the first line of a log."""
    require_new(folder)
    append_step(folder, first, signer)
    return first


Line = TypeVar("Line", bound=BaseModel)


class Counted:
    """The requests of a log that count, by arm, and why others do not."""

    def __init__(self, path: Path, state: State, known: set[str]) -> None:
        self.ignored: Counter[str] = Counter()
        self.keys: list[str] = []
        rows: dict[Arm, list[Request]] = {arm: [] for arm in ARMS}
        seen, plan = set(known), state.plan
        rewards = self._rewards(path)
        for where, row in requests_of(path):
            request = read_line(Request, row, where)
            if (reward := rewards.pop(request.id, None)) is not None:
                request = request.model_copy(update={"reward": reward})
            if request.stage > state.stage:
                problem = f"of stage {request.stage}, the rollout is in stage {state.stage}"
                raise UserError(where, problem, "give the log of this rollout")
            given = request.domain, request.tenant, request.prompt_bytes
            wanted = arm_of(plan, request.stage, request.key, *given)
            if request.arm != wanted:
                problem = f"answered by {request.arm}, the key belongs to {wanted}"
                raise UserError(where, problem, "requests are dealt by the hash alone: see docs/rollout.md")
            name = key_hash(plan, request.key)
            if request.stage < state.stage:
                self.ignored["of an earlier stage"] += 1
            elif request.arm == "outside":
                self.ignored["outside the stage"] += 1
            elif name in seen:
                self.ignored["of a key that was counted"] += 1
            else:
                seen.add(name)
                self.keys.append(name)
                rows[request.arm].append(request)
        if rewards:
            self.ignored["rewards of no request in this log"] = len(rewards)
        self.sums: dict[Arm, Sums] = {arm: sums_of(rows[arm]) for arm in ARMS}

    def _rewards(self, path: Path) -> dict[str, float]:
        """Id of a request -> its first reward, of the lines that came after the answers."""
        rewards: dict[str, float] = {}
        for where, row in requests_of(path, rewards=True):
            line = read_line(Reward, row, where)
            if line.reward_of in rewards:
                self.ignored["second rewards of a request"] += 1
            rewards.setdefault(line.reward_of, line.reward)
        return rewards


def requests_of(path: Path, rewards: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where it stands -> each line of a log that is a request; or each that is a reward."""
    fix = (
        "give a JSONL of requests, one a line; a server that could not read its rollout from the start "
        "logs none, and its /healthz says why"
    )
    for where, _, row in json_objects(path, "--log", fix):
        if ("reward_of" in row) is rewards:
            yield where, row


def read_line(kind: type[Line], row: dict[str, Any], where: str) -> Line:
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or kind.__name__.lower()
        raise UserError(f"{where}: {key}", repr(first["input"])[:60], expected_text(first)) from error


def step(args: argparse.Namespace) -> Step:
    """One look: judged with all looks of its stage, then written."""
    folder = Path(args.rollout)
    steps = read_steps(folder, trusted_of(args))
    last, signer = steps[-1].state, private_key(args.key)
    if not has_state(folder, last):
        write_state(folder, last)  # the step before was cut off after its line
    if last.status == "rolled back" or (last.status == "complete" and args.log):
        raise UserError(f"rollout {folder}", f"{last.status}: {last.reason}", "start a new one")
    results, counted = list[Finding](), None
    decision: Decision = ROLL_BACK
    reason = args.roll_back
    if args.log:
        counted = Counted(Path(args.log), last, known_keys(folder, steps, last.stage))
        if not counted.keys:
            ignored = ", ".join(f"{count} {why}" for why, count in counted.ignored.items())
            raise UserError(f"--log {args.log}", f"no request that counts ({ignored})", "give new requests")
        looks = looks_of(steps, last.stage)
        results = findings(last.plan, last.stage, {arm: [*looks[arm], counted.sums[arm]] for arm in ARMS})
        decision, reason = decide(results)
    time, number = now(), len(steps) + 1
    state = last.model_copy(update={**after(last, decision), "step": number, "time": time, "reason": reason})
    keys = None
    if counted is not None:
        path = keys_path(folder, number)
        write_text(path, "".join(f"{name}\n" for name in counted.keys))
        keys = file_sha256(path)
    line = Step(
        number=number,
        previous=last_hash(folder),
        time=time,
        by=args.by,
        public_key=signer.public_key.keyval["public"],
        decision=decision,
        reason=reason,
        by_hand=counted is None,
        stage=last.stage,
        requests=file_sha256(Path(args.log)) if args.log else None,
        keys=keys,
        ignored=dict(counted.ignored) if counted else {},
        sums=counted.sums if counted else None,
        findings=results,
        state=state,
    )
    append_step(folder, line, signer)
    return line


def after(state: State, decision: Decision) -> dict[str, object]:
    """What a decision changes."""
    if decision == ROLL_BACK:
        return {"status": "rolled back"}
    if decision == PROMOTE:
        is_last = state.stage == len(state.plan.stages)
        return {"status": "complete"} if is_last else {"stage": state.stage + 1}
    return {}


def check_decisions(folder: Path, steps: list[Step]) -> None:
    """Every decision follows from the sums in the log, and every state from the decision.

    Raises:
        UserError: one does not.
    """
    for before, one in pairwise(steps):
        where, fix = f"{log_path(folder)}: line {one.number}", "ask who signed it"
        state = before.state
        if not one.by_hand:
            results = findings(state.plan, state.stage, looks_of(steps[: one.number], state.stage))
            decision, _ = decide(results)
            if decision != one.decision:
                raise UserError(where, f"says {one.decision}, its figures say {decision}", fix)
        elif one.decision != ROLL_BACK:
            raise UserError(where, f"{one.decision} by hand", fix)
        wanted = state.model_copy(
            update={**after(state, one.decision), "step": one.number, "time": one.time, "reason": one.reason}
        )
        is_late = state.status != "running" and not one.by_hand
        if one.state != wanted or one.stage != state.stage or is_late:
            raise UserError(where, "its state does not follow from the one before", fix)


def describe(state: State) -> str:
    """Where a rollout stands, in a sentence."""
    stages = state.plan.stages
    if state.status == "complete":
        where = "complete: the release answers all requests"
    elif state.status == "rolled back":
        where = (
            f"rolled back in stage {state.stage} of {len(stages)}: the fallback answers all requests; "
            f"release is off: {state.reason}"
        )
    else:
        stage = stages[state.stage - 1]
        only = {"domain": stage.domain, "tenant": stage.tenant}
        parts = [f"{name} {' or '.join(values)}" for name, values in only.items() if values]
        if stage.max_prompt_bytes is not None:
            parts.append(f"prompts of at most {stage.max_prompt_bytes} bytes")
        of = f" of {', '.join(parts)}" if parts else ""
        where = f"stage {state.stage} of {len(stages)}: the release answers {100 * stage.share:g} %{of}"
    return f"{state.contract} ({state.owner}) on {state.target}, {where}"


def table_of(results: list[Finding], stage: int) -> Table:
    table = Table(
        "", "release", "fallback", "values", "worse by", "bounds at every look", "allowed", "",
        title=f"stage {stage}, everything so far",
    )  # fmt: skip
    for one in results:
        shown = [significant(x) if x is not None else "" for x in (one.release, one.fallback)]
        low, high = (signed_amount(one.measure, x) if x is not None else "?" for x in (one.low, one.high))
        mark = ROLL_BACK if one.broken_since is not None else "holds" if one.holds else "open"
        worse = signed_amount(one.measure, one.worse) if one.worse is not None else ""
        table.add_row(
            f"{one.measure}, {MEASURES[one.measure]}", *shown, f"{one.values[0]:,} / {one.values[1]:,}",
            worse, f"[{low}, {high}]", signed_amount(one.measure, one.allowed),
            Text(mark, style={ROLL_BACK: "red", "holds": "green"}.get(mark, "yellow")),
        )  # fmt: skip
    return table


def trusted_of(args: argparse.Namespace) -> Trusted | None:
    return read_trusted(args.public) if args.public else None


def arguments() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="start|step|state")
    for name in ("start", "step", "state"):
        one = commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter)
        one.add_argument("--rollout", required=True, metavar="FOLDER", help="where its log and state lie")
        about = "public keys, or files of allowed signers: these are trusted and no others"
        one.add_argument("--public", nargs="+", metavar="FILE", help=about)
        add_json(one)
        if name != "state":
            one.add_argument("--by", type=text_line, required=True, help="who does this")
            one.add_argument("--key", required=True, help="the private key that signs the step")
        if name == "start":
            one.add_argument("--release", required=True, help="a folder that `eval.release` made")
            one.add_argument(
                "--plan", required=True, metavar="YAML", help="stages, measures and their limits"
            )
            one.add_argument("--target", help="whose artifact is rolled out (default: the first)")
            one.add_argument("--why", type=text_line, default="a new release", help="kept in the log")
        if name == "step":
            what = one.add_mutually_exclusive_group(required=True)
            what.add_argument("--log", metavar="JSONL", help="requests since the last step")
            what.add_argument(
                "--roll-back", type=text_line, metavar="WHY", help="go back by hand, at any time"
            )
    return parser


@entry
def main() -> int:
    args = arguments().parse_args()
    console = new_console()
    folder = Path(args.rollout)
    if args.command == "state":
        steps = read_steps(folder, trusted_of(args))
        check_decisions(folder, steps)
        last = steps[-1].state
        if not has_state(folder, last):
            raise UserError(f"rollout {folder}", "rollout.json is not what the log says", "take another step")
        for one in steps:
            what = Text.assemble(
                (one.decision, COLOURS[one.decision]), f" in stage {one.stage}: {one.reason}"
            )
            by = f"{one.by} (key {key_ids([one])[0]})"
            console.print(Text(f"{one.number}. {one.time} {by}: ") + what, soft_wrap=True)
        console.print(Text(describe(last)), soft_wrap=True)
        console.print(Text(keys_to_know(key_ids(steps))), soft_wrap=True)
        write_json(args.json, {"state": last, "steps": steps})
        return EXIT_FAIL if last.status == "rolled back" else EXIT_PASS
    if args.command == "start":
        first, signer = first_step(args)  # before there is a folder: what cannot start leaves none
        make_folder(folder)
        with lock_folder(folder):
            done = start(folder, first, signer)
    else:
        require_log(folder)
        with lock_folder(folder):
            done = step(args)
    if done.findings:
        console.print(table_of(done.findings, done.stage))
        console.print(Text(stamp_line("seen")), soft_wrap=True)
    for why, number in done.ignored.items():
        console.print(Text(f"{number:,} requests {why} do not count"))
    console.print(Text.assemble((done.decision, COLOURS[done.decision]), f": {done.reason}"), soft_wrap=True)
    console.print(Text(describe(done.state)), soft_wrap=True)
    if len(ids := key_ids(read_steps(folder, None))) > 1 or args.command == "start":
        console.print(Text(keys_to_know(ids)), soft_wrap=True)
    write_json(args.json, done)
    return EXIT_PASS if done.decision == "START" else STEP_EXITS[done.decision]


if __name__ == "__main__":
    main()
