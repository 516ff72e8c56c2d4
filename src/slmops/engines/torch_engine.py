"""The reference engine: a Hugging Face model in PyTorch, float32, on the CPU.

Prompts of equal length run as one batch, so nothing is padded. A sampled answer depends on the seed, on its prompt and
on how many equal prompts came before it in the call, never on the other prompts of its batch (up to the rounding that
batch size causes inside matrix products).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core.digest import digest_json
from slmops.core.engine import Generation, Sampling
from slmops.engines import at_once, check_room, clean, no_room, read_json
from slmops.engines.plain_tokenizer import end_ids
from slmops.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

BATCH_TOKENS = 8192
MAX_BATCH = 64


class TorchEngine:
    """A causal language model in PyTorch. See `slmops.core.engine.Engine`.

    Args:
        adapter: folder of an adapter in PEFT's form, which is computed beside the base's weights and not merged into them.
    """

    name = "torch"

    def __init__(self, folder: Path, *, threads: int = 1, adapter: Path | None = None) -> None:
        try:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise MissingExtraError("PyTorch with transformers", "train") from error
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(threads)
        config = read_json(folder / "config.json")
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        except Exception as error:
            raise ModelError(f"{folder} cannot be loaded: {error}", "the folder is damaged, or too new") from error
        if adapter is not None:
            self._put_on(adapter)
        if self.tokenizer.chat_template is None:
            raise ModelError(f"{folder} has no chat template", "add a chat_template.jinja to the folder")
        self.model.eval()
        self.context_length = int(getattr(self.model.config, "max_position_embeddings", 0) or 2048)
        self.end_ids = end_ids(folder, config, self.tokenizer.eos_token_id)

    def _put_on(self, adapter: Path) -> None:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise MissingExtraError("peft", "train") from error
        try:
            self.model = PeftModel.from_pretrained(self.model, str(adapter))
        except Exception as error:
            raise ModelError(
                f"{adapter} cannot be loaded: {error}", "give the base that the adapter belongs to"
            ) from error

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of the rendered prompt, ready for the answer."""
        text = self.tokenizer.apply_chat_template(clean(messages), tokenize=False, add_generation_prompt=True)
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_done: Callable[[int], None] | None = None
    ) -> list[Generation]:
        """One answer per prompt, in order. Times are those of the batch that a prompt ran in."""
        check_room(prompts, self.context_length)
        seen: Counter[tuple[int, ...]] = Counter()
        occurrence = []
        for prompt in prompts:
            occurrence.append(seen[tuple(prompt)])
            seen[tuple(prompt)] += 1
        by_length: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(index)
        answers: dict[int, Generation] = {}
        for length, indices in sorted(by_length.items()):
            size = max(1, min(MAX_BATCH, BATCH_TOKENS // length))
            for start in range(0, len(indices), size):
                part = indices[start : start + size]
                batch = [list(prompts[i]) for i in part]
                seeds = [_seed(sampling.seed, prompts[i], occurrence[i]) for i in part] if sampling.temperature else []
                answers.update(zip(part, self._batch(batch, sampling, seeds), strict=True))
                if on_done:
                    on_done(len(part))
        return [answers[i] for i in range(len(prompts))]

    def at_once(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Generation]:
        """One answer of `new_tokens` tokens to each prompt, in one batch; see `slmops.core.engine.AtOnce`."""
        at_once.check(prompts, new_tokens, self.context_length)
        return self._batch([list(prompt) for prompt in prompts], Sampling(new_tokens, ignore_end=True), [])

    def _batch(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[Generation]:
        """Answers to prompts of one length; rows that are finished leave the batch."""
        import torch
        from transformers import DynamicCache

        started = time.perf_counter()
        room = min(sampling.max_new_tokens, self.context_length - len(prompts[0]))
        draws = [torch.rand(room, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        uniform = torch.stack(draws) if draws else None
        tokens: list[list[int]] = [[] for _ in prompts]
        logprobs = [0.0] * len(prompts)
        finished = [False] * len(prompts)
        ends = [0.0] * len(prompts)
        first = 0.0
        live = list(range(len(prompts)))
        with torch.inference_mode():
            ids = torch.tensor(prompts)
            cache = DynamicCache(config=self.model.config)
            for step in range(room):
                output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                logits = output.logits[:, -1].float()
                chosen = pick(logits, sampling, None if uniform is None else uniform[live, step])
                scores = torch.log_softmax(logits, -1).gather(1, chosen[:, None])[:, 0]
                now = time.perf_counter() - started
                first = first or now
                stay = []
                for row, (index, token, score) in enumerate(zip(live, chosen.tolist(), scores.tolist(), strict=True)):
                    tokens[index].append(token)
                    logprobs[index] += score
                    ends[index] = now
                    finished[index] = token in self.end_ids
                    if not finished[index] or sampling.ignore_end:
                        stay.append(row)
                if not stay:
                    break
                if len(stay) < len(live):
                    cache.batch_select_indices(torch.tensor(stay))
                    live = [live[row] for row in stay]
                ids = chosen[stay][:, None]
        return [
            Generation(self.decode(t), tuple(t), f, first, end, logprob)
            for t, f, end, logprob in zip(tokens, finished, ends, logprobs, strict=True)
        ]

    def logits(self, ids: Sequence[int], start: int = 0) -> NDArray[np.float32]:
        """Teacher-forced logits, float32 (len(ids) - start, vocabulary): the rows from position `start` on."""
        import torch

        if not 0 < len(ids) <= self.context_length:
            raise no_room(0, len(ids), self.context_length)
        with torch.inference_mode():
            rows = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, start:]
        array: NDArray[np.float32] = rows.float().numpy()
        return array

    def close(self) -> None:
        """Drop the model and give PyTorch back the number of threads that it had."""
        import torch

        self.model = None
        torch.set_num_threads(self._threads_before)


def pick(logits: Tensor, sampling: Sampling, uniform: Tensor | None) -> Tensor:
    """Choose one token per row.

    Args:
        logits: float32 (rows, vocabulary).
        sampling: temperature 0 takes the most likely token, the lowest id on ties.
        uniform: float64 (rows,) in [0, 1), one draw per row; None is greedy.

    Returns:
        int64 (rows,).
    """
    import torch

    if uniform is None or sampling.temperature == 0:
        return logits.argmax(-1)
    whole = torch.softmax(logits.double() / sampling.temperature, -1)
    probabilities, order = torch.sort(whole, stable=True, dim=-1, descending=True)
    if sampling.top_k:
        probabilities[:, sampling.top_k :] = 0.0
    if sampling.top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    heap = probabilities.cumsum(-1)
    place = torch.searchsorted(heap, uniform[:, None] * heap[:, -1:], right=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    chosen: Tensor = order.gather(1, torch.minimum(place, last))[:, 0]
    return chosen


def _seed(seed: int, prompt: Sequence[int], occurrence: int) -> int:
    """63 bits from the call's seed, the prompt and its number among equal prompts."""
    return int(digest_json([seed, list(prompt), occurrence])[7:23], 16) >> 1
