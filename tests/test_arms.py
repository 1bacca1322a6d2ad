"""What of a study one arm has otherwise: the training of CE, and the arms that `absorb compare` trains."""

import json

import pytest
import yaml

from eval.core.errors import UserError
from eval.core.study import arm_studies, load_study, study_text


def test_ce_is_trained_as_the_students_but_for_what_is_named(tmp_path):
    own = ["--ce_train.optimizer.lr", "0.003", "--ce_train.optimizer.lr_rest", "null"]
    plain, study = load_study("default"), load_study("default", own)
    optimizer = study.train.optimizer.model_copy(update={"lr": 0.003, "lr_rest": None})
    assert study.training("CE") == study.train.model_copy(update={"optimizer": optimizer})
    assert study.training("S1") == study.training("S0") == study.train == plain.training("CE")
    assert (plain.own_training_text("CE"), study.own_training_text("S1")) == ("", "")
    (tmp_path / "study.yaml").write_text(study_text(study))
    assert load_study(tmp_path / "study.yaml") == study
    longer = load_study(tmp_path / "study.yaml", ["--train.epochs", "9"])
    assert longer.training("CE").epochs == 9, "a change of `train` reaches CE in a run folder too"
    (tmp_path / "study.yaml").write_text(study_text(plain))
    assert load_study(tmp_path / "study.yaml", own) == study
    assert load_study("default", ["--ce_train", "{}"]) == plain


ARM = {"fewer": {"method": {"settings": {"members": 2}}}, "soft": {"train": {"loss": {"weight": 1.0}}}}


def test_arms_are_the_study_again_but_for_what_they_name(tmp_path):
    plain = load_study("default", ["--ce_train.optimizer.lr", "0.003"])
    study = load_study("default", ["--ce_train.optimizer.lr", "0.003", f"--arms={json.dumps(ARM)}"])
    assert study.hash() == plain.hash(), "no model of the study depends on them"
    assert "arms" not in yaml.safe_load(study_text(plain))
    fewer, soft = arm_studies(study)
    assert (fewer.name, soft.name) == ("fewer", "soft")
    assert fewer.method.settings == {**study.method.settings, "members": 2}
    assert soft.train == study.train.model_copy(update={"loss": soft.train.loss})
    assert soft.train.loss == study.train.loss.model_copy(update={"weight": 1.0})
    same = {"name", "recipes", "method", "train", "arms"}
    for arm in (fewer, soft):
        assert arm.model_dump(exclude=same) == study.model_dump(exclude=same)
        assert arm.training("CE") == study.training("CE"), "a rival of S1 is no other CE"
        assert arm.arms == {}
        (tmp_path / "study.yaml").write_text(study_text(arm))
        assert load_study(tmp_path / "study.yaml") == arm
    free = load_study("default", [f"--arms={json.dumps({'deep': {'train': {'exits': {'layers': [1]}}}})}"])
    (deep,) = arm_studies(free)
    (tmp_path / "study.yaml").write_text(study_text(deep))
    assert load_study(tmp_path / "study.yaml").training("CE") == free.train


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"seeds": [3]}, r"arms\.x: key: 'seeds'; accepted: method, student, targets, teacher, train"),
        ({"metod": {}}, "did you mean 'method'"),
        (
            {"train": {"loss": {"wieght": 1}}},
            r"arms\.x: unknown key train\.loss\.wieght.*did you mean 'weight'",
        ),
        ({"train": {"steps": 9}}, r"arms\.x\.train\.steps: 9, not None as in the study; leave it: arms have"),
        ({"train": {"rows": 2}}, r"arms\.x\.train\.rows: 2, not 4"),
    ],
)
def test_an_arm_that_is_no_change_of_the_method_or_its_training_is_refused(arm, message):
    with pytest.raises(UserError, match=message):
        arm_studies(load_study("default", [f"--arms={json.dumps({'x': arm})}"]))


def test_the_name_of_an_arm_is_one_of_a_folder():
    with pytest.raises(UserError, match=r"arms\.\.\./other"):
        load_study("default", ['--arms={"../other": {}}'])
