"""The pre-tokenizers of GGUF files: llama.cpp cuts text into the same tokens as the tokenizers library."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

pytest.importorskip("gguf")

from test_gguf import LLAMA, needs_llama

from moetools.formats.gguf import export_gguf
from moetools.formats.gguf_header import _SPLITS
from moetools.formats.reader import open_model

TEXTS = (
    "Hello world! It's 2024, isn't it?\n\n  def f(x):\n\treturn x**2 + 31415926\n",
    "HTTPServer and XMLHttpRequest; don't WE'LL /usr/bin //\n 1234567 cafés naïve",
    "   three   spaces\r\nand lines\n\n\nend  ",
)
_RUN = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], vocab_only=True, verbose=False)
print(json.dumps([model.tokenize(text.encode(), add_bos=False, special=False) for text in json.loads(sys.argv[2])]))
"""


def steps(name: str) -> pre_tokenizers.PreTokenizer:
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "refact":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    regexes = next(regexes for regexes, known in _SPLITS.items() if known == name)
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@needs_llama
@pytest.mark.parametrize("name", ["gpt-2", "refact", *_SPLITS.values()])
def test_llama_cpp_cuts_text_alike(name: str, tiny, tmp_path: Path) -> None:
    source = shutil.copytree(tiny("olmoe", vocab_size=400, hidden_size=32), tmp_path / "model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = steps(name), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.save(str(source / "tokenizer.json"))
    export_gguf(open_model(source), tmp_path / "out.gguf")
    command = [LLAMA, "-c", _RUN, str(tmp_path / "out.gguf"), json.dumps(TEXTS)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr[-1000:]
    assert json.loads(ran.stdout.splitlines()[-1]) == [tokenizer.encode(text).ids for text in TEXTS]
