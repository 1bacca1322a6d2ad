"""A smaller vocabulary splits texts as before, and its model answers as before among what is left."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from compress.passes.vocabulary import keep_tokens
from compress.vocabulary import check_round_trip, needed_ids, token_ids, without_tokens, write_tokenizer
from eval.core.documents import Document, collate
from eval.core.errors import UserError
from eval.engines import load_tokenizer
from tests.distill.test_families import EVERY, FAMILIES, ROWS
from tests.helpers import WORDS, text

TRAINERS = {
    "BPE": trainers.BpeTrainer,
    "byte fallback": trainers.BpeTrainer,
    "Unigram": trainers.UnigramTrainer,
    "WordPiece": trainers.WordPieceTrainer,
    "WordLevel": trainers.WordLevelTrainer,
}
PROSE = [Document(f"prose-{i}", "prose", text("prose", i)) for i in range(6)]


def trained(kind):
    """A tokenizer of both domains, with special tokens at both ends of its ids and in its post-processor."""
    special = ["<s>", "[UNK]", "</s>"]
    more = {}
    model = models.WordLevel(unk_token="[UNK]")
    if kind in ("BPE", "byte fallback"):
        model = models.BPE(unk_token="[UNK]", byte_fallback=kind == "byte fallback")
        special += [f"<0x{i:02X}>" for i in range(256)] if kind == "byte fallback" else []
    elif kind != "WordLevel":
        model = getattr(models, kind)(**({"unk_token": "[UNK]"} if kind == "WordPiece" else {}))
        more = {"unk_token": "[UNK]"} if kind == "Unigram" else {}
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = TRAINERS[kind](vocab_size=420, special_tokens=special, show_progress=False, **more)
    backend.train_from_iterator([text(d, i) for d in WORDS for i in range(6)], trainer)
    backend.add_special_tokens(["<pad>"])
    ends = [("<s>", 0), ("<pad>", backend.token_to_id("<pad>"))]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A <pad>", special_tokens=ends)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.mark.parametrize("kind", TRAINERS)
def test_texts_are_split_as_before_by_every_kind_of_tokenizer(kind, tmp_path):
    old = trained(kind)
    content = json.loads(old.backend_tokenizer.to_str())
    used = {i for document in PROSE for i in old(document.text)["input_ids"]}
    kept = needed_ids(content, used)
    assert used < {*kept} < {*range(len(old))}
    write_tokenizer(old, without_tokens(content, kept), tmp_path)
    new = load_tokenizer(tmp_path, len(kept))
    assert len(new) == len(kept)
    assert check_round_trip(old, new, kept, PROSE) == len(PROSE)
    for document in PROSE:  # with what the post-processor adds
        assert [kept[i] for i in new(document.text)["input_ids"]] == old(document.text)["input_ids"]
    assert new.convert_ids_to_tokens(range(len(kept))) == old.convert_ids_to_tokens(kept)
    assert new.all_special_tokens == old.all_special_tokens
    with pytest.raises(UserError, match="document 'code': it is split into other tokens"):
        check_round_trip(old, new, kept, [Document("code", "code", text("code", 0))])
    everything = needed_ids(content, range(len(old)))
    assert without_tokens(content, everything) == content, "nothing cut is the same tokenizer"


def test_bytes_spell_what_the_documents_did_not_have():
    for kind, unseen in (("byte fallback", "ж"), ("BPE", "lambda")):
        old = trained(kind)
        content = json.loads(old.backend_tokenizer.to_str())
        kept = needed_ids(content, {i for document in PROSE for i in old(document.text)["input_ids"]})
        new = Tokenizer.from_str(json.dumps(without_tokens(content, kept)))
        assert "[UNK]" not in new.encode(unseen, add_special_tokens=False).tokens
        assert len(new.encode(unseen, add_special_tokens=False).ids) > 1


def test_a_kept_token_keeps_all_that_it_is_merged_from():
    """Brute force: of a BPE tokenizer of bytes, every subset of tokens that texts use splits them as before."""
    old = trained("BPE")
    content, generator = json.loads(old.backend_tokenizer.to_str()), torch.Generator().manual_seed(0)
    ids = token_ids(content)
    words = [token.replace("▁", " ") for token, i in ids.items() if i > 60]
    for _ in range(10):
        some = " ".join(words[i] for i in torch.randint(len(words), (6,), generator=generator).tolist())
        whole = old.backend_tokenizer.encode(some, add_special_tokens=False)
        kept = needed_ids(content, set(whole.ids))
        new = Tokenizer.from_str(json.dumps(without_tokens(content, kept)))
        assert new.encode(some, add_special_tokens=False).tokens == whole.tokens


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("tied", [True, False])
def test_every_family_answers_as_before_among_the_tokens_left(name, tied, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**FAMILIES[name], "eos_token_id": 319}, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).eval()
    kept = sorted({token for row in ROWS for token in row.tokens} | {0, 319})
    place = {old: new for new, old in enumerate(kept)}
    small = keep_tokens(model, kept)
    batch = collate(ROWS, 0)
    ids = torch.tensor([[place[i] for i in row] for row in batch.input_ids.tolist()])
    with torch.no_grad():
        before = model(**batch.inputs).logits[..., kept]
        small.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        after = again(input_ids=ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    text_config = again.config.get_text_config()
    assert (text_config.vocab_size, text_config.eos_token_id) == (len(kept), len(kept) - 1)
    assert again.generation_config.eos_token_id == len(kept) - 1
    head, embedding = again.get_output_embeddings().weight, again.get_input_embeddings().weight
    assert (head is embedding) == (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )


def test_an_unknown_kind_of_tokenizer_is_refused():
    content = {"model": {"type": "Tiktoken", "vocab": {}}, "added_tokens": []}
    with pytest.raises(UserError, match="a Tiktoken tokenizer, not BPE, Unigram"):
        needed_ids(content, set())
