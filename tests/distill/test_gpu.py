"""What trains and teaches on a GPU, held against the CPU. Skipped where there is none: not run by us yet."""

import math

import pytest
import torch

from distill.data.rows import training_rows
from distill.losses.teacher_output import Dense
from distill.method import Plain
from distill.models.export import export
from distill.models.generation import generate_texts
from distill.models.lora import add_adapters
from distill.models.precision import measure_products
from distill.teachers.cache import CachedTeacher, link_shards, write_shards
from distill.teachers.codec import make_codec
from distill.teachers.local import LocalTeacher
from distill.trainer.loop import batch_loss, row_order, train
from distill.trainer.module import DistillationModule, float32_products
from distill.trainer.optimizers import build_optimizers, learning_rate_factor, set_learning_rate
from eval.core.artifacts import Key, build_artifact, read_manifest
from eval.core.config import Frozen
from eval.core.documents import collate, free_bytes, tokens_per_batch
from eval.core.sections import Optimizer, Student, Targets, Train
from eval.core.study import load_study
from eval.engines import load_tokenizer
from eval.engines.torch import load_checkpoint
from tests.distill.test_generate import GENERATION, lively
from tests.distill.test_generate import rows as some_rows
from tests.distill.test_loop import row_log_probs, rows
from tests.helpers import launch, run, tiny_model, tiny_study, tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS, GPU = 6, torch.device("cuda")


def teacher(batch):
    """What a row's tokens decide, on the device of the batch."""
    return Dense(row_log_probs(batch.to("cpu"))[:, :-1].to(batch.input_ids.device)[batch.mask])


def losses_on_a_cpu(config):
    """The loss of every step, by the parts of the loop: the loop itself takes the GPU that there is."""
    model, some, losses = tiny_model(), rows(), []
    module = DistillationModule(model, config).train()
    optimizers = build_optimizers(model, config)
    for step, places in enumerate(row_order(len(some), STEPS, config.rows, 0)):
        chosen = [some[i] for i in places]
        set_learning_rate(optimizers, learning_rate_factor(step, STEPS, config))
        loss = batch_loss(module, collate(chosen, 0), teacher) / sum(row.predicted for row in chosen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("precision", "name", "near"),
    [
        ("fp32", "adamw", 1e-4),
        ("fp32", "muon", 1e-3),
        ("fp32", "adamw_8bit", 1e-2),
        ("tf32", "adamw", 5e-3),
        ("bf16", "adamw", 3e-2),
        ("bf16", "muon", 3e-2),
    ],
)
def test_training_has_the_losses_of_a_cpu(tmp_path, precision, name, near):
    optimizer = Optimizer(name=name, lr=0.01)
    config = Train(rows=4, steps=STEPS, precision=precision, optimizer=optimizer)
    wanted = losses_on_a_cpu(config.model_copy(update={"precision": "fp32"}))
    curve = train(tiny_model(), rows(), config, pad=0, seed=0, teacher=teacher, scratch=tmp_path)
    assert [loss for _, loss in curve] == pytest.approx(wanted, rel=near)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
@pytest.mark.parametrize("again", [False, True])
def test_a_stopped_run_with_dropout_goes_on_to_the_same_weights(tmp_path, name, again):
    """Checkpoints hold the random numbers of the GPU too; layers computed again drop the same units."""
    student = Student(tuning="lora", rank=2, dropout=0.5)
    weights = []
    for folder, checkpointing, stop_at in (("whole", False, None), ("parts", again, 3)):
        config = Train(
            rows=4,
            steps=5,
            checkpoint_every=2,
            gradient_checkpointing=checkpointing,
            optimizer=Optimizer(name=name, lr=0.01),
        )
        how = {"pad": 0, "seed": 1, "teacher": teacher, "scratch": tmp_path / folder}

        def report(step, stop_at=stop_at):
            if step.number == stop_at:
                raise Stopped

        model = add_adapters(tiny_model(), student, 0, device=GPU, dtype=torch.float32).model
        try:
            train(model, rows(), config, report=report, **how)
        except Stopped:
            model = add_adapters(tiny_model(), student, 0, device=GPU, dtype=torch.float32).model
            train(model, rows(), config, **how)
        weights.append(model.state_dict())
    for one, other in zip(*(state.values() for state in weights), strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), atol=1e-6, rtol=1e-5)


def test_tf32_is_inside_and_nowhere_else():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("a GPU before Ampere has no TF32")
    one, other = torch.randn(2, 512, 512, device=GPU)
    exact = one.double() @ other.double()

    def error():
        return float(((one @ other) - exact).norm() / exact.norm())

    before = error()
    with float32_products("tf32"):
        inside = error()
    with float32_products("fp32"):
        assert error() == before
    assert error() == before < 1e-6
    assert 1e-5 < inside < 1e-3


