"""A teacher behind a server: a real one in a process of its own, refused, restarted, killed in the middle."""

import hashlib
import shutil
import socket
from contextlib import closing

import pytest
import torch

from distill.checks import check_method
from distill.losses.divergences import TOP_K_DIVERGENCES, distillation_loss
from distill.losses.teacher_output import TopK
from distill.method import Plain
from distill.methods.context import Context
from distill.pipeline import base_jobs, make_student, prepare_inputs, teacher_jobs
from distill.teachers.codec import TopKCodec
from distill.teachers.server import Client, ServerTeacher, check_server
from distill.teachers.spelling import Unmapped, spellings
from distill.teachers.target_source import check_target_source
from distill.trainer.loop import accelerator
from eval.core.artifacts import read_manifest
from eval.core.config import Frozen
from eval.core.documents import Row, collate
from eval.core.errors import UserError
from eval.core.jobs import run_in_turn
from eval.core.records import each_score
from eval.core.sections import Loss
from eval.core.sections.models import Server
from eval.core.study import load_study, make_run_folder
from eval.engines.torch import load_model
from tests.distill.completions_server import serving
from tests.distill.test_cross_tokenizer import sentencepiece
from tests.helpers import text, tiny_model, tiny_study, tiny_tokenizer

KEY = "sk-0123456789-secret"


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def how(url, **changes):
    return Server(**{"url": url, "model": "large", "retries": 0, "timeout": 20, **changes})


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def large(tmp_path_factory, tokenizer):
    """A model with more rows than its tokenizer has ids, lively enough that its answers differ."""
    folder = tmp_path_factory.mktemp("large")
    model = tiny_model(330, 7, hidden_size=96)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(6)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(large):
    with serving(large, key=KEY, refuse=318) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def batch(tokenizer):
    texts = {"code": text("code", 1, 9), "prose": text("prose", 2, 5) + "é: 東"}
    return collate(
        [
            Row(f"d{i}", domain, i, [0, *tokenizer(one)["input_ids"]], 3 * i)
            for i, (domain, one) in enumerate(texts.items())
        ],
        0,
    )


def exact(model, batch, front=()):
    """[B, T, V] of the model itself, after tokens in front."""
    ahead = torch.tensor([front] * len(batch.ids), dtype=torch.int64).reshape(len(batch.ids), -1)
    ids = torch.cat([ahead, batch.input_ids], 1)
    with torch.no_grad():
        return model(ids).logits[:, len(front) :].log_softmax(-1)


@pytest.mark.parametrize(
    ("protocol", "place"),
    [("prompt_logprobs", "ids"), ("echo", "ids"), ("echo", "content"), ("generate", "own")],
)
def test_a_server_says_what_its_model_says(url, large, tokenizer, batch, protocol, place):
    server = how(f"{url}/{place}/v1", protocol=protocol, batch=1)
    with closing(ServerTeacher(server, Plain(Frozen()), tokenizer, 12)) as teacher:
        target, scored = teacher(batch), teacher.log_probs(batch)
    wanted = exact(load_model(large), batch)
    of_tokens = wanted[:, :-1][batch.mask]
    values = of_tokens[:, :320].topk(12).values
    torch.testing.assert_close(of_tokens.gather(1, target.ids), values, msg="the likeliest, in their order")
    torch.testing.assert_close(target.log_probs, values, atol=1e-5, rtol=1e-5)
    assert scored.shape == (*batch.input_ids.shape, 320)
    own = [each[:, :-1][batch.mask].gather(1, batch.labels[batch.mask][:, None]) for each in (scored, wanted)]
    torch.testing.assert_close(*own, atol=1e-5, rtol=1e-5)
    best = scored[:, :-1][batch.mask].argmax(-1, keepdim=True)
    torch.testing.assert_close(of_tokens.gather(1, best), values[:, :1])
    assert float(scored.logsumexp(-1).abs().max()) < 1e-4


def test_an_echo_of_texts_leaves_what_cannot_be_told_apart_to_the_tail(url, large, tokenizer, batch):
    with closing(ServerTeacher(how(f"{url}/v1", protocol="echo"), Plain(Frozen()), tokenizer, 12)) as teacher:
        target = teacher(batch)
    wanted = exact(load_model(large), batch)[:, :-1][batch.mask]
    used = target.log_probs > -torch.inf
    torch.testing.assert_close(
        target.log_probs[used], wanted.gather(1, target.ids)[used], atol=1e-5, rtol=1e-5
    )
    assert used[:, 0].all()
    assert 0 < int((~used).sum()) < used.numel() / 2


