"""Dropout for models that run through their own code: on the embedding, and on what each block adds to the residual stream.

These are the places where `slmops.train.written` drops too (a test compares the two). The models' own dropout settings
stay out of it: they differ from one architecture to the next, and most have none.
"""

from __future__ import annotations

from typing import Any

from slmops.errors import TrainingError

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
NORMED = ("post_attention_layernorm", "post_feedforward_layernorm")
"""The norms through which Gemma 2, Gemma 3 and OLMo 2 add: there they come last before the sum."""


class Dropout:
    """Hooks in a model; nothing is dropped while `share` is 0.

    Raises:
        TrainingError: the model has no blocks of attention and feed-forward.
    """

    def __init__(self, model: Any) -> None:
        self.share = 0.0
        for module in places(model):
            module.register_forward_hook(self._drop)

    def _drop(self, module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        from torch.nn import functional as F

        if not self.share:
            return output
        if isinstance(output, tuple):
            return (F.dropout(output[0], self.share), *output[1:])
        return F.dropout(output, self.share)


def places(model: Any) -> list[Any]:
    """The modules whose results are dropped.

    Raises:
        TrainingError: see `Dropout`.
    """
    found, blocks = [model.get_input_embeddings()], 0
    for module in model.base_model.modules():
        children = dict(module.named_children())
        attention = next((children[name] for name in ATTENTION if name in children), None)
        rest = next((children[name] for name in FEED_FORWARD if name in children), None)
        if attention is None or rest is None:
            continue
        blocks += 1
        found += [children[name] for name in NORMED] if NORMED[1] in children else [attention, rest]
    kind = model.config.model_type
    if blocks != model.config.num_hidden_layers:
        raise TrainingError(
            f"train.dropout has no place in a model of type {kind}",
            "take it out, or use `train.lora.dropout` with a tuning of low rank",
        )
    return found
