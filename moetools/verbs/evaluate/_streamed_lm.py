"""The language model of EleutherAI's evaluation harness (lm-eval 0.4) on our streamed forward pass.

Tokens, contexts and windows are cut as the harness' own model of Hugging Face checkpoints cuts them, so that its
numbers come out the same; layers are loaded one after the other, so that models larger than memory are measured, packed
ones too. Imports lm-eval.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from moetools.errors import DataError, UserError
from moetools.forward.evaluate import likelihoods
from moetools.forward.generate import continuations, generation_plan
from moetools.forward.streaming import StreamedModel
from moetools.text.tokenizer import padding_id
from moetools.text.tokens import TokenBatch, pad_right

_LONGEST = 2048
_GENERATED = 256
_SAMPLED = ("do_sample", "temperature", "top_p", "top_k")

Pair = tuple[Any, list[int], list[int]]
"""(text, tokens of the context, tokens of the continuation)."""


class StreamedLM(TemplateLM):
    """A checkpoint as the harness sees it."""

    def __init__(self, model: StreamedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        super().__init__()
        self._model, self.tokenizer, self._size = model, tokenizer, batch_size
        config = model.arch.text(model.checkpoint.config)
        self.max_length = int(config.get("max_position_embeddings") or _LONGEST)

    @property
    def eot_token_id(self) -> int | None:
        """What ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text without context."""
        found = self.tokenizer.bos_token_id
        found = self.tokenizer.eos_token_id if found is None else found
        if found is None:
            raise DataError("the tokenizer has neither BOS nor EOS: nothing predicts the first token of a text")
        return int(found)

    @property
    def tokenizer_name(self) -> str:
        """For the harness' cache of requests."""
        return str(self._model.checkpoint.path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_more: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer itself adds them, but never a second BOS."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos and string.startswith(bos):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_more: Any) -> list[tuple[float, bool]]:
        """(sum of log p, whether every token is the most likely one) of each continuation."""
        # A context that is too long loses its beginning.
        rows = [((context + more)[-self.max_length :], len(more)) for _, context, more in requests]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
        batches = [order[start : start + self._size] for start in range(0, len(order), self._size)]
        scored = [self._scored([rows[index] for index in batch]) for batch in batches]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        scores = likelihoods(self._model, scored)
        for batch, (_tokens, mask_BN), (log_prob_R, top_R) in zip(batches, scored, scores, strict=True):
            row_R = mask_BN.nonzero()[:, 0]
            for place, index in enumerate(batch):
                mine = row_R == place
                found[index] = (log_prob_R[mine].sum().item(), bool(top_R[mine].all()))
        return found

    def _scored(self, rows: Sequence[tuple[list[int], int]]) -> tuple[TokenBatch, torch.Tensor]:
        ids, mask = pad_right([torch.tensor(ids) for ids, _ in rows], padding_id(self.tokenizer))
        place_N = torch.arange(ids.shape[1])
        ends = torch.tensor([len(one) for one, _ in rows])[:, None]
        begins = ends - torch.tensor([more for _, more in rows])[:, None]
        wanted = (place_N >= begins.clamp(min=1)) & (place_N < ends)
        return TokenBatch(input_ids=ids, attention_mask=mask, task=torch.zeros(len(rows), dtype=torch.int64)), wanted

    def loglikelihood_rolling(self, requests: Sequence[Instance], **_more: Any) -> list[float]:
        """log p of whole texts, in windows that do not overlap."""
        windows: list[Pair] = []
        owner: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, more in map(make_disjoint_window, cut):
                windows.append((None, context, more))
                owner.append(number)
        sums = [0.0] * len(requests)
        for number, (log_prob, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += log_prob
        return sums

    def generate_until(self, requests: Sequence[Instance], **_more: Any) -> list[str]:
        """Greedy continuations up to a stop.

        Raises:
            UserError: a task that samples.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        contexts = []
        for number, request in enumerate(requests):
            text, options = request.args
            if options.get("do_sample") and any(options.get(name) for name in _SAMPLED[1:]):
                raise UserError("a harness task samples its answers, which two models cannot be compared by")
            most = int(options.get("max_gen_toks") or options.get("max_new_tokens") or _GENERATED)
            contexts.append(self.tok_encode(text)[-(self.max_length - most) :] or [self.prefix_token_id])
            groups.setdefault((len(contexts[-1]), most), []).append(number)
        texts = [""] * len(requests)
        for (_, most), members in groups.items():
            for start in range(0, len(members), self._size):
                self._continue(members[start : start + self._size], contexts, most, requests, texts)
        return texts

    def _continue(
        self,
        members: Sequence[int],
        contexts: Sequence[list[int]],
        most: int,
        requests: Sequence[Instance],
        texts: list[str],
    ) -> None:
        ids = torch.tensor([contexts[number] for number in members])
        batch = TokenBatch(input_ids=ids, attention_mask=None, task=torch.zeros(len(members), dtype=torch.int64))
        plan = generation_plan(self._model, [batch], most)
        ends = () if self.eot_token_id is None else (self.eot_token_id,)
        found = continuations(self._model, [batch], most, plan, end_ids=ends)[0]
        for number, more in zip(members, found.tolist(), strict=True):
            until = requests[number].args[1].get("until") or []
            eos = self.eot_token_id
            kept = more[: more.index(eos)] if eos in more else more
            text = self.tokenizer.decode(kept, skip_special_tokens=False)
            texts[number] = _before(text, [until] if isinstance(until, str) else until)


def _before(text: str, stops: Iterable[str]) -> str:
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text
