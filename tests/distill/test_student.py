"""Kinds of student: what each starts from, what of it is trained, and the plain model that comes out."""

import copy

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from distill.data.split import prepare
from distill.models.card import model_card
from distill.models.init import init_student
from distill.models.layers import block_influence, decoder_layers, evenly_spaced, most_influential
from distill.models.load import check_architecture, fresh_model
from distill.models.lora import add_adapters, add_adapters_to_nf4
from distill.trainer.checkpoint import Checkpoints
from distill.trainer.evaluate import Validation
from distill.trainer.loop import accelerator, train
from distill.trainer.module import DistillationModule
from eval.core.documents import Row, batches, collate
from eval.core.errors import UserError
from eval.core.sections import Optimizer, Student, Train
from eval.core.study import load_study
from eval.score.scoring import score_documents
from tests.distill.test_loop import results_of_one_and_two
from tests.helpers import SHAPE, tiny_model, tiny_study, tiny_tokenizer

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
ROWS = [
    Row("d", "x", i, [0, *torch.randint(1, 300, (16,), generator=torch.Generator().manual_seed(i)).tolist()])
    for i in range(8)
]
BATCH = collate(ROWS, 0)


@torch.no_grad()
def logits(model, batch=BATCH):
    return model(**batch.inputs, use_cache=False).logits


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_layers_are_kept_evenly_with_both_ends():
    assert evenly_spaced(12, 3) == [0, 6, 11]
    assert evenly_spaced(12, 6) == [0, 2, 4, 7, 9, 11]  # as printed by Shleifer and Rush, table 2
    assert evenly_spaced(4, 4) == [0, 1, 2, 3]
    assert evenly_spaced(4, 1) == [0]
    for count in range(1, 20):
        assert all(len(evenly_spaced(count, wanted)) == wanted for wanted in range(1, count + 1))


def test_influence_is_one_minus_the_cosine_of_what_goes_in_and_comes_out():
    """Against the hidden states that the model itself gives; padding does not count."""
    model = tiny_model(num_hidden_layers=4)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 1.0  # the padding's row is zero, and a zero has no direction
    rows = [*ROWS[:2], Row("d", "x", 9, ROWS[2].tokens[:5])]
    influence = block_influence(model, list(batches(rows, 0, 40)))
    cosines = []
    for row in rows:  # alone: no padding
        seen = []
        hooks = [
            layer.register_forward_hook(lambda m, args, out, seen=seen: seen.append((args[0], out)))
            for layer in decoder_layers(model)[2]
        ]
        logits(model, collate([row], 0))
        for hook in hooks:
            hook.remove()
        norms = [
            (a.double()[0] * b.double()[0]).sum(-1) / a.double()[0].norm(dim=-1) / b.double()[0].norm(dim=-1)
            for a, b in seen
        ]
        cosines.append(torch.stack(norms))
    torch.testing.assert_close(influence, 1 - torch.cat(cosines, 1).mean(1), rtol=1e-4, atol=1e-6)


def test_the_layers_of_least_influence_are_left_out(tokenizer):
    model = tiny_model(num_hidden_layers=5)
    with torch.no_grad():
        for idle in (1, 3):
            layer = model.model.layers[idle]
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    assert most_influential(model, [BATCH], 3) == [0, 2, 4]
    before = logits(model)
    student, facts = init_student(model, tokenizer, Student(start="influential", layers=3), ROWS, seed=0)
    assert facts == {"kept_layers": [0, 2, 4]}
    assert student.config.num_hidden_layers == 3
    torch.testing.assert_close(logits(student), before)
    with pytest.raises(UserError, match=r"student\.layers: 4; the base has 3 layers"):
        init_student(student, tokenizer, Student(start="every", layers=4), ROWS, seed=0)


