"""Distillation from inside: the student also imitates the teacher's hidden states and attention relations.

Per position with loss: cross-entropy + `hidden_weight` * distance + `attention_weight` * divergence, where

- distance (TinyBERT, arXiv 1909.10351): the student's layer i looks at the teacher's layer round(i * teacher / student); its
  state goes through a learned map, and the squared error is taken relative to the size of the teacher's state, mean over layers;
- divergence (MiniLMv2, arXiv 2012.15828): queries, keys and values of the last layer, as projected, are cut into the same
  number of relation heads on both sides; KL(teacher || student) between the softmax of the scaled products of each kind
  with itself, over the tokens that attention may see, mean over heads and kinds. Widths may differ.

Both look at the same tokens, so teacher and student share a tokenizer. The learned maps are trained beside the student and
left out of what is saved. Everything is a sum over positions, so a split batch has the loss of the whole one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core.method import Context, Declaration, Facts
from slmops.core.spec import Train
from slmops.errors import TrainingError
from slmops.train import sft
from slmops.train.objective import Supervised, cross_entropy, part_loss

if TYPE_CHECKING:
    import torch

    from slmops.train.batches import Part
    from slmops.train.network import Network
    from slmops.train.objective import Objective, PartLoss, Weights
    from slmops.train.sft import Prepared

KINDS = ("q", "k", "v")
MAP = "transfer.map."

DECLARATION = Declaration(
    name="train.hidden_states",
    version="3",
    makes="model",
    takes={"teacher": "model"} | sft.TAKES,
    extra="train",
    packages=sft.PACKAGES,
    threads=True,
)


class Params(sft.Params):
    """As for `train.sft`, with the weights of what is imitated."""

    training: Train = Train(method="hidden_states")


@dataclass
class Inside:
    """What one forward pass leaves behind.

    Attributes:
        states: (B, T, hidden) of each layer, first to last.
        relations: by kind (B, T, heads of that kind * width) of the last layer, before positions are put in.
    """

    states: list[torch.Tensor]
    relations: dict[str, torch.Tensor]


@contextmanager
def watching(network: Network) -> Iterator[Inside]:
    """Collect the inside of the passes that the model's own code makes."""
    layers = network.model.base_model.layers
    inside = Inside([], {})
    attention = layers[-1].self_attn
    hooks = [layer.register_forward_hook(_keep_state(inside)) for layer in layers]
    if hasattr(attention, "qkv_proj"):
        hooks.append(attention.qkv_proj.register_forward_hook(_keep_fused(inside, network.model.config)))
    else:
        for kind in KINDS:
            hooks.append(getattr(attention, f"{kind}_proj").register_forward_hook(_keep_relation(inside, kind)))
    path, network.path = network.path, "head" if network.path == "fast" else network.path
    try:
        yield inside
    finally:
        network.path = path
        for hook in hooks:
            hook.remove()


def _keep_state(inside: Inside) -> Any:
    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        inside.states.append(output[0] if isinstance(output, tuple) else output)

    return keep


def _keep_relation(inside: Inside, kind: str) -> Any:
    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        inside.relations[kind] = output

    return keep


