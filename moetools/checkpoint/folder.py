"""Which files of a model folder hold the weights, and which are carried over. Reads no tensor."""

import difflib
import fnmatch
import functools
import json
import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from moetools.errors import CheckpointError

_LOG = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_NAME = "adapter_config.json"
"""Of a peft adapter; in a model's folder transformers loads the adapter too, where peft is installed."""
_NO_GGUF = "start from the original model; GGUF is an output format"
PICKLE_PATTERNS = ("*.bin", "*.pth", "*.pt", "*.ckpt")

WEIGHT_PATTERNS = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json",
    "*.pth", "*.pt", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data",
)  # fmt: skip
"""Weights in any format. Those of the input are wrong for the output, so none is carried over."""

REPLACED_FILES = frozenset({"config.json", "moetools.json", "README.md"})
"""Written anew for every output; only those at the top of the folder."""

BOOKKEEPING_FOLDERS = frozenset({".git", ".cache", ".huggingface", "mlx"})

MAX_JSON_BYTES = 1 << 28
"""Of config.json or an index; those of the largest models have a few MB."""

_SHARD_NAME = re.compile(r"model-(\d{5,})-of-(\d{5,})\.safetensors")


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        CheckpointError: unreadable, not JSON, or not an object.
    """
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes; a JSON file of a model has fewer")
        text = file.read_text(encoding="utf-8")
        value = json.loads(text)
        if "\\ud" in text.lower():
            # Half of a surrogate pair is legal in JSON and in Python, and can never be written again.
            json.dumps(value, ensure_ascii=False).encode()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}", hint="download this file again") from error
    if not isinstance(value, dict):
        message = f"{file}: must hold a JSON object, holds {type(value).__name__}"
        raise CheckpointError(message, hint="download this file again")
    return value


def check_folder(path: Path) -> None:
    """Raises CheckpointError unless `path` is a folder with a config.json, and no adapter without its model."""
    if not path.exists():
        raise CheckpointError(f"no model folder '{path}'", hint=_missing_hint(path))
    if not path.is_dir():
        inside = (path.parent / "config.json").is_file()
        hint = f"did you mean '{path.parent}'?" if inside else "text is given with `data`, before each of its files"
        raise CheckpointError(f"'{path}' is a file; a model is a folder", hint=hint)
    _refuse_adapter(path)
    if not (path / "config.json").is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        message = f"'{path}' holds no config.json" + (f", only GGUF weights ('{ggufs[0]}')" if ggufs else "")
        raise CheckpointError(message, hint=_NO_GGUF if ggufs else "give the folder of a model in Hugging Face layout")


def _refuse_adapter(path: Path) -> None:
    weights = {file.name for file in path.glob("*.safetensors")} - {"adapter_model.safetensors"}
    if (path / ADAPTER_NAME).is_file() and not ((path / "config.json").is_file() and weights):
        base = read_json_object(path / ADAPTER_NAME).get("base_model_name_or_path")
        raise CheckpointError(
            f"'{path}' is an adapter of {base or 'some model'}, not a model",
            hint="give that model, or merge the adapter into it with peft: PeftModel.from_pretrained(model, "
            f"{str(path)!r}).merge_and_unload().save_pretrained('MERGED')",
        )


def weight_files(path: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the safetensors files of the model, and the index (tensor -> file) where there is one.

    An index decides alone, and `model.safetensors` decides alone: other safetensors files beside them are ignored. With
    neither, a complete set of model-XXXXX-of-YYYYY.safetensors is accepted.

    Raises:
        CheckpointError: no weights; pickled weights only; ambiguous, incomplete or missing files; an index that is
            malformed or points outside the folder.
    """
    if (path / INDEX_NAME).is_file():
        weight_map = _read_index(path / INDEX_NAME)
        names = sorted(set(weight_map.values()))
        if (path / SINGLE_NAME).is_file() and SINGLE_NAME not in names:
            message = f"{path}: holds both {SINGLE_NAME} and {INDEX_NAME}, so it is unclear which are the weights"
            raise CheckpointError(message, hint="delete the stale one; transformers would load the former")
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            message = f"{path}: {len(missing)} of {len(names)} shards are missing, first '{missing[0]}'"
            raise CheckpointError(message, hint="the download is incomplete; download the model again")
        return names, weight_map
    if (path / SINGLE_NAME).is_file():
        return [SINGLE_NAME], None
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if not found:
        raise _no_weights(path)
    _check_complete(path, found)
    return found, None