def test_a_row_whose_texts_do_not_say_its_ids_has_no_answer(url, tokenizer):
    """The others are kept and read as ever; what is scored may not lack one."""
    some = [Row("odd", "code", 0, [0, 5, 300, 9]), Row("fine", "code", 0, [0, 5, 9])]
    server = how(f"{url}/odd/v1", protocol="echo", batch=2)
    with closing(ServerTeacher(server, Plain(Frozen()), tokenizer, 4)) as teacher:
        odd, fine = teacher.answers(collate(some, 0))
        assert odd is None
        assert fine.own.shape == (2,)
        assert list(teacher.causes) == ["odd#0"]
        assert "~' there, " in teacher.causes["odd#0"]
        target = teacher(collate(some, 0))
        assert (target.log_probs == -torch.inf).all(1).tolist() == [True] * 3 + [False] * 2
        with pytest.raises(UserError, match="row odd#0: a scored document is among the rows whose tokens"):
            teacher.log_probs(collate(some, 0))
    with pytest.raises(UserError, match=r"row odd#0: id 5 is .*~' there, .* take a base with the tokenizer"):
        check_server(server, tokenizer, 4, collate(some, 0))


def test_a_text_is_mapped_back_exactly_or_not_at_all(tokenizer):
    """With a tokenizer of SentencePiece, whose `decode` takes away the space that a word begins with."""
    pieces = sentencepiece()
    texts = [pieces.decode([i]) for i in range(1 + max(pieces.get_vocab().values()))]
    decoded, spaced = spellings(pieces, texts)
    tokens = pieces("the rain the", add_special_tokens=False)["input_ids"]
    by_bytes = [pieces.convert_ids_to_tokens(i).replace("\u2581", " ") for i in tokens]
    assert spaced.fits(tokens, by_bytes)
    assert not decoded.fits(tokens, by_bytes)
    assert [spaced.id(text) for text in by_bytes] == tokens
    assert decoded.fits(tokens, [texts[i] for i in tokens])
    same = next(i for i, text in enumerate(texts) if texts.count(text) > 1 and text)
    assert decoded.id(texts[same]) is None, "several ids have it"
    assert decoded.id("") is decoded.id("\ufffd") is None
    assert spaced.id(f"token_id:{tokens[0]}") == tokens[0]
    assert spaced.id(f"token_id:{len(texts)}") is None
    with pytest.raises(Unmapped, match="'no such' there is no token"):
        spaced.id("no such")
    (plain, *_) = spellings(tokenizer, [tokenizer.decode([i]) for i in range(320)])
    known = [i for i in range(320) if plain.id(tokenizer.decode([i])) is not None]
    assert all(plain.id(tokenizer.decode([i])) == i for i in known)
    assert len(known) > 150


def test_another_version_of_a_server_is_another_teacher(tmp_path, large, url):
    base = tmp_path / "small"
    tiny_model(330).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    teacher, hashes = {"server": {"url": f"{url}/v1", "model": "large", "retries": 0}}, []
    changes = {"base": {"path": str(base)}, "method": {"name": "larger_teacher"}, "seeds": [0]}
    path = tiny_study(tmp_path, teacher=teacher, targets={"form": "top_k", "k": 6}, ce_arm=False, **changes)
    for version in ("", "2"):
        study = load_study(path, ["--teacher.server.version", f"'{version}'"])
        make_run_folder(study)
        prepare_inputs(study, accelerator())
        hashes.append(read_manifest(study.folder / "teacher").hash)
    assert hashes[0] != hashes[1]


def test_a_context_method_stands_in_the_prompt(url, large, tokenizer, batch):
    method = Context(
        Context.Settings(text=text("code", 5, 6), domains={"prose": {"text": text("prose", 5, 6)}})
    )
    for one in (method, method.control()):
        fronts = one.in_front(tokenizer)
        with closing(ServerTeacher(how(f"{url}/v1"), one, tokenizer, 300)) as teacher:
            target, start = teacher(batch), 0
        for i, front in enumerate((fronts[""], fronts["prose"])):
            wanted = exact(load_model(large), batch, front)[i, :-1][batch.mask[i]][:, :320]
            found = target.slice(start, start := start + len(wanted))
            torch.testing.assert_close(found.log_probs, wanted.gather(1, found.ids), atol=1e-4, rtol=1e-4)


