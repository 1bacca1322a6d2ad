"""Several teachers in one study: the weighted mean of their probabilities, or one for each domain."""

import pytest
import torch

from distill.checks import check_method, check_models
from distill.losses.chunked import chunked_loss
from distill.losses.divergences import DIVERGENCES
from distill.losses.teacher_output import Dense, Mixed, States, match_vocabulary
from distill.method import Plain
from distill.methods.context import Context
from distill.models.generation import sample_texts
from distill.models.lm_head import Head
from distill.pipeline import base_jobs, make_student, prepare_inputs, teacher_jobs
from distill.teachers.local import LocalTeacher
from distill.teachers.run import find_teacher_hash, run_teacher
from distill.teachers.several import MixedTeacher
from distill.teachers.target_source import check_target_source, open_target_source
from distill.trainer.loop import accelerator
from eval.core.artifacts import read_manifest
from eval.core.config import Frozen
from eval.core.documents import Row, collate
from eval.core.errors import UserError
from eval.core.jobs import run_in_turn
from eval.core.records import each_score
from eval.core.sections import Generation, Loss
from eval.core.sections.models import Teacher
from eval.core.study import load_study, make_run_folder
from eval.engines import load_tokenizer
from eval.engines.torch import load_model
from tests.helpers import text, tiny_model, tiny_study, tiny_tokenizer

ROWS = (330, 352)  # rows of the two heads; the tokenizer has 320 ids
WIDTHS = (64, 96)


def settings(*members):
    return Teacher(mix=[{"path": f"model-{i}", **member} for i, member in enumerate(members)])


@pytest.fixture(scope="module")
def models():
    made = []
    for seed, (rows, width) in enumerate(zip(ROWS, WIDTHS, strict=True)):
        model = tiny_model(rows, 5 + seed, hidden_size=width)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(6)
        made.append(model)
    return made


@pytest.fixture(scope="module")
def batch():
    tokenizer = tiny_tokenizer()
    texts = [("code", 1, 9), ("prose", 2, 5), ("code", 3, 4), ("other", 1, 6)]
    rows = [
        Row(
            f"d{i}",
            domain,
            i,
            [0, *tokenizer(text("prose" if domain == "other" else domain, seed, n))["input_ids"]],
            i,
        )
        for i, (domain, seed, n) in enumerate(texts)
    ]
    return collate(rows, 0)


def locals_of(models, tokens=320):
    return [LocalTeacher(Plain(Frozen()), "plain", m, m.config.vocab_size, tokens=tokens) for m in models]


def probabilities(model, batch, width=352):
    """[B, T, width] of a model by itself, in float64; rows that it lacks have none."""
    with torch.no_grad():
        said = model(**batch.inputs).logits.double().softmax(-1)
    return torch.nn.functional.pad(said, (0, width - said.shape[-1]))


def by_hand(models, batch, shares):
    """Domain -> weights of the models, as they should be."""
    each = torch.stack([probabilities(model, batch) for model in models])
    weights = torch.tensor([shares[domain] for domain in batch.domains]).double()  # [B, models]
    return torch.einsum("mbtv,bm->btv", each, weights)


CASES = [
    ([{"weight": 3}, {}], {"code": (0.75, 0.25), "prose": (0.75, 0.25), "other": (0.75, 0.25)}),
    ([{"domains": ["code"]}, {}], {"code": (1, 0), "prose": (0, 1), "other": (0, 1)}),
    (
        [{"domains": ["code", "prose"]}, {"domains": ["prose", "other"], "weight": 4}],
        {"code": (1, 0), "prose": (0.2, 0.8), "other": (0, 1)},
    ),
]


@pytest.mark.parametrize(("members", "shares"), CASES)
def test_what_they_say_is_the_weighted_mean_of_those_that_speak_of_a_domain(models, batch, members, shares):
    teacher = MixedTeacher(locals_of(models), settings(*members))
    wanted = by_hand(models, batch, shares)
    scored = teacher.log_probs(batch).double().exp()
    real = batch.attention_mask.bool()
    torch.testing.assert_close(scored[real], wanted[real], atol=1e-6, rtol=1e-4)
    target, valid = teacher(batch), wanted[:, :-1][batch.mask]
    assert target.vocabulary == 352
    whole = target.log_softmax(0, len(valid)).double().exp()
    torch.testing.assert_close(whole, valid, atol=1e-6, rtol=1e-4)
    chunks = torch.cat([target.log_softmax(i, min(i + 7, len(valid))) for i in range(0, len(valid), 7)])
    torch.testing.assert_close(chunks.double().exp(), whole, atol=1e-6, rtol=1e-5)


