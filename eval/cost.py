"""`python -m eval.cost --study runs/X [--target cpu] [--recipe NAME ...]`: what variants cost on a target.

Each measurement is a fresh process (`eval.probe`), alone while it measures; this one sleeps meanwhile.
Processes run in rounds, one of every variant in each, so that a ratio to a named variant is taken within a
round, where the machine's mood is shared. A variant is done when its record is of the same bytes and study
and was taken in the same rounds as that of the plain student: what was half measured is measured again.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO

import torch
from rich.console import Console
from rich.table import Table

from eval.artifacts import MANIFEST, Manifest, read_manifest, verified
from eval.budget import Target, load_budget
from eval.documents import TRAIN, boundary_id, read_documents
from eval.engines import Subject, engine_module, load_tokenizer, subject_of
from eval.errors import UserError, entry, one_of
from eval.probe import Answer, Order
from eval.records import PLAIN, Measured, Process, provenance, read_costs, recipe_names, write_record
from eval.sections import Cost
from eval.study import ROOT, Study, study_from_command
from eval.workers import Job, Report, locked, run_in_turn

QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class Variant:
    """A model folder that is measured."""

    folder: Path
    manifest: Manifest
    subject: Subject

    @property
    def recipe(self) -> str:
        return self.subject.recipe


def variants(study: Study) -> list[Variant]:
    """The plain student S1 of the first seed, then its variants in the order of the study."""
    seed, run = study.seeds[0], study.folder
    names = recipe_names(study)[1:]
    folders = [run / f"students/S1/s{seed}", *(run / f"variants/{name}/S1/s{seed}" for name in names)]
    found = [path for path in folders if (path / MANIFEST).is_file()]
    if not found or found[0] != folders[0]:
        raise UserError(f"model {folders[0]}", "not made yet", "run distill/train.py with this study first")
    manifests = [read_manifest(path) for path in found]
    return [Variant(path, m, subject_of(m)) for path, m in zip(found, manifests, strict=True)]


def chosen(every: list[Variant], recipes: list[str] | None, target: Target) -> list[Variant]:
    """Plain first, then the recipes named (default: all) whose engine runs on the target's device."""
    known = [v.recipe for v in every]
    for name in recipes or []:
        one_of("--recipe", name, known)
    kept = []
    for variant in every:
        if recipes and variant.recipe not in (PLAIN, *recipes):
            continue
        engine = variant.subject.engine
        if target.device != "cpu" and target.device not in engine_module(engine).DEVICES:
            print(f"{variant.recipe} is not measured: engine {engine} does not run on {target.device}")
            continue
        kept.append(variant)
    return kept


def measured_before(study: Study, target: str, wanted: list[Variant]) -> bool:
    """True if all records are there, of these bytes and settings, and of the same rounds."""
    cost, times = study.cost, {}
    for record in read_costs(study.folder):
        asked = (cost.prompt_tokens, cost.new_tokens, cost.threads, cost.processes, cost.requests)
        settings = (record.prompt_tokens, record.new_tokens, record.threads, len(record.processes))
        found = (*settings, len(record.processes[0].prefill_ms))
        if (record.target, record.provenance.config, found) == (target, study.hash(), asked):
            times[record.recipe, record.provenance.artifact] = record.provenance.time
    rounds = {times.get((v.recipe, v.manifest.hash)) for v in wanted}
    return len(rounds) == 1 and None not in rounds


def prompts(study: Study, plain: Path) -> list[list[int]]:
    """[warmup + requests][prompt_tokens] tokens of training documents, the same for every variant."""
    tokenizer = load_tokenizer(plain)
    documents = read_documents(study.folder / "data", TRAIN)
    texts = (tokenizer(d.text, add_special_tokens=False, verbose=False)["input_ids"] for d in documents)
    stream = itertools.cycle(itertools.chain.from_iterable(texts))
    body = study.cost.prompt_tokens - 1
    count = study.cost.warmup + study.cost.requests
    made = [[boundary_id(tokenizer), *itertools.islice(stream, body)] for _ in range(count)]
    if len(made[0]) <= body:
        raise UserError(f"slice {TRAIN!r}", "no tokens", "make the data again")
    return made