def test_k_and_a_tail_of_one_id_are_the_whole_distribution():
    """KL over k + 1 outcomes against that over V = k + 1 ids; unused entries add nothing to any divergence."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.log_softmax(2 * torch.randn(7, 9, generator=generator), -1)
    logits, labels = torch.randn(7, 9, generator=generator), torch.arange(7)
    values, ids = whole.topk(8)
    padded = TopK(
        torch.cat([ids, ids[:, :1].expand(-1, 3)], 1), torch.cat([values, torch.full((7, 3), -torch.inf)], 1)
    )
    columns = TopKCodec(9, 8).encode_top_k(padded.ids[:, 3:].numpy(), padded.log_probs[:, 3:].numpy())
    assert (TopKCodec(9, 8).decode(columns).log_probs == -torch.inf).sum() == 21
    for name in TOP_K_DIVERGENCES:
        results = []
        for target in (whole, TopK(ids, values), padded):
            leaf = logits.clone().requires_grad_()
            loss = distillation_loss(leaf, labels, target, Loss(divergence=name, weight=1.0))
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        for other in results[1:]:
            for one, two in zip(results[0], other, strict=True):
                torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_a_busy_server_is_asked_again_and_a_silent_one_is_told(url, tokenizer, batch):
    server = how(f"{url}/busy/v1", batch=2, retries=2)
    with closing(ServerTeacher(server, Plain(Frozen()), tokenizer, 4)) as teacher:
        assert len(teacher(batch).ids) == int(batch.mask.sum())
    silent = how(f"http://127.0.0.1:{free_port()}/v1", retries=1)
    with (
        closing(ServerTeacher(silent, Plain(Frozen()), tokenizer, 4)) as teacher,
        pytest.raises(UserError, match=r"does not answer after 2 tries \(ConnectError"),
    ):
        teacher(batch)


def test_a_row_that_is_refused_is_named(url, tokenizer, batch):
    """The request held both rows; what was said of the other one is kept."""
    refused = collate([Row("fine", "code", 0, [0, 5, 6]), Row("bad", "code", 4, [0, 5, 318])], 0)
    with (
        closing(ServerTeacher(how(f"{url}/v1"), Plain(Frozen()), tokenizer, 4)) as teacher,
        pytest.raises(UserError, match="row bad#4: refused with status 400: token 318 is not allowed"),
    ):
        teacher(refused)


@pytest.mark.parametrize(
    ("changes", "k", "message"),
    [
        ({"model": "larger"}, 4, r"teacher.server.model: 'larger'; it serves large, other"),
        ({}, 310, r"row d0#0: refused with status 400: Requested prompt logprobs of 310, .*targets.k"),
        ({"path": "nowhere"}, 4, r"teacher.server: refused with status 404: no such page; give .* `/v1`"),
        ({"api_key_env": "NO_SUCH_KEY"}, 4, r"api_key_env: NO_SUCH_KEY is not set; set NO_SUCH_KEY"),
    ],
)
def test_what_a_server_refuses_is_told_in_one_line(url, tokenizer, batch, changes, k, message):
    changes = dict(changes)
    server = how(f"{url}/{changes.pop('path', 'v1')}", **changes)
    with pytest.raises(UserError, match=message) as error:
        check_server(server, tokenizer, k, batch)
    assert "\n" not in str(error.value)


def test_another_tokenizer_is_refused(url, batch):
    texts = [text(domain, i)[::-1] for domain in ("code", "prose") for i in range(5)]
    other = tiny_tokenizer().train_new_from_iterator(texts, 320)
    with pytest.raises(UserError, match=r"id \d+ is '.*' there, '.*' in the tokenizer of the base"):
        check_server(how(f"{url}/v1"), other, 4, batch)


def test_the_key_is_in_no_message(url, tokenizer, batch, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-wrong-key")
    server = how(f"{url}/key/v1", api_key_env="TEACHER_KEY")
    with pytest.raises(UserError, match=r"refuses the key \(status 401: wrong key: Bearer \*\*\*\)") as error:
        check_server(server, tokenizer, 4, batch)
    assert "sk-wrong" not in str(error.value)
    monkeypatch.setenv("TEACHER_KEY", KEY)
    check_server(server, tokenizer, 4, batch)


def test_a_wait_that_the_server_asks_for(monkeypatch):
    waits = []
    monkeypatch.setattr("distill.teachers.server.time.sleep", waits.append)
    client = Client(how("http://127.0.0.1:9/v1", retries=4))
    with pytest.raises(UserError, match="after 5 tries"):
        client.ask("GET", "models")
    assert waits == [0.5, 1, 2, 4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--method", "{name: harmful}"],
            "method harmful: changes the model .* use context or larger_teacher",
        ),
        (["--targets.form", "dense"], "targets.form: dense, .* set it to top_k"),
        (["--targets.source", "online"], "targets.source: online, .* set it to cached"),
        (["--teacher.path", "some/model"], "exactly one of `path`, `server`, `mix` and `file`"),
        (["--teacher.dtype", "bfloat16"], "a `server` decides itself"),
        (["--teacher.server.url", "http://me:secret@host/v1"], "holds no user, password or query"),
        (["--data.packing", "true"], "data.packing: true, but a server"),
    ],
)
def test_what_a_server_cannot_do_is_refused(tmp_path, words, message):
    server = {"url": "http://127.0.0.1:1/v1", "model": "large"}
    path = tiny_study(
        tmp_path,
        teacher={"server": server},
        method={"name": "larger_teacher"},
        targets={"form": "top_k", "k": 4},
    )
    with pytest.raises(UserError, match=message):  # noqa: PT012
        study = load_study(path, words)
        check_method(study)
        check_target_source(study)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("shard-*")}


def run_teachers(path):
    study = load_study(path)
    make_run_folder(study)
    study = prepare_inputs(study, accelerator())
    run_in_turn("server", [*base_jobs(study), *teacher_jobs(study)], quiet=True)
    return study


@pytest.mark.slow
def test_a_study_with_a_server_killed_in_the_middle_ends_with_the_same_bytes(tmp_path, large, monkeypatch):
    """No server, one that dies, one that goes on; a student; and the key is nowhere."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    base, port, count, wholes = tmp_path / "small", free_port(), tmp_path / "count", tmp_path / "whole"
    tiny_model(330).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    address = f"http://127.0.0.1:{port}/key/v1"
    server = {"url": address, "model": "large", "retries": 1, "batch": 2, "parallel": 1}
    teacher, targets = {"server": {**server, "api_key_env": "TEACHER_KEY"}}, {"form": "top_k", "k": 6}
    changes = {"base": {"path": str(base)}, "method": {"name": "larger_teacher"}, "seeds": [0]}
    path = tiny_study(tmp_path, teacher=teacher, targets=targets, ce_arm=False, **changes)
    with pytest.raises(UserError, match=r"teacher.server: .*/models does not answer after 2 tries"):
        run_teachers(path)
    with serving(large, port=port, key=KEY, count=count):
        study = run_teachers(path)
    run, whole = study.folder, int(count.read_text())
    run_teachers(path)  # done: no server is asked
    make_student(study, "S1", 0, lambda share, tokens=0: None)
    assert "large, behind a server" in (run / "students/S1/s0/README.md").read_text()
    assert {score.arm for score in each_score(run)} == {"T1", "T0"}
    shards, scores = hashes(run / "targets/T1/s0"), documents(run)
    for name in ("targets", "method", "teacher", "records"):
        shutil.move(run / name, wholes / name)
    with serving(large, port=port, key=KEY, count=count, die_after=9):
        with pytest.raises(UserError, match="does not answer after 2 tries"):
            run_teachers(path)
        before = int(count.read_text())
    assert not (run / "targets/T1/s0/manifest.json").exists()
    with serving(large, port=port, key=KEY, count=count):
        run_teachers(path)
    assert hashes(run / "targets/T1/s0") == shards != {}
    assert documents(run) == scores
    assert before + int(count.read_text()) <= whole + 6, "a row that was answered is not asked again"
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert not (run / "scratch/answers-T1-s0").exists()


def documents(run):
    return {(score.arm, score.kind): score.documents for score in each_score(run)}
