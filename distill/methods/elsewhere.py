"""The method ran elsewhere: what its teacher said stands in a file."""

from distill.method import Card, Plain


class Elsewhere(Plain):
    card = Card(
        title="Made elsewhere",
        paper="none: whoever made the files knows it",
        claim="what stands in `teacher.file` is better than what stands in `teacher.control_file`",
        touches="unknown: only answers to the rows of the study are known",
        limits="nothing here can tell whether both files are of one teacher, with the method and without it",
    )
