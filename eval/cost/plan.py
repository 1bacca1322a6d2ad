"""What is measured, where and with which settings: the variants of a run, or any that have a manifest."""

import argparse
import itertools
import random
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from eval.core.artifacts import MANIFEST, Manifest, file_sha256, read_manifest, verify_artifact, write_text
from eval.core.budget import Target
from eval.core.checks import TEACHERS, Artifacts, is_measured, measured_bytes, measured_hash, teacher_folder
from eval.core.commands import add_json, add_keys_help, add_study, new_parser, start_log, write_json
from eval.core.config import Frozen, apply_overrides, validate_config
from eval.core.documents import TRAIN, boundary_id, stream_documents
from eval.core.documents.encoding import text_ids
from eval.core.errors import UserError, require_one_of
from eval.core.jobs import lock_folder
from eval.core.plan import budget_of_run
from eval.core.records import PLAIN, TRAINING, CostRecord, LoadRecord, Provenance, provenance, write_record
from eval.core.sections import Cost
from eval.core.study import Study, check_trained, load_study, recipe_names
from eval.engines import Subject, engine_module, has_own_vocabulary, load_tokenizer, subject_of

RANDOM = "random tokens, seed 0"
R = TypeVar("R", CostRecord, LoadRecord)
Prompts = dict[str, list[list[int]]]  # by the label of a variant


@dataclass(frozen=True)
class Variant:
    """A model folder that is measured."""

    folder: Path
    manifest: Manifest
    subject: Subject

    @property
    def recipe(self) -> str:
        return self.subject.recipe

    @property
    def label(self) -> str:
        return self.subject.label

    @property
    def name(self) -> str:
        """As people see it."""
        return {"B": "fallback", TEACHERS[0]: "teacher"}.get(self.subject.arm, self.recipe)

    @property
    def hash(self) -> str:
        return measured_hash(self.manifest)

    @property
    def bytes(self) -> int:
        """That loading needs; a teacher lies at `method/T1/s0` of its run folder."""
        return measured_bytes(self.folder.parents[2], self.manifest)


@dataclass(frozen=True)
class CostPlan:
    """Variants that are measured together on one target."""

    target: str
    device: str
    cost: Cost
    variants: list[Variant]
    prompts: list[list[int]]  # [warmup + requests][prompt_tokens], the same for every variant but those in
    own_prompts: Prompts  # label -> the same texts in a vocabulary of its own
    source: str  # what the prompts are made of
    config: str  # hash of the study; empty without one
    study: Study | None = None  # of the run folder that takes the records
    record: Path | None = None  # the file that takes them where there is no run folder

    def provenance(self) -> Provenance:
        """Of all that is measured together: it shares one time."""
        return provenance("", self.config, *describe_device(self.device))

    def facts(self, variant: Variant, source: Provenance) -> dict[str, Any]:
        """The fields that every record of a variant has."""
        return {
            **variant.subject.model_dump(),
            **self.cost.model_dump(include={"prompt_tokens", "new_tokens", "threads", "warmup"}),
            "target": self.target,
            "prompts": self.source,
            "provenance": source.model_copy(update={"artifact": variant.hash}),
        }

    def store(self, records: list[R]) -> None:
        """Into the run folder, else as lines of one file."""
        if self.study:
            for record in records:
                write_record(self.study.folder, record)
            return
        assert self.record is not None
        write_text(self.record, "".join(record.model_dump_json() + "\n" for record in records))
        print(f"{len(records)} record(s) in {self.record}; join: absorb merge --study RUN FILE")


def describe_device(device: str) -> tuple[str, str | None]:
    """Name and driver of the device that was measured on."""
    import torch

    if device == "cpu":
        return "cpu", None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return torch.cuda.get_device_name(), driver


def read_variant(folder: Path) -> Variant:
    """The variant that the manifest of `folder` describes."""
    manifest = read_manifest(folder)
    return Variant(folder, manifest, subject_of(manifest))


def find_variants(study: Study, teacher: bool = True) -> list[Variant]:
    """The plain student S1 of the first seed, its variants in the order of the study, and its fallback.

    Args:
        teacher: and the teacher with its method, where it can run here; a queue is not asked of it.
    """
    seed, run = study.seeds[0], study.folder
    names = recipe_names(study)[1:]
    folders = [run / f"students/S1/s{seed}", *(run / f"variants/{name}/S1/s{seed}" for name in names)]
    folders.append(run / f"base/s{seed}")  # a release holds it against the same limits
    complete = [path for path in folders if (path / MANIFEST).is_file()]
    if folders[0] not in complete:
        raise UserError(f"model {folders[0]}", "not trained yet", f"run absorb train --config {run} first")
    variants = [read_variant(path) for path in complete]
    return [*variants, *find_teacher(study)] if teacher else variants