def test_moments_of_8_bits_lie_on_the_gpu(tmp_path):
    model = tiny_model().to(GPU)
    eight, _ = build_optimizers(model, Train(optimizer=Optimizer(name="adamw_8bit")))
    model(torch.arange(9, device=GPU)[None], labels=torch.arange(9, device=GPU)[None]).loss.backward()
    eight.step()
    moments = [state["state1"] for state in eight.state.values()]
    assert {(moment.dtype, moment.device.type) for moment in moments} == {(torch.uint8, "cuda")}


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
def test_attention_as_asked_has_the_losses_of_any_other(tmp_path, attention):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    curves = []
    for name in ("auto", attention):
        config = Train(rows=4, steps=3, precision="bf16", attention=name)
        curve = train(tiny_model(), rows(), config, pad=0, seed=0, teacher=teacher, scratch=tmp_path / name)
        curves.append([loss for _, loss in curve])
    assert curves[1] == pytest.approx(curves[0], rel=2e-2)


def test_a_student_over_nf4_is_exported_as_it_was_trained(tmp_path):
    adapted = add_adapters(tiny_model(), Student(tuning="qlora", rank=4), 0, device=GPU, dtype=torch.bfloat16)
    config = Train(rows=4, steps=8, precision="bf16", optimizer=Optimizer(lr=0.01))
    curve = train(adapted.model, rows(), config, pad=0, seed=0, teacher=teacher, scratch=tmp_path / "s")
    assert curve[-1][1] < curve[0][1]
    batch = collate(rows(2), 0)
    with torch.no_grad():
        trained = adapted.model(**batch.to(GPU).inputs).logits.float().cpu()
    export(adapted.merged(), tiny_tokenizer(), tmp_path / "out", "card", [])
    loaded, _ = load_checkpoint(tmp_path / "out")
    with torch.no_grad():
        assert float((loaded(**batch.inputs).logits - trained).abs().max()) < 0.1  # products in bf16


@pytest.mark.parametrize("form", ["dense", "sampled", "top_k"])
def test_targets_are_those_of_a_cpu(tmp_path, form):
    codec, some = make_codec(Targets(form=form), 320, 1.0), rows(6)
    read = []
    for place in ("cpu", "cuda"):
        local = LocalTeacher(Plain(Frozen()), "plain", tiny_model(seed=3).to(place), 320)

        def ask(batch, local=local, place=place):
            return local(batch.to(place))

        write_shards(tmp_path / place, some, ask, codec, pad=0, report=lambda share: None)
        with build_artifact(
            tmp_path / f"{place}-t", kind="targets", name="t", key=Key(""), parents={}, facts={**codec.facts}
        ) as folder:
            link_shards(tmp_path / place, folder, sum(row.predicted for row in some))
        batch = collate(some, 0).to(GPU)
        target = CachedTeacher(tmp_path / f"{place}-t", some, codec, {})(batch)
        moved = [value for value in vars(target).values() if isinstance(value, torch.Tensor)]
        assert {value.device.type for value in moved} == {"cuda"}
        read.append(moved)
    for one, other in zip(*read, strict=True):
        assert one.shape == other.shape
        if one.is_floating_point():
            torch.testing.assert_close(one, other, atol=2e-2, rtol=1e-2)  # kept in 16 bits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts_are_those_of_a_cpu(dtype):
    model = lively().to(getattr(torch, dtype))
    texts = [generate_texts(model.to(place), some_rows(), GENERATION, "seed", 0) for place in ("cpu", "cuda")]
    same = sum(one == other for one, other in zip(*texts, strict=True))
    assert same >= len(texts[0]) - (1 if dtype == "float32" else 3), "but where two tokens are all but equal"


def test_a_batch_is_sized_by_the_memory_of_the_gpu():
    whole = torch.cuda.get_device_properties(0).total_memory
    before = free_bytes(GPU)
    held = torch.empty(2**28, dtype=torch.uint8, device=GPU)
    assert 2**27 < before - free_bytes(GPU) < 2**29
    del held
    assert free_bytes(GPU) <= whole
    assert tokens_per_batch(2**16, GPU) <= free_bytes(GPU) / (8 * 4 * 2**16)


def test_products_are_measured_on_the_gpu():
    speeds = measure_products(256, 512, 1024, GPU)
    assert min(speeds.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--targets.form", "sampled", "--train.precision", "bf16", "--targets.dtype", "bfloat16"],
        ["--targets.source", "online", "--targets.quantization", "nf4", "--train.precision", "tf32"],
        ["--targets.source", "sequence", "--train.optimizer.name", "adamw_8bit"],
        ["--targets.source", "on_policy", "--train.loss.weight", "1"],
        ["--student.tuning", "qlora", "--student.rank", "2"],
    ],
)
def test_a_whole_study_trains_on_a_gpu_and_is_scored_there(tmp_path, words):
    generation = ["--targets.generation.prompt_tokens", "6", "--targets.generation.new_tokens", "8"]
    path = tiny_study(tmp_path, recipes=[])
    done = launch(path, "--seeds", "[0]", *generation, *words)
    assert done.returncode == 0, done.stderr
    assert "1 processes on cuda" in done.stderr
    folder = tmp_path / "runs" / "tiny"
    study = load_study(folder)
    assert len(training_rows(study, load_tokenizer(folder / "base" / "s0"))) == 32
    for arm in ("S1", "S0", "CE"):
        curve = read_manifest(folder / "students" / arm / "s0").facts["loss_curve"]
        assert all(math.isfinite(loss) for _, loss in curve)
    scored = run("-m", "eval.score", "--study", folder, "--device", "cuda")
    assert scored.returncode == 0, scored.stderr
