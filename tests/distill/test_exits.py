"""Early exits: each is the model cut after that layer, in every family; in training alone, and checked early."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from distill.checks import check_models
from distill.models.layers import keep_layers
from distill.trainer.loop import build_module, train
from distill.trainer.module import final_norm
from eval.core.documents import Row, collate, join_rows
from eval.core.errors import UserError
from eval.core.sections import Exits, Optimizer, Train
from eval.core.study import load_study
from tests.distill.test_families import FAMILIES
from tests.distill.test_loop import rows
from tests.helpers import run, tiny_model, tiny_study

PLAIN = Train(rows=4)
ONE = Train(rows=4, exits=Exits(layers=[1], weight=0.25))
ROWS = [
    Row("a", "x", 0, [0, 5, 9, 11, 30, 7], given=2),
    Row("b", "x", 0, [0, 8, 9]),
    Row("c", "x", 0, [0, 4]),
]


def loss(model, config, some):
    return float(build_module(model, some[0], config, None, 0).train()(collate(some, 0), None).detach())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exit_is_the_model_cut_after_that_layer(family, packed):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()
    some = [join_rows(ROWS)] if packed else ROWS
    cut = deepcopy(model)
    keep_layers(cut, [0])
    for one in (model, cut):
        for module in one.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    wanted = loss(model, PLAIN, some) + 0.25 * loss(cut, PLAIN, some)
    assert loss(model, ONE, some) == pytest.approx(wanted, rel=1e-5)


def test_validation_has_the_last_layer_alone_and_exits_reach_the_first():
    module = build_module(tiny_model(), ROWS[0], ONE, None, 0)
    batch = collate(ROWS, 0)
    plain = build_module(tiny_model(), ROWS[0], PLAIN, None, 0)
    assert float(module.eval()(batch, None).detach()) == float(plain.eval()(batch, None).detach())
    gradients = []
    for each in (module, plain):
        each.train()(batch, None).backward()
        gradients.append(each.model.model.layers[0].mlp.up_proj.weight.grad)
    assert not torch.equal(*gradients)
    assert len(module.own_weights) == 0, "an exit has no weights of its own"


def test_it_is_exact_over_accumulation_and_in_bf16_near_it(tmp_path):
    trained = []
    for name, update in {"one": {}, "two": {"accumulate": 2}, "bf16": {"precision": "bf16"}}.items():
        config = ONE.model_copy(update={"steps": 3, "optimizer": Optimizer(lr=0.01), **update})
        model = tiny_model()
        names = [*model.state_dict()]
        train(model, rows(), config, pad=0, seed=0, teacher=None, scratch=tmp_path / name)
        assert [*model.state_dict()] == names
        trained.append(model.state_dict())
    for name in trained[0]:
        torch.testing.assert_close(trained[0][name], trained[1][name], atol=2e-5, rtol=0)
        torch.testing.assert_close(trained[0][name], trained[2][name], atol=0.05, rtol=0)


def test_the_norm_is_found_by_what_runs_and_a_model_with_more_there_is_refused():
    model, batch = tiny_model(), collate(ROWS, 0)
    assert final_norm(model, batch) is model.model.norm
    model.model.norm = nn.Identity()
    assert isinstance(final_norm(model, batch), nn.Identity)
    model.model.norm = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64))
    assert final_norm(model, batch) is model.model.norm
    plain = model.model.forward

    def doubled(*inputs, **named):
        output = plain(*inputs, **named)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    model.model.forward = doubled
    with pytest.raises(UserError, match="more than a norm stands between its last layer and its output"):
        final_norm(model, batch)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--train.exits.layers", "[2]"],
            r"train\.exits\.layers: 2 is no middle layer of 2; choose .* 1 to 1",
        ),
        (["--base.train.exits.layers", "[3]"], r"base\.train\.exits\.layers: 3 is no middle layer of 2"),
        (["--ce_train.exits.layers", "[5]"], r"ce_train\.exits\.layers: 5 is no middle layer of 2"),
        (
            ["--method", "{name: heads, settings: {train: {exits: {layers: [1, 2]}}}}"],
            r"method\.settings\.train\.exits\.layers: 2 is no middle layer",
        ),
        (
            ["--train.exits.layers", "[1]", "--student.start", "every", "--student.layers", "1"],
            "leave exits out",
        ),
        (["--train.exits.layers", "[1, 1]"], "give each layer once"),
        (["--train.exits.layers", "[]"], r"train\.exits\.layers"),
        (
            ["--train.exits.layers", "[0]"],
            r"train\.exits\.layers\.0: 0; expected more than 0",
        ),
    ],
)
def test_layers_that_are_none_are_refused_before_anything_is_made(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        check_models(load_study(tiny_study(tmp_path), words))


def test_a_wrong_layer_ends_the_command_in_one_line(tmp_path):
    done = run("distill/train.py", "--config", tiny_study(tmp_path), "--train.exits.layers", "[7]")
    assert done.returncode == 3
    assert "train.exits.layers: 7 is no middle layer of 2" in done.stderr
    assert not [*tmp_path.rglob("base/s0")]