def test_each_reads_the_rows_of_which_it_speaks_and_no_others(models, batch):
    seen = {}

    class Noting(Plain):
        def output(self, teacher, batch):
            seen.setdefault(teacher, []).extend(batch.ids)
            return super().output(teacher, batch)

    teachers = [LocalTeacher(Noting(Frozen()), "noting", model, model.config.vocab_size) for model in models]
    MixedTeacher(teachers, settings({"domains": ["code"]}, {}))(batch)
    assert [seen[model] for model in models] == [["d0#0", "d2#2"], ["d1#1", "d3#3"]]


def test_the_same_model_twice_is_that_model(models, batch):
    one, twice = (
        locals_of(models[:1])[0],
        MixedTeacher(locals_of(models[:1] * 2), settings({"weight": 2}, {})),
    )
    torch.testing.assert_close(
        twice.log_probs(batch), one.log_probs(batch).log_softmax(-1), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_takes_the_mean_as_any_other_distribution(name):
    """Against the mean written out; the student has fewer rows than the teachers, so some are cut off."""
    generator = torch.Generator().manual_seed(0)
    hidden, heads = torch.randn(9, 8, generator=generator), torch.randn(2, 40, 8, generator=generator)
    own, weight = (
        torch.randn(9, 8, generator=generator).requires_grad_(),
        torch.randn(30, 8, generator=generator),
    )
    places = torch.arange(9), torch.tensor([1, 2, 5, 8])
    shares = torch.tensor(
        [[1, 0], [0.3, 0.7], [0.3, 0.7], [1, 0], [1, 0], [0.3, 0.7], [1, 0], [1, 0], [0.3, 0.7]]
    )
    dense = (hidden @ heads[1].T)[places[1]].log_softmax(-1)
    parts = States([hidden], [Head(heads[0])]), Dense(dense)
    logs = tuple(shares[p, i].log() for i, p in enumerate(places))
    each = torch.stack([(hidden @ head.T)[:, :30].softmax(-1) for head in heads], -1)
    wanted = Dense((each * shares[:, None]).sum(-1).log())
    config, results = Loss(divergence=name, temperature=2.0, weight=0.8), []
    for target in (Mixed(parts, places, logs), wanted):
        loss = chunked_loss(own, Head(weight), torch.arange(9), target, config)
        results.append((loss.detach(), *torch.autograd.grad(loss, own)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert match_vocabulary(Mixed(parts, places, logs), 44).padding == 4


def test_a_text_is_of_the_teacher_of_its_domain_or_drawn_from_the_mean(models, batch):
    generation = Generation(prompt_tokens=4, new_tokens=5)
    prompts = [
        Row(f"p{i}", domain, i, [0, 5, 6, 7 + i], 3) for i, domain in enumerate(("code", "prose", "code"))
    ]
    members = [{"domains": ["code", "prose"]}, {"domains": ["prose"]}]
    teachers = locals_of(models)
    texts = MixedTeacher(teachers, settings(*members)).write(prompts, generation, 3)
    assert [texts[0], texts[2]] == teachers[0].write([prompts[0], prompts[2]], generation, 3)

    def following(rows):
        return by_hand(models, collate(rows, 0), {"prose": (0.5, 0.5)})[:, -1].log()

    assert [texts[1]] == sample_texts(following, [prompts[1]], generation, 3, {0})


def save(folder, model):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def path(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("several")
    mix = [{"path": save(folder / "a", models[0]), "weight": 3}, {"path": save(folder / "b", models[1])}]
    return tiny_study(
        folder,
        seeds=[0],
        ce_arm=False,
        base={"path": save(folder / "small", tiny_model(ROWS[0]))},
        teacher={"mix": mix},
        method={
            "name": "context",
            "settings": {"text": text("code", 5, 6), "wrong": {"text": text("prose", 5, 6)}},
        },
    )


@pytest.mark.slow
def test_a_study_teaches_by_the_mean_with_and_without_the_method(path, models):
    study = load_study(path)
    make_run_folder(study)
    study = prepare_inputs(study, accelerator())
    run_in_turn("mix", [*base_jobs(study), *teacher_jobs(study)], quiet=True)
    tokenizer, folder = load_tokenizer(study.folder / "base/s0"), study.folder
    method = Context(Context.Settings(**study.method.settings))
    for side, arm, one in (("T1", "S1", method), ("T0", "S0", method.control())):
        parents = read_manifest(folder / f"method/{side}/s0").parents
        assert {"teachers/0", "teachers/1"} < set(parents), "both carry the method, and both do without"
        with open_target_source(study, arm, 0, tokenizer) as source:
            batch = collate(source.rows[:3], 0)
            kept = source.teacher(batch).logits(0, int(batch.mask.sum()))
        front = one.in_front(tokenizer)[""]
        ids = torch.cat([torch.tensor([front] * 3), batch.input_ids], 1)
        with torch.no_grad():
            said = [m(ids).logits.double().softmax(-1)[:, len(front) : -1][batch.mask] for m in models]
        mean = 0.75 * torch.nn.functional.pad(said[0], (0, 22)) + 0.25 * said[1]
        torch.testing.assert_close(kept.double().exp()[:, :330], mean[:, :330], atol=1e-4, rtol=2e-2)
    assert {score.arm for score in each_score(folder)} == {"T1", "T0"}
    assert read_manifest(folder / "teachers/1").facts["origin"]


@pytest.mark.slow
def test_other_weights_are_another_teacher(path):
    study = load_study(path)
    before = [find_teacher_hash(study, arm, 0) for arm in ("S1", "S0")]
    lighter = study.teacher.mix[0].model_copy(update={"weight": 2})
    changed = study.teacher.model_copy(update={"mix": [lighter, study.teacher.mix[1]]})
    other = study.model_copy(update={"teacher": changed})
    for arm, old in zip(("S1", "S0"), before, strict=True):
        assert find_teacher_hash(other, arm, 0) != old


@pytest.mark.slow
def test_a_student_learns_online_from_the_teacher_of_each_domain(path):
    study = load_study(path, ["--targets.source", "online", "--train.steps", "1"])
    mix = [
        member.model_copy(update={"domains": [name]})
        for member, name in zip(study.teacher.mix, ("code", "prose"), strict=True)
    ]
    study = study.model_copy(update={"teacher": study.teacher.model_copy(update={"mix": mix})})
    with run_teacher(study, "T1", [0], (0,)) as teacher:
        assert isinstance(teacher, MixedTeacher)
    run_in_turn("mix", teacher_jobs(study), quiet=True)
    make_student(study, "S1", 0, lambda share, tokens=0: None)
    start, student = (load_model(study.folder / name) for name in ("base/s0", "students/S1/s0"))
    assert not torch.equal(student.model.embed_tokens.weight, start.model.embed_tokens.weight)
    card = (study.folder / "students/S1/s0/README.md").read_text()
    assert f"teacher of the study: {mix[0].path}, {mix[1].path}\n" in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teacher.path", "some/model"], "exactly one of `path`, `server`, `mix` and `file`"),
        (["--teacher.dtype", "bfloat16"], "each of `mix` has its own"),
        (["--teacher.mix", "[{weight: 2}]"], "give each of `mix` a `path`"),
        (["--method", "{name: experts}"], "method experts: fits a model, and teacher.mix is several"),
        (["--targets.alignment", "bytes", "--targets.source", "online"], "teacher.mix has one tokenizer"),
        (
            ["--targets.source", "online", "--train.loss.hidden", "{pairs: [[1, 1]]}"],
            "teacher.mix is several models",
        ),
        (["--data.context", "300"], r"data.context: 300 tokens, more than .* of base: 256"),
    ],
)
def test_what_several_teachers_cannot_do_is_refused(path, words, message):
    with pytest.raises(UserError, match=message):  # noqa: PT012
        study = load_study(path, words)
        check_method(study)
        check_target_source(study)
        check_models(study)


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        (
            [["code"], ["prosa"]],
            r"teacher.mix.1.domains: domain of no document: 'prosa'; did you mean 'prose'",
        ),
        (
            [["code"], ["code"]],
            "teacher.mix: none of these speaks of documents of the domain 'prose'; name it",
        ),
    ],
)
def test_a_domain_without_a_teacher_is_told_before_training(path, domains, message):
    study = load_study(path)
    mix = [
        m.model_copy(update={"domains": names}) for m, names in zip(study.teacher.mix, domains, strict=True)
    ]
    study = study.model_copy(update={"teacher": study.teacher.model_copy(update={"mix": mix})})
    with pytest.raises(UserError, match=message):
        prepare_inputs(study, accelerator())