def test_a_fresh_student_has_the_vocabulary_of_its_teacher(tokenizer):
    """Rows of the embedding that no token has are kept, so that the two distributions are over one set."""
    architecture = {"model_type": "qwen3", **SHAPE, "head_dim": 16, "num_hidden_layers": 1}
    config = Student(start="fresh", architecture=architecture)
    base = tiny_model(len(tokenizer) + 16)
    one, _ = init_student(base, tokenizer, config, ROWS, seed=0)
    same, other = (init_student(base, tokenizer, config, ROWS, seed=s)[0] for s in (0, 1))
    assert type(one).__name__ == "Qwen3ForCausalLM"
    assert one.config.vocab_size == len(tokenizer) + 16
    assert torch.equal(logits(one), logits(same))
    assert not torch.equal(logits(one), logits(other))
    with pytest.raises(UserError, match=r"student\.architecture\.model_type: 'lama'"):
        fresh_model({"model_type": "lama"}, tokenizer, 0, where="student.architecture")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_sise": 64}, r"unknown key of llama: 'hidden_sise'; did you mean 'hidden_size'\?"),
        ({"hidden_size": "64x"}, r"transformers cannot build this llama model \(.*expected int, got str"),
        ({"hidden_size": 65}, r"hidden size \(65\) is not a multiple of the number of attention heads"),
        (
            {"hidden_act": "nope"},
            r"\(KeyError: 'nope'\); change that field of .*: fields and values are those of LlamaConfig",
        ),
        ({"num_attention_heads": 0}, "cannot build this llama model"),
        ({"model_type": "t5"}, "unknown key of t5|cannot build this t5 model"),
        ({"model_type": "lama"}, r"base\.architecture\.model_type: 'lama'; did you mean 'llama'"),
    ],
)
def test_an_architecture_that_cannot_be_built_is_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        check_architecture({"model_type": "llama", **SHAPE, **changes}, "base.architecture", 300)
    assert "\n" not in str(error.value)


def test_an_architecture_may_use_the_names_of_its_family_and_the_common_ones():
    for fields in ({"n_embd": 32, "n_layer": 1, "n_head": 2}, {"hidden_size": 32, "num_hidden_layers": 1}):
        config = check_architecture({"model_type": "gpt2", **fields, "n_head": 2}, "base.architecture", 300)
        assert (config.hidden_size, config.vocab_size) == (32, 300)
    config = check_architecture({"model_type": "llama", **SHAPE, "rope_theta": 5e5}, "base.architecture", 300)
    assert config.rope_parameters["rope_theta"] == 5e5


def test_what_does_not_go_together_is_refused():
    for settings, message in (
        ({"start": "every"}, "`layers` says"),
        ({"layers": 2}, "`layers` says"),
        ({"start": "fresh"}, "`architecture` is given"),
        ({"start": "fresh", "architecture": SHAPE, "tuning": "lora"}, "nothing yet to adapt"),
    ):
        with pytest.raises(ValueError, match=message):
            Student(**settings)
    with pytest.raises(UserError, match=r"student\.tuning: qlora needs CUDA, the device is cpu; use lora"):
        add_adapters(tiny_model(), Student(tuning="qlora"), 0, **CPU)
    with pytest.raises(UserError, match=r"student\.modules: \['attention'\] \(Target .*; name linear layers"):
        add_adapters(tiny_model(), Student(tuning="lora", modules=["attention"]), 0, **CPU)
    with pytest.raises(UserError, match=r"leave lm_head out"):
        add_adapters(tiny_model(), Student(tuning="lora", modules=["lm_head"]), 0, **CPU)