def sidecar_files(path: Path) -> list[Path]:
    """Relative paths, sorted, of every file that is neither weights, nor in `REPLACED_FILES`, nor an adapter's config.

    A link to a file is followed inside the folder and, in a snapshot of the Hugging Face cache, to the blobs of the
    same repository. One that leads elsewhere may name any file of this machine: it is left out and named in the log.
    Links to folders are not followed.

    Raises:
        CheckpointError: a link that leads nowhere.
    """
    found, roots = [], _own_roots(path)
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = [name for name in subfolders if name not in BOOKKEEPING_FOLDERS]
        relative = Path(folder).relative_to(path)
        for name in names:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in WEIGHT_PATTERNS):
                continue
            if relative == Path() and (name in REPLACED_FILES or name == ADAPTER_NAME):
                continue
            file = Path(folder) / name
            if file.is_symlink() and not file.exists():
                message = f"{file}: a link to '{file.readlink()}', which does not exist"
                raise CheckpointError(message, hint="the download is incomplete; download the model again")
            target = Path(os.path.realpath(file))
            if not any(root in target.parents for root in roots):
                _LOG.warning("%s: a link to '%s', outside the model: not carried over", file, target)
            elif file.is_file():
                found.append(relative / name)
    return sorted(found)


def _own_roots(path: Path) -> list[Path]:
    """Folders whose files belong to the model: its own and, of a snapshot in the Hugging Face cache, its blobs."""
    real = Path(os.path.realpath(path))
    snapshots = next((parent for parent in real.parents if parent.name == "snapshots"), None)
    return [real] if snapshots is None else [real, Path(os.path.realpath(snapshots.with_name("blobs")))]


def _read_index(file: Path) -> dict[str, str]:
    weight_map = read_json_object(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        alone = (file.parent / SINGLE_NAME).is_file()
        hint = f"{SINGLE_NAME} needs none: delete it" if alone else "download this file again"
        raise CheckpointError(f"{file}: must hold a non-empty 'weight_map' object", hint=hint)
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _inside_folder(name):
            message = f"{file}: tensor '{tensor}' is said to lie in {name!r}, which is no file of this folder"
            raise CheckpointError(message, hint="do not use this model: its index is malformed or hostile")
        if not name.endswith(".safetensors"):
            message = f"{file}: tensor '{tensor}' is said to lie in '{name}', which is no safetensors file"
            raise CheckpointError(message, hint="convert the model to safetensors")
    return weight_map


@functools.cache  # an index names the same few shards for tens of thousands of tensors
def _inside_folder(name: str) -> bool:
    # The name is judged, not what it links to: in the Hugging Face cache every shard is a link to ../../blobs.
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and not any(c in name for c in "\\:\0")


def _check_complete(path: Path, found: list[str]) -> None:
    matches = [_SHARD_NAME.fullmatch(name) for name in found]
    if not all(matches):
        odd = next(name for name, match in zip(found, matches, strict=True) if not match)
        message = f"{path}: holds {len(found)} safetensors files, no {INDEX_NAME} and no {SINGLE_NAME}; first '{odd}'"
        raise CheckpointError(message, hint=f"if '{odd}' is the whole model, name it {SINGLE_NAME}; else get the index")
    counts = sorted({int(match[2]) for match in matches if match})
    numbers = {int(match[1]) for match in matches if match}
    missing = [number for number in range(1, counts[-1] + 1) if number not in numbers]
    if len(counts) > 1 or missing or len(found) != counts[-1]:
        detail = f"shard {missing[0]} is missing" if missing else f"they count {counts} shards"
        message = f"{path}: the {len(found)} shards are not one complete set of {counts[-1]}: {detail}"
        raise CheckpointError(message, hint="the download is incomplete; download the model again")


def _no_weights(path: Path) -> CheckpointError:
    pickles = sorted(file.name for pattern in PICKLE_PATTERNS for file in path.glob(pattern))
    if pickles:
        message = f"{path}: only pickled weights ('{pickles[0]}'), which can run code when loaded; refused"
        hint = "on a machine you can risk, load it with transformers and save_pretrained() it: that writes safetensors"
        return CheckpointError(message, hint=hint)
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if ggufs:
        message = f"{path}: only GGUF weights ('{ggufs[0]}'); safetensors are needed"
        return CheckpointError(message, hint=_NO_GGUF)
    return CheckpointError(
        f"{path}: no *.safetensors file", hint="the download is incomplete; download the model again"
    )


def _missing_hint(path: Path) -> str:
    parent = path.parent
    siblings = sorted(entry.name for entry in parent.iterdir() if entry.is_dir()) if parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    if close:
        return f"did you mean '{parent / close[0]}'?"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return f"only local folders are read; download it first: hf download {path} --local-dir {path.name}"
    return "only local folders are read"
