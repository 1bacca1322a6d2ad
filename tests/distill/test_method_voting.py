"""Votes and best-of-n by hand over the same texts; what is outside decides the teacher's key."""

from collections import Counter

import pytest

from distill.checks import check_method
from distill.method import plain_texts
from distill.methods.voting import last_word
from distill.models.generation import make_prompts
from eval.core.errors import UserError
from eval.core.sections import Generation
from eval.core.study import load_study
from eval.engines.torch import load_model
from tests.distill.method_helpers import count_of_e, is_even, make
from tests.helpers import tiny_study

GENERATION = Generation(prompt_tokens=5, new_tokens=6)
HELPERS = "tests.distill.method_helpers"
LAST_WORD = "distill.methods.voting.last_word"


@pytest.mark.parametrize("rule", ["answer", "score"])
def test_the_winner_is_that_by_hand_among_texts_of_which_the_first_is_the_controls(
    rule, context, rows, tokenizer
):
    teacher, prompts = load_model(context.bases[0]), make_prompts(rows[:6], GENERATION)
    path = f"{HELPERS}.is_even" if rule == "answer" else f"{HELPERS}.count_of_e"
    method = make("voting", samples=5, **{rule: path})
    with method.attached(teacher, context):
        taught = method.write(teacher, prompts, GENERATION, 3)
        assert method.write(teacher, prompts, GENERATION, 3) == taught
        assert method.write(teacher, prompts, GENERATION, 4) != taught
    drawn = [plain_texts(teacher, prompts, GENERATION, seed) for seed in (3, "3 1", "3 2", "3 3", "3 4")]
    assert drawn[0] == method.control().write(teacher, prompts, GENERATION, 3)
    for place, chosen in enumerate(taught):
        texts = [some[place] for some in drawn]
        read = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in texts]
        if rule == "score":
            best = max(count_of_e("", text) for text in read)
            assert chosen == next(
                t for t, text in zip(texts, read, strict=True) if count_of_e("", text) == best
            )
            continue
        answers = [is_even(text) for text in read]
        most = max(Counter(answer for answer in answers if answer is not None).values())
        wins = [a for a in dict.fromkeys(answers) if a is not None and answers.count(a) == most]
        assert chosen == texts[answers.index(wins[0])]
    assert taught != drawn[0]


def test_other_code_of_the_function_is_another_teacher(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    identities = []
    for name, code in (
        ("one", "return len(text)"),
        ("two", "return len(text)  # why"),
        ("three", "return 1"),
    ):
        (tmp_path / f"verify_{name}.py").write_text(f"def score(prompt, text):\n    {code}\n")
        identities.append(make("voting", score=f"verify_{name}.score").identity[-1])
    assert identities[0] == identities[1] != identities[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of `answer` and `score`"),
        ({"answer": "no.such.function"}, "is it on PYTHONPATH"),
        ({"answer": f"{HELPERS}.nothing"}, "give a function of a module"),
    ],
)
def test_a_rule_that_is_missing_or_cannot_be_found_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make("voting", **settings)


def test_without_texts_or_without_chance_there_is_nothing_to_choose(tmp_path, context, rows):
    choice = {"name": "voting", "settings": {"answer": LAST_WORD}}
    study = load_study(tiny_study(tmp_path, method=choice))
    with pytest.raises(UserError, match=r"method voting: .* set targets\.source: sequence"):
        check_method(study)
    method, teacher = make("voting", answer=LAST_WORD), load_model(context.bases[0])
    with pytest.raises(UserError, match="temperature: 0, but voting needs texts that differ"):
        method.write(teacher, make_prompts(rows[:1], GENERATION), Generation(temperature=0), 0)


def test_the_last_word_stands_without_its_punctuation():
    assert [last_word(text) for text in ("it is 12.", "so:\nyes!", " ", "")] == ["12", "yes", None, None]