def find_teacher(study: Study) -> list[Variant]:
    """The teacher of the first seed, if its manifest names an engine and has room for a request."""
    folder = teacher_folder(study.folder, TEACHERS[0], study.seeds[0])
    if not (folder / MANIFEST).is_file() or "engine" not in (manifest := read_manifest(folder)).facts:
        return []
    room, asked = manifest.facts["room"], study.cost.prompt_tokens + study.cost.new_tokens
    if room is not None and asked > room:
        print(f"the teacher is not measured: a request has {asked} tokens, it has room for {room}")
        return []
    return [read_variant(folder)]


def choose_variants(variants: list[Variant], recipes: list[str] | None, target: Target) -> list[Variant]:
    """Plain first, then the recipes named (default: all) whose engine runs on the target's device."""
    known = [v.recipe for v in variants]
    for name in recipes or []:
        require_one_of("--recipe", name, known)
    chosen = []
    for variant in variants:
        if recipes and variant.recipe not in (PLAIN, *recipes):
            continue
        engine = variant.subject.engine
        if target.device != "cpu" and target.device not in engine_module(engine).DEVICES:
            print(f"{variant.recipe} is not measured: engine {engine} does not run on {target.device}")
            continue
        chosen.append(variant)
    return chosen


def cut_prompts(cost: Cost, model: Path, texts: Iterable[str], thing: str) -> list[list[int]]:
    """[warmup + requests][prompt_tokens]: the tokens of the texts, again from the first when they end."""
    tokenizer = load_tokenizer(model)
    tokens = (text_ids(tokenizer, text) for text in texts)
    stream = itertools.cycle(itertools.chain.from_iterable(tokens))
    body, count = cost.prompt_tokens - 1, cost.warmup + cost.requests
    prompts = [[boundary_id(tokenizer), *itertools.islice(stream, body)] for _ in range(count)]
    if len(prompts[0]) <= body:
        raise UserError(thing, "no tokens", "give a text that is not empty")
    return prompts


def own_prompts(
    cost: Cost, variants: list[Variant], texts: Callable[[], Iterable[str]], thing: str
) -> Prompts:
    """`cut_prompts` of each variant with a vocabulary of its own: it reads the texts by its own ids."""
    own = [variant for variant in variants if has_own_vocabulary(variant.manifest)]
    return {variant.label: cut_prompts(cost, variant.folder, texts(), thing) for variant in own}


def draw_prompts(cost: Cost, *models: Path) -> list[list[int]]:
    """[warmup + requests][prompt_tokens]: tokens drawn evenly from all that models and tokenizers share."""
    from transformers import AutoConfig  # takes seconds to import: only where it is needed

    read = partial(AutoConfig.from_pretrained, local_files_only=True)
    rows = [read(model).get_text_config().vocab_size for model in models]
    rng, vocabulary = random.Random(0), min(*rows, *(len(load_tokenizer(model)) for model in models))
    count = cost.warmup + cost.requests
    return [[rng.randrange(vocabulary) for _ in range(cost.prompt_tokens)] for _ in range(count)]


def plan_from_run(args: argparse.Namespace, overrides: list[str], teacher: bool = True) -> CostPlan:
    """The variants of a run folder, on a target of its study's budget."""
    study = load_study(args.study, overrides)
    check_trained(study)
    targets = budget_of_run(study).targets
    target = targets[require_one_of("--target", args.target, list(targets))]
    require_device(args.target, target.device)
    variants = choose_variants(find_variants(study, teacher), args.recipe, target)
    verify_variants(variants)
    thing = f"slice {TRAIN!r}"

    def texts() -> Iterator[str]:
        return (document.text for document in stream_documents(study.folder / "data", TRAIN))

    return CostPlan(
        target=args.target,
        device=target.device,
        cost=study.cost,
        variants=variants,
        prompts=cut_prompts(study.cost, variants[0].folder, texts(), thing),
        own_prompts=own_prompts(study.cost, variants, texts, thing),
        source=TRAINING,
        config=study.hash(),
        study=study,
    )


class Settings(Frozen):
    """What may be set on the command line where there is no study."""

    cost: Cost = Cost()


