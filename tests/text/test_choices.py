import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from moetools.errors import DataError
from moetools.text import choices
from moetools.text.choices import ChoiceItem, ChoiceSet, choice_batches
from moetools.text.sources import DataSource
from moetools.text.tokenizer import load_tokenizer

SHARED = Path(__file__).parents[2].parent / "shared"
MODEL = SHARED / "models" / "mixtral-8x9m"
needs_shared = pytest.mark.skipif(not MODEL.is_dir(), reason="the reference model and its data are not here")
A, B, AB, C, U, BOS, PAD = range(7)


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Letters a, b, c, ü, and the merge ab."""
    vocab = {"a": A, "b": B, "ab": AB, "c": C, "ü": U, "<s>": BOS, "<p>": PAD}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab, [("a", "b")])), **special)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos_token="<s>", pad_token="<p>")


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def load_choices(path: Path) -> ChoiceSet:
    return choices.load_choices(DataSource(task=path.stem, location=str(path)))


def one(prompt: str, *choices: str) -> ChoiceSet:
    return ChoiceSet(name="set", items=(ChoiceItem(prompt=prompt, choices=choices, answer=0),))


def scored_ids(batch) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(batch.tokens.input_ids, batch.score_mask, strict=True)]


def test_items_are_loaded_in_order(tmp_path):
    path = write(
        tmp_path / "quiz.jsonl",
        {"prompt": "1+1=", "choices": ["2", "3"], "answer": 0, "task": "extra"},
        {"prompt": "", "choices": ["x", "y", "z"], "answer": 2},
    )
    assert load_choices(path) == ChoiceSet(
        name="quiz",
        items=(
            ChoiceItem(prompt="1+1=", choices=("2", "3"), answer=0),
            ChoiceItem(prompt="", choices=("x", "y", "z"), answer=2),
        ),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": 3}, "'prompt' is a number, not a string"),
        ({"choices": "ab"}, "'choices' must be a list of two or more strings"),
        ({"choices": ["a"]}, "'choices' must be a list of two or more strings"),
        ({"choices": ["a", None]}, "'choice 1' is null or missing, not a string"),
        ({"choices": ["a", ""]}, "choice 1 is empty"),
        ({"answer": 2}, "'answer' is 2; legal is an index from 0 to 1"),
        ({"answer": -1}, "'answer' is -1;"),
        ({"answer": "a"}, "'answer' is 'a';"),
        ({"answer": True}, "'answer' is True;"),
        ({"answer": 1.0}, "'answer' is 1.0;"),
    ],
)
def test_items_that_are_not_legal(tmp_path, change, message):
    good = {"prompt": "p", "choices": ["a", "b"], "answer": 1}
    path = write(tmp_path / "q.jsonl", good, good | change)
    with pytest.raises(DataError) as caught:
        load_choices(path)
    assert caught.value.message.startswith(f"{path}:2: ")
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("key", ["prompt", "choices", "answer"])
def test_a_missing_key_is_named(tmp_path, key):
    record = {"prompt": "p", "choices": ["a", "b"], "answer": 1}
    del record[key]
    with pytest.raises(DataError, match=rf"q.jsonl:1: no '{key}'; the keys are {', '.join(record)}"):
        load_choices(write(tmp_path / "q.jsonl", record))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        load_choices(write(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"b.jsonl:1: not JSON"):
        load_choices(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="no such data") as caught:
        load_choices(tmp_path / "c.jsonl")
    assert "did you mean" in caught.value.hint
    with pytest.raises(DataError, match=r"is not a \.jsonl file of multiple-choice items"):
        load_choices(tmp_path)
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises(DataError, match=r"is not a \.jsonl file of multiple-choice items"):
        load_choices(tmp_path / "d.txt")


def test_the_choices_tokens_are_scored_and_padding_is_not(tokenizer):
    (batch,) = choice_batches(one("cc", "b", "cü"), tokenizer, seq_len=8, batch_size=4)
    assert batch.tokens.input_ids.tolist() == [[BOS, C, C, B, PAD], [BOS, C, C, C, U]]
    assert batch.tokens.attention_mask.tolist() == [[True] * 4 + [False], [True] * 5]
    assert batch.score_mask.tolist() == [[False, False, False, True, False], [False, False, False, True, True]]
    assert batch.num_bytes.tolist() == [1, 3]
    assert (batch.item.tolist(), batch.choice.tolist()) == ([0, 0], [0, 1])


def test_a_token_merged_across_the_border_counts_as_the_choices(tokenizer):
    (batch,) = choice_batches(one("ca", "b", "c"), tokenizer, seq_len=8, batch_size=4)
    assert batch.tokens.input_ids.tolist() == [[BOS, C, AB, PAD], [BOS, C, A, C]]
    assert scored_ids(batch) == [[AB], [C]]
    assert batch.num_bytes.tolist() == [1, 1]


def test_an_empty_prompt_is_predicted_from_the_separator(tokenizer):
    (batch,) = choice_batches(one("", "c", "b"), tokenizer, seq_len=8, batch_size=4)
    assert batch.tokens.input_ids.tolist() == [[BOS, C], [BOS, B]]
    assert scored_ids(batch) == [[C], [B]]


def test_without_a_separator_the_first_token_is_not_scored():
    bare = make_tokenizer()
    (batch,) = choice_batches(one("", "cb", "bc"), bare, seq_len=8, batch_size=4)
    assert batch.tokens.input_ids.tolist() == [[C, B], [B, C]]
    assert scored_ids(batch) == [[B], [C]]
    with pytest.raises(DataError, match=r"set: item 0, choice 0 adds no token"):
        list(choice_batches(one("", "c", "b"), bare, seq_len=8, batch_size=4))


def test_a_long_prompt_loses_its_beginning(tokenizer):
    (batch,) = choice_batches(one("bbbbccc", "ü", "üü"), tokenizer, seq_len=4, batch_size=4)
    assert batch.tokens.input_ids.tolist() == [[BOS, C, C, U], [BOS, C, U, U]]
    assert scored_ids(batch) == [[U], [U, U]]
    (bare,) = choice_batches(one("bbbbccc", "ü", "üü"), make_tokenizer(), seq_len=4, batch_size=4)
    assert bare.tokens.input_ids.tolist() == [[C, C, C, U], [C, C, U, U]]
    assert scored_ids(bare) == [[U], [U, U]]


def test_a_choice_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"item 0, choice 1 has 4 tokens and needs 1 before it") as caught:
        list(choice_batches(one("a", "c", "cccc"), tokenizer, seq_len=4, batch_size=4))
    assert caught.value.hint == "use `seq_len=5` or more"


@needs_shared
@pytest.mark.parametrize(("name", "count", "ways"), [("grammar", 600, 2), ("math", 200, 4)])
def test_shared_sets_score_exactly_their_choices(name, count, ways):
    tokenizer = load_tokenizer(MODEL, vocab_size=4096)
    questions = load_choices(SHARED / "data" / "choice" / f"{name}.jsonl")
    assert len(questions.items) == count
    seen = set()
    for batch in choice_batches(questions, tokenizer, seq_len=1024, batch_size=16):
        assert len(batch.item) <= 16
        real = batch.tokens.attention_mask
        assert not batch.score_mask[:, 0].any()
        assert real is None or not (batch.score_mask & ~real).any()
        for row, ids in enumerate(scored_ids(batch)):
            item, choice = questions.items[batch.item[row]], int(batch.choice[row])
            seen.add((int(batch.item[row]), choice))
            text = item.choices[choice]
            # A leading space of the prompt's end may be merged into the choice's first token.
            assert tokenizer.decode(ids).lstrip() == text.lstrip()
            assert int(batch.num_bytes[row]) == len(text.encode())
    assert seen == {(item, choice) for item in range(count) for choice in range(ways)}
    assert torch.tensor([item.answer for item in questions.items]).unique().numel() == ways
