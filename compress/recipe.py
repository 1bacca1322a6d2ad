"""What a pass is, and how a recipe of passes is read: in order of stage, with every option checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, reduce
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from eval.core.artifacts import digest, installed_versions, stage_code
from eval.core.config import Frozen, Stored, plugin_class, plugin_code, plugin_names, validate_config
from eval.core.documents import Document, Row
from eval.core.errors import UserError, require_installed
from eval.core.sections.precision import Choice, read_choice, replace_auto
from eval.core.sections.recipe import Calibration
from eval.core.study import Study, read_recipe, recipe_names

if TYPE_CHECKING:  # heavy, and a command that has nothing to do should end at once
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from distill.teachers.target_source import TargetSource
    from eval.core.sections import Train

LEAST_REACH = 0.9  # share of the weights named that a pass must go through
Failures = dict[str, str]  # name of a recipe -> why it could not be applied
PASSES = "compress.passes"  # the registry: a file each
# module -> extra of pyproject.toml
EXTRAS = {"optimum.intel": "openvino", "openvino": "openvino", "nncf": "openvino", "bitsandbytes": "gpu"}
EXTRAS |= dict.fromkeys(("onnxruntime", "onnxruntime_genai", "onnx", "onnx_ir"), "onnxruntime")
EXTRAS |= dict.fromkeys(("llama_cpp", "gguf"), "llama_cpp")


class Stage(IntEnum):
    """A recipe goes through the stages in this order and never back."""

    STRUCTURE = 1
    SPARSITY = 2
    RECOVERY = 3
    PRECISION = 4
    EXPORT = 5


class Size(Stored):
    """A model's size; tied weights count once."""

    parameters: int
    nonzeros: int
    bytes: int  # of the weights as they are stored
    low_bit: int = 0  # of the parameters, those that are stored in 8 bits or fewer


class Skipped(Stored):
    """A module with weights that a pass left as it was."""

    module: str
    reason: str


class PassReport(Stored):
    """What a pass did."""

    name: str
    before: Size
    after: Size
    named: int = 0  # weights that the name of the pass speaks of; 0: of none in particular
    reached: int = 0  # of these, the ones that it went through
    skipped: list[Skipped] = Field(default_factory=list)
    facts: dict[str, Any] = Field(
        default_factory=dict
    )  # layers dropped, worst rounding error, loss curve ...


def check_reach(report: PassReport) -> None:
    """Refuses a pass that left out too much of the weights it is named after, such as the experts of an MoE.

    Raises:
        UserError: it reached less than `LEAST_REACH` of them.
    """
    if report.reached < LEAST_REACH * report.named:
        left = ", ".join(f"{skip.module} ({skip.reason})" for skip in report.skipped[:3])
        share = f"{report.reached / report.named:.0%} of the weights that it is named after"
        fix = "leave its recipes out of this study: their names would say more than was done"
        raise UserError(f"pass {report.name}", f"reached {share}, without {left}", fix)


@dataclass(frozen=True)
class Grid:
    """Symmetric levels: 2^bits of them, one signed scale for each group of a row."""

    bits: int
    group_size: int  # inputs that share a scale; -1: all of a row

    def holds(self, other: Grid) -> bool:
        """True if it has all levels of the other: of fewer bits they are every second, fourth ..."""
        return other.group_size == self.group_size and other.bits <= self.bits

    def __str__(self) -> str:
        return f"{self.bits} bits, {'whole rows' if self.group_size < 0 else f'groups of {self.group_size}'}"


@dataclass(frozen=True)
class MethodTargets:
    """What the student itself learned from: rows and the teacher of its arm."""

    identity: str  # fingerprint of the teacher and of its targets on disk
    open: Callable[[], AbstractContextManager[TargetSource]]


@dataclass(frozen=True)
class Context:
    """What a pass may use beside the model. Nothing of it may be changed."""

    parent: PreTrainedModel  # the uncompressed student
    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[Row]  # training rows; validation documents are never seen by a pass
    pad: int
    seed: int
    scratch: Path  # a folder shared by every pass that gets this very model: name files by your options
    report: Callable[[float], None]  # takes the share of this pass that is done, 0 to 1
    dtype: torch.dtype  # in which the student is stored and served; here it is computed in float32
    documents: Callable[[], Iterator[Document]]  # all that students were trained on
    method: MethodTargets | None = None  # where a recipe asks for it


