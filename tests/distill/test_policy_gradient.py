"""The reverse KL as a policy gradient: exact over a vocabulary that can be enumerated, decided by the seed, resumed."""

from itertools import product

import pytest
import torch

from distill.losses.chunked import chunked_loss
from distill.losses.divergences import distillation_loss
from distill.losses.teacher_output import Dense, States
from distill.models.lm_head import Head
from distill.pipeline import base_jobs, make_student, prepare_inputs, student_jobs, teacher_jobs
from distill.teachers.target_source import check_target_source, target_source_inputs
from distill.trainer.loop import accelerator, train
from distill.trainer.rollout import OnPolicy
from eval.core.documents import Row
from eval.core.errors import UserError
from eval.core.jobs import run_in_turn
from eval.core.sections import Generation, Loss, Train
from eval.core.study import load_study, make_run_folder
from eval.engines.torch import load_model
from tests.helpers import tiny_model, tiny_study, tiny_tokenizer

GRADIENT = Loss(divergence="policy_gradient", weight=1.0)
GENERATION = Generation(prompt_tokens=5, new_tokens=7)
N, V, D = 2, 5, 4


@pytest.fixture
def student():
    """Hidden states [N, D] and a head [V, D]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((N, D), (V, D))]


def mean_over_draws(loss, student):
    """Mean of a loss and of its gradients over all ids [N] that a student can draw, one by one."""
    hidden, weight = student
    q = torch.softmax(hidden @ weight.T, -1).detach()
    total = [torch.zeros(()), torch.zeros_like(hidden), torch.zeros_like(weight)]
    for labels in product(range(V), repeat=N):
        value = loss(torch.tensor(labels))
        share = torch.stack([q[n, y] for n, y in enumerate(labels)]).prod()
        parts = [value.detach(), *torch.autograd.grad(value, student)]
        total = [mean + share * part for mean, part in zip(total, parts, strict=True)]
    return total


@pytest.mark.parametrize("form", ["dense", "states", "plain"])
def test_its_mean_over_all_draws_is_the_reverse_kl_and_its_gradient(student, form):
    hidden, weight = student
    generator = torch.Generator().manual_seed(1)
    states, its_head = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    logits = states @ its_head.T
    target = States([states], [Head(its_head)]) if form == "states" else Dense(logits.log_softmax(-1))

    def loss(labels):
        if form == "plain":
            return distillation_loss(hidden @ weight.T, labels, logits, GRADIENT)
        return chunked_loss(hidden, Head(weight), labels, target, GRADIENT)

    found = mean_over_draws(loss, student)
    q = torch.softmax(hidden @ weight.T, -1)
    kl = (q * (q.log() - logits.log_softmax(-1))).sum()  # of the whole distributions, by definition
    for mean, wanted in zip(found, [kl.detach(), *torch.autograd.grad(kl, student)], strict=True):
        torch.testing.assert_close(mean, wanted, atol=1e-6, rtol=1e-5)


def test_without_a_teacher_the_mean_over_all_draws_moves_nothing(student):
    """An advantage of 1 is the cross-entropy of what was drawn: single draws move the student, none on average."""
    hidden, weight = student
    one = chunked_loss(hidden, Head(weight), torch.tensor([1, 2]), None, Loss())
    drawn = torch.log_softmax(hidden @ weight.T, -1)[[0, 1], [1, 2]].sum()
    for found, wanted in zip(
        torch.autograd.grad(one, student), torch.autograd.grad(-drawn, student), strict=True
    ):
        torch.testing.assert_close(found, wanted)
        assert float(found.abs().max()) > 0.1
    _, *gradients = mean_over_draws(
        lambda labels: chunked_loss(hidden, Head(weight), labels, None, Loss()), student
    )
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-6


def test_a_token_that_the_teacher_lacks_is_refused(student):
    hidden, weight = student
    target = Dense(torch.randn(N, V - 1).log_softmax(-1))
    with pytest.raises(
        UserError, match=r"policy_gradient is infinite: the student has 5 rows, its teacher 4"
    ):
        chunked_loss(hidden, Head(weight), torch.tensor([0, 1]), target, GRADIENT)


def rows(count=4, length=14):
    generator = torch.Generator().manual_seed(3)
    return [
        Row(f"d{i}", "code", i, [0, *torch.randint(1, 300, (length - 1,), generator=generator).tolist()])
        for i in range(count)
    ]


def test_every_sample_of_a_prompt_has_random_numbers_of_its_own():
    acc, model = accelerator(), tiny_model()
    one = OnPolicy(1.0, GENERATION, 14, 1, 0)(acc, model, 2, rows())
    three = OnPolicy(1.0, GENERATION, 14, 1, 0, samples=3)(acc, model, 2, rows())
    assert [row.id for row in three] == [row.id for row in rows() for _ in range(3)]
    assert [row.tokens for row in three[::3]] == [row.tokens for row in one], "the first one is as before"
    assert len({tuple(row.tokens) for row in three}) == 12
    assert len({tuple(row.tokens[:5]) for row in three}) == 4
    again = OnPolicy(1.0, GENERATION, 14, 1, 0, samples=3)(acc, model, 2, rows()[:1])
    assert again == three[:3], "a text depends neither on the other rows nor on when it is written"


def test_a_run_continues_to_the_same_weights(tmp_path):
    table = torch.log_softmax(3 * torch.randn(320, 320, generator=torch.Generator().manual_seed(5)), -1)

    def teacher(batch):
        assert len(batch.ids) == 4, "two texts after each of two prompts"
        return Dense(table[batch.input_ids[:, :-1][batch.mask]])

    config = Train(rows=2, steps=5, checkpoint_every=2, loss=GRADIENT)
    how = {"pad": 0, "seed": 1, "teacher": teacher, "rewrite": OnPolicy(1.0, GENERATION, 14, 1, 0, samples=2)}

    def stop(step):
        if step.number == 3:
            raise KeyboardInterrupt

    whole, again, other = tiny_model(), tiny_model(seed=9), tiny_model()
    curve = train(whole, rows(), config, scratch=tmp_path / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), rows(), config, scratch=tmp_path / "parts", report=stop, **how)
    assert train(again, rows(), config, scratch=tmp_path / "parts", **how) == curve
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    train(other, rows(), config, scratch=tmp_path / "other", **{**how, "seed": 2})
    assert not torch.equal(whole.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_it_draws_a_student_to_its_teacher(tmp_path):
    """To a teacher that says the same everywhere; the exact reverse KL falls, and the estimate that is logged."""
    table = torch.log_softmax(2 * torch.randn(320, generator=torch.Generator().manual_seed(5)), -1)
    model, some = tiny_model(), rows()

    def reverse_kl():
        with torch.no_grad():
            q = model(torch.tensor([row.tokens for row in some])).logits.log_softmax(-1)
        return float((q.exp() * (q - table)).sum(-1).mean())

    def teacher(batch):
        return Dense(table.expand(int(batch.mask.sum()), -1))

    before, config = reverse_kl(), Train(rows=4, steps=12, loss=GRADIENT, optimizer={"lr": 0.03})
    rewrite = OnPolicy(1.0, GENERATION, 14, 1, 0, samples=4)
    curve = train(model, some, config, pad=0, seed=1, teacher=teacher, rewrite=rewrite, scratch=tmp_path)
    assert reverse_kl() < 0.7 * before
    assert curve[-1][1] < 0.7 * curve[0][1]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Everything on policy, and an arm without a teacher, with a method that does nothing."""
    folder = tmp_path_factory.mktemp("policy")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    return tiny_study(
        folder,
        seeds=[0],
        base={"path": str(folder / "base")},
        method={"name": "placebo"},
        train={"rows": 4, "steps": 2, "loss": {"divergence": "policy_gradient", "weight": 1}},
        targets={
            "source": "on_policy",
            "share": 1,
            "samples": 2,
            "generation": {"prompt_tokens": 4, "new_tokens": 5},
        },
        ce_arm="on_policy",
    )


