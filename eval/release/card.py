"""The model card of a release, whose results other programs can read."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eval.core.gate_file import Estimate, KeptShare, Number
from eval.release.contract_file import Contract, Cost, Gain
from eval.release.origin import Entry
from eval.report.format import estimate_cell, fixed, significant
from eval.report.markdown import escape

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TEMPLATES = Path(__file__).parent / "templates"
METRICS = {
    "own_share": "share of the method's gain that this artifact retains, given the measured teacher's gain",
    "bits_per_byte_saved_over_control": "bits per byte saved over the control",
    "bits_per_byte_saved_over_fallback": "bits per byte saved over the fallback",
}


def span(value: Estimate | KeptShare) -> str:
    return str(estimate_cell(value))


def bounded(cost: Cost) -> str:
    return f"{significant(cost.measured)} [{significant(cost.low)}, {significant(cost.high)}]"


def number(cost: Number) -> str:
    return f"{significant(cost.value)} [{significant(cost.lower)}, {significant(cost.upper)}] {cost.unit}"


def card(contract: Contract, base: str | None, origin: Sequence[Entry], said: Sequence[str]) -> str:
    """README.md of a release.

    Args:
        origin: where it comes from, see `eval.release.origin`.
        said: what the gate said of the study, and what that is conditional on, in sentences.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        model_name=contract.name,
        base_model=base,
        pipeline_tag="text-generation",
        library_name="transformers",
        eval_results=results(contract),
    )
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), trim_blocks=True, undefined=StrictUndefined, autoescape=False
    )
    environment.filters.update(
        span=span,
        bounded=bounded,
        number=number,
        fixed=fixed,
        own_share=own_share,
        significant=significant,
        zip=zip,
        cell=escape,
    )
    template = environment.get_template("release_card.md.j2")
    return str(
        ModelCard(template.render(card_data=data.to_yaml(), contract=contract, origin=origin, said=said))
    )


def results(contract: Contract) -> list["EvalResult"]:
    """Of the shipped artifact: bits per byte, its share and what it saves, on every promised slice."""
    results = []
    for target, shipped in contract.targets.items():
        for name, gain in shipped.gain.items():
            values = {"bits_per_byte": gain.level.point, **saved(gain)}
            for metric, value in values.items():
                if value is not None:
                    title = METRICS.get(metric, "bits per byte")
                    results.append(_result(contract, target, name, metric, f"{title}, {target}", value))
    return results


def own_share(gain: Gain) -> KeptShare | None:
    """What the artifact saves over its control, as a share of the teacher's gain; None where that is none.

    The ends of its interval are those of the saving, given the teacher's gain as it was measured.
    """
    teacher, saving = gain.teacher_gain, gain.over_control.measured
    if not (teacher.low or 0) > 0:
        return None
    low, high = (None if end is None else end / teacher.point for end in (saving.low, saving.high))
    about = "given the measured teacher's gain"
    return KeptShare(point=saving.point / teacher.point, low=low, high=high, method=about)


def saved(gain: Gain) -> dict[str, float | None]:
    own = own_share(gain)
    share = own.point if own else None
    values = share, gain.over_control.measured.point, gain.over_fallback.measured.point
    return dict(zip(METRICS, values, strict=True))


def _result(
    contract: Contract, target: str, name: str, metric: str, title: str, value: float
) -> "EvalResult":
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        task_name="language modelling",
        dataset_type=contract.study,
        dataset_name=f"{contract.study}, {name}",
        dataset_config=target,
        dataset_split=name,
        dataset_revision=contract.data,
        metric_type=metric,
        metric_name=title,
        metric_value=round(value, 6),
    )
