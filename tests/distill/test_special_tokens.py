"""Special tokens that a tokenizer has and a model has no row for, as Gemma 3's token for images."""

import json
import shutil

import pytest
import torch

from distill.pipeline import make_base, make_named_teacher
from distill.train import distil
from eval.core.documents import Row, collate
from eval.core.errors import UserError
from eval.core.study import load_study
from eval.cost.plan import draw_prompts
from eval.engines import load_engine
from tests.helpers import tiny_model, tiny_study, tiny_tokenizer

# A text that spells out a special token is text: only a template writes such tokens.
TEMPLATE = "{% for turn in messages %}{{ '<image>' if turn.role == 'user' }}{{ turn.content }}{% endfor %}"
PICTURE = [{"role": "user", "content": "What is this?"}]


@pytest.mark.parametrize("split", [None, "train", "validation", "far"])
def test_special_tokens_beyond_the_model_are_refused_where_a_document_has_one(tmp_path, split):
    """As Gemma 3's token for images: no row of the embedding is its own, and no text needs it."""
    folder, tokenizer = tmp_path / "my-base", tiny_tokenizer()
    tiny_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    study = load_study(tiny_study(tmp_path, seeds=[0], base={"path": str(folder)}, workers=1))
    distil(study, until="data")
    if split is not None:
        file = study.folder / "data" / f"{split}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines[-1]["prompt"] = PICTURE
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(
            UserError, match=rf"'{lines[-1]['id']}' has the token '<image>', id 320; .* 320 r"
        ):
            make_base(study, 0, lambda share, tokens=0: None)
        return
    make_base(study, 0, lambda share, tokens=0: None)
    engine = load_engine("torch", study.folder / "base" / "s0")
    assert engine.tokenizer("<image>")["input_ids"] == [320]
    row = Row("d", "x", 0, [0, 5, 320])
    for call in (
        lambda: engine.logits(collate([row], 0)),
        lambda: engine.prefill(torch.tensor([row.tokens])),
    ):
        with pytest.raises(UserError, match="token '<image>' is id 320; leave out"):
            call()
    assert max(max(ids) for ids in draw_prompts(study.cost, engine.folder)) < 320


@pytest.mark.slow
def test_a_teacher_too_must_have_a_row_for_every_token_of_the_documents(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = TEMPLATE
    for name, rows in (("base", 321), ("teacher", 320)):
        tiny_model(rows).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    base, teacher = {"path": str(tmp_path / "base")}, {"path": str(tmp_path / "teacher")}
    path = tiny_study(tmp_path, seeds=[0], base=base, teacher=teacher, method={"name": "larger_teacher"})
    study = load_study(path)
    distil(study, until="data")
    make_base(study, 0, lambda share, tokens=0: None)
    make_named_teacher(study, lambda share, tokens=0: None)
    shutil.rmtree(study.folder / "base")
    shutil.rmtree(study.folder / "teacher")
    file = study.folder / "data" / "train.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[3]["prompt"] = PICTURE
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_base(study, 0, lambda share, tokens=0: None)
    with pytest.raises(
        UserError, match=rf"tokenizer of teacher\.path: '{lines[3]['id']}' has the token '<im"
    ):
        make_named_teacher(study, lambda share, tokens=0: None)