def _keep_fused(inside: Inside, config: Any) -> Any:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = [size * heads for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        inside.relations.update(zip(KINDS, output.split(sizes, -1), strict=True))

    return keep


def widths(config: Any) -> list[int]:
    """How wide queries and keys (or values) are, all heads together."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [size * config.num_attention_heads, size * config.num_key_value_heads]


def relation_heads(student: Any, teacher: Any, wanted: int | None) -> int:
    """Into how many relation heads both sides are cut.

    Raises:
        TrainingError: a width of the student or the teacher is no multiple of `wanted`.
    """
    every = widths(student) + widths(teacher)
    if wanted is None:
        common = math.gcd(*every)
        return max(n for n in range(1, student.num_attention_heads + 1) if common % n == 0)
    bad = [width for width in every if width % wanted]
    if bad:
        raise TrainingError(
            f"train.transfer.relation_heads is {wanted}, but a width of {bad[0]} cannot be cut into so many parts",
            f"leave it out, or give a divisor of {math.gcd(*every)}",
        )
    return wanted


def relation(x: torch.Tensor, heads: int, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, T, width) to (B, T, heads, T) log probabilities: how each token relates to those before it and itself."""
    import torch

    rows, length, width = x.shape
    parts = x.float().view(rows, length, heads, width // heads).transpose(1, 2)
    scores = parts @ parts.transpose(-1, -2) / math.sqrt(width // heads)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    return scores.masked_fill(~mask, -1e9).log_softmax(-1).transpose(1, 2)


def imitating(teacher: Network, training: Train, heads: int, maps: Mapping[str, torch.Tensor]) -> PartLoss:
    """The loss of a part, as the module defines it."""
    transfer, text = training.transfer, cross_entropy(training)

    def loss(network: Network, weights: Weights, part: Part, dropout: float) -> torch.Tensor:
        import torch

        with torch.no_grad(), watching(teacher) as theirs:
            teacher.hidden(teacher.weights, part)
        with watching(network) as ours:
            total = part_loss(network, weights, part, text, dropout)
        if transfer.hidden_weight:
            each = distance(ours, theirs, maps, part.where)
            total = total + transfer.hidden_weight * (each * part.weights).sum()
        if transfer.attention_weight:
            each = divergence(ours, theirs, heads, part)
            total = total + transfer.attention_weight * (each * part.weights).sum()
        return total

    return loss


def distance(ours: Inside, theirs: Inside, maps: Mapping[str, torch.Tensor], where: torch.Tensor) -> torch.Tensor:
    """(P,) relative squared error of the mapped hidden states, mean over the student's layers."""
    import torch

    found = []
    for layer, state in enumerate(ours.states, 1):
        target = theirs.states[round(layer * len(theirs.states) / len(ours.states)) - 1].flatten(0, 1)[where].float()
        mapped = torch.nn.functional.linear(state.flatten(0, 1)[where].float(), maps[f"{MAP}{layer - 1}"])
        found.append((mapped - target).square().mean(-1) / target.square().mean(-1).clamp_min(1e-6))
    return torch.stack(found).mean(0)


def divergence(ours: Inside, theirs: Inside, heads: int, part: Part) -> torch.Tensor:
    """(P,) KL(teacher || student) of the relations, mean over relation heads and kinds."""
    import torch

    found = []
    for kind in KINDS:
        student, teacher = (
            relation(side.relations[kind], heads, part.mask).flatten(0, 1)[part.where] for side in (ours, theirs)
        )
        found.append((teacher.exp() * (teacher - student)).sum(-1).mean(-1))
    return torch.stack(found).mean(0)


def make_maps(student: Network, teacher: Network, seed: int) -> dict[str, torch.Tensor]:
    """By name the maps (teacher's width, student's width) of the student's layers: the identity where widths agree."""
    import torch

    wide, narrow = teacher.model.config.hidden_size, student.model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    maps: dict[str, torch.Tensor] = {}
    for layer in range(len(student.model.base_model.layers)):
        start = torch.eye(wide) if wide == narrow else torch.randn(wide, narrow, generator=generator) * narrow**-0.5
        maps[f"{MAP}{layer}"] = torch.nn.Parameter(start.to(student.device))
    return maps


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Train; write a Hugging Face model folder with its tokenizer and training.json.

    Raises:
        TrainingError: the teacher has another tokenizer, or relation heads do not fit.
    """

    def objective(ready: Prepared, net: Network) -> Objective:
        from slmops.train.teachers import scoring

        teacher, mark = scoring(inputs["teacher"], ready, net, "bf16" if net.bf16 else "fp32")
        for network, who in ((net, "student"), (teacher, "teacher")):
            if network.path == "whole" or not hasattr(network.model.base_model, "layers"):
                raise TrainingError(
                    f"the {who}'s architecture ({network.model.config.model_type}) does not show its hidden states",
                    "use train.method: logits",
                )
        transfer = params.training.transfer
        heads = relation_heads(net.model.config, teacher.model.config, transfer.relation_heads)
        maps = make_maps(net, teacher, ctx.seed) if transfer.hidden_weight else {}
        net.trained.update(maps)
        loss = imitating(teacher, params.training, heads, maps)
        return Supervised(ready.data, ready.validation, params.training, loss, [mark, heads])

    return sft.learn(params, inputs, out, ctx, DECLARATION.name, objective)
