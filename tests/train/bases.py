"""Tiny models of the real architectures, to be tuned: random weights, a byte-level tokenizer, a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ARCHITECTURES = ("qwen3", "llama", "phi3", "gemma3")


def config(kind: str, vocabulary: int, **changes: Any) -> Any:
    """The configuration of a small model; `kind` is an architecture as transformers writes it, in any case."""
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 4,
        "tie_word_embeddings": True,
    } | changes  # fmt: skip
    name = "gemma3text" if kind.lower() == "gemma3" else kind.lower()
    classes = {known.lower(): known for known in dir(transformers) if known.endswith("Config")}
    return getattr(transformers, classes[f"{name}config"])(**settings)


def build(kind: str, vocabulary: int, seed: int = 0, hidden: int = 64, layers: int = 2, context: int = 128) -> Any:
    """A float32 model of an architecture."""
    import torch
    from transformers import AutoModelForCausalLM

    own: dict[str, Any] = {}
    if kind == "phi3":
        own = {"original_max_position_embeddings": context}
    elif kind != "llama":
        own = {"head_dim": hidden // 4}
    if kind == "gemma3":
        kinds = ["sliding_attention" if (layers - i) % 2 == 0 else "full_attention" for i in range(layers)]
        own |= {"sliding_window": 16, "layer_types": kinds}
    settings = config(
        kind, vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        max_position_embeddings=context, initializer_range=hidden**-0.5, **own,
    )  # fmt: skip
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(settings, dtype=torch.float32)


def save(kind: str, tokenizer: Path, out: Path, **settings: Any) -> Path:
    """The folder of a base model with a tokenizer."""
    from slmops.train import network
    from slmops.train.encode import load_tokenizer

    network.save(build(kind, len(load_tokenizer(tokenizer)), **settings), tokenizer, out)
    return out


def adapter(
    base: Path, out: Path, *, tuning: str = "lora", rank: int = 4, seed: int = 0, targets: tuple[str, ...] | None = None
) -> Path:
    """The folder that a training would write, without one: new weights are random, and large enough to matter."""
    import torch

    from slmops.core.spec import Lora, Training
    from slmops.train import network
    from slmops.train import tuning as tunings

    training = Training(tuning=tuning, lora=Lora(rank=rank, targets=targets), adapter_width=8)  # type: ignore[arg-type]
    handle = tunings.apply(network.load(base), training, seed)
    generator = torch.Generator().manual_seed(seed)
    for weight in handle.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    tunings.save_adapter(handle, training, base, out)
    network.save(tunings.merged(out / "adapter", base), base, out)
    return out
