"""Folders with and without a tokenizer, as users have them."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from moetools.errors import CheckpointError, DataError
from moetools.text import tokenizer as module
from moetools.text.tokenizer import encode, load_tokenizer

VOCAB = 100
# What sentencepiece writes for a single piece, "<unk>".
SENTENCEPIECE = b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
CODE = """
from transformers import PreTrainedTokenizer

class Letters(PreTrainedTokenizer):
    vocab_files_names = {}
    def __init__(self, **options):
        self.letters = {letter: number for number, letter in enumerate("abcdefgh ")}
        super().__init__(**options)
    @property
    def vocab_size(self):
        return len(self.letters)
    def get_vocab(self):
        return dict(self.letters)
    def _tokenize(self, text, **options):
        return list(text)
    def _convert_token_to_id(self, token):
        return self.letters[token]
    def _convert_id_to_token(self, number):
        return list(self.letters)[number]
"""
AUTO_MAP = {"auto_map": {"AutoTokenizer": ["letters.Letters", None]}, "tokenizer_class": "Letters"}


def folder(path: Path, **files: object) -> Path:
    """Files by name, "__" for the dot; objects are written as JSON."""
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else content if isinstance(content, str) else json.dumps(content)
        (path / name.replace("__", ".")).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return path


def words() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="97")


def refusal(path: Path, **options: bool) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(path, vocab_size=VOCAB, **options)
    assert "\n" not in caught.value.message
    assert "`tokenizer=PATH`" in caught.value.hint
    return caught.value


def test_a_saved_tokenizer_loads(tmp_path):
    words().save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, vocab_size=VOCAB)
    assert (loaded.bos_token_id, encode(loaded, ["1 2", "3"])) == (97, [[1, 2], [3]])


def test_a_tokenizer_with_ids_the_model_lacks_is_refused(tmp_path):
    words().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"wrong tokenizer: .* ids up to 99, .* 99 tokens") as caught:
        load_tokenizer(tmp_path, vocab_size=VOCAB - 1)
    assert "`tokenizer=PATH`" in caught.value.hint


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("settings", [{}, {"tokenizer_config__json": {"tokenizer_class": "Qwen2Tokenizer"}}])
def test_a_model_saved_without_its_tokenizer_has_none(tmp_path, family, settings):
    """transformers 5 makes an empty tokenizer for the first three and says nothing."""
    path = folder(tmp_path / "model", config__json={"model_type": family}, **settings)
    assert refusal(path).message == f"no tokenizer in {path}"


@pytest.mark.parametrize(
    "vocabulary",
    [{"vocab__json": {}, "merges__txt": "#version: 0.2\n"}, {"vocab__json": {"<|endoftext|>": 0}, "merges__txt": ""}],
)
def test_an_empty_vocabulary_is_no_tokenizer(tmp_path, vocabulary):
    path = folder(tmp_path / "model", config__json={"model_type": "qwen3_moe"}, **vocabulary)
    assert refusal(path).message == f"no tokenizer in {path}; what is there knows no text"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer__json": '{"a'}, "not valid JSON"),
        ({"tokenizer__json": "{}"}, "cannot be loaded: "),
        ({"tokenizer__json": '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE"}}'}, "cannot be loaded: "),
        ({"tokenizer__json": "[]"}, "tokenizer.json: "),
        ({"tokenizer__json": "{}", "config__json": "[]"}, "cannot be loaded: "),
        ({"tokenizer__json": ""}, "not valid JSON"),
    ],
)
def test_a_corrupt_tokenizer_is_one_line_with_its_cause(tmp_path, files, message):
    assert message in refusal(folder(tmp_path / "model", **files)).message


def test_a_corrupt_tokenizer_config_is_named(tmp_path):
    path = folder(tmp_path / "model", tokenizer__json="{}", tokenizer_config__json="[1")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: not valid JSON"):
        load_tokenizer(path, vocab_size=VOCAB)


@pytest.mark.parametrize("name", ["tokenizer__json", "tokenizer__model"])
def test_a_tokenizer_that_git_lfs_did_not_fetch(tmp_path, name):
    path = folder(tmp_path / "model", **{name: "version https://git-lfs.github.com/spec/v1\noid sha256:1"})
    refused = refusal(path)
    assert refused.message == f"{path / name.replace('__', '.')} is a Git LFS pointer, not the tokenizer"
    assert "git lfs pull" in refused.hint


def test_no_folder(tmp_path):
    shutil.rmtree(tmp_path)
    assert "is not a folder" in refusal(tmp_path).message


def test_a_tokenizer_that_is_code_needs_trust_and_then_works(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = folder(
        tmp_path / "kimi",
        config__json={"model_type": "deepseek_v3"},
        tokenizer_config__json=AUTO_MAP,
        letters__py=CODE,
        tiktoken__model=b"YQ== 0\n",
    )
    refused = refusal(path)
    assert refused.message == f"the tokenizer in {path} is Python code that comes with it"
    assert "pass `trust_remote_code=True`" in refused.hint
    trusted = load_tokenizer(path, vocab_size=VOCAB, trust_remote_code=True)
    assert encode(trusted, ["bad cab", "e"]) == [[1, 0, 3, 8, 2, 0, 1], [4]]
    # A text that its code cannot take.
    with pytest.raises(DataError, match=r"the tokenizer fails on the text 'xyz' or one behind it: KeyError: 'x'"):
        encode(trusted, ["xyz"])


def test_code_that_needs_a_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = folder(
        tmp_path / "model",
        config__json={"model_type": "deepseek_v3"},
        tokenizer_config__json=AUTO_MAP,
        letters__py="import no_such_package\n" + CODE,
    )
    message = refusal(path, trust_remote_code=True).message
    assert "cannot be loaded: ImportError: " in message
    assert "no_such_package" in message


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_sentencepiece_tokenizer_names_the_package_that_is_missing(tmp_path, monkeypatch, model_type):
    """transformers 5 asks for tiktoken, which cannot read such a file."""
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    path = folder(tmp_path / "model", config__json={"model_type": model_type}, tokenizer__model=SENTENCEPIECE)
    refused = refusal(path)
    assert refused.message.endswith("is a sentencepiece model, which needs sentencepiece and protobuf")
    assert refused.hint.startswith("pip install sentencepiece protobuf;")


def test_a_panic_inside_the_tokenizer_is_one_line_too():
    class PanicException(BaseException):
        """What PyO3 makes of a panic in Rust code."""

    def panics(*_args, **_options):
        raise PanicException("index out of bounds\nbacktrace")

    with pytest.raises(
        DataError, match=r"fails on the text 'a' or one behind it: PanicException: index out of bounds$"
    ):
        encode(panics, ["a"])


def test_ctrl_c_is_no_failure_of_the_tokenizer():
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(interrupted, ["a"])