def test_a_router_with_a_bias_of_its_own_is_not_adapted():
    """peft would wrap it, and the model's next forward pass miss what it wrapped."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1}
    width = {"moe_intermediate_size": 32, "topk_group": 1, "first_k_dense_replace": 1}
    config = AutoConfig.for_model("glm4_moe", vocab_size=64, **SHAPE, **experts, **width)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"student\.modules: 'all-linear' includes .*mlp\.gate"):
        add_adapters(copy.deepcopy(model), Student(tuning="lora"), 0, **CPU)
    adapted = add_adapters(model, Student(tuning="lora", modules=["q_proj", "o_proj"]), 0, **CPU)
    ids = torch.arange(8)[None]
    adapted.model(input_ids=ids, labels=ids).loss.backward()
    assert type(adapted.merged()).__name__ == "Glm4MoeForCausalLM"


def lora(model, folder, seed=0, **changes):
    config = Train(
        **{"steps": 4, "rows": 4, "checkpoint_every": 1, "optimizer": Optimizer(lr=0.01), **changes}
    )
    adapted = add_adapters(model, Student(tuning="lora", rank=4, dropout=0.1), seed, **CPU)
    how = {"pad": 0, "seed": seed, "teacher": None, "scratch": folder}
    return adapted, lambda **more: train(adapted.model, ROWS, config, **how, **more)


def test_adapters_start_as_nothing_are_all_that_is_trained_and_merge_to_what_was_trained(tmp_path):
    model, plain = tiny_model(), tiny_model()
    adapted, run = lora(model, tmp_path)
    torch.testing.assert_close(logits(adapted.model), logits(plain))
    run()
    trained = logits(adapted.model.eval())
    state = (tmp_path / "step-3" / "model.safetensors").stat().st_size
    assert state < 0.3 * sum(p.numel() * 4 for p in plain.parameters()), "frozen weights are not saved again"
    whole = adapted.merged()
    torch.testing.assert_close(logits(whole), trained, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trained, logits(plain), atol=1e-2)
    assert torch.equal(whole.model.embed_tokens.weight, plain.model.embed_tokens.weight)


@pytest.mark.parametrize("modules", [["embed_tokens"], ["q_proj", "model.embed_tokens"]])
def test_an_adapter_on_a_tied_embedding_is_refused_and_on_one_of_its_own_exported(tmp_path, modules):
    """peft merges it into the shared weight: the head that was trained would not be the one in the file."""
    config = Student(tuning="lora", rank=4, modules=modules)
    with pytest.raises(UserError, match=r"includes model\.embed_tokens, whose weight is tied .*tuning: full"):
        add_adapters(tiny_model(), config, 0, **CPU)
    adapted = add_adapters(tiny_model(tie_word_embeddings=False), config, 0, **CPU)
    settings = Train(steps=4, rows=4, optimizer=Optimizer(lr=0.01))
    train(adapted.model, ROWS, settings, pad=0, seed=0, teacher=None, scratch=tmp_path / "run")
    trained = logits(adapted.model)
    adapted.merged().save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trained, logits(tiny_model(tie_word_embeddings=False)), atol=1e-2)


class Stopped(Exception):
    pass


def test_adapters_continue_to_the_same_weights(tmp_path):
    """With dropout, whose random numbers go on where they were."""
    whole, run = lora(tiny_model(), tmp_path / "whole")
    run()

    def stop(step):
        if step.number == 3:
            raise Stopped

    with pytest.raises(Stopped):
        lora(tiny_model(), tmp_path / "parts")[1](report=stop)
    again, run = lora(tiny_model(), tmp_path / "parts")
    run()
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_quantized_student_is_exported_as_it_was_trained(tmp_path):
    """NF4 answers on a CPU too, where rows are multiples of 64; it has no gradient there."""
    pytest.importorskip("bitsandbytes")
    plain = tiny_model()
    adapted = add_adapters_to_nf4(plain, Student(tuning="qlora", rank=4), **CPU)
    pairs = zip(plain.parameters(), tiny_model().parameters(), strict=True)
    gaps = [float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs]
    assert sum(0.05 < gap < 0.15 for gap in gaps) == 14, "all but the head and the norms"
    adapters = {n: p for n, p in adapted.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in adapters)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.normal_(std=0.1)
    trained = logits(adapted.model.train())  # in evaluation, a CPU takes another way, in bfloat16
    whole = adapted.merged()
    assert whole is plain
    torch.testing.assert_close(logits(whole), trained, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(logits(tiny_model()), trained, atol=1e-2)


def test_a_checkpoint_of_a_quantized_student_holds_its_adapters(tmp_path):
    pytest.importorskip("bitsandbytes")
    adapted = add_adapters_to_nf4(tiny_model(), Student(tuning="qlora", rank=4), **CPU)
    adapters = {n: p for n, p in adapted.model.named_parameters() if p.requires_grad}
    acc = accelerator()
    acc.prepare(DistillationModule(adapted.model, Train(rows=4)))
    before = {name: adapter.clone() for name, adapter in adapters.items()}
    Checkpoints(tmp_path, acc).save(1, [], [])
    assert load_file(tmp_path / "step-1" / "model.safetensors").keys() == {f"model.{n}" for n in adapters}
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.normal_()
    assert Checkpoints(tmp_path, acc).load() == (1, [], [])
    assert all(torch.equal(adapter, before[name]) for name, adapter in adapters.items())


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    study = load_study(tiny_study(tmp_path_factory.mktemp("study"), seeds=[0]))
    prepare(study)
    return study


def test_bits_per_byte_of_training_are_those_of_scoring(study, tokenizer):
    data, context = study.folder / "data", study.data.context
    model = tiny_model(len(tokenizer))
    measured = Validation(data, tokenizer, context, 0)(DistillationModule(model, Train(rows=4)))
    scored = score_documents(lambda batch: model(**batch.inputs).logits, data, tokenizer, context)
    selected = [i for i, name in enumerate(scored.slice) if name == "validation"]
    expected = sum(scored.bits[i] for i in selected) / sum(scored.bytes[i] for i in selected)
    assert measured == pytest.approx(expected, rel=1e-5)


SHARED = """
import json, sys
from pathlib import Path
sys.path[0] = sys.argv[1]
from distill.trainer.evaluate import Validation
from distill.trainer.loop import accelerator
from distill.trainer.module import DistillationModule
from eval.core.sections import Train
from tests.helpers import tiny_model, tiny_tokenizer

