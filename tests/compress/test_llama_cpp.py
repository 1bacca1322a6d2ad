"""GGUF files: families, formats, tokenizers, what is refused before any work, and the real command."""

from dataclasses import replace

import pytest
import torch

from compress.calibration import check_batch, log_probs
from compress.gguf_file import NO_TOKENIZER, PROBE, same_tokenizer
from compress.recipe import make_pass
from distill.models.gguf import load_gguf
from eval.core.artifacts import read_manifest
from eval.core.documents import collate
from eval.core.errors import UserError
from eval.core.records import read_scores
from eval.score.divergence import kl_divergence
from tests.compress.student_run import build_student_run, family, model_of, recipe_file, small_context
from tests.distill.test_families import ROWS
from tests.helpers import run, tiny_model, tiny_tokenizer

pytest.importorskip("llama_cpp")
TAKEN = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return small_context(tmp_path_factory)


def applied(model, context, weights):
    step = make_pass({"pass": "llama_cpp", "weights": weights}, "here")
    step.preview(model)
    return step.apply(model, context)


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("tied", [True, False])
def test_a_family_answers_as_torch_does_and_step_by_step_as_at_once(name, tied, context, tmp_path):
    model = family(name, tie_word_embeddings=tied)
    work = replace(context, parent=model, rows=ROWS, tokenizer=tiny_tokenizer(), scratch=tmp_path)
    batch = collate(ROWS, 0)
    wanted = log_probs(model, batch)
    for weights in ("f32", "q8_0"):
        made, report = applied(model, work, weights)
        worst = float((log_probs(made, batch) - wanted).abs().max())
        assert worst < 1e-4 if weights == "f32" else 1e-4 < worst < 0.1
        full = made.engine.logits(batch)
        logits, state = made.engine.prefill(batch.input_ids[:, :6])
        for position in range(6, batch.input_ids.shape[1]):
            logits, state = made.engine.decode(batch.input_ids[:, position], state)
        torch.testing.assert_close(logits, full[:, -1], atol=1e-4, rtol=1e-4)
        matrices = sum(w.numel() for w in model.parameters() if w.ndim > 1)
        assert report.reached == report.named == (0 if weights == "f32" else matrices)
        assert report.facts["tokenizer"] == "gpt-2"


def test_another_reader_of_gguf_finds_the_same_model_and_tokenizer(context):
    made, _ = applied(model_of(context), context, "f32")
    model, words = load_gguf(made.folder / "model.gguf")
    batch = check_batch(context.rows, context.pad)
    real = batch.attention_mask.bool()
    difference = (log_probs(model, batch) - log_probs(context.parent, batch))[real].abs().max()
    assert float(difference) < 1e-4
    assert words(PROBE)["input_ids"] == context.tokenizer(PROBE)["input_ids"]


def test_more_bits_are_nearer_to_the_student_and_fewer_are_smaller(context):
    batch = check_batch(context.rows, context.pad)
    real = batch.attention_mask.bool()
    wanted, far, size = log_probs(context.parent, batch)[real], {}, {}
    for weights in ("f32", "q8_0", "q4_0"):
        made, report = applied(model_of(context), context, weights)
        far[weights] = float(kl_divergence(wanted, log_probs(made, batch)[real]).mean())
        size[weights] = report.after.bytes
    assert far["f32"] < 1e-6 < far["q8_0"] < far["q4_0"]
    assert size["q4_0"] < 0.8 * size["q8_0"] < 0.25 * size["f32"]
    assert report.facts["formats"] == {"Q4_0": 14, "Q8_0": 1}, (
        "the head, which is the embedding, keeps 8 bits"
    )


def test_groups_of_256(context, tmp_path):
    model = tiny_model(hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4)
    _, report = applied(model, replace(context, parent=model, scratch=tmp_path), "q4_k_m")
    assert set(report.facts["formats"]) == {"Q4_K", "Q6_K"}
    assert 0.01 < report.facts["worst_moved"] < 0.2
    assert report.reached == report.named


def test_a_tokenizer_that_llama_cpp_has_not_stays_outside(context, tmp_path):
    """Its ids are what the engine is given; the file says nothing of texts."""
    words = tiny_tokenizer()
    assert same_tokenizer(tiny_model().config, words, ["def f(x): return 2024"]) == "gpt-2"
    from tokenizers import pre_tokenizers

    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("e", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert same_tokenizer(tiny_model().config, words, ["the river"]) is None
    made, report = applied(model_of(context), replace(context, tokenizer=words, scratch=tmp_path), "f32")
    assert report.facts["tokenizer"] == NO_TOKENIZER
    assert made.engine.vocabulary == 320


def test_what_it_cannot_do_is_said_before_any_work(context):
    def preview(model, weights="q8_0"):
        make_pass({"pass": "llama_cpp", "weights": weights}, "here").preview(model)

    with pytest.raises(UserError, match="pass llama_cpp: model type 'gpt2', expected one of llama, mistral"):
        preview(family("gpt2"))
    with pytest.raises(UserError, match="a sliding window of 8 tokens"):
        preview(family("mistral", sliding_window=8))
    with pytest.raises(UserError, match="biases in its matrices"):
        preview(family("llama", attention_bias=True))
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UserError, match="rotary positions of type 'linear'"):
        preview(family("llama", rope_parameters=rope))
    with pytest.raises(UserError, match=r"the 64 inputs of .*q_proj are no multiple of 256; take q4_0"):
        preview(model_of(context), "q4_k_m")
    with pytest.raises(UserError, match="weights"):
        make_pass({"pass": "llama_cpp", "weights": "q3"}, "here")


def test_a_build_with_amx_is_refused_before_any_work(context, monkeypatch):
    """Compiled so by GCC 12, it ended the process."""
    said = b"CPU : AVX512 = 1 | AMX_INT8 = 1 | REPACK = 1 | "
    monkeypatch.setattr("llama_cpp.llama_print_system_info", lambda: said)
    with pytest.raises(
        UserError, match=r"was compiled with AMX.*; compile it without: CMAKE_ARGS="
    ) as caught:
        make_pass({"pass": "llama_cpp", "weights": "q8_0"}, "here").preview(model_of(context))
    assert "\n" not in str(caught.value)


def test_the_command_builds_verifies_and_scores_them(tmp_path):
    recipes = [
        recipe_file(tmp_path, weights, {"pass": "llama_cpp", "weights": weights})
        for weights in ("f32", "q4_0")
    ]
    study = build_student_run(tmp_path, recipes, layers=2)
    done = run("-m", "compress.run", "--study", study.folder)
    assert done.returncode == 0, done.stderr
    folders = sorted(study.folder.glob("variants/*/S1/s0"))
    assert [read_manifest(folder).facts["engine"] for folder in folders] == ["llama_cpp"] * 2
    done = run("-m", "eval.score", "--study", study.folder)
    assert done.returncode == 0, done.stderr
    scores = {score.recipe: score for score in read_scores(study.folder) if score.arm == "S1"}
    bits = {name: (score.engine, sum(score.documents.bits)) for name, score in scores.items()}
    assert bits["plain"][1] == pytest.approx(bits["f32"][1], rel=1e-4)
    assert bits["q4_0"][0] == "llama_cpp"
    assert bits["q4_0"][1] != pytest.approx(bits["plain"][1], rel=1e-4)