def plan_from_folders(args: argparse.Namespace, overrides: list[str]) -> CostPlan:
    """Variant folders alone, by the settings of a study's YAML file or of the command line."""
    if args.study:
        study = load_study(args.study, overrides)
        cost, config = study.cost, study.hash()
    else:
        raw: dict[str, Any] = {}
        apply_overrides(raw, overrides)
        cost, config = validate_config(Settings, raw, "command line").cost, ""
    require_device(args.target, args.device)
    variants = [read_variant(Path(folder)) for folder in args.variant]
    if len({v.label for v in variants}) < len(variants):
        raise UserError("--variant", "the same model twice", "name each folder once")
    for variant in variants:
        require_one_of(
            f"device of {variant.folder}", args.device, list(engine_module(variant.subject.engine).DEVICES)
        )
    verify_variants(variants)
    own: Prompts = {}
    if args.text:
        text, thing = Path(args.text), f"--text {args.text}"
        texts = [text.read_text(encoding="utf-8")]
        prompts = cut_prompts(cost, variants[0].folder, texts, thing)
        own = own_prompts(cost, variants, lambda: texts, thing)
        source = f"text of sha256 {file_sha256(text)}"
    else:
        others = [variant.folder for variant in variants[1:] if has_own_vocabulary(variant.manifest)]
        prompts, source = draw_prompts(cost, variants[0].folder, *others), RANDOM
    return CostPlan(
        target=args.target,
        device=args.device,
        cost=cost,
        variants=variants,
        prompts=prompts,
        own_prompts=own,
        source=source,
        config=config,
        record=Path(args.record),
    )


def verify_variants(variants: list[Variant]) -> None:
    """Refuses a variant whose files are not those of its manifest, before anything of it is read."""
    for variant in variants:
        verify_artifact(variant.folder)


def require_device(target: str, device: str) -> None:
    """Refuses a target whose device this machine does not have."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        fix = "run this command on a machine that has one, on a copy of the run folder"
        raise UserError(f"target {target!r}", "no CUDA device here", fix)


def plan_from_command(doc: str, record: str, teacher: bool = True) -> tuple[CostPlan, Path | None]:
    """Parses the command line of `eval.cost` and `eval.cost.load`, and checks every variant's hashes.

    Returns the plan and the file of `--json`.

    Raises:
        UserError: there is nothing to measure, or it cannot be measured here.
    """
    parser = new_parser(doc)
    add_study(parser)
    parser.add_argument("--target", default="cpu", help="a target of the budget (default: cpu)")
    parser.add_argument("--recipe", nargs="+", help="measure these and the plain student only")
    alone = parser.add_argument_group("without a run folder")
    alone.add_argument("--variant", nargs="+", help="folders with a manifest, measured together")
    alone.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default: cpu)")
    alone.add_argument("--text", help="a text file for prompts (default: random tokens)")
    alone.add_argument("--record", default=record, help=f"where the records go (default: {record})")
    add_json(parser)
    add_keys_help(parser)
    args, overrides = parser.parse_known_args()
    plan = plan_from_folders(args, overrides) if args.variant else plan_from_run(args, overrides, teacher)
    if plan.study:
        start_log(plan.study.folder)
    return plan, args.json


def are_measured(
    records: Sequence[CostRecord | LoadRecord], study: Study, target: str, variants: Sequence[Variant]
) -> bool:
    """True if every variant has a record of its bytes and these settings, all of them of the same rounds."""
    wanted = [(variant.recipe, variant.hash) for variant in variants]
    return is_measured(Artifacts(study.folder, study).rounds(records, target, wanted))


def measure_from_command(
    doc: str,
    record: str,
    *,
    read: Callable[[Path], list[R]],
    measure: Callable[[CostPlan], list[R]],
    build_table: Callable[[CostPlan, list[R]], Table],
    teacher: bool = True,
) -> None:
    """The command `eval.cost` or `eval.cost.load`: measures, stores and shows what `read` does not find.

    `--json` takes all records of the target: those of the run folder, or those just measured without one.
    """
    plan, json_path = plan_from_command(doc, record, teacher)
    study, records = plan.study, list[R]()
    with lock_folder(study.folder) if study else nullcontext():
        if study and are_measured(read(study.folder), study, plan.target, plan.variants):
            print(f"{len(plan.variants)} variants were measured before on {plan.target}")
        else:
            records = measure(plan)
            plan.store(records)
    if records:
        Console().print(build_table(plan, records))
    if study:
        records = [record for record in read(study.folder) if record.target == plan.target]
    write_json(json_path, records)
