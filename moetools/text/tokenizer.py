"""The tokenizer of a model: found, loaded and called. Everything about it is foreign code."""

import logging
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moetools.checkpoint.folder import read_json_object
from moetools.errors import CheckpointError
from moetools.text.foreign import foreign
from moetools.text.tokenizer_files import check_tokenizer_files

_LOG = logging.getLogger(__name__)
_PADDED_SHARE = 0.9
_VOCABULARY_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
_SENTENCEPIECE_PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
_LFS = b"version https://git-lfs"
_OTHER = "name a folder with a tokenizer.json: `tokenizer=PATH`"


def load_tokenizer(path: Path, *, vocab_size: int, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder `path`; nothing is downloaded, its own code runs only with `trust_remote_code`.

    Raises:
        CheckpointError: no tokenizer there, an empty or corrupt one, code that is not trusted, a missing package, or
            ids of `vocab_size` or more.
    """
    if not path.is_dir():
        raise CheckpointError(f"no tokenizer: {path} is not a folder", hint="name its folder with `tokenizer=PATH`")
    hint = _check_files(path, trust_remote_code)
    try:
        check_tokenizer_files(path)
    except CheckpointError as error:
        raise CheckpointError(error.message, hint=f"{error.hint}; or {_OTHER}") from error
    with foreign(f"the tokenizer in {path} cannot be loaded", hint, CheckpointError):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
        words = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
    # Without its files transformers makes a tokenizer of special tokens alone, and any text becomes nothing.
    if not words:
        raise _no_tokenizer(path, "; what is there knows no text")
    _check_ids(path, tokenizer, vocab_size)
    return tokenizer


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id that a text may contain."""
    return max(tokenizer.get_vocab().values())


def separator_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The one token in front of a document: BOS, else EOS; empty when the tokenizer has neither."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    return []


def padding_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The id that fills padded positions: PAD, else EOS, else 0. Masked everywhere, so any legal id will do."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id) if tokenizer is not None else ()
    return next((token for token in candidates if token is not None), 0)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, no special tokens added, never truncated.

    Raises:
        DataError: whatever the tokenizer raises, with the beginning of the texts.
    """
    if not texts:
        return []
    with foreign(f"the tokenizer fails on the text {texts[0][:40]!r} or one behind it", _OTHER):
        # verbose=False: a text longer than the model's context is no fault here, it will be cut.
        encoded = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return [list(ids) for ids in encoded["input_ids"]]


def _check_files(path: Path, trust_remote_code: bool) -> str:
    """Refuse a folder in which no tokenizer can be; else the hint for one that does not load."""
    files = sorted({file.name for pattern in _VOCABULARY_FILES for file in path.glob(pattern)})
    code = _is_code(path)
    for name in files:
        if _start(path / name, len(_LFS)) == _LFS:
            hint = "run 'git lfs pull' in the model folder"
            raise CheckpointError(f"{path / name} is a Git LFS pointer, not the tokenizer", hint=f"{hint}; or {_OTHER}")
    if not (files or code):
        raise _no_tokenizer(path)
    trust = f"read its code, then pass `trust_remote_code=True` if you trust it; or {_OTHER}"
    if code and not trust_remote_code and "tokenizer.json" not in files:
        raise CheckpointError(f"the tokenizer in {path} is Python code that comes with it", hint=trust)
    if not code and files and all(_is_sentencepiece(path / name) for name in files):
        missing = [package for package, module in _SENTENCEPIECE_PACKAGES.items() if not _installed(module)]
        if missing:
            raise CheckpointError(
                f"the tokenizer in {path} is a sentencepiece model, which needs {' and '.join(missing)}",
                hint=f"pip install {' '.join(missing)}; or {_OTHER}",
            )
    return trust if code and not trust_remote_code else _OTHER


def _is_code(path: Path) -> bool:
    file = path / "tokenizer_config.json"
    auto = read_json_object(file).get("auto_map") if file.is_file() else None
    return "AutoTokenizer" in auto if isinstance(auto, dict) else bool(auto)


def _is_sentencepiece(file: Path) -> bool:
    """Whether the file is a protobuf message that begins with its list of pieces: field 1, of a length."""
    return file.suffix == ".model" and _start(file, 1) == b"\x0a"


def _start(file: Path, length: int) -> bytes:
    with foreign(f"{file} cannot be read", "check its permissions", CheckpointError), file.open("rb") as opened:
        return opened.read(length)


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _check_ids(path: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    largest = largest_id(tokenizer)
    if largest >= vocab_size:
        raise CheckpointError(
            f"wrong tokenizer: {path} has {len(tokenizer)} tokens with ids up to {largest}, "
            f"the model embeds {vocab_size} tokens (ids up to {vocab_size - 1})",
            hint="name the folder of the tokenizer this model was trained with: `tokenizer=PATH`",
        )
    if largest < _PADDED_SHARE * vocab_size:
        # Embeddings are padded by a few per cent at most; a much smaller tokenizer is probably another model's.
        _LOG.warning("%s has ids up to %d only, the model embeds %d tokens", path, largest, vocab_size)


def _no_tokenizer(path: Path, why: str = "") -> CheckpointError:
    return CheckpointError(f"no tokenizer in {path}{why}", hint=f"copy the original model's there, or {_OTHER}")
