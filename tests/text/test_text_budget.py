"""How much text is taken, by which task, and what is said about it."""

import json
import logging
from itertools import count
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split, WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from moetools.errors import DataError, UserError
from moetools.text import budget, sequences
from moetools.text.budget import default_sequences, take, take_evenly
from moetools.text.options import DataOptions
from moetools.text.sources import DataSource
from moetools.text.tokens import DocumentCount, TaskMix, load_token_data

VOCAB = 100
BOS = 97


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """The text "5 7" has the ids [5, 7]; words that are no number below 100 have the id 0."""
    backend = Tokenizer(WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    backend.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=str(BOS), pad_token="99")
    made.chat_template = "{% if messages[0].role == 'system' %}{{ 1 / 0 }}{% endif %}{{ messages[0].content }}"
    return made


def lines(path: Path, *texts: str | dict) -> DataSource:
    records = [text if isinstance(text, dict) else {"text": text} for text in texts]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataSource(task=path.stem, location=str(path))


def words(number: int) -> str:
    return " ".join(str(1 + i % 90) for i in range(number))


def brute_force(sizes: list[int], total: int) -> list[int]:
    """One after another, each stream in turn that still has something and has got least."""
    taken = [0] * len(sizes)
    for _ in range(total):
        open_streams = [number for number, size in enumerate(sizes) if taken[number] < size]
        if not open_streams:
            break
        taken[min(open_streams, key=lambda number: (taken[number], number))] += 1
    return taken


@pytest.mark.parametrize("sizes", [[9], [9, 9, 9], [1, 9, 9], [9, 0, 9, 2], [0, 0], [2, 3, 100, 4, 1], [3, 3, 3, 3]])
@pytest.mark.parametrize("total", [1, 2, 7, 10, 11, 64])
def test_tasks_share_evenly_and_give_away_what_they_lack(sizes, total):
    found = take_evenly([iter(range(size)) for size in sizes], total)
    assert [len(items) for items in found] == brute_force(sizes, total)
    assert all(items == list(range(len(items))) for items in found)


def test_the_remainder_goes_to_the_first_tasks_and_no_stream_is_drawn_further():
    streams = [count(), count(), count()]
    assert list(map(len, take_evenly(streams, 8))) == [3, 3, 2]
    assert [next(stream) for stream in streams] == [3, 3, 2]


@pytest.mark.parametrize(("seq_len", "tasks", "most"), [(512, 5, 512), (2048, 5, 128), (256, 1, 1024), (262_144, 3, 3)])
def test_the_default_is_512_sequences_of_512_tokens_or_as_many_tokens(seq_len, tasks, most):
    assert default_sequences(seq_len, tasks) == most


def test_what_samples_means():
    assert [list(map(len, take([iter(range(9)), iter(range(2))], asked, 512))) for asked in (4, "all")] == [
        [4, 2],
        [9, 2],
    ]


