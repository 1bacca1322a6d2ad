"""From the paper to what may ship: what every artifact was made from, with its hash."""

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from eval.core.artifacts import MANIFEST, read_manifest
from eval.core.gate_file import GateFile
from eval.core.records import PLAIN
from eval.report.format import ARMS
from eval.report.svg import opening

WIDTH, GAP, LEFT = 178, 40, 4  # of a box, between two columns, before the first; in units of the picture
LINE, PAD, BETWEEN = 16, 9, 30  # of a line of text, inside a box, between two boxes
LETTERS = 27  # that fit into a box
SEEDS = 3  # whose hashes are written into a box; the table has all
SHORT = 12  # digits of a hash in the picture


@dataclass(frozen=True)
class Node:
    """A thing that others were made from. `hashes`: seed, or nothing, -> hash."""

    name: str
    title: str
    text: str = ""
    hashes: dict[str, str] = field(default_factory=dict)
    made_from: tuple[str, ...] = ()
    column: int = 0

    @property
    def lines(self) -> list[str]:
        text = textwrap.wrap(self.text, LETTERS, max_lines=4, placeholder=" ...")
        seeds = [f"{name} {digest[:SHORT]}".strip() for name, digest in self.hashes.items()]
        more = [f"and {len(seeds) - SEEDS} more"] if len(seeds) > SEEDS else []
        return [*text, *seeds[:SEEDS], *more]

    @property
    def height(self) -> int:
        return 2 * PAD + LINE * (1 + len(self.lines))


def card(run: Path, gate: GateFile) -> dict[str, Any]:
    """The card of the method, from the manifest of a student; those of earlier versions have none."""
    for seed in gate.seeds:
        folder = run / "students" / "S1" / f"s{seed}"
        if (folder / MANIFEST).is_file():
            method_card: dict[str, Any] = read_manifest(folder).facts.get("method", {})
            return method_card
    return {}


def _hashes(gate: GateFile, arm: str, recipe: str = PLAIN) -> dict[str, str]:
    """s<seed> -> hash of one arm after one recipe; one entry where all seeds share it."""
    places = {f"s{seed}": f"{arm}/s{seed}/{recipe}" for seed in gate.seeds}
    artifacts = gate.provenance.artifacts
    hashes = {name: artifacts[place] for name, place in places.items() if place in artifacts}
    shared = len(hashes) > 1 and len(set(hashes.values())) == 1
    return {"all seeds": next(iter(hashes.values()))} if shared else hashes


def nodes(run: Path, gate: GateFile) -> list[Node]:
    """What lies between the paper and the variants that are recommended, each after what it was made from."""
    method_card = card(run, gate)
    data = Node("data", "documents", "training, validation, shifted", {"": gate.provenance.data})
    method = Node("method", method_card.get("title", gate.method), method_card.get("paper", ""))
    base = Node("B", "base B", ARMS["B"], _hashes(gate, "B"), ("data",), 1)
    models = {side: _named_teacher(run, side) for side in ("T1", "T0")}
    known = [digest for digest in models.values() if digest]
    named = {"all seeds": known[0]} if known else {}
    size = [Node("T", "pretrained teacher", "beside the base", named, (), 1)] if named else []
    made_in = {side: "T" if digest else "B" for side, digest in models.items()}
    teachers = [
        Node("T1", "teacher T1", ARMS["T1"], _hashes(gate, "T1"), (made_in["T1"], "method"), 2),
        Node("T0", "teacher T0", ARMS["T0"], _hashes(gate, "T0"), (made_in["T0"],), 2),
    ]
    students = [
        Node("S1", "student S1", ARMS["S1"], _hashes(gate, "S1"), ("B", "T1"), 3),
        Node("S0", "control S0", ARMS["S0"], _hashes(gate, "S0"), ("B", "T0"), 3),
    ]
    return [method, data, base, *size, *teachers, *students, *_variants(gate)]


