"""The training step: one loss and one gradient over accumulation, masks in place, runs that continue."""

import json
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from distill.losses.teacher_output import Dense
from distill.models.lora import add_adapters
from distill.trainer.distributed import gradient_norm
from distill.trainer.loading import step_input
from distill.trainer.loop import (
    accelerator,
    batch_loss,
    check_train,
    row_order,
    set_memory_and_attention,
    step_loss,
    train,
)
from distill.trainer.module import DistillationModule
from eval.core.documents import Row, collate
from eval.core.errors import UserError
from eval.core.sections import Optimizer, Student, Train
from tests.helpers import ROOT, run, tiny_model


def rows(count=8, longest=20):
    """Rows of very unequal lengths: a mean per micro-batch would weight the short ones more."""
    generator = torch.Generator().manual_seed(0)
    lengths = [2 + (i * 7) % (longest - 1) for i in range(count)]
    return [
        Row(f"d{i}", "code", 0, [0, *torch.randint(1, 300, (n,), generator=generator).tolist()])
        for i, n in enumerate(lengths)
    ]


def row_teacher(batch):
    """A teacher whose answer for a row does not depend on the batch around it."""
    return Dense(row_log_probs(batch)[:, :-1][batch.mask])


def row_log_probs(batch):
    """[B, T, V] log-probabilities that the tokens of a row decide."""
    logits = torch.zeros(*batch.input_ids.shape, 320)
    for i, (ids, mask) in enumerate(zip(batch.input_ids, batch.attention_mask, strict=True)):
        generator = torch.Generator().manual_seed(int(ids[mask.bool()].sum()))
        logits[i, : int(mask.sum())] = torch.randn(int(mask.sum()), 320, generator=generator)
    return torch.log_softmax(logits, -1)


@pytest.mark.parametrize("teacher", [None, row_teacher])
def test_accumulation_changes_neither_loss_nor_gradient(teacher):
    results = []
    for accumulate in (1, 8):
        model = tiny_model()
        config, acc = Train(rows=8, accumulate=accumulate), accelerator()
        loss = step_loss(
            DistillationModule(model, config), step_input(rows(8), config, acc, 0), teacher, config, acc
        )
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        results.append((loss, float(norm)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


SCRIPT = """
import json, sys, torch
sys.path[0] = sys.argv[1]
from distill.trainer.module import DistillationModule
from distill.trainer.loading import step_input
from distill.trainer.loop import accelerator, step_loss
from eval.core.sections import Train
from tests.distill.test_loop import row_teacher, rows
from tests.helpers import tiny_model

acc, results = accelerator(), []
for accumulate in (1, 4):
    config = Train(rows=8, accumulate=accumulate)
    model = acc.prepare(DistillationModule(tiny_model(), config))
    loss = step_loss(model, step_input(rows(8), config, acc, 0), row_teacher, config, acc)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    results.append([acc.num_processes, loss, float(norm)])
if acc.is_main_process:
    print("RESULTS", json.dumps(results))
"""


def results_of_one_and_two(program, folder):
    """What a program prints as RESULTS in one process, then in two; its arguments: the root, a scratch folder."""
    script, results = folder / "program.py", []
    script.write_text(program)
    for processes in ("1", "2"):
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, script, ROOT]
        done = run(*words, folder / processes)
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stdout.splitlines() if line.startswith("RESULTS"))
        results += json.loads(line.removeprefix("RESULTS"))
    return results


@pytest.mark.slow
def test_processes_change_neither_loss_nor_gradient(tmp_path):
    """Two gloo processes, whose shares of the step have different numbers of tokens, against one."""
    results = results_of_one_and_two(SCRIPT, tmp_path)
    assert [processes for processes, _, _ in results] == [1, 1, 2, 2]
    for _, loss, norm in results[1:]:
        assert loss == pytest.approx(results[0][1], rel=1e-6)
        assert norm == pytest.approx(results[0][2], rel=1e-5)


DROPOUT = """
import json, sys
from pathlib import Path
sys.path[0] = sys.argv[1]
import torch
from accelerate.utils import gather_object
from distill.models.lora import add_adapters
from distill.trainer.loop import accelerator, train
from eval.core.documents import Row
from eval.core.sections import Student, Train
from tests.helpers import tiny_model

acc, seen = accelerator(), []
config = Student(tuning="lora", rank=2, dropout=0.5, modules=["q_proj"])
student = add_adapters(tiny_model(), config, 0, device=acc.device, dtype=torch.float32)
drop = next(m for m in student.model.modules() if isinstance(m, torch.nn.Dropout))
drop.register_forward_hook(lambda m, args, out: seen.append((out == 0).flatten().tolist()) if m.training else None)
same = [Row(f"d{i}", "x", 0, [0, 1, 2, 3, 4, 5, 6, 7, 8]) for i in range(4)]
train(student.model, same, Train(rows=2, steps=2), pad=0, seed=0, teacher=None, scratch=Path(sys.argv[2]))
every = gather_object([seen])
if acc.is_main_process:
    print("RESULTS", json.dumps(every))
"""


