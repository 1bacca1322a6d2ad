"""A teacher with another tokenizer: pieces of text that both cut out, and the losses over them."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from distill.losses.chunked import chunked_loss
from distill.losses.cross_tokenizer import cross_tokenizer_loss
from distill.losses.divergences import DIVERGENCES, sorted_distance
from distill.losses.teacher_output import Dense, States
from distill.models.lm_head import Head
from distill.models.load import train_tokenizer
from distill.teachers.alignment import END, NO_TEXT, Alignment, Vocabulary, byte_alphabet
from eval.core.documents import Document, Row, collate, windows
from eval.core.errors import UserError
from eval.core.sections import Loss
from tests.helpers import text, tiny_tokenizer

TEXT = "naïve cafés, 東京 12345 — the quiet morning\n\tdef return(self): 'Straße' 🙂🙂 rain\n"


def other_tokenizer(size=300):
    return train_tokenizer([TEXT * 3, *(text("prose", i) for i in range(3))], size)


def sentencepiece():
    """A byte-fallback BPE with the letters of SentencePiece: as of Llama 2."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    words = ["▁", "t", "h", "e", "▁t", "▁th", "▁the", "r", "a", "i", "n", "ra", "in", "rain", "▁rain"]
    vocab |= {word: len(vocab) + i for i, word in enumerate(words)}
    pairs = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("r", "a"), ("i", "n"), ("ra", "in"), ("▁", "rain")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pieces_of(vocabulary, tokens, given, pieces, count):
    """The bytes of each piece."""
    parts = [b""] * count
    for token, piece in zip(tokens[1 + given :], pieces, strict=True):
        if piece >= 0:
            parts[piece] += vocabulary.text[token]
    return parts


@pytest.mark.parametrize("teacher", [other_tokenizer, sentencepiece, tiny_tokenizer])
@pytest.mark.parametrize("given", [0, 5])
def test_pieces_hold_the_same_bytes_in_both_and_are_as_short_as_can_be(teacher, given):
    student, teacher = tiny_tokenizer(), teacher()
    alignment = Alignment(student, teacher)
    ids = [0, *student(TEXT)["input_ids"]]
    its_ids, its_given, own, its, count = alignment.row(ids, given)
    mine = pieces_of(alignment.student, ids, given, own, count)
    theirs = pieces_of(alignment.teacher, its_ids, its_given, its, count)
    assert mine == [
        part.removeprefix(b" ") if i == 0 and part != mine[0] else part for i, part in enumerate(theirs)
    ]
    learned = alignment.student.joined(ids[1 + given :])
    assert learned.endswith(b"".join(mine)), "without a gap, to the end of the row"
    assert len(learned) - len(b"".join(mine)) < 8, "a token that straddles the seam, at most"
    own_ends, its_ends = alignment.student.ends(ids[1:]), alignment.teacher.ends(its_ids[1:])
    shift = its_ends[-1] - own_ends[-1]
    seam = own_ends[given - 1] if given else 0
    common = {end for end in own_ends if end + shift in its_ends and end >= seam} | (
        {0} if not given else set()
    )
    assert count == len(common) - 1, "one piece between each two ends that both have"


def test_a_row_that_begins_or_ends_within_a_character_is_aligned_where_there_is_text():
    student = train_tokenizer(["x"], 257)  # bytes
    alignment = Alignment(student, other_tokenizer())
    data = "東京 rain".encode()[1:-2]
    alphabet = {value: letter for letter, value in byte_alphabet().items()}
    ids = [student.convert_tokens_to_ids(alphabet[bytes([byte])]) for byte in data]
    _, _, own, _, count = alignment.row([0, *ids, *ids[:1]], 0)
    assert own[:2] == [-1, -1], "the rest of a character is no text"
    assert own[-1] == -1, "nor is the beginning of one"
    assert b"".join(pieces_of(alignment.student, [0, *ids, *ids[:1]], 0, own, count)) == data[2:]


def test_the_end_of_a_text_is_the_end_whatever_it_is_called():
    student, teacher = tiny_tokenizer(), sentencepiece()
    alignment = Alignment(student, teacher)
    ids = [0, *student("the rain")["input_ids"], student.eos_token_id, *student("rain")["input_ids"]]
    its_ids, _, own, its, _ = alignment.row(ids, 0)
    assert teacher.eos_token_id in its_ids
    assert own[ids[1:].index(0)] == its[its_ids[1:].index(teacher.eos_token_id)] >= 0
    pairs = dict(alignment.shared.T.tolist())
    assert pairs[student.eos_token_id] == teacher.eos_token_id


