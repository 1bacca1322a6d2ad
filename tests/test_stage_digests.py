"""The version of a stage goes with its code: neither a comment nor a new name does work over again."""

import ast

import pytest

from eval.core.artifacts import VERSIONS
from eval.syntax import normalize
from scripts import stage_digests
from scripts.stage_digests import (
    ROOTS,
    code_of,
    compare,
    definitions,
    module_file,
    module_imports,
    read,
    stage_definitions,
    state,
)

CODE = '''
"""A module."""
LIMIT = 3

def scale(values: list[float], *, by: float = 2.0) -> list[float]:
    """Scaled."""
    total = sum(values)  # of all
    def one(value):
        return value * by / total
    if total > LIMIT:
        raise ValueError(f"too much: {total}")
    return [one(value) for value in values]
'''


def same(old, new):
    text = CODE.replace(old, new)
    assert text != CODE
    return normalize(ast.parse(text)) == normalize(ast.parse(CODE))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # of all", "  # of each and all"),
        ('"""Scaled."""', '"""Every value, scaled."""\n    "and a text that stands alone"'),
        ('"""A module."""', ""),
        ("total", "amount"),
        ("value", "number"),
        ("one", "scaled"),
        ("total > LIMIT", "(total>LIMIT)"),
        ("too much", "more than the limit"),
        ("values: list[float]", "values: tuple[float, ...]"),
        ("    total = sum(values)", "    total: float = sum(values)"),
    ],
)
def test_comments_docstrings_local_names_and_texts_of_errors_change_nothing(old, new):
    assert same(old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("value * by / total", "value * total / by"),
        ("LIMIT = 3", "LIMIT = 4"),
        ("by: float = 2.0", "by: float = 2.5"),
        ("by", "factor"),
        ("def scale", "def rescale"),
        ("total > LIMIT", "total >= LIMIT"),
        ("for value in values]", "for value in values[1:]]"),
        ("ValueError", "KeyError"),
    ],
)
def test_another_expression_constant_or_public_name_is_another_code(old, new):
    assert not same(old, new)


def test_two_names_that_are_exchanged_are_another_code():
    one, other = "def f(a, b):\n    return a - b\n", "def f(a, b):\n    return b - a\n"
    assert normalize(ast.parse(one)) != normalize(ast.parse(other))
    shadowed = "def f(a, b):\n    def g(a):\n        c = a\n        return {}\n    return g(b)\n"
    texts = {normalize(ast.parse(shadowed.format(name))) for name in ("a + b", "c + b", "c + a", "b + b")}
    assert len(texts) == 4


def test_every_stage_is_as_recorded_or_has_a_new_version():
    problems = compare(read(), state())
    assert not problems, "\n".join(problems)


def test_a_changed_expression_without_a_new_version_says_what_to_do(monkeypatch):
    """A changed rule of dropping layers reaches the variants, whose pass imports it, and the students."""
    before, name = state(), "distill.models.layers.keep_layers"
    for fresh in (definitions, module_imports, code_of):
        fresh.cache_clear()
    (node,) = definitions("distill.models.layers")["keep_layers"]
    node.body.append(ast.parse("kept = kept[:-1]").body[0])
    try:
        problems = compare(before, state())
        assert {p.split("'")[1] for p in problems} == {"student", "variant"}
        for problem in problems:
            assert f"changed in {name}; " in problem
            assert "raise the version of" in problem
            assert "python scripts/stage_digests.py --write" in problem
        monkeypatch.setitem(VERSIONS, "variant", VERSIONS["variant"]._replace(version=99))
        raised = compare(before, state())
        assert any("its version was raised: run `python scripts/stage_digests.py" in p for p in raised)
    finally:
        for fresh in (definitions, module_imports, code_of):
            fresh.cache_clear()


def reached_text(monkeypatch, root, **modules):
    """The code that `make` of the module `distill.first` reaches, in a project of these modules alone."""
    caches = (module_file, definitions, module_imports, code_of)
    (root / "distill").mkdir(exist_ok=True)
    for name, text in modules.items():
        (root / "distill" / f"{name}.py").write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr(stage_digests, "ROOT", root)
        patch.setitem(ROOTS, "data", ["distill.first.make"])
        for fresh in caches:
            fresh.cache_clear()
        try:
            return "\n".join(stage_definitions("data").values())
        finally:
            for fresh in caches:
                fresh.cache_clear()


@pytest.mark.parametrize(
    "template",
    [
        'LIMITS = {{"a": {0}}}\nLIMITS |= {{"b": 2}}',
        'LIMITS = {{"b": 2}}\nLIMITS |= {{"a": {0}}}',
        'LIMITS = {{"b": 2}}\nLIMITS["a"] = {0}',
        "import sys\nif sys.version_info < (3, 12):\n    LIMITS = {0}\nelse:\n    LIMITS = 2",
        "import sys\nif sys.version_info < (3, {0}):\n    LIMITS = 1\nelse:\n    LIMITS = 2",
        "try:\n    LIMITS = 2\nexcept ImportError:\n    LIMITS = {0}",
        "import sys\nif sys.platform:\n    def rule():\n        return {0}\nLIMITS = rule()",
        "for LIMITS in range({0}):\n    pass",
    ],
)
def test_every_statement_that_defines_a_name_counts(monkeypatch, tmp_path, template):
    code = template + "\ndef make():\n    return LIMITS\n"
    texts = [reached_text(monkeypatch, tmp_path, first=code.format(number)) for number in (1, 7)]
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    "template",
    [
        "import distill.second\ndef make():\n    return distill.second.rule()\n",
        "import distill.second\nimport distill.third\ndef make():\n    return distill.second.rule()\n",
        "import distill.third\nimport distill.second\ndef make():\n    return distill.second.rule()\n",
        "import distill.second as other\ndef make():\n    return other.rule()\n",
        "def make():\n    import distill.second\n    return distill.second.rule()\n",
        "import json\nfrom distill.second import rule\ndef make():\n    return json.dumps(rule())\n",
    ],
)
def test_every_kind_of_import_is_followed(monkeypatch, tmp_path, template):
    texts = [
        reached_text(
            monkeypatch,
            tmp_path,
            first=template,
            second=f"def rule():\n    return {number}\n",
            third="X = 1\n",
        )
        for number in (1, 7)
    ]
    assert texts[0] != texts[1]


def test_a_stage_is_what_it_reaches_and_no_more():
    reached = {stage: set(stage_definitions(stage)) for stage in ROOTS}
    assert set(ROOTS) == set(VERSIONS)
    loss, codec = "distill.losses.divergences.distillation_loss", "distill.teachers.cache.write_shards"
    assert {stage for stage, names in reached.items() if loss in names} == {"base", "method", "student"}
    assert {stage for stage, names in reached.items() if codec in names} == {"targets"}
    assert not any(name.startswith("eval.core.errors") for names in reached.values() for name in names)
