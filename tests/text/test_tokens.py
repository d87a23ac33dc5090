import json
import logging
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from moetools.errors import DataError, UserError
from moetools.text import sources as data
from moetools.text.sources import DataSource, parse_data_option
from moetools.text.tokenizer import load_tokenizer, padding_id, separator_ids
from moetools.text.tokens import load_token_data

SHARED = Path(__file__).parents[2].parent / "shared"
MODEL = SHARED / "models" / "mixtral-8x9m"
TASKS = ("code", "math", "plays", "reviews", "german")
needs_shared = pytest.mark.skipif(not MODEL.is_dir(), reason="the reference model and its data are not here")

VOCAB = 100
BOS, EOS, PAD = 97, 98, 99


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """The text "5 7" has the ids [5, 7]; "<b>", "<e>" and "<p>" are 97, 98 and 99."""
    vocab = {str(i): i for i in range(BOS)} | {"<b>": BOS, "<e>": EOS, "<p>": PAD}
    backend = Tokenizer(WordLevel(vocab, unk_token="0"))
    backend.pre_tokenizer = WhitespaceSplit()
    # Adds a BOS of its own, as Llama's does: ours must not come on top of it.
    backend.post_processor = TemplateProcessing(single="<b> $A", special_tokens=[("<b>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=8, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos_token="<b>", eos_token="<e>", pad_token="<p>")


def write_documents(path: Path, *documents: list[int] | dict) -> DataSource:
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [d if isinstance(d, dict) else {"text": " ".join(map(str, d))} for d in documents]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataSource(task=path.stem, location=str(path))


def write_ids(path: Path, **tensors: torch.Tensor) -> DataSource:
    save_file(tensors, path)
    return DataSource(task=path.stem, location=str(path))


def rows(token_data) -> list[list[int]]:
    """Real tokens of every sequence."""
    out = []
    for batch in token_data.batches:
        for row, ids in enumerate(batch.input_ids):
            out.append((ids if batch.attention_mask is None else ids[batch.attention_mask[row]]).tolist())
    return out


def judge_windows(tokenizer, path: Path, size: int) -> torch.Tensor:
    """What `windows()` of tools/judge.py returns."""
    ids = []
    with path.open(encoding="utf8") as file:
        for line in file:
            ids += [0, *tokenizer(json.loads(line)["text"])["input_ids"]]
    n = len(ids) // size
    return torch.tensor(ids[: n * size]).view(n, size)


@needs_shared
def test_packing_equals_the_judge_on_all_test_text():
    tokenizer = load_tokenizer(MODEL, vocab_size=4096)
    sources = parse_data_option([f"{task}={SHARED / 'data' / task / 'test.jsonl'}" for task in TASKS])
    loaded = load_token_data(sources, tokenizer, seq_len=256, batch_size=7)
    # The judge's own tokenizer, made the way it makes it.
    judge = PreTrainedTokenizerFast(tokenizer_file=str(MODEL / "tokenizer.json"))
    for number, task in enumerate(TASKS):
        batches = [batch for batch in loaded.batches if int(batch.task[0]) == number]
        wanted = judge_windows(judge, SHARED / "data" / task / "test.jsonl", 256)
        assert torch.equal(torch.cat([batch.input_ids for batch in batches]), wanted)
        assert {len(batch.input_ids) for batch in batches[:-1]} == {7}
        assert loaded.tokens_per_task()[task] == wanted.numel()


@needs_shared
def test_packing_equals_the_shared_calibration_set():
    tokenizer = load_tokenizer(MODEL, vocab_size=4096)
    tasks = json.loads((MODEL / "training.json").read_text())["domains"]
    sources = parse_data_option([f"{task}={SHARED / 'data' / task / 'train.jsonl'}" for task in tasks])
    loaded = load_token_data(sources, tokenizer, seq_len=256, samples=26, batch_size=8)
    wanted = load_file(SHARED / "data" / "calibration.safetensors")["input_ids"]
    assert torch.equal(torch.cat([batch.input_ids for batch in loaded.batches]), wanted.long())
    assert torch.cat([batch.task for batch in loaded.batches]).tolist() == [t for t in range(5) for _ in range(26)]
    assert loaded.num_sequences == 130
    stored = load_token_data(
        parse_data_option([str(SHARED / "data" / "calibration.safetensors")]), tokenizer, seq_len=256
    )
    assert stored.tasks == ("calibration",)
    assert rows(stored) == wanted.tolist()


def test_documents_are_joined_behind_one_separator_each_and_the_tail_dropped(tmp_path, tokenizer):
    source = write_documents(tmp_path / "a.jsonl", [1, 2, 3], [], [4, 5], [6])
    loaded = load_token_data([source], tokenizer, seq_len=4)
    assert rows(loaded) == [[BOS, 1, 2, 3], [BOS, BOS, 4, 5]]
    assert loaded.batches[0].attention_mask is None
    assert loaded.batches[0].input_ids.dtype == torch.int64
    assert (loaded.num_tokens, loaded.num_sequences, loaded.seq_len) == (8, 2, 4)


@pytest.mark.parametrize(
    ("special", "separator", "pad"),
    [
        ({"bos_token": "<b>", "eos_token": "<e>", "pad_token": "<p>"}, [BOS], PAD),
        ({"eos_token": "<e>"}, [EOS], EOS),
        ({}, [], 0),
    ],
)
def test_separator_is_bos_else_eos_else_none_and_padding_pad_else_eos_else_0(special, separator, pad):
    tokenizer = make_tokenizer(**special)
    assert separator_ids(tokenizer) == separator
    assert padding_id(tokenizer) == pad


def test_a_document_longer_than_a_window_and_than_the_tokenizers_limit_is_not_truncated(
    tmp_path, tokenizer, caplog, monkeypatch
):
    # transformers warns of such lengths through a logger that pytest sees only when it propagates.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    source = write_documents(tmp_path / "a.jsonl", list(range(1, 30)))
    assert list(chain(*rows(load_token_data([source], tokenizer, seq_len=10)))) == [BOS, *range(1, 30)]
    assert not caplog.records


def test_samples_bounds_the_sequences_of_each_task(tmp_path, tokenizer):
    long = write_documents(tmp_path / "long.jsonl", *[[i, i, i] for i in range(1, 20)])
    short = write_documents(tmp_path / "short.jsonl", [7, 7, 7], [8])
    for pack in (True, False):
        loaded = load_token_data([long, short], tokenizer, seq_len=4, samples=3, batch_size=2, pack=pack)
        assert rows(loaded)[:3] == [[BOS, i, i, i] for i in (1, 2, 3)]
        # The short task gives what it has.
        assert loaded.tokens_per_task() == {"long": 12, "short": 4 if pack else 6}
        assert all(len(batch.task.unique()) == 1 for batch in loaded.batches)


@pytest.mark.parametrize("pack", [True, False])
def test_reading_stops_when_the_samples_are_full(tmp_path, tokenizer, monkeypatch, pack):
    # The last line would be refused if it were reached.
    strict = {"seq_len": 4, "pack": pack, "strict": True}
    source = write_documents(tmp_path / "a.jsonl", *[[1, 2, 3]] * 1000, {"body": "not legal"})
    pulled = []
    original = data.read_json

    def counting(path, column):
        for document in original(path, column):
            pulled.append(document)
            yield document

    monkeypatch.setitem(data._READERS, ".jsonl", counting)
    assert load_token_data([source], tokenizer, samples=100, **strict).num_sequences == 100
    assert len(pulled) == 128  # two chunks of 64 documents
    with pytest.raises(DataError, match=r"a.jsonl:1001: has the keys body"):
        load_token_data([source], tokenizer, **strict)


def test_less_than_one_window_is_refused_with_numbers(tmp_path, tokenizer):
    source = write_documents(tmp_path / "a.jsonl", [1, 2], [3])
    with pytest.raises(DataError, match=r"task 'a' .* has 5 tokens, fewer than one sequence of 6") as caught:
        load_token_data([source], tokenizer, seq_len=6)
    assert caught.value.hint == "use `seq_len=5` at most, `pack=False`, or more text"


def test_unpacked_documents_are_padded_right_and_masked(tmp_path, tokenizer):
    source = write_documents(tmp_path / "a.jsonl", [1, 2, 3], [4], [], [5, 6, 7, 8, 9], [6, 7, 8])
    loaded = load_token_data([source], tokenizer, seq_len=5, pack=False, batch_size=3)
    first, second = loaded.batches
    # Sorted by length, ties in document order; the empty document is skipped, the longest cut.
    assert first.input_ids.tolist() == [[BOS, 4, PAD, PAD], [BOS, 1, 2, 3], [BOS, 6, 7, 8]]
    assert first.attention_mask.tolist() == [[True, True, False, False], [True] * 4, [True] * 4]
    assert first.attention_mask.dtype == torch.bool
    assert second.input_ids.tolist() == [[BOS, 5, 6, 7, 8]]
    assert second.attention_mask is None
    assert loaded.num_tokens == 2 + 4 + 4 + 5
    assert loaded.tokens_per_task() == {"a": 15}


def test_length_sorting_stays_within_runs_of_256(tmp_path, tokenizer):
    source = write_documents(tmp_path / "a.jsonl", *[[1, 1]] * 256, [2])
    assert rows(load_token_data([source], tokenizer, pack=False))[-1] == [BOS, 2]


def test_nothing_but_single_tokens_is_refused_unpacked(tmp_path, tokenizer):
    source = write_documents(tmp_path / "a.jsonl", [], [])
    with pytest.raises(DataError, match="has no document of 2 tokens or more"):
        load_token_data([source], tokenizer, pack=False)


def test_shuffle_is_a_seeded_permutation_of_documents(tmp_path, tokenizer):
    source = write_documents(tmp_path / "a.jsonl", *[[i] for i in range(1, 90)])
    other = write_documents(tmp_path / "b.jsonl", *[[i] for i in range(1, 90)])

    def loaded(seed, *sources):
        return load_token_data(sources or [source], tokenizer, seq_len=2, shuffle=True, seed=seed)

    plain = rows(load_token_data([source], tokenizer, seq_len=2))
    assert rows(loaded(0)) != plain
    assert sorted(rows(loaded(0))) == sorted(plain)
    assert rows(loaded(0)) == rows(loaded(0))
    assert rows(loaded(0)) != rows(loaded(1))
    # A task's order does not depend on the tasks beside it.
    assert rows(loaded(0, other, source))[89:] == rows(loaded(0))


def test_shuffle_with_a_full_buffer_still_gives_every_document_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("moetools.text.sequences._SHUFFLE_DOCUMENTS", 5)
    source = write_documents(tmp_path / "a.jsonl", *[[i] for i in range(1, 90)])
    shuffled = rows(load_token_data([source], tokenizer, seq_len=2, shuffle=True))
    assert sorted(shuffled) == [[BOS, i] for i in range(1, 90)] != shuffled


def test_fingerprint_names_the_tokens_and_not_the_batching(tmp_path, tokenizer):
    first = write_documents(tmp_path / "a.jsonl", *[[i] * (1 + i % 4) for i in range(1, 40)])
    again = write_documents(tmp_path / "copy" / "a.jsonl", *[[i] * (1 + i % 4) for i in range(1, 40)])
    changed = write_documents(
        tmp_path / "changed" / "a.jsonl", *[[i] * (1 + i % 4) for i in range(1, 39)], [3, 3, 3, 4]
    )
    renamed = DataSource(task="b", location=first.location)
    for pack in (True, False):

        def fingerprint(source, batch_size=4, seq_len=4, tokenizer=tokenizer, pack=pack):
            return load_token_data([source], tokenizer, seq_len=seq_len, batch_size=batch_size, pack=pack).fingerprint

        wanted = fingerprint(first)
        assert len(wanted) == 64
        assert fingerprint(again) == wanted
        assert fingerprint(first, batch_size=3) == wanted
        assert fingerprint(first, tokenizer=make_tokenizer(bos_token="<b>")) == wanted
        others = [fingerprint(changed), fingerprint(renamed), fingerprint(first, seq_len=5)]
        assert len({wanted, *others}) == 4


def test_fingerprint_sees_where_a_sequence_ends(tmp_path, tokenizer):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    masks = torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    prints = []
    for mask in masks:
        source = write_ids(tmp_path / "a.safetensors", input_ids=ids, attention_mask=mask)
        prints.append(load_token_data([source], tokenizer).fingerprint)
    assert prints[0] != prints[1]


def test_chats_go_through_the_template_without_a_second_bos(tmp_path):
    chat = {"messages": [{"role": "1", "content": "5"}, {"role": "2", "content": "6 7"}]}
    source = write_documents(tmp_path / "a.jsonl", chat, {"prompt": "3 ", "completion": "4"})
    for begin in ("<b>", ""):
        templated = make_tokenizer(bos_token="<b>", eos_token="<e>")
        templated.chat_template = begin + "{% for m in messages %} {{ m.role }} {{ m.content }} <e>{% endfor %}"
        loaded = load_token_data([source], templated, pack=False)
        assert rows(loaded) == [[BOS, 3, 4], [BOS, 1, 5, EOS, 2, 6, 7, EOS]]


def test_chats_without_a_template_or_refused_by_it(tmp_path, tokenizer):
    source = write_documents(tmp_path / "a.jsonl", [1], {"messages": [{"role": "user", "content": "5"}]})
    with pytest.raises(DataError, match=r"a.jsonl:2: messages need a chat template") as caught:
        load_token_data([source], tokenizer)
    assert "`tokenizer=PATH`" in caught.value.hint
    strict = make_tokenizer(bos_token="<b>")
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    refused = r"a.jsonl:2: the chat template refuses these messages: TemplateError: roles must alternate"
    with pytest.raises(DataError, match=refused):
        load_token_data([source], strict, strict=True)


def test_stored_ids_are_sequences_as_they_are(tmp_path):
    source = write_ids(tmp_path / "a.safetensors", input_ids=torch.arange(12, dtype=torch.int32).view(4, 3))
    loaded = load_token_data([source], None, seq_len=8, samples=3, batch_size=2, vocab_size=12)
    assert rows(loaded) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert loaded.batches[0].input_ids.dtype == torch.int64
    shuffled = rows(load_token_data([source], None, vocab_size=12, shuffle=True, seed=1))
    assert sorted(shuffled) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_stored_masks_are_respected(tmp_path, tokenizer):
    mask = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 1]])
    source = write_ids(tmp_path / "a.safetensors", input_ids=torch.arange(9).view(3, 3), attention_mask=mask)
    (batch,) = load_token_data([source], tokenizer).batches
    assert batch.input_ids.tolist() == [[1, 2, PAD], [6, 7, 8]]
    assert batch.attention_mask.tolist() == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.ones(2, 2)}, "has no tensor 'input_ids'; it has: weight"),
        ({"input_ids": torch.ones(2, 2)}, r"'input_ids' is float32 \[2, 2\], not integers"),
        ({"input_ids": torch.ones(4, dtype=torch.int64)}, r"'input_ids' is int64 \[4\], not integers"),
        ({"input_ids": torch.ones(2, 9, dtype=torch.int64)}, "sequences have 9 tokens, more than `seq_len=8`"),
        ({"input_ids": torch.tensor([[1, 100]])}, "token ids from 1 to 100; legal are 0 to 99"),
        ({"input_ids": torch.tensor([[-100, 3]])}, "token ids from -100 to 3; legal are 0 to 99"),
        ({"input_ids": torch.ones(0, 4, dtype=torch.int64)}, "no sequence of 2 tokens or more"),
        ({"input_ids": torch.ones(3, 1, dtype=torch.int64)}, "no sequence of 2 tokens or more"),
        (
            {"input_ids": torch.ones(2, 2, dtype=torch.int64), "attention_mask": torch.ones(2, dtype=torch.int64)},
            r"'attention_mask' is \[2\], 'input_ids' \[2, 2\]",
        ),
    ],
)
def test_stored_ids_that_cannot_be_used(tmp_path, tokenizer, tensors, message):
    source = write_ids(tmp_path / "a.safetensors", **tensors)
    with pytest.raises(DataError, match=message) as caught:
        load_token_data([source], tokenizer, seq_len=8)
    assert caught.value.hint


def test_corrupt_ids_file(tmp_path, tokenizer):
    (tmp_path / "a.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        load_token_data(parse_data_option([str(tmp_path / "a.safetensors")]), tokenizer)


@pytest.mark.parametrize("option", [{"seq_len": 1}, {"samples": 0}, {"batch_size": 0}])
def test_sizes_below_their_minimum(tokenizer, option):
    name = next(iter(option))
    with pytest.raises(UserError, match=f"`{name}=[01]` is too small"):
        load_token_data([], tokenizer, **option)


def test_text_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="task 'a' is text, and there is no tokenizer"):
        load_token_data([write_documents(tmp_path / "a.jsonl", [1])], None)