@pytest.mark.slow
def test_dropout_differs_between_processes_and_that_of_the_first_is_that_of_one(tmp_path):
    """The same mask on every process would drop the same units of all their rows."""
    alone, first, second = results_of_one_and_two(DROPOUT, tmp_path)
    assert first[0] != second[0]
    assert first[0] == alone[0][: len(first[0])], "a single process keeps its random numbers"


class Table(torch.nn.Module):
    """A model whose logits are parameters: the gradient of each position can be read off."""

    def __init__(self, length):
        super().__init__()
        self.config = LlamaConfig(hidden_size=320, vocab_size=320)
        self._no_split_modules = []
        self.table = torch.nn.Parameter(torch.randn(1, length, 320))
        self.lm_head = torch.nn.Linear(320, 320, bias=False)
        torch.nn.init.eye_(self.lm_head.weight)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, **inputs):
        return SimpleNamespace(logits=self.lm_head(self.table))


def test_teacher_at_p_minus_1_teaches_token_p():
    """A change of the teacher at one position reaches that position of the student and no other."""
    torch.manual_seed(0)
    model, batch = Table(8), collate([Row("d", "code", 0, list(range(10, 18)))], 0)
    module = DistillationModule(model, Train(rows=1))
    plain = torch.log_softmax(torch.randn(1, 8, 320), -1)

    def gradient(place):
        changed = plain.clone()
        if place is not None:
            changed[0, place] = torch.log_softmax(torch.arange(320.0) / 50, -1)
        model.zero_grad()
        batch_loss(module, batch, lambda _: Dense(changed[:, :-1][batch.mask])).backward()
        return model.table.grad.clone()[0]

    before = gradient(None)
    assert before[7].abs().max() == 0, "the last position predicts nothing"
    for place in (0, 3, 6):
        moved = (gradient(place) - before).abs().amax(-1)
        assert moved.nonzero().flatten().tolist() == [place]
    assert torch.equal(gradient(7), before)
    # With labels alone, position p - 1 is pulled towards token p.
    model.zero_grad()
    batch_loss(module, batch, None).backward()
    assert model.table.grad[0, :7].argmin(-1).tolist() == list(range(11, 18))


@torch.no_grad()
def test_padding_is_no_token():
    module, both = DistillationModule(tiny_model(), Train(rows=2)), rows(2)
    together = batch_loss(module, collate(both, 0), row_teacher)
    apart = sum(batch_loss(module, collate([row], 0), row_teacher) for row in both)
    assert float(together) == pytest.approx(float(apart), rel=1e-5)


def test_every_epoch_is_a_permutation_and_the_seed_decides():
    order = [i for step in row_order(12, 6, 4, seed=3) for i in step]
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12))
    assert order[:12] != order[12:]
    assert row_order(12, 6, 4, seed=3) == row_order(12, 6, 4, seed=3) != row_order(12, 6, 4, seed=4)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"precision": "tf32"}, "train.precision: tf32 needs CUDA, the device is cpu; take fp32"),
        ({"precision": "auto"}, "train.precision: auto; give fp32, tf32 or bf16"),
    ],
)
def test_what_cannot_be_trained_with_here_is_refused(tmp_path, settings, error):
    with pytest.raises(UserError, match=error):
        check_train(Train(**settings), torch.device("cpu"))


@pytest.mark.parametrize("teacher", [None, row_teacher])
def test_activations_computed_again_give_the_same_weights(tmp_path, teacher):
    weights = []
    for again in (False, True):
        config = Train(rows=4, steps=4, gradient_checkpointing=again, optimizer=Optimizer(lr=0.01))
        model = tiny_model()
        train(model, rows(), config, pad=0, seed=0, teacher=teacher, scratch=tmp_path / str(again))
        assert not model.is_gradient_checkpointing
        weights.append(model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=1e-6, rtol=1e-5)


def test_activations_are_not_kept_between_layers(tmp_path):
    """Counted in tensors that autograd saves: with checkpointing only the inputs of layers are."""
    kept = []
    for again in (False, True):
        model, sizes = tiny_model(), []
        config = Train(rows=4, gradient_checkpointing=again)
        set_memory_and_attention(model, config)
        module = DistillationModule(model, config).train()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            batch_loss(module, collate(rows(4), 0), None)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_computed_as_asked(tmp_path, attention):
    model = tiny_model()
    train(
        model, rows(), Train(rows=4, steps=1, attention=attention), pad=0, seed=0, teacher=None, scratch=tmp_path
    )  # fmt: skip
    assert model.config._attn_implementation == attention


def test_attention_that_is_not_there_is_refused(tmp_path):
    config = Train(rows=4, steps=1, attention="flash_attention_2")
    with pytest.raises(UserError, match=r"train: LlamaForCausalLM: .*leave train.attention"):
        train(tiny_model(), rows(), config, pad=0, seed=0, teacher=None, scratch=tmp_path)