@dataclass(frozen=True)
class Probe:
    """A fresh process for one variant."""

    variant: Variant
    process: subprocess.Popen[str]
    said: IO[str]  # what it wrote on stderr

    def hear(self) -> Answer:
        """The next answer of the process, or its error raised here."""
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            answer = Answer.model_validate_json(line)
            if answer.error:
                raise UserError(*answer.error)
            return answer
        self.said.seek(0)
        last = (self.said.read().strip().splitlines() or ["it said nothing"])[-1]
        found = f"the process ended with {self.process.wait()} ({last})"
        raise UserError(
            f"measuring {self.variant.folder}", found, "mend that, or free some memory; run again"
        )

    def measure(self, order: Order) -> Process:
        """Gives the order, sleeps until it is carried out and the process has ended."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it died: `hear` tells of what
            self.process.stdin.write(order.model_dump_json() + "\n")
            self.process.stdin.flush()
        measured = self.hear().process
        assert measured is not None
        self.process.wait()
        return measured


@contextmanager
def started(variant: Variant, threads: int) -> Iterator[Probe]:
    """A process that has begun to import the variant's engine; it is gone at the end."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "eval.probe", variant.subject.engine],
            cwd=ROOT,
            env={**os.environ, **QUIET, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        try:
            yield Probe(variant, process, said)
        finally:
            process.kill()
            process.communicate()


def measure_group(
    group: list[Variant], cost: Cost, device: str, requests: list[list[int]], report: Report
) -> dict[str, Process]:
    """Starts one process for each variant side by side, then lets one after another measure, alone."""
    with ExitStack() as stack:
        probes = [stack.enter_context(started(variant, cost.threads)) for variant in group]
        for probe in probes:
            probe.hear()
        done: dict[str, Process] = {}
        for probe in probes:
            order = Order(
                engine=probe.variant.subject.engine,
                folder=str(probe.variant.folder.resolve()),
                device=device,
                threads=cost.threads,
                prompts=requests,
                warmup=cost.warmup,
                new_tokens=cost.new_tokens,
            )
            done[probe.variant.recipe] = probe.measure(order)
            report(len(done) / len(group))
        return done


def measure_rounds(study: Study, device: str, wanted: list[Variant]) -> dict[str, list[Process]]:
    """recipe -> one process per round. Each round starts with another variant: none is always the first."""
    requests = prompts(study, wanted[0].folder)
    jobs, size = [], study.workers
    for turn in range(study.cost.processes):
        shift = turn % len(wanted)
        order = [*wanted[shift:], *wanted[:shift]]
        for group in (order[i : i + size] for i in range(0, len(order), size)):
            name = f"round {turn + 1}, {' and '.join(v.recipe for v in group)}"
            jobs.append(Job(name, measure_group, (group, study.cost, device, requests), weight=len(group)))
    done = run_in_turn("cost", jobs).values()
    return {v.recipe: [found[v.recipe] for found in done if v.recipe in found] for v in wanted}


def accelerator(device: str) -> tuple[str, str | None]:
    """Name and driver of the device that was measured on."""
    if device == "cpu":
        return "cpu", None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return torch.cuda.get_device_name(), driver


def measure_target(study: Study, target: str, device: str, wanted: list[Variant]) -> None:
    """Measures the variants together and writes their records, which share one time."""
    for variant in wanted:
        verified(variant.folder)
    measured = measure_rounds(study, device, wanted)
    source = provenance("", study.hash(), *accelerator(device))
    for variant in wanted:
        record = Measured(
            **variant.subject.model_dump(),
            **study.cost.model_dump(include={"prompt_tokens", "new_tokens", "threads"}),
            target=target,
            disk_bytes=variant.manifest.bytes,
            processes=measured[variant.recipe],
            provenance=source.model_copy(update={"artifact": variant.manifest.hash}),
        )
        write_record(study.folder, record)


def table(records: list[Measured]) -> Table:
    """Medians over all processes; the gate holds upper bounds against the limits, not these."""
    shown = Table("recipe", "engine", "prefill ms", "decode ms/token", "peak MiB", "disk MiB", "load s")
    shown.title = f"cost on {records[0].target}, medians"
    for record in records:
        runs = record.processes
        figures = (
            median(ms for run in runs for ms in run.prefill_ms),
            median(ms for run in runs for ms in run.decode_ms),
            median(run.peak_memory_bytes for run in runs) / 2**20,
            record.disk_bytes / 2**20,
            median(run.load_s for run in runs),
        )
        shown.add_row(record.recipe, record.engine, *(f"{figure:.2f}" for figure in figures))
    return shown


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="cpu", help="a target of the study's budget (default: cpu)")
    parser.add_argument("--recipe", nargs="+", help="measure these and the plain student only")
    return parser


@entry
def main() -> None:
    study, given = study_from_command(arguments())
    targets = load_budget(study).targets
    target = targets[one_of("--target", given.target, list(targets))]
    if target.device == "cuda" and not torch.cuda.is_available():
        mend = "run this command on a machine that has one, on a copy of the run folder"
        raise UserError(f"target {given.target!r}", "no CUDA device here", mend)
    wanted = chosen(variants(study), given.recipe, target)
    with locked(study.folder):
        if measured_before(study, given.target, wanted):
            print(f"{len(wanted)} variants were measured before on {given.target}")
            return
        measure_target(study, given.target, target.device, wanted)
    records = {r.recipe: r for r in read_costs(study.folder) if r.target == given.target}
    Console().print(table([records[variant.recipe] for variant in wanted]))


if __name__ == "__main__":
    main()
