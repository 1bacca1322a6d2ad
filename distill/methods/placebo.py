"""A method that does nothing: the gate must never pass it."""

from distill.method import Card, Plain


class Placebo(Plain):
    classifies = True
    card = Card(
        title="Placebo",
        paper="none: the control treatment of a clinical trial",
        claim="no gain at all; the gate must never pass it",
        touches="nothing",
        limits="only for tests of the gate",
    )
