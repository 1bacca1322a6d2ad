"""The evidence that a row of the page opens to: every part of the gate, and whatever stands behind it.

A page may hold ten thousand of these, so they are put together here and not by a template. Whatever comes
from users is escaped.
"""

import html
from collections.abc import Iterable, Iterator

from markupsafe import Markup

from eval.core.gate_file import Estimate, GateFile, KeptShare, Load, Number, Quality, Rate, Variant
from eval.report.budget_table import bound_note
from eval.report.format import SYMBOLS, TIMES, estimate_cell, fixed, part_title, short_stamp, significant

Column = tuple[str, str]  # title, and the class of its cells: none for figures, `text`, `text long`
BADGES = {
    word: Markup(
        f'<span class="verdict {word}"><span class="symbol" aria-hidden="true">{symbol}</span>{word}</span>'
    )
    for word, symbol in SYMBOLS.items()
}


def safe(text: str) -> str:
    """Text as HTML; what is HTML already stays. Of many short texts markupsafe is slow."""
    return text if isinstance(text, Markup) else html.escape(text)


def table(caption: str, columns: list[Column], rows: Iterable[list[str]]) -> str:
    """One table; the first cell of a row is its head."""
    shades = [f' class="{shade}"' if shade else "" for _, shade in columns]
    heads = "".join(
        f'<th scope="col"{shade}>{safe(title)}</th>'
        for (title, _), shade in zip(columns, shades, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row">{safe(first)}</th>'
        + "".join(f"<td{s}>{safe(text)}</td>" for s, text in zip(shades[1:], rest, strict=True))
        + "</tr>"
        for first, *rest in rows
    )
    top = f"<caption>{safe(caption)}</caption><thead><tr>{heads}</tr></thead>"
    return f"<table>{top}<tbody>{body}</tbody></table>"


def bounds(low: float | None, high: float | None, digits: int = 3) -> str:
    return f"[{significant(low, digits)}, {significant(high, digits)}]"


def share(value: Estimate | KeptShare | None) -> str:
    cell = estimate_cell(value)
    return " ".join([cell.main, *cell.notes])


def parts(v: Variant, alpha: float) -> str:
    columns = [("part", "text"), ("verdict", "text"), ("estimate", ""), ("bounds", ""), ("limit", "")]
    rows = (
        [
            part_title(part.name),
            BADGES[part.verdict],
            significant(part.estimate, 4),
            bounds(part.low, part.high, 4),
            f"{part.limit:.6g}",
            part.unit,
            significant(part.p, 2),
            significant(part.p_fail, 2),
            part.reason,
        ]
        for part in v.parts
    )
    rest = [("unit", "text"), ("p to pass", ""), ("p to fail", ""), ("reason", "text long")]
    return table(f"Parts of the gate, bounds one-sided at {alpha:g}", [*columns, *rest], rows)


def chain(v: Variant) -> str:
    names = {"teacher": "the teacher's gain"}
    rows = [[link.step, names.get(link.over, link.over), share(link.share)] for link in v.chain]
    rows.append(["together", names["teacher"], share(v.kept_share)])
    if v.kept_share.bootstrap_low is not None:
        low, high = fixed(v.kept_share.bootstrap_low), fixed(v.kept_share.bootstrap_high)
        rows.append(["cross-check", "bootstrap", f"[{low}, {high}]"])
    rows.append(["compression alone", "the student's gain", share(v.kept_of_student)])
    if v.holm_p is not None:
        rows.append(["picked among several", "p after Holm", significant(v.holm_p, 2)])
    columns = [("step", "text"), ("of", "text"), ("share", "")]
    return table("Gain retained, link by link; the product is the share of the gain retained", columns, rows)


def slices(v: Variant, documents: dict[str, int], more: Quality | None) -> str:
    """Scores and shares of the gain retained, and what else is known by slice."""
    metrics = {"next token right": more.accuracy, "calibration error": more.calibration_error} if more else {}
    metrics = {title: values for title, values in metrics.items() if values}
    columns = [("slice", "text"), ("documents", ""), ("bits/byte", ""), ("share of the gain retained", "")]
    columns += [*((title, "") for title in metrics), ("verdict", "text")]
    rows = []
    for name, score in v.scores.items():
        one = v.slices.get(name)
        word = BADGES[one.verdict] if one and one.verdict else "not asked" if one else "parts above"
        figures = [share(values.get(name)) for values in metrics.values()]
        retained = share(one.kept_share if one else v.kept_share)
        rows.append([name, str(documents[name]), share(score), retained, *figures, word])
    return table("Slices", columns, rows)


def costs(v: Variant, cost: dict[str, Number], alpha: float) -> str:
    columns = [("quantity", "text"), ("value", ""), ("bounds", ""), ("unit", "text"), ("against", "text")]
    rows = (
        [
            name.replace("_", " "),
            f"needs {n.needs} requests" if n.value is None and n.needs else significant(n.value),
            bounds(n.lower, n.upper),
            n.unit,
            _against(n, v.recipe),
            str(n.requests),
            str(n.processes),
        ]
        for name, n in cost.items()
    )
    title = f"Measured on {v.target}, bounds one-sided at {alpha:g}"
    return table(title, [*columns, ("timed", ""), ("processes", "")], rows)


def _against(number: Number, recipe: str) -> str:
    ratio = number.relative
    if ratio is None or ratio.of == recipe:
        return ""
    return f"{significant(ratio.point)} {TIMES} {ratio.of} {bounds(ratio.lower, ratio.upper)}"


def load(measured: Load) -> str:
    """What was measured at every rate of requests."""
    knee, tokens = significant(measured.knee_rps.value), significant(measured.knee_tokens_per_s.value)
    title = f"Under load for {measured.seconds:g} s per rate and process"
    title += f"; knee at {knee} requests/s, {tokens} tokens/s"
    if measured.slo_ms is not None:
        title += f", for p95 within {measured.slo_ms:g} ms"
    titles = ["rate asked", "arrived", "done, requests/s", "tokens/s", "first token p95, ms", "p50, ms"]
    titles += ["p95, ms", "p99, ms", "keeps up"]
    return table(title, [(title, "") for title in titles], map(_rate, measured.rates))


def _rate(rate: Rate) -> list[str]:
    rates = [rate.offered_rps, rate.throughput_rps, rate.throughput_tokens_per_s]
    numbers = [*rates, rate.ttft_p95, rate.p50, rate.p95, rate.p99]
    figures = [f"{significant(n.value)} {bound_note(n)}".rstrip() for n in numbers]
    return [f"{rate.rate:g}", *figures, f"{rate.follows} of {rate.p50.processes}"]


def hashes(v: Variant) -> str:
    artifacts = {"S1": v.hashes.artifact, "S0": v.hashes.control}
    rows = [
        [f"{arm} after {v.recipe}, seed {seed}", text]
        for arm, by_seed in artifacts.items()
        for seed, text in by_seed.items()
    ]
    rows += [[path, text] for path, text in v.hashes.records.items()]
    return table("Hashes", [("what", "text"), ("sha256", "text hash")], rows)


def _pieces(gate: GateFile, v: Variant) -> Iterator[str]:
    alpha = gate.budget["alpha"]
    if v.how:
        yield f"<p>To measure what is missing: <code>{safe(v.how)}</code></p>"
    yield parts(v, alpha)
    yield f'<div class="beside">{chain(v)}{slices(v, gate.documents, gate.quality.get(v.recipe))}</div>'
    if v.cost:
        yield costs(v, v.cost, alpha)
    if v.load:
        yield load(v.load)
    yield hashes(v)


def render_evidence(gate: GateFile, v: Variant) -> Markup:
    """The evidence for one variant on one target, as HTML."""
    label = safe(f"Evidence for {v.recipe} on {v.target}")
    inner = "".join(_pieces(gate, v)).replace("</caption>", f"; {safe(short_stamp(gate))}</caption>")
    return Markup(f'<div class="inner" role="region" tabindex="0" aria-label="{label}">{inner}</div>')
