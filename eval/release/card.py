"""The model card of a release, whose results other programs can read."""

from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eval.core.gate_file import Estimate, GateFile, KeptShare
from eval.release.contract_file import Contract, Cost, Gain
from eval.report.format import estimate_cell, fixed, significant

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TEMPLATES = Path(__file__).parent / "templates"
METRICS = {
    "kept_share": "share of the method's gain retained",
    "bits_per_byte_saved_over_control": "bits per byte saved over the control",
    "bits_per_byte_saved_over_fallback": "bits per byte saved over the fallback",
}


def span(value: Estimate | KeptShare) -> str:
    return str(estimate_cell(value))


def bounded(cost: Cost) -> str:
    return f"{significant(cost.measured)} [{significant(cost.low)}, {significant(cost.high)}]"


def card(contract: Contract, gate: GateFile, base: str | None) -> str:
    """README.md of a release."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        model_name=contract.name,
        base_model=base,
        pipeline_tag="text-generation",
        library_name="transformers",
        eval_results=results(contract, gate),
    )
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), trim_blocks=True, undefined=StrictUndefined, autoescape=False
    )
    environment.filters.update(span=span, bounded=bounded, fixed=fixed, zip=zip)
    template = environment.get_template("release_card.md.j2")
    return str(ModelCard(template.render(card_data=data.to_yaml(), contract=contract)))


def results(contract: Contract, gate: GateFile) -> list["EvalResult"]:
    """Bits per byte, the kept share and what is saved, on every promised slice of every target."""
    results = []
    for target, shipped in contract.targets.items():
        row = next(v for v in gate.variants if (v.recipe, v.target) == (shipped.recipe, target))
        for name, gain in shipped.gain.items():
            values = {"bits_per_byte": row.scores[name].point, **saved(gain)}
            for metric, value in values.items():
                if value is not None:
                    title = METRICS.get(metric, "bits per byte")
                    results.append(_result(contract, target, name, metric, f"{title}, {target}", value))
    return results


def saved(gain: Gain) -> dict[str, float | None]:
    values = gain.kept_share.point, gain.over_control.measured.point, gain.over_fallback.measured.point
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