def test_the_default_budget_is_shared_logged_and_reported(tmp_path, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(budget, "DEFAULT_TOKENS", 80)
    sources = [
        lines(tmp_path / "long.jsonl", *[words(7)] * 50),
        lines(tmp_path / "short.jsonl", words(7), words(7)),
        lines(tmp_path / "two.jsonl", *[words(15)] * 50),
    ]
    with caplog.at_level(logging.INFO, logger="moetools"):
        found = load_token_data(sources, tokenizer, seq_len=8, samples=None)
    # Each document of 7 tokens and its separator is one sequence; ten in all: 4 + 2 + 4.
    assert found.mix == (
        TaskMix(task="long", read=DocumentCount(documents=4), sequences=4, tokens=32),
        TaskMix(task="short", read=DocumentCount(documents=2), sequences=2, tokens=16),
        TaskMix(task="two", read=DocumentCount(documents=2), sequences=4, tokens=32),
    )
    assert [record.getMessage() for record in caplog.records] == [
        "text: long 4 sequences (32 tokens), short 2 sequences (16 tokens), two 4 sequences (32 tokens); "
        "`samples=all` takes everything"
    ]
    everything = load_token_data(sources, tokenizer, seq_len=8, samples="all")
    assert [row.sequences for row in everything.mix] == [50, 2, 100]


def test_less_text_than_the_budget_is_said(tmp_path, tokenizer, caplog):
    with caplog.at_level(logging.INFO, logger="moetools"):
        load_token_data([lines(tmp_path / "a.jsonl", words(39))], tokenizer, seq_len=8, samples=None)
    assert [record.getMessage() for record in caplog.records] == ["text: a 5 sequences (40 tokens); all there is"]


@pytest.mark.parametrize("pack", [True, False])
def test_fewer_sequences_than_asked_for_are_said(tmp_path, tokenizer, caplog, pack):
    source = lines(tmp_path / "a.jsonl", *[words(7)] * 3)
    found = load_token_data([source], tokenizer, seq_len=8, samples=5, pack=pack)
    assert found.num_sequences == 3
    assert [record.getMessage() for record in caplog.records] == ["task 'a' has 3 sequences of the 5 asked for"]


def test_skipped_records_and_refused_chats_are_counted_together(tmp_path, tokenizer, caplog):
    chats = [{"messages": [{"role": role, "content": "1 2"}]} for role in ("user", "system", "user")]
    source = lines(tmp_path / "a.jsonl", *chats, {"txt": 3})
    found = load_token_data([source], tokenizer, seq_len=3)
    assert found.num_sequences == 2
    reason = f"{source.location}:2: the chat template refuses these messages: ZeroDivisionError: division by zero"
    # The line without text was met first: a chunk is read before its chats are rendered.
    assert found.read[0].documents == 2
    assert found.read[0].skipped == 2
    assert found.read[0].reason == reason
    assert caplog.records[0].getMessage() == f"task 'a': records skipped: 2; the first: {reason}"
    with pytest.raises(DataError, match="ZeroDivisionError"):
        load_token_data([source], tokenizer, seq_len=3, strict=True)


def test_a_task_of_which_the_template_refuses_every_chat_is_refused(tmp_path, tokenizer):
    chat = {"messages": [{"role": "system", "content": "1"}]}
    source = lines(tmp_path / "a.jsonl", chat, chat)
    with pytest.raises(DataError, match=r"a.jsonl: none of the 2 records can be used; .* ZeroDivisionError") as caught:
        load_token_data([source], tokenizer, seq_len=3)
    assert caught.value.hint


@pytest.mark.parametrize("pack", [True, False])
def test_text_that_becomes_one_token_over_and_over_is_refused(tmp_path, tokenizer, pack):
    source = lines(tmp_path / "a.jsonl", *["a text in words that this tokenizer does not know"] * 5)
    with pytest.raises(DataError, match=r"makes all text of task 'a' into one token, id 0") as caught:
        load_token_data([source], tokenizer, seq_len=11, pack=pack)
    assert "`tokenizer=PATH`" in caught.value.hint


@pytest.mark.parametrize("pack", [True, False])
def test_nothing_but_empty_documents_is_refused(tmp_path, tokenizer, pack):
    with pytest.raises(DataError, match=r"empty documents|no document of 2 tokens"):
        load_token_data([lines(tmp_path / "a.jsonl", *[""] * 20)], tokenizer, seq_len=8, pack=pack)


def test_a_column_is_passed_on(tmp_path, tokenizer):
    source = lines(tmp_path / "a.jsonl", {"text": "1 2", "body": "3 4"})
    (batch,) = load_token_data([source], tokenizer, seq_len=3, column="body").batches
    assert batch.input_ids.tolist() == [[BOS, 3, 4]]


def test_samples_of_the_options():
    for legal in (None, "all", 1):
        DataOptions(data=["a"], samples=legal).check()
    with pytest.raises(UserError, match="`samples=0` is too small; the least is 1"):
        DataOptions(data=["a"], samples=0).check()
    with pytest.raises(UserError, match="31 digits"):
        DataOptions(data=["a"], samples=10**30).check()
    with pytest.raises(UserError, match="`samples=most` is no number of sequences"):
        DataOptions(data=["a"], samples="most").check()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges, words split as GPT-2 and its heirs split them."""
    letters = sorted(ByteLevel.alphabet())
    merges = [("a", "b"), ("Ġ", "a"), ("c", "d"), ("ab", "cd"), ("Ċ", "Ċ")]
    vocabulary = {token: number for number, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(BPE(vocabulary, merges))
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    backend.pre_tokenizer = Sequence([Split(pattern, "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("form", ["lines", "words", "letters"])
def test_a_long_document_has_the_same_ids_in_pieces_as_whole(tmp_path, monkeypatch, form):
    monkeypatch.setattr(sequences, "_PIECE_CHARACTERS", 50)
    generator = torch.Generator().manual_seed(0)
    alphabet = {"lines": "aabbcd \n", "words": "aabbcd  ", "letters": "aabbcd"}[form]
    text = "".join(alphabet[i] for i in torch.randint(len(alphabet), (2000,), generator=generator))
    tokens = byte_tokenizer()
    whole = tokens(text, add_special_tokens=False)["input_ids"]
    source = lines(tmp_path / "a.jsonl", text)
    found = load_token_data([source], tokens, seq_len=10)
    ids = torch.cat([batch.input_ids.flatten() for batch in found.batches]).tolist()
    assert tokens.decode(ids) == text[: len(tokens.decode(ids))]
    if form != "letters":
        assert ids == whole[: len(ids)]
    # Without a single border, words are cut in the middle: at most two tokens more for each of the 40 pieces.
    assert len(whole) - 10 < len(ids) <= len(whole) + 80


@pytest.mark.parametrize("pack", [True, False])
def test_a_document_of_16_megabytes_is_tokenized_as_far_as_needed(tmp_path, monkeypatch, pack):
    calls = []
    real = sequences.encode

    def counting(tokenizer, texts):
        calls.append(sum(map(len, texts)))
        return real(tokenizer, texts)

    monkeypatch.setattr(sequences, "encode", counting)
    source = lines(tmp_path / "a.jsonl", "ab cd " * (16_000_000 // 6))
    found = load_token_data([source], byte_tokenizer(), seq_len=512, samples=1, pack=pack)
    assert found.num_sequences == 1
    assert sum(calls) <= 1 << 16
