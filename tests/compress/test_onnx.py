"""ONNX graphs: families, formats, what is refused before any work, and the real command."""

from dataclasses import replace

import pytest
import torch

from compress.calibration import check_batch, log_probs
from compress.recipe import make_pass
from eval.core.artifacts import read_manifest
from eval.core.documents import collate
from eval.core.errors import UserError
from eval.core.records import read_scores
from eval.score.divergence import kl_divergence
from tests.compress.student_run import build_student_run, family, model_of, recipe_file, small_context
from tests.distill.test_families import ROWS
from tests.helpers import run, tiny_tokenizer

TAKEN = ("llama", "mistral", "qwen2", "qwen3", "granite")
FORMATS = ("fp32", "int8", "int8-dynamic", "int4")


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return small_context(tmp_path_factory)


def applied(model, context, **options):
    step = make_pass({"pass": "onnxruntime", **options}, "here")
    step.preview(model)
    return step.apply(model, context)


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("tied", [True, False])
def test_a_family_answers_as_torch_does_and_step_by_step_as_at_once(name, tied, context, tmp_path):
    model = family(name, tie_word_embeddings=tied)
    work = replace(context, parent=model, rows=ROWS, tokenizer=tiny_tokenizer(), scratch=tmp_path)
    batch = collate(ROWS, 0)
    wanted = log_probs(model, batch)
    for weights in ("fp32", "int8"):
        graph, report = applied(model, work, weights=weights)
        worst = float((log_probs(graph, batch) - wanted).abs().max())
        assert worst < 1e-4 if weights == "fp32" else 1e-4 < worst < 0.1
        full = graph.engine.logits(batch)
        logits, state = graph.engine.prefill(batch.input_ids[:, :6])
        for position in range(6, batch.input_ids.shape[1]):
            logits, state = graph.engine.decode(batch.input_ids[:, position], state)
        torch.testing.assert_close(logits, full[:, -1], atol=1e-4, rtol=1e-4)
        matrices = sum(w.numel() for w in model.parameters() if w.ndim > 1)
        assert report.reached == report.named == (0 if weights == "fp32" else matrices)


def test_more_bits_are_nearer_to_the_student_and_fewer_are_smaller(context):
    batch = check_batch(context.rows, context.pad)
    real = batch.attention_mask.bool()
    wanted, far, size = log_probs(context.parent, batch)[real], {}, {}
    for weights in FORMATS:
        graph, report = applied(model_of(context), context, weights=weights)
        far[weights] = float(kl_divergence(wanted, log_probs(graph, batch)[real]).mean())
        size[weights] = report.after.bytes
    assert far["fp32"] < 1e-6 < far["int8"] < far["int4"]
    assert far["int8-dynamic"] < far["int4"]
    assert size["int4"] < size["int8"] < size["fp32"] / 2
    whole = applied(model_of(context), context, weights="int4", group_size=64)[1]
    assert whole.after.bytes < size["int4"]


def test_reading_a_prompt_computes_the_logits_of_its_last_token_alone(context, monkeypatch):
    graph, _ = applied(model_of(context), context, weights="fp32")
    engine, ids = graph.engine, torch.tensor([context.rows[0].tokens])
    asked = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape: asked.append(shape) or empty(*shape))
    engine.prefill(ids)
    assert asked == [(1, 1, engine.vocabulary)]


def test_what_it_cannot_do_is_said_before_any_work(context):
    def preview(model, **options):
        make_pass({"pass": "onnxruntime", **options}, "here").preview(model)

    with pytest.raises(UserError, match="no ONNX graph of a GPT2LMHeadModel was compared with it; leave"):
        preview(family("gpt2"), weights="fp32")
    with pytest.raises(UserError, match="a sliding window of 8 tokens"):
        preview(family("mistral", sliding_window=8), weights="fp32")
    with pytest.raises(UserError, match=r"the 64 inputs of .*q_proj are no multiple of 128; .*int8-dynamic"):
        preview(model_of(context), weights="int4", group_size=128)
    for options, message in (
        ({"weights": "fp32", "group_size": 64}, "group_size needs weights: int8 or int4"),
        ({"weights": "int8-dynamic", "group_size": 64}, "group_size needs weights"),
        ({"weights": "int4", "group_size": 48}, "group_size"),
        ({"weights": "int3"}, "weights"),
    ):
        with pytest.raises(UserError, match=message):
            make_pass({"pass": "onnxruntime", **options}, "here")


@pytest.mark.slow
def test_the_command_builds_verifies_and_scores_them(tmp_path):
    recipes = [
        recipe_file(tmp_path, weights, {"pass": "onnxruntime", "weights": weights})
        for weights in ("fp32", "int8-dynamic", "int4")
    ]
    study = build_student_run(tmp_path, recipes, layers=2)
    done = run("-m", "compress.run", "--study", study.folder)
    assert done.returncode == 0, done.stderr
    folders = sorted(study.folder.glob("variants/*/S1/s0"))
    assert [read_manifest(folder).facts["engine"] for folder in folders] == ["onnxruntime"] * 3
    done = run("-m", "eval.score", "--study", study.folder)
    assert done.returncode == 0, done.stderr
    scores = {score.recipe: score for score in read_scores(study.folder) if score.arm == "S1"}
    bits = {name: (score.engine, sum(score.documents.bits)) for name, score in scores.items()}
    assert bits["plain"][1] == pytest.approx(bits["fp32"][1], rel=1e-4)
    assert bits["int4"][0] == "onnxruntime"
    assert bits["int4"][1] != pytest.approx(bits["plain"][1], rel=1e-4)


def test_a_missing_library_names_the_extra(tmp_path):
    path = recipe_file(tmp_path, "graph", {"pass": "onnxruntime", "weights": "int4"})
    script = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'onnxruntime_genai' else find(name, *rest)\n"
        "from eval.core.errors import entry\nfrom compress.recipe import load_recipe\n"
        f"entry(lambda: load_recipe({path!r}))()"
    )
    done = run("-c", script)
    assert done.returncode == 3
    assert done.stderr.endswith(
        "'onnxruntime': needs onnxruntime_genai, which is not installed; run `pip install '.[onnxruntime]'`\n"
    )