acc, tokenizer, seen = accelerator(), tiny_tokenizer(), []
module = DistillationModule(tiny_model(len(tokenizer)), Train(rows=4))
module.register_forward_hook(lambda *args: seen.append(1))
validation = Validation(Path("DATA"), tokenizer, 32, 0, acc)
bits = validation(module)
if acc.is_main_process:
    print("RESULTS", json.dumps([[bits, len(seen), len(validation.batches)]]))
"""


@pytest.mark.slow
def test_processes_share_the_evaluation_and_find_the_same_number(study, tmp_path):
    program = SHARED.replace("DATA", str(study.folder / "data"))
    (alone, batches, whole), (shared, first, _) = results_of_one_and_two(program, tmp_path)
    assert shared == alone
    assert (batches, first) == (whole, -(-whole // 2))


def test_evaluation_and_logs_leave_the_run_as_it_is(study, tokenizer, tmp_path):
    """Bit for bit, with dropout; what is logged is what was measured."""
    validation, logged = Validation(study.folder / "data", tokenizer, study.data.context, 0), []
    finals = []
    for evaluate, log, steps in (
        (None, None, None),
        (validation, lambda step, v: logged.append((step, v)), 2),
    ):
        adapted, run = lora(tiny_model(len(tokenizer)), tmp_path / str(steps), evaluate_every=steps)
        curve = run(evaluate=evaluate, log=log)
        finals.append([p.clone() for p in adapted.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))
    measured = {step: values for step, values in logged if "loss" in values}
    assert [(step, values["loss"]) for step, values in measured.items()] == curve
    assert all(v["tokens_per_second"] > 0 and v["gradient_norm"] > 0 for v in measured.values())
    assert measured[1]["learning_rate"] == pytest.approx(0.01)
    bits = {step: v["validation_bits_per_byte"] for step, v in logged if "validation_bits_per_byte" in v}
    assert set(bits) == {2, 4}


def test_a_card_states_for_programs_what_a_student_was_made_of(study):
    parents = {"base": "a" * 64, "data": "b" * 64, "teacher": "c" * 64}
    text = model_card(study, "S1", 0, parents)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "transformers"
    lineage = front["lineage"]
    assert lineage["parents_sha256"] == parents
    assert (lineage["method"], lineage["tuning"], lineage["start"]) == ("ensemble", "full", "base")
    assert lineage["study_sha256"] == study.hash()
    assert "base_model" not in front, "it was trained from nothing"
    assert "method" not in yaml.safe_load(model_card(study, "S0", 0, parents).split("---\n")[1])["lineage"]
