"""A causal language model as a function of its weights: built, loaded, run and saved.

It promises the logits of the Hugging Face model (checked once on random tokens when a `Network` is made), only faster:
for Llama and Qwen3 the forward pass is written out here, so that nothing is computed that the loss does not need. The
output matrix, and in the last layer everything after the attention, run only at the positions that carry loss.
Any other architecture goes through its own code, with the output matrix at those positions alone where that is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core.spec import Architecture
from slmops.engines.tokenizer import TOKENIZER_FILES
from slmops.errors import ModelError
from slmops.train.batches import Part
from slmops.train.dropout import Dropout
from slmops.train.shape import config_of, ffn_width, written_out
from slmops.train.written import ROWS, LowRank, Written

if TYPE_CHECKING:
    import torch

    Weights = Mapping[str, torch.Tensor]

TOLERANCE = 2e-4


def build(architecture: Architecture, tokenizer: Any, seed: int) -> Any:
    """A float32 Hugging Face model with random weights that depend on `seed` alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": architecture.hidden,
        "intermediate_size": ffn_width(architecture),
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.kv_heads or architecture.heads,
        "head_dim": architecture.hidden // architecture.heads,
        "max_position_embeddings": architecture.context,
        "tie_word_embeddings": architecture.tie_embeddings,
        # Unit-variance logits at the start. The usual 0.02 suits widths of thousands: at 128 it learns several times slower.
        "initializer_range": architecture.hidden**-0.5,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "attn_implementation": "sdpa",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any
        if architecture.type == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**common))
        else:
            model = LlamaForCausalLM(LlamaConfig(**common))
    return model.float()


def load(folder: Path) -> Any:
    """A Hugging Face model from a folder, float32.

    Raises:
        ModelError: it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"{folder}: the model cannot be loaded: {str(error).splitlines()[0]}",
            "the folder needs config.json and model.safetensors of a causal language model",
        ) from error


def context_of(model: Any) -> int:
    """Tokens that the model can see."""
    return int(getattr(model.config, "max_position_embeddings", 0) or 2048)


def context_in(folder: Path) -> int:
    """The same of a model folder, which is not loaded.

    Raises:
        ModelError: it has no configuration.
    """
    try:
        config = config_of(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: there is no config.json to read", "give the folder of a model") from error
    inner = config.get("text_config") or config
    return int(inner.get("max_position_embeddings") or 2048)


def save(model: Any, tokenizer_folder: Path, out: Path) -> None:
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's files, unchanged."""
    import shutil

    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(out)
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).exists():
            shutil.copyfile(tokenizer_folder / name, out / name)


def precision_for(wanted: str, parameters: int, device: str) -> str:
    """`bf16` or `fp32`. `auto` takes bf16 above 8 M parameters where the machine multiplies it in hardware."""
    import torch

    if wanted != "auto":
        return wanted
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if parameters <= 8_000_000:
        return "fp32"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def device_here() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    import os

    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first product on a GPU
    return "cuda" if torch.cuda.is_available() else "cpu"


def frozen(folder: Path, precision: str) -> Network:
    """A model that only answers, on the GPU where there is one; `precision` as in `precision_for`."""
    model = load(folder)
    for weight in model.parameters():
        weight.requires_grad_(False)
    device = device_here()
    count = sum(weight.numel() for weight in model.parameters())
    return Network(model, device, precision_for(precision, count, device) == "bf16")


def masks(config: Any, mask: torch.Tensor) -> Any:
    """A mask as the model's own code takes it, with the windows of layers that look back only so far.

    Args:
        mask: (B, 1, T, T) bool: what each token may look at; transformers takes it as it is and adds no window.

    Returns:
        It, or a narrower one, or one per type of layer.
    """
    import torch

    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not window or (kinds and "sliding_attention" not in kinds):
        return mask
    near = mask & torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1 - window)
    return {"full_attention": mask, "sliding_attention": near} if kinds else near