def test_every_end_that_a_model_lists_is_an_end():
    student, teacher = tiny_tokenizer(), sentencepiece()
    student.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|user|>"]})
    end, user = student.convert_tokens_to_ids(["<|end|>", "<|user|>"])
    text = student("the rain")["input_ids"]
    before = Alignment(student, teacher).row([0, *text, end, *text], 0)
    student.listed_ends = [end]
    alignment = Alignment(student, teacher)
    _, _, own, _, count = alignment.row([0, *text, end, *text], 0)
    assert own[-1] == count - 1
    assert before[2][len(text) :] == [-1] * (1 + len(text)), "nothing from the end on was aligned"
    pairs = dict(alignment.shared.T.tolist())
    assert pairs[student.eos_token_id] == teacher.eos_token_id, "EOS first: the teacher has one end"
    assert end not in pairs
    assert alignment.own_events[end] == alignment.own_events[student.eos_token_id]
    assert (alignment.student.joined([end]), alignment.student.joined([user])) == (END, NO_TEXT)


def test_one_tokenizer_shares_every_token_with_itself():
    vocabulary = tiny_tokenizer()
    assert torch.equal(*Alignment(vocabulary, tiny_tokenizer()).shared)
    assert len(Alignment(vocabulary, tiny_tokenizer()).shared[0]) == len(vocabulary)
    repeated = Alignment(sentencepiece(), sentencepiece()).shared  # `<0x74>` and `t` are the same byte
    assert torch.equal(*repeated)
    assert len(repeated[0]) == len(sentencepiece())


def test_a_tokenizer_that_changes_texts_is_refused():
    from tokenizers import normalizers

    lower = tiny_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match=r"tokenizer of teacher\.path: does not give a text back"):
        Vocabulary(lower, "teacher.path")
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"a": 0}, unk_token="a")))
    with pytest.raises(UserError, match="the bytes of its tokens are not known"):
        Vocabulary(words, "teacher.path")


def batch_of(tokenizer, given=3):
    documents = [Document("d0", "x", text("prose", 0, 6)), Document("d1", "x", TEXT[:40])]
    rows = [windows(tokenizer, document, 40)[0] for document in documents]
    return collate([Row(r.document, r.domain, r.index, r.tokens, given) for r in rows], 0)


def case(student, teacher, vocabulary, form="states"):
    """Hidden states of a student, its labels, and what a teacher of random weights says of the same rows."""
    batch, alignment = batch_of(student), Alignment(student, teacher)
    translation = alignment.translate(batch)
    count = int(translation.batch.mask.sum())
    head = Head(noise(len(teacher), 8, seed=3) / 2)
    target = States([noise(count, 8, seed=4)], [head])
    if form == "dense":
        target = Dense(target.log_softmax(0, count))
    labels = batch.labels[batch.mask]
    hidden = (noise(len(labels), 6, seed=1)).requires_grad_()
    weight = (noise(vocabulary, 6, seed=2)).requires_grad_()
    return hidden, weight, labels, alignment.target(translation, target)


@pytest.mark.parametrize("form", ["states", "dense"])
@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_identical_tokenizers_give_the_loss_between_equal_tokenizers(divergence, form):
    """Value and gradients, to float32's last digits; the student's head may be padded."""
    tokenizer = tiny_tokenizer()
    rows = len(tokenizer) + (0 if divergence == "reverse_kl" else 9)
    config = Loss(divergence=divergence, weight=0.7, temperature=2.0)
    hidden, weight, labels, aligned = case(tokenizer, tiny_tokenizer(), rows, form)
    results = []
    for loss_of, target in ((chunked_loss, aligned.target), (cross_tokenizer_loss, aligned)):
        hidden.grad = weight.grad = None
        loss = loss_of(hidden, Head(weight), labels, target, config)
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def events_of(vocabulary, shared, names):
    """[V, K] which of its tokens counts as which shared one: the longest that it begins with."""
    member = torch.zeros(vocabulary.size, len(shared), dtype=torch.bool)
    for i, text_of_token in enumerate(vocabulary.text):
        begins = [place for place, name in enumerate(names) if text_of_token.startswith(name)]
        longest = max(begins, key=lambda place: len(names[place]), default=None)
        if i in shared.tolist():
            member[i, shared.tolist().index(i)] = True
        elif longest is not None:
            member[i, longest] = True
    return member.double()


def reference(hidden, weight, labels, aligned, config, vocabularies):
    """The same, piece by piece and in float64, straight from its words."""
    names = [vocabularies[0].text[i] for i in aligned.shared_own.tolist()]
    shares = [
        events_of(vocabulary, shared, names)
        for vocabulary, shared in zip(vocabularies, (aligned.shared_own, aligned.shared_its), strict=True)
    ]
    own = torch.log_softmax((hidden.double() @ weight.double().T), -1)
    its = torch.log_softmax(aligned.target.logits(0, len(aligned.its)).double(), -1)
    own_t, its_t = (torch.log_softmax(each / config.temperature, -1) for each in (own, its))
    total = torch.zeros((), dtype=torch.float64)
    divergence = DIVERGENCES[config.divergence]
    for piece in range(aligned.pieces):
        mine, theirs = ((each == piece).nonzero()[:, 0].tolist() for each in (aligned.own, aligned.its))
        if config.divergence == "uld":
            total = total + sorted_distance(its_t[theirs[:1]], own_t[mine[:1]])
            continue
        q, p = own_t[mine[0]].exp() @ shares[0], its_t[theirs[0]].exp() @ shares[1]
        if (
            float(q.detach().sum()) < 1 - 1e-9
        ):  # the student has control tokens that are none of the teacher's
            p, q = (torch.cat([x, 1 - x.sum()[None]]) for x in (p, q))
        total = total + divergence((p / p.sum()).log()[None], q.log()[None], config)
        if len(mine) > 1 or len(theirs) > 1:
            p = sum(its_t[m, aligned.labels[m]] for m in theirs).exp()
            q = sum(own_t[n, labels[n]] for n in mine).exp()
            p, q = (torch.stack([x, 1 - x]).log()[None] for x in (p, q))
            total = total + divergence(p, q, config)
    hard = -own[torch.arange(len(labels)), labels].sum()
    return (1 - config.weight) * hard + config.weight * config.temperature**2 * total