class Stopped(Exception):
    pass


def with_dropout():
    """A student whose adapters drop units; of the model itself, because the loop trains that."""
    config = Student(tuning="lora", rank=2, dropout=0.5)
    return add_adapters(tiny_model(), config, 0, device=torch.device("cpu"), dtype=torch.float32).model


@pytest.mark.parametrize("again", [False, True])
def test_dropout_with_activations_computed_again_and_a_stop(tmp_path, again):
    """The units that are dropped are the same ones when a layer is computed again, and after a restart."""
    weights = []
    for folder, checkpointing, stop_at in (("kept", False, None), ("other", True, 3 if again else None)):
        config = Train(rows=4, steps=5, checkpoint_every=2, gradient_checkpointing=checkpointing)
        how = {"pad": 0, "seed": 1, "teacher": row_teacher, "scratch": tmp_path / folder}

        def report(step, stop_at=stop_at):
            if step.number == stop_at:
                raise Stopped

        model = with_dropout()
        try:
            train(model, rows(), config, report=report, **how)
        except Stopped:
            model = with_dropout()
            train(model, rows(), config, **how)
        weights.append(model.state_dict())
    assert any("lora_B" in name and weight.any() for name, weight in weights[0].items())
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


@pytest.mark.parametrize(
    ("name", "precision"),
    [("muon", "fp32"), ("adamw", "fp32"), ("adamw", "bf16"), ("adamw_8bit", "fp32")],
)
def test_a_stopped_run_continues_to_the_same_weights(tmp_path, name, precision):
    config = Train(
        rows=4,
        steps=7,
        checkpoint_every=2,
        optimizer=Optimizer(name=name, lr=0.02, weight_decay=0.1),
        precision=precision,
    )

    def finish(folder, stop_at):
        model = tiny_model()

        def report(step):
            if step.number == stop_at:
                raise Stopped

        how = {"pad": 0, "seed": 1, "teacher": row_teacher, "scratch": folder}
        try:
            curve = train(model, rows(), config, report=report, **how)
        except Stopped:
            model = tiny_model(seed=9)  # what it holds now does not matter
            curve = train(model, rows(), config, **how)
        return curve, model.state_dict()

    whole_curve, whole = finish(tmp_path / "whole", None)
    curve, parts = finish(tmp_path / "parts", 5)
    assert curve == whole_curve
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["step-6"]


def test_a_point_of_the_curve_is_the_mean_of_the_steps_since_the_last_one(tmp_path, monkeypatch):
    """Also where a run was stopped between two points; logs say the same."""
    monkeypatch.setattr("distill.trainer.loop.CURVE_POINTS", 2)
    config, losses, norms, logged = Train(rows=4, steps=7, checkpoint_every=2), {}, {}, {}

    def measured(acc, norm):
        norms[len(losses) + 1] = gradient_norm(acc, norm)
        return norms[len(losses) + 1]

    monkeypatch.setattr("distill.trainer.loop.gradient_norm", measured)

    def report(step):
        losses[step.number] = step.loss
        if step.number == 5 and not stopped:
            stopped.append(True)
            del losses[5]  # made again from the checkpoint of step 4
            raise Stopped

    stopped: list[bool] = []
    how = {"pad": 0, "seed": 1, "teacher": row_teacher, "scratch": tmp_path, "report": report}
    how["log"] = lambda step, values: logged.update({step: [values["loss"], values["gradient_norm"]]})
    with pytest.raises(Stopped):
        train(tiny_model(), rows(), config, **how)
    curve = train(tiny_model(seed=9), rows(), config, **how)
    points = {3: (1, 2, 3), 6: (4, 5, 6), 7: (7,)}
    means = {end: [mean(each[i] for i in some) for each in (losses, norms)] for end, some in points.items()}
    assert dict(curve) == {step: loss for step, (loss, _) in logged.items()}
    for end, values in logged.items():
        assert values == pytest.approx(means[end])
    assert logged.keys() == means.keys()


def test_a_loss_that_is_not_finite_stops_with_step_and_rows(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"loss at step 1: nan, must be finite; .*rows d\d+#0"):
        train(model, rows(), Train(rows=4), pad=0, seed=0, teacher=None, scratch=tmp_path)


def test_more_rows_a_step_than_there_are_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.rows: 16"):
        train(tiny_model(), rows(8), Train(rows=16), pad=0, seed=0, teacher=None, scratch=tmp_path)


def test_training_learns(tmp_path):
    config = Train(rows=4, steps=30, optimizer=Optimizer(name="muon", lr=0.02, lr_rest=0.01))
    curve = train(tiny_model(), rows(), config, pad=0, seed=0, teacher=None, scratch=tmp_path)
    assert curve[-1][1] < 0.8 * curve[0][1]