def _named_teacher(run: Path, side: str) -> str | None:
    """Hash of the pretrained model that a teacher ran in; None where it ran in the base."""
    manifests = sorted((run / "method" / side).glob(f"s*/{MANIFEST}"))
    return read_manifest(manifests[0].parent).parents.get("teacher") if manifests else None


def _variants(gate: GateFile) -> list[Node]:
    """The recommended variants with their controls; of the uncompressed student there is nothing to add."""
    names = dict.fromkeys(name for name in gate.recommended.values() if name not in (None, PLAIN))
    nodes = []
    for name in names:
        where = " and ".join(target for target, recipe in gate.recommended.items() if recipe == name)
        for arm, title in (("S1", f"recommended on {where}"), ("S0", "the same recipe for the control")):
            hashes = _hashes(gate, arm, str(name))
            nodes.append(Node(f"{arm}/{name}", f"{name} of {arm}", title, hashes, (arm,), 4))
    return nodes


@dataclass(frozen=True)
class Spot:
    node: Node
    x: int
    y: float


def _spots(nodes: list[Node]) -> tuple[dict[str, Spot], float]:
    """Where every box stands, and the height of the picture. A column is spread from top to bottom, a single
    box in the middle: so an arrow that passes a column finds the space between its boxes."""
    columns: dict[int, list[Node]] = {}
    for node in nodes:
        columns.setdefault(node.column, []).append(node)
    heights = {
        c: sum(n.height for n in column_nodes) + BETWEEN * (len(column_nodes) - 1)
        for c, column_nodes in columns.items()
    }
    height, spots = max(heights.values()) + 8, {}
    for column, column_nodes in columns.items():
        spare = height - 8 - heights[column]
        y = 4 + (spare / 2 if len(column_nodes) == 1 else 0)
        for node in column_nodes:
            spots[node.name] = Spot(node, LEFT + column * (WIDTH + GAP), y)
            y += node.height + BETWEEN + spare / max(1, len(column_nodes) - 1)
    return spots, height


def _arrow(start: Spot, end: Spot) -> Markup:
    x1, y1 = start.x + WIDTH, start.y + start.node.height / 2
    x2, y2 = end.x - 5, end.y + end.node.height / 2
    turn = end.x - GAP  # where the last gap begins: up to there the arrow goes straight
    middle = (turn + x2) / 2
    return Markup(
        f'<path class="edge" d="M{x1} {y1:g}H{turn}C{middle:g} {y1:g} {middle:g} {y2:g} {x2} {y2:g}"/>'
        f'<path class="tip" d="M{x2} {y2 - 4:g}l6 4l-6 4z"/>'
    )


def _box(spot: Spot) -> Markup:
    node, x = spot.node, spot.x
    title = textwrap.shorten(node.title, LETTERS - 3, placeholder=" ...") or node.title[:LETTERS]
    rows = [
        f'<text x="{x + PAD}" y="{spot.y + PAD + LINE * (i + 1.75):g}">{escape(line)}</text>'
        for i, line in enumerate(node.lines)
    ]
    top = spot.y + PAD + LINE * 0.75
    return Markup(
        f'<rect x="{x}" y="{spot.y:g}" width="{WIDTH}" height="{node.height}" rx="6"/>'
        f'<text class="name" x="{x + PAD}" y="{top:g}">{escape(title)}</text>{"".join(rows)}'
    )


def graph(nodes: list[Node]) -> Markup:
    """The nodes as boxes in columns, with an arrow from each to what was made from it."""
    spots, height = _spots(nodes)
    arrows = [_arrow(spots[parent], spots[node.name]) for node in nodes for parent in node.made_from]
    width = max(spot.x for spot in spots.values()) + WIDTH + LEFT
    description = "; ".join(
        f"{node.title} from {' and '.join(spots[p].node.title for p in node.made_from)}"
        for node in nodes
        if node.made_from
    )
    top = opening("lineage", "From the paper to the artifacts", description, width, height)
    return top + Markup("").join([*arrows, *map(_box, spots.values())]) + Markup("</svg>")