@pytest.mark.parametrize("teacher", [other_tokenizer, sentencepiece])
@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_other_tokenizers_are_compared_as_the_definition_says(divergence, teacher, monkeypatch):
    monkeypatch.setattr("distill.losses.cross_tokenizer.CHUNK_BYTES", 4 * 7 * 620)  # seven tokens at a time
    student = tiny_tokenizer()
    config = Loss(divergence=divergence, weight=0.6, temperature=2.0)
    vocabularies = Vocabulary(student, "student"), Vocabulary(teacher(), "teacher")
    hidden, weight, labels, aligned = case(student, teacher(), len(student))
    sizes = [torch.bincount(each[each >= 0], minlength=aligned.pieces) for each in (aligned.own, aligned.its)]
    assert bool(((sizes[0] == 1) & (sizes[1] == 1)).any()), "tokens that both have"
    assert bool(((sizes[0] > 1) | (sizes[1] > 1)).any()), "and pieces of several"
    results = []
    for loss_of, head in (
        (partial(reference, vocabularies=vocabularies), weight),
        (cross_tokenizer_loss, Head(weight)),
    ):
        hidden.grad = weight.grad = None
        loss = loss_of(hidden, head, labels, aligned, config)
        loss.backward()
        results.append((loss.detach().float(), hidden.grad, weight.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("divergence", ["forward_kl", "uld"])
def test_a_gpu_gives_the_same_loss(divergence):
    student = tiny_tokenizer()
    hidden, weight, labels, aligned = case(student, other_tokenizer(), len(student), "dense")
    moved = {name: value.cuda() for name, value in vars(aligned).items() if isinstance(value, torch.Tensor)}
    there = replace(aligned, target=Dense(aligned.target.log_probs.cuda()), **moved)
    config = Loss(divergence=divergence, weight=0.7)
    results = []
    for place, target in (("cpu", aligned), ("cuda", there)):
        leaf = hidden.detach().to(place).requires_grad_()
        loss = cross_tokenizer_loss(leaf, Head(weight.detach().to(place)), labels.to(place), target, config)
        loss.backward()
        results.append((loss.detach().cpu(), leaf.grad.cpu()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_sorted_probabilities_of_other_sizes():
    """By hand: {0.6, 0.4} against {0.5, 0.3, 0.2}."""
    teacher, student = torch.tensor([[0.4, 0.6]]).log(), torch.tensor([[0.2, 0.5, 0.3]]).log()
    assert float(sorted_distance(teacher, student)) == pytest.approx(0.1 + 0.1 + 0.2)
    assert float(sorted_distance(teacher, teacher.flip(1))) == pytest.approx(0.0, abs=1e-7)


def test_a_student_learns_the_text_that_a_teacher_of_bytes_knows():
    """The teacher is sure of one text, byte by byte; the student hears of it through the pieces alone."""
    student, teacher = tiny_tokenizer(), train_tokenizer(["x"], 257)
    alignment, batch = Alignment(student, teacher), batch_of(tiny_tokenizer(), given=0)
    translation = alignment.translate(batch)
    its = translation.batch.labels[translation.batch.mask]
    sure = nn.functional.one_hot(its, len(teacher)).float() * 12
    target = alignment.target(translation, Dense(sure.log_softmax(-1)))
    labels = batch.labels[batch.mask]
    logits = torch.zeros(len(labels), len(student), requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(100):
        optimizer.zero_grad()
        loss = cross_tokenizer_loss(logits, Head(torch.eye(len(student))), labels, target, Loss(weight=1.0))
        loss.backward()
        optimizer.step()
    right = logits.detach().log_softmax(-1)[torch.arange(len(labels)), labels]
    several = torch.bincount(target.its)[target.own] > 1
    assert int(several.sum()) > 5
    assert float(right[several].min()) > -0.2 > -math.log(len(student))
    first = logits.detach().softmax(-1) @ nn.functional.one_hot(alignment.own_events).float()
    known = target.own_events[labels]
    assert float(first[torch.arange(len(labels)), known].min()) > 0.8, "and how each piece begins"