@pytest.mark.slow
def test_a_study_with_a_control_that_has_no_teacher(path):
    study = load_study(path)
    make_run_folder(study)
    study = prepare_inputs(study, accelerator())
    run_in_turn("policy", [*base_jobs(study), *teacher_jobs(study), *student_jobs(study)], quiet=True)
    s1, s0, ce = (load_model(study.folder / f"students/{arm}/s0") for arm in ("S1", "S0", "CE"))
    start = load_model(study.folder / "base/s0").model.embed_tokens.weight
    embedding = s1.model.embed_tokens.weight
    assert torch.equal(embedding, s0.model.embed_tokens.weight), "a placebo teaches what it is"
    assert not torch.equal(ce.model.embed_tokens.weight, embedding)
    assert not torch.equal(ce.model.embed_tokens.weight, start)
    assert (
        "without a teacher, on what it wrote itself"
        in (study.folder / "students/CE/s0/README.md").read_text()
    )


@pytest.mark.slow
def test_the_base_with_a_text_in_front_teaches_itself_without(path):
    """Context self-distillation, on policy: the student's own texts, scored after a text that it never reads."""
    settings = {"text": "the river walked under old trees", "wrong": {"text": "def return self None import"}}
    words = ["--method", f"{{name: context, settings: {settings}}}", "--name", "context"]
    study = load_study(path, words)
    make_run_folder(study)
    study = prepare_inputs(study, accelerator())
    run_in_turn("context", [*base_jobs(study), *teacher_jobs(study)], quiet=True)
    for arm in ("S1", "S0"):
        make_student(study, arm, 0, lambda share, tokens=0: None)
    s1, s0 = (
        load_model(study.folder / f"students/{arm}/s0").model.embed_tokens.weight for arm in ("S1", "S0")
    )
    assert not torch.equal(s1, s0), "a right text and a wrong one teach something else"


def test_what_the_control_learns_from_is_in_its_key(path):
    on_policy, plain = load_study(path), load_study(path, ["--ce_arm", "true"])
    settings, code = target_source_inputs(on_policy, "CE", 0)
    assert settings["samples"] == 2
    assert code
    assert target_source_inputs(plain, "CE", 0) == (None, {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--targets.share", "0.5"], r"targets.share: 0.5, but policy_gradient learns .* set it to 1"),
        (["--targets.source", "online", "--ce_arm", "true"], "targets.source: online, but policy_gradient"),
        (["--targets.generation.temperature", "0.7"], "targets.generation.temperature: 0.7, .* set it to 1"),
        (["--targets.generation.top_p", "0.9"], "targets.generation.top_p: 0.9"),
        (["--train.loss.temperature", "2"], "`policy_gradient` is at `temperature: 1`"),
        (["--train.loss.weight", "0.5"], "of `weight: 1`"),
        (["--targets.source", "cached", "--train.loss", "{}"], "ce_arm: on_policy, but .* cached targets"),
        (["--ce_arm", "sometimes"], "ce_arm"),
    ],
)
def test_what_is_not_drawn_from_the_student_is_refused(path, words, message):
    with pytest.raises(UserError, match=message):
        check_target_source(load_study(path, words))
