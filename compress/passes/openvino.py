"""OpenVINO IR for CPU targets: float32, int8 per row, or int4 in groups, through optimum-intel and nncf.

The options are those of nncf's `compress_weights`, and are called so. The float32 export is made once per
model and shared by every recipe that starts from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from compress.allocation import Allocation, allocation_of
from compress.calibration import calibration_rows
from compress.model_size import check_groups, layer_inputs, size_of
from compress.openvino_ir import (
    compressed_matrices,
    constant_bytes,
    conversion,
    export,
    load,
    module_name,
    number_names,
    plain_matrices,
)
from compress.recipe import Context, Grid, Pass, PassReport, Size, Skipped, Stage
from compress.targets import Targets
from compress.tensors.quant_error import (
    INT4_STEP,
    INT4_SUBNORMAL,
    INT8_STEP,
    INT8_SUBNORMAL,
    UINT4_STEP,
    check_rounding,
    check_scaled,
)
from eval.core.documents import Row
from eval.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Element type -> largest error by the largest weight of a row, and of tiny weights.
INT8 = (INT8_STEP, INT8_SUBNORMAL)
BOUNDS = {"i8": INT8, "u8": INT8, "i4": (INT4_STEP, INT4_SUBNORMAL), "u4": (UINT4_STEP, INT4_SUBNORMAL)}
RESCALED = 0.3  # change of a scale, as a logarithm, that rounding does not explain
GROUP = 32
CHOICES = ("sensitivity_metric", "all_layers", "backup_precision", "group_size_fallback")
ALGORITHMS = ("awq", "scale_estimation", "gptq", "lora_correction")
OF_ALLOCATION = ("ratio", "sym", *CHOICES, *ALGORITHMS)  # what it leaves no choice of
OF_INT4 = ("group_size", "ratio", "allocation", *CHOICES, *ALGORITHMS)
Metric = Literal[
    "weight_quantization_error",
    "hessian_input_activation",
    "mean_activation_variance",
    "max_activation_variance",
    "mean_activation_magnitude",
]


class OpenVINO(Pass):
    stage = Stage.EXPORT
    engine = "openvino"
    last = True
    needs = ("optimum.intel", "openvino", "nncf")

    class Options(Targets):
        weights: Literal["fp32", "int8", "int4"] = Field(description="of the matrices inside the layers")
        sym: bool = Field(
            True, description="levels around zero; false: from the least weight of a group to the largest"
        )
        group_size: int = Field(
            GROUP, ge=-1, description="inputs of a row that share one scale; -1: all of them"
        )
        group_size_fallback: Literal["error", "ignore", "adjust"] = Field(
            "error", description="for a matrix that the group does not divide: stop; 8 bits; a smaller group"
        )
        all_layers: bool = Field(
            False, description="embeddings and head in 4 bits too, not in `backup_precision`"
        )
        backup_precision: Literal["none", "int8_sym", "int8_asym"] = Field(
            "int8_asym", description="of what is not in 4 bits; `none`: it is not rounded"
        )
        ratio: float = Field(
            1.0, ge=0, le=1, description="share of the weights in 4 bits; the others in `backup_precision`"
        )
        sensitivity_metric: Metric | None = Field(
            None, description="with `ratio`: by what NNCF chooses the matrices in `backup_precision`"
        )
        awq: bool = Field(
            False, description="scale channels by their activations first (Lin et al. 2024, arXiv:2306.00978)"
        )
        scale_estimation: bool = Field(
            False, description="choose scales that change a layer's output least, on training rows"
        )
        gptq: bool = Field(
            False,
            description="round column by column and correct the rest (Frantar et al. 2023, arXiv:2210.17323)",
        )
        lora_correction: bool = Field(
            False, description="adapters of low rank beside the matrices that take back what rounding changed"
        )
        dynamic_quantization_group_size: int | None = Field(
            None,
            ge=0,
            description="inputs of an activation that share a scale in 8 bits at run time; 0: they are not "
            "rounded; none: as OpenVINO chooses",
        )
        allocation: Literal["kl"] | None = Field(
            None,
            description="`kl`: for each matrix the group size, or the 8 bits, that keep predictions best, at "
            "the bytes of `group_size` for all",
        )
        rows: int = Field(32, gt=0, description="training rows that calibrate")

        @model_validator(mode="after")
        def fits_together(self) -> Self:
            given = self.model_fields_set
            if self.weights == "fp32" and self.dynamic_quantization_group_size is not None:
                raise ValueError("dynamic_quantization_group_size needs weights of 8 or 4 bits")
            if self.weights != "int4" and (names := [name for name in OF_INT4 if name in given]):
                raise ValueError(f"{names[0]} needs weights: int4")
            if self.group_size == 0:
                raise ValueError("group_size 0; give a number above 0, or -1 for whole rows")
            if self.gptq and self.lora_correction:
                raise ValueError("give `gptq` or `lora_correction`, not both")
            if self.allocation and (beside := sorted(given & {*OF_ALLOCATION})):
                raise ValueError(f"allocation chooses all formats; leave {beside[0]} out")
            if self.allocation and self.group_size < 16:
                raise ValueError("allocation also takes half of group_size; give 16 or more")
            if self.sensitivity_metric is not None and self.ratio == 1:
                raise ValueError("sensitivity_metric chooses nothing where ratio is 1; give a smaller ratio")
            if "rows" in given and not self.data_aware:
                raise ValueError("rows are not used: none of the options looks at data")
            return self

        @property
        def moves_weights(self) -> bool:
            """Whether weights are not simply rounded."""
            return self.awq or self.scale_estimation or self.gptq

        @property
        def data_aware(self) -> bool:
            by_data = self.sensitivity_metric not in (None, "weight_quantization_error")
            return self.moves_weights or self.lora_correction or by_data or self.allocation is not None

        @property
        def choices(self) -> list[Grid]:
            """The formats that an allocation chooses from."""
            sizes = (2 * self.group_size, self.group_size, self.group_size // 2)
            return [*(Grid(4, size) for size in sizes), Grid(8, -1)]

    def grid_problem(self, grid: Grid) -> str | None:
        options, own = self.options, Grid(8, -1)
        if options.weights == "int4":
            own = Grid(4, options.group_size)
            if options.allocation:
                return "openvino.allocation chooses levels of its own"
            if (moves := [name for name in ALGORITHMS if getattr(options, name)]) or options.ratio < 1:
                return f"openvino.{(moves or ['ratio'])[0]} moves weights to others"
        if options.weights == "fp32" or (options.sym and own.holds(grid)):
            return None
        levels = own if options.sym else f"{own}, not around zero"
        return f"openvino rounds to levels of {levels}"

    def preview(self, model: PreTrainedModel) -> PreTrainedModel:
        self.options.choose(matrix_modules(model))
        options = self.options
        if options.weights == "int4" and options.group_size > 0 and options.group_size_fallback == "error":
            fix = "give a group size that divides all of them, or group_size_fallback: adjust"
            check_groups(model, options.group_size, "openvino.group_size", fix)
        return model

    def apply(self, model: PreTrainedModel, context: Context) -> tuple[Any, PassReport]:
        before = size_of(model, context.dtype)
        ir_folder = context.scratch / "openvino-fp32"
        every = matrix_modules(model)
        left_out = every - self.options.choose(every)
        rows = calibration_rows(context.rows, self.options.rows, context.seed)
        chosen = self._allocated(model, rows, context, every - left_out) if self.options.allocation else None
        with conversion():
            if not ir_folder.is_dir():
                export(model, context, ir_folder)
            model.to("meta")  # its memory is free: what follows is made from the export
            plain = load(ir_folder).model
            if chosen is not None:
                result = load(ir_folder)
                compress_as(result.model, chosen.formats, every - set(chosen.formats) - left_out, left_out)
            else:
                data = model_inputs(rows) if self.options.data_aware else None
                result = load(ir_folder, self._compression(len(rows), left_out), data)
        originals = plain_matrices(plain)
        formats, zeroed, facts = self._check(originals, result.model)
        if beyond := sorted(left_out & formats.keys()):
            fix = "leave it in, or leave out what shares its weights too"
            raise UserError(f"openvino: {beyond[0]}", "is compressed although it is left out", fix)
        number_names(result.model)
        if (size := self.options.dynamic_quantization_group_size) is not None:
            result.model.set_rt_info(str(size), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
        asked = {name: m for name, m in originals.items() if module_name(name) not in left_out}
        low_bit = sum(prod(originals[name].shape) for name in originals if module_name(name) in formats)
        report = PassReport(
            name=self.name,
            before=before,
            after=Size(
                parameters=before.parameters,
                nonzeros=before.nonzeros - zeroed,
                bytes=constant_bytes(result.model),
                low_bit=low_bit,
            ),
            named=0 if self._leaves_matrices else sum(prod(m.shape) for m in asked.values()),
            reached=0 if self._leaves_matrices else low_bit,
            skipped=self._skipped({name for name in originals if module_name(name) not in formats}, left_out),
            facts={"formats": formats, **facts, **({} if chosen is None else chosen.facts)},
        )
        return result, report

    def _allocated(
        self, model: PreTrainedModel, rows: Sequence[Row], context: Context, names: set[str]
    ) -> Allocation:
        """A grid for each matrix inside the layers; embeddings and head are left to `backup_precision`."""
        inside = sorted(names & layer_inputs(model).keys())
        return allocation_of(model, inside, self.options.choices, self.options.group_size, rows, context)

    @property
    def _leaves_matrices(self) -> bool:
        """True if matrices stay in float32 because the recipe says so."""
        options = self.options
        return options.weights == "fp32" or "none" in (options.backup_precision, options.group_size_fallback)

    def _check(
        self, originals: dict[str, Any], compressed: Any
    ) -> tuple[dict[str, str], int, dict[str, float]]:
        """Formats of the compressed modules, weights that became zero, and how far the worst was moved.

        Raises:
            UserError: a matrix is not what its format allows.
        """
        worst, moved, rescaled, zeroed, formats = 0.0, 0.0, 0, 0, dict[str, str]()
        for name, kind, axis, new in compressed_matrices(compressed):
            if name not in originals:  # a matrix that corrects others
                continue
            old = torch.tensor(originals[name].data)
            if self.options.moves_weights and kind in ("i4", "u4"):
                here, change = check_scaled(name, old, new.reshape(old.shape))
                moved, rescaled = max(moved, here), rescaled + (change > RESCALED)
            else:
                rows = old.reshape(new.shape).movedim(axis, -1), new.movedim(axis, -1)
                worst = max(worst, check_rounding(name, *rows, None, *BOUNDS[kind]))
            zeroed += int(torch.count_nonzero(old)) - int(torch.count_nonzero(new))
            formats[module_name(name)] = kind
        facts: dict[str, float] = {"worst_rounding": worst}
        if self.options.moves_weights:
            facts |= {"worst_moved": moved, "rescaled": rescaled}
        if self.options.awq and not rescaled:
            raise UserError("openvino.awq", "nncf rescaled no matrix of this family", "leave it out")
        return formats, zeroed, facts

    def _compression(self, rows: int, left_out: set[str]) -> Any:
        """The settings for nncf, or None. `tokenizer` is unused, but its default, a path, would be saved."""
        from optimum.intel import OVWeightQuantizationConfig

        options = self.options
        if options.weights == "fp32":
            return None
        patterns = [pattern_of(name) for name in sorted(left_out)]
        scope = {"ignored_scope": {"patterns": patterns, "validate": False}} if patterns else {}
        if options.weights == "int8":
            return OVWeightQuantizationConfig(bits=8, sym=options.sym, tokenizer=".", **scope)
        beside = {
            name: getattr(options, name) or None
            for name in (*CHOICES, *ALGORITHMS)
            if name in options.model_fields_set
        }
        beside["quant_method"] = "awq" if beside.pop("awq", None) else "default"
        return OVWeightQuantizationConfig(
            bits=4,
            sym=options.sym,
            group_size=options.group_size,
            ratio=options.ratio,
            num_samples=rows if options.data_aware else None,
            tokenizer=".",
            **beside,
            **scope,
        )

    def _skipped(self, names: set[str], left_out: set[str]) -> list[Skipped]:
        other = "the recipe asks for float32" if self.options.weights == "fp32" else "left in float32 by nncf"
        modules = [module_name(name) for name in sorted(names)]
        reasons = {name: "not in targets, or ignored" if name in left_out else other for name in modules}
        return [Skipped(module=name, reason=reason) for name, reason in reasons.items()]


def compress_as(model: Any, formats: dict[str, Grid], ends: set[str], left_out: set[str]) -> None:
    """Compresses each matrix to its grid, in place, and the `ends` as nncf does beside 4 bits."""
    import nncf

    modes = nncf.CompressWeightsMode

    def compress(names: set[str], mode: Any, **options: Any) -> None:
        others = (set(formats) | ends | left_out) - names
        scope = nncf.IgnoredScope(patterns=[pattern_of(name) for name in sorted(others)], validate=False)
        nncf.compress_weights(model, mode=mode, ignored_scope=scope, **options)

    compress(ends, modes.INT8_ASYM)
    for grid in dict.fromkeys(formats.values()):
        names = {name for name, own in formats.items() if own == grid}
        if grid.bits == 8:
            compress(names, modes.INT8_SYM)
        else:
            compress(names, modes.INT4_SYM, group_size=grid.group_size, ratio=1.0, all_layers=True)


def pattern_of(name: str) -> str:
    return rf"__module\.{name.replace('.', chr(92) + '.')}/.*"


def matrix_modules(model: PreTrainedModel) -> set[str]:
    """Names of the modules that hold a matrix."""
    return {name.rpartition(".")[0] for name, weight in model.named_parameters() if weight.ndim > 1}


def model_inputs(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as the inputs of an exported model, one at a time; each takes those that it has."""
    inputs = []
    for row in rows:
        ids = np.array([row.read], dtype=np.int64)
        inputs.append(
            {
                "input_ids": ids,
                "attention_mask": np.ones_like(ids),
                "token_type_ids": np.zeros_like(ids),
                "position_ids": np.arange(ids.shape[1], dtype=np.int64)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
        )
    return inputs