class Network:
    """A model with its weights by name (tied ones once).

    Attributes:
        model: the Hugging Face model; its parameters are the values of `weights`.
        weights: parameter name to tensor.
        trained: those of them that have gradients: all, or a tuning's new ones.
        matrices: names of the weights that 4-bit conversion rounds: all Linear layers and the token embedding.
        inner: those of them that are neither embedding nor output matrix.
        path: `fast`, `head` or `whole`: how logits are computed.
        dropout: where the model's own code drops, once `may_drop` was called.
        kept: by the name of a trained weight, bool of its shape: which of its values may move. All do that are not named here.
        learning: whether dropout inside a tuning's layers, and recomputing of activations, are on.
    """

    def __init__(self, model: Any, device: str = "cpu", bf16: bool = False, checkpointing: bool = False) -> None:
        import torch

        self.model = model if getattr(model, "is_loaded_in_4bit", False) else model.to(device)
        self.device = device
        self.bf16 = bf16
        self.checkpointing = checkpointing
        self.dropout: Dropout | None = None
        self.kept: dict[str, torch.Tensor] = {}
        self.learning = True  # as long as it was not switched
        self.layers = LowRank.of(self.model)
        self.modules = dict(self.model.named_modules())
        self.weights: dict[str, torch.Tensor] = dict(model.named_parameters())
        self.trained = {name: weight for name, weight in self.weights.items() if weight.requires_grad}
        self.prefix = model.base_model_prefix + "."
        embedding = model.get_input_embeddings()
        self.matrices = tuple(
            f"{name}.weight"
            for name, module in model.named_modules()
            if (isinstance(module, torch.nn.Linear) or module is embedding) and f"{name}.weight" in self.weights
        )
        self.learn(False)
        names = {id(p): n for n, p in self.weights.items()}
        self.embedding = names[id(embedding.weight)]
        head = model.get_output_embeddings()
        self.head = names[id(head.weight)]
        self.inner = tuple(name for name in self.matrices if name not in (self.embedding, self.head))
        self.head_bias = names.get(id(head.bias)) if getattr(head, "bias", None) is not None else None
        self.vocabulary = int(head.weight.shape[0])
        self.parameters = sum(p.numel() for p in self.weights.values())
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None
        self.path = self._choose()

    def _choose(self) -> str:
        """The quickest way to the logits that agrees with the model itself."""
        import torch

        bf16, plain = self.bf16, written_out(self.model.config.to_dict())
        ids = torch.arange(14, device=self.device).reshape(2, 7) * 37 % self.vocabulary
        part = Part(ids, None, None, torch.arange(14, device=self.device), ids[0], ids[0], ids[0], ids[0], 14)
        self.bf16 = False
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # additions that start at zero are looked at with other values
            probe = self.weights | {
                n: w + 0.02 * torch.randn_like(w)
                for n, w in self.trained.items()
                if len(self.trained) < len(self.weights)
            }
            options: dict[str, Any] = {"input_ids": ids, "use_cache": False}
            wanted = torch.func.functional_call(self.model, probe, (), options).logits.flatten(0, 1)
            for path in ("fast", "head") if plain else ("head",):
                self.path = path
                got = self.logits(probe, part)
                if torch.allclose(got, wanted, atol=TOLERANCE * max(1.0, float(wanted.abs().max())), rtol=1e-3):
                    break
            else:
                self.path = "whole"
        self.bf16 = bf16
        return self.path

    def learn(self, on: bool) -> None:
        """Switch between a training step and a plain forward pass; nothing to do where it is so already."""
        import torch

        if on == self.learning:
            return
        self.learning = on
        self.model.eval()
        if self.dropout is not None:
            self.dropout.share = 0.0  # until a step asks for more; what it drops is computed again in its backward pass
        for name, module in self.modules.items():
            if isinstance(module, torch.nn.Dropout) and ".lora_dropout." in name:
                module.train(on)
            if type(module).__name__ == "Linear4bit":
                module.training = (
                    True  # else bitsandbytes packs it for inference on CPUs, through which no gradient flows
                )
            if self.checkpointing and hasattr(module, "gradient_checkpointing"):
                module.training = on

    def keep_zeros(self) -> None:
        """From now on, weights of the blocks' linear layers that are zero stay zero (see `kept`)."""
        import torch

        linear = {f"{name}.weight" for name, module in self.modules.items() if isinstance(module, torch.nn.Linear)}
        self.kept = {name: w.detach() != 0 for name, w in self.trained.items() if name in linear and name != self.head}

    def may_drop(self) -> None:
        """Get ready for dropout above 0.

        Raises:
            TrainingError: the model has no place for it.
        """
        if self.path != "fast" and self.dropout is None:
            self.dropout = Dropout(self.model)

    def logits(self, weights: Weights, part: Part, dropout: float = 0.0) -> torch.Tensor:
        """(P, vocabulary) float32 logits at `part.where`. `weights` stand in for the model's own."""
        hidden = self.hidden(weights, part, dropout)
        return hidden.float() if self.path == "whole" else self.project(weights, hidden)

    def project(self, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
        """(P, hidden) to (P, vocabulary) float32. In path `whole` the hidden states are logits already."""
        import torch

        if self.path == "whole":
            return hidden.float()
        head, bias = weights[self.head], weights[self.head_bias] if self.head_bias else None
        if self.bf16:
            hidden, head = hidden.to(torch.bfloat16), head.to(torch.bfloat16)
            bias = bias.to(torch.bfloat16) if bias is not None else None
        count = hidden.shape[0]
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, -count % ROWS))
        return torch.nn.functional.linear(hidden, head, bias)[:count].float()

    def hidden(self, weights: Weights, part: Part, dropout: float = 0.0) -> torch.Tensor:
        """(P, hidden) final hidden states at `part.where`, after the last norm."""
        import torch

        if self.path == "fast":
            return Written(self, weights, dropout).hidden(part)
        if dropout:
            self.may_drop()
        if self.dropout is not None:
            self.dropout.share = dropout
        options: dict[str, Any] = {"input_ids": part.ids, "use_cache": False}
        if part.mask is not None:
            options |= {"attention_mask": masks(self.model.config, part.mask), "position_ids": part.positions}
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            if self.path == "whole":
                out = torch.func.functional_call(self.model, dict(weights), (), options).logits
            else:
                cut = len(self.prefix)
                own = {n[cut:]: w for n, w in weights.items() if n.startswith(self.prefix)}
                out = torch.func.functional_call(self.model.base_model, own, (), options).last_hidden_state
        chosen: torch.Tensor = out.flatten(0, 1)[part.where]
        return chosen

    def angles(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the half angles of positions 0, 1, …: (at least `width`, d/2) each."""
        import torch

        if self._angles is None or self._angles[0].shape[0] < width:
            size = max(64, 1 << (width - 1).bit_length())
            probe = torch.zeros(1, device=self.device)
            with torch.no_grad():
                cos, sin = self.model.base_model.rotary_emb(probe, torch.arange(size, device=self.device)[None])
            half = cos.shape[-1] // 2
            self._angles = (cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
        return self._angles
