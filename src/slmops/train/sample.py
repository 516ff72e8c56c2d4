"""A model writes answers in the middle of its training: all prompts of a batch at once, keys and values kept.

Promises: the text is a function of weights, prompts and generator; without temperature it is what the model itself would
write greedily. Llama and Qwen3 go through the written-out forward pass; others through their own `generate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slmops.train.written import Written

if TYPE_CHECKING:
    import torch

    from slmops.train.network import Network

    Weights = Mapping[str, torch.Tensor]


def sample(
    network: Network, weights: Weights, prompts: Sequence[Sequence[int]], limit: int, end: int, temperature: float, seed: int
) -> list[list[int]]:  # fmt: skip
    """One continuation of each prompt.

    Args:
        prompts: token ids, at least one each.
        limit: most tokens of a continuation.
        end: the token that ends it; it is part of the result.
        temperature: 0 takes the most likely token.

    Returns:
        Token ids of each continuation, at least one.
    """
    import torch

    if not prompts:
        return []
    generator = torch.Generator(network.device).manual_seed(seed % (1 << 62))
    with torch.no_grad():
        if network.path == "fast":
            return _written(network, weights, prompts, limit, end, temperature, generator)
        return _generate(network, prompts, limit, end, temperature, seed)


def choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """(B, vocabulary) float32 logits to (B,) tokens."""
    import torch

    if temperature == 0:
        return logits.argmax(-1)
    chances = torch.softmax(logits / temperature, -1)
    if chances.device.type != "cpu":
        return torch.multinomial(chances, 1, generator=generator)[:, 0]
    heap = chances.cumsum(-1, dtype=torch.float64)  # one random number a row; multinomial draws one for each token
    at = heap[:, -1:] * torch.rand(len(heap), 1, dtype=torch.float64, generator=generator)
    return torch.searchsorted(heap, at, right=True)[:, 0].clamp_max(heap.shape[1] - 1)


def _written(
    network: Network, weights: Weights, prompts: Sequence[Sequence[int]], limit: int, end: int, temperature: float,
    generator: torch.Generator,
) -> list[list[int]]:  # fmt: skip
    """Rows of different lengths side by side: each row's keys lie at its own positions; rows that end are taken out."""
    import torch

    pass_ = Written(network, weights)
    device = network.device
    sizes = [len(p) for p in prompts]
    width, total = max(sizes), max(sizes) + limit
    cos, sin = network.angles(total)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(list(prompt))
    ids, lengths = ids.to(device), torch.tensor(sizes, device=device)
    shape = (len(prompts), pass_.groups, total, pass_.size)
    keys = [torch.zeros(shape, device=device) for _ in range(pass_.layers)]
    values = [torch.zeros(shape, device=device) for _ in range(pass_.layers)]

    x = pass_.embed(ids)
    for layer in range(pass_.layers):
        q, k, v = pass_.queries(x, pass_.here(layer), cos[:width], sin[:width])
        keys[layer][:, :, :width], values[layer][:, :, :width] = k, v
        x = pass_.rest(x, _attend(pass_, q, k, v, None), pass_.here(layer))
    x = x[torch.arange(len(prompts), device=device), lengths - 1]

    written: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    for turn in range(limit):
        logits = network.project(weights, pass_.norm(x, network.prefix + "norm"))
        tokens = choose(logits, temperature, generator)
        stay = []
        for place, (row, token) in enumerate(zip(alive, tokens.tolist(), strict=True)):
            written[row].append(token)
            if token != end:
                stay.append(place)
        if not stay or turn == limit - 1:
            break
        if len(stay) < len(alive):
            kept = torch.tensor(stay, device=device)
            alive = [alive[place] for place in stay]
            tokens, lengths = tokens[kept], lengths[kept]
            keys, values = [k[kept] for k in keys], [v[kept] for v in values]
        position = lengths + turn
        rows = torch.arange(len(alive), device=device)
        angles = cos[position][:, None, None], sin[position][:, None, None]
        seen = (torch.arange(total, device=device)[None] <= position[:, None])[:, None, None]
        x = pass_.embed(tokens[:, None])
        for layer in range(pass_.layers):
            q, k, v = pass_.queries(x, pass_.here(layer), *angles)
            keys[layer][rows, :, position], values[layer][rows, :, position] = k[:, :, 0], v[:, :, 0]
            x = pass_.rest(x, _attend(pass_, q, keys[layer], values[layer], seen), pass_.here(layer))
        x = x[:, 0]
    return written


def _attend(pass_: Written, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
    """(B, T, heads * size)."""
    from torch.nn import functional as F

    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=pass_.groups != pass_.heads
    )
    return out.transpose(1, 2).flatten(2).to(pass_.low)


def _generate(
    network: Network, prompts: Sequence[Sequence[int]], limit: int, end: int, temperature: float, seed: int
) -> list[list[int]]:
    """By the model's own code. It sees its own weights: rounded stand-ins are not passed on."""
    import torch

    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), 0)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    options: dict[str, Any] = {
        "do_sample": temperature > 0,
        "max_new_tokens": limit,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed % (1 << 62))
        out = network.model.generate(ids.to(network.device), attention_mask=mask.to(network.device), **options)
    texts: list[list[int]] = []
    for row in out[:, width:].tolist():
        texts.append(row[: row.index(end) + 1] if end in row else row)
    return texts