class Pass(ABC):
    """One step of a recipe: one file in `compress/passes`, or a `package.module` with one subclass.

    A subclass must define `stage` and `apply`.
    """

    stage: ClassVar[Stage]
    engine: ClassVar[str] = "torch"  # of eval/engines, that loads what this pass makes
    last: ClassVar[bool] = False  # its output is in a format that no further pass can change
    needs: ClassVar[tuple[str, ...]] = ()  # modules that must be installed

    class Options(Frozen):
        """Accepted beside `pass:` in a recipe."""

    def __init__(self, options: Frozen, calibration: Calibration | None = None) -> None:
        self.options: Any = options
        self.calibration = calibration  # of its recipe: what its rows are made of; none: training rows

    @property
    def name(self) -> str:
        return type(self).__module__.removeprefix("compress.passes.")

    @abstractmethod
    def apply(self, model: PreTrainedModel, context: Context) -> tuple[Any, PassReport]:
        """Compresses `model`, in place or not: it belongs to the pass.

        In the stages STRUCTURE and SPARSITY it lies on a GPU where there is one; put batches there.

        Returns:
            A model with the interface of transformers (call, `save_pretrained`), and what was done.
        """

    def preview(self, model: PreTrainedModel) -> PreTrainedModel:
        """A model with the shapes that `apply` leaves of those of `model`, both on the meta device.

        Called for each pass of every recipe before any of them does any work.

        Raises:
            UserError: the pass cannot be applied to a model of these shapes.
        """
        return model

    @property
    def trained_grid(self) -> Grid | None:
        """The grid that it leaves weights on, which the passes after it must keep, or None."""
        return None

    def grid_problem(self, grid: Grid) -> str | None:
        """How it would move weights off `grid`, on which an earlier pass left them; None if it keeps them."""
        return None

    @property
    def method_training(self) -> Train | None:
        """How it trains from the teacher of the method; none: it does not."""
        return None

    def next_context(self, context: Context) -> Context:
        """What the passes after it get, from what it got itself: other ids where it changes the tokenizer."""
        return context

    @cached_property
    def identity(self) -> list[Any]:
        """What decides the outcome beside the model: its settings and its code."""
        return [self.settings, self.code]

    @property
    def settings(self) -> list[Any]:
        own = [type(self).__qualname__, self.options.model_dump(mode="json")]
        if self.calibration is None:
            return own
        from distill.data.sources import fingerprint

        return [*own, self.calibration.model_dump(mode="json"), *map(fingerprint, self.calibration.documents)]

    @cached_property
    def code(self) -> dict[str, str]:
        """Digests of its code and versions of the libraries that it needs, for the keys of variants."""
        libraries = [name.replace(".", "-") for name in self.needs]
        return {**plugin_code(type(self), Pass), **installed_versions(libraries)}


@dataclass(frozen=True)
class Recipe:
    name: str
    target: str
    passes: tuple[Pass, ...]
    file: str  # digest of what its file says, before `auto` is settled

    @property
    def engine(self) -> str:
        return self.passes[-1].engine

    @property
    def learns_from_method(self) -> bool:
        return any(step.method_training is not None for step in self.passes)

    @property
    def settings(self) -> list[Any]:
        return [self.name, self.target, [step.settings for step in self.passes]]

    @property
    def code(self) -> dict[str, str]:
        """Versions that make its variants: of the stage, of every pass and of the libraries."""
        return reduce(lambda code, step: code | step.code, self.passes, stage_code("variant"))


def pass_class(name: str, where: str = "pass") -> type[Pass]:
    """The one subclass of Pass in `compress/passes/<name>.py` or in the module `name`."""
    return plugin_class(PASSES, name, where, Pass, {"stage": Stage})


def make_pass(
    entry: dict[str, Any], where: str, calibration: Calibration | None = None, runs_here: bool = True
) -> Pass:
    """The pass that one entry of a recipe names, with its options checked.

    Args:
        calibration: of the recipe; a recovery trains on training rows all the same.
        runs_here: its libraries are asked for; the machine that trains needs none of them.

    Raises:
        UserError: no such pass, an option that is not accepted, or a library that is not installed.
    """
    options = dict(entry)
    name = options.pop("pass", None)
    if not isinstance(name, str):
        raise UserError(f"{where}.pass", repr(name), f"name one of: {', '.join(plugin_names(PASSES))}")
    kind = pass_class(name, f"{where}.pass")
    checked = validate_config(kind.Options, options, where)
    for module in kind.needs if runs_here else ():
        extra = EXTRAS.get(module)
        fix = f"run `pip install '.[{extra}]'`" if extra else "install its package"
        require_installed(module, f"{where}.pass: {name!r}", fix)
    return kind(checked, None if kind.stage == Stage.RECOVERY else calibration)


def check_order(passes: list[Pass], where: str) -> None:
    """Refuses stages that go back, a pass after one that must be the last, and one that leaves a grid."""
    grid: Grid | None = None
    for i, (before, after) in enumerate(pairwise(passes)):
        thing = f"{where}: passes.{i + 1}"
        if after.stage < before.stage:
            raise UserError(
                thing,
                f"{after.name} ({after.stage.name}) after {before.name} ({before.stage.name})",
                f"order the passes by stage: {' < '.join(stage.name for stage in Stage)}",
            )
        if before.last:
            raise UserError(
                thing,
                f"{after.name} after {before.name}",
                f"{before.name} must be the last pass: no other can change its format",
            )
        grid = before.trained_grid or grid
        if grid is not None and (problem := after.grid_problem(grid)) is not None:
            fix = "give both the same levels, or leave one of them out"
            raise UserError(thing, f"{problem}, after weights were trained on levels of {grid}", fix)


def load_recipe(name: str, choice: Choice | None = None, runs_here: bool = True) -> Recipe:
    """A recipe of configs/recipes by name, or from the path of a YAML file.

    Args:
        choice: what `auto` is in the run, if that is known.
        runs_here: see `make_pass`.

    Raises:
        UserError: names the file, the key and what is accepted.
    """
    path, raw = read_recipe(name)
    entries = replace_auto(raw.passes, choice or {})
    passes = [make_pass(e, f"{path}: passes.{i}", raw.calibration, runs_here) for i, e in enumerate(entries)]
    check_order(passes, str(path))
    return Recipe(raw.name, raw.target, tuple(passes), digest(raw.model_dump(mode="json")))


def load_recipes(study: Study, runs_here: bool = True) -> list[Recipe]:
    """The recipes of a study, in its order, with what its run chose for `auto`; their names differ."""
    choice, names = read_choice(study.folder), recipe_names(study)[1:]
    return [load_recipe(place, choice, runs_here) for place, _ in zip(study.recipes, names, strict=True)]
