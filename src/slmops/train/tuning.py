"""Which weights of a model move: all of them, or few new ones beside a frozen base (`train.tuning`).

lora, rslora, dora and qlora are PEFT's own layers, injected into the model, so that what is saved is what PEFT loads. With
`lora.embeddings` the token embedding and the output matrix are trained whole, and lie in the same file.
qlora holds the base in 4 bits by bitsandbytes (NF4, double quantisation), on the CPU as on a GPU: its kernels run on both, so
that a model tuned on one goes on on the other.

adapter is a bottleneck beside each feed-forward block (parallel adapter, arXiv 2110.04366), with the block's own gated form
and activation: h + W_down(act(W_gate x) * W_up x). So it is the same function as a feed-forward block that is wider by the
bottleneck, and that is how it is saved: a plain model of the same architecture that every runtime takes.

Laws: a tuning changes nothing before the first step (the additions start at zero); `merged` gives a plain model with the
logits of the tuned one (qlora: of the tuned one over the unrounded base).
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core.spec import Training
from slmops.errors import MissingExtraError, ModelError, TrainingError
from slmops.store.lora import ADAPTER as ADAPTER
from slmops.store.lora import BASE, base_digest, require_base

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep from users that bitsandbytes found no optional kernels, and that peft reads what transformers has renamed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def load_4bit(folder: Path, precision: str = "fp32") -> Any:
    """A model whose linear layers are held in 4 bits (NF4), quantised layer by layer while it is read.

    Args:
        precision: of the products on a GPU, as in `precision_for`; on a CPU they are float32.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        ModelError: the model cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from slmops.train import heap
    from slmops.train.network import device_here, precision_for

    try:
        with _quiet():
            import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "qlora") from error
    device = device_here()
    low = device == "cuda" and precision_for(precision, 0, device) == "bf16"
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if low else torch.float32,
    )  # fmt: skip
    with heap.given_back():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=torch.float32, attn_implementation="sdpa", local_files_only=True,
                quantization_config=config, device_map={"": device},
            )  # fmt: skip
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"{folder}: cannot be loaded in 4 bits: {str(error).splitlines()[0]}") from error
        for weight in model.parameters():
            if weight.is_floating_point():  # it lies in the file's pages, and would hold all of them in memory
                weight.data = weight.data.clone()
    return model


def block_linears(model: Any) -> dict[str, torch.nn.Linear]:
    """Linear layers of the decoder's blocks by name; the output matrix is none of them."""
    import torch

    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}


def unread(training: Training) -> list[str]:
    """Settings of `train` that differ from their defaults and that its tuning does not use."""
    used = {"adapter": {"adapter_width"}, "full": set[str]()}.get(training.tuning, {"lora"})
    return [n for n in ("lora", "adapter_width") if n not in used and getattr(training, n) != getattr(Training(), n)]


def check(model: Any, training: Training) -> None:
    """Refuse settings that fit no layer of the model.

    Raises:
        TrainingError: names that match nothing, a rank above a layer's width.
    """
    if training.tuning in ("full", "adapter"):
        return
    layers = block_linears(model)
    known = sorted({name.rpartition(".")[2] for name in layers})
    for target in training.lora.targets or ():
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise TrainingError(
                f"train.lora.targets: {target} matches no linear layer", f"there are: {', '.join(known)}"
            )
    for name, layer in layers.items():
        if training.lora.targets and name.rpartition(".")[2] not in {
            t.rpartition(".")[2] for t in training.lora.targets
        }:
            continue
        least = min(layer.in_features, layer.out_features)
        if training.lora.rank > least:
            raise TrainingError(
                f"train.lora.rank is {training.lora.rank}, but {name} has only {least} dimensions on one side",
                f"give a rank of at most {least}, or name other layers in train.lora.targets",
            )


def apply(model: Any, training: Training, seed: int) -> Any:
    """Freeze the model and put the tuning's new weights into it, in place.

    Returns:
        What `save` needs: a PeftModel, or the model itself for a bottleneck. None for full.

    Raises:
        TrainingError: see `check`.
        MissingExtraError: peft is not installed.
    """
    import torch

    if training.tuning == "full":
        return None
    check(model, training)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if training.tuning == "adapter":
            _widen(model, training.adapter_width)
            return model
        try:
            with _quiet():
                from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise MissingExtraError("peft", "train") from error
        lora = training.lora
        targets = lora.targets or sorted({name.rpartition(".")[2] for name in block_linears(model)})
        config = LoraConfig(
            r=lora.rank, lora_alpha=lora.strength, lora_dropout=lora.dropout, target_modules=list(targets),
            use_rslora=training.tuning == "rslora", use_dora=training.tuning == "dora", bias="none", task_type="CAUSAL_LM",
        )  # fmt: skip
        with _quiet():
            handle = get_peft_model(model, config)
        if lora.embeddings:
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                table.weight.requires_grad_(True)
        return handle


def _beside(hidden: int, width: int, activation: Any) -> Any:
    """A bottleneck that starts with the output 0."""
    import torch

    module = torch.nn.Module()
    module.gate_proj = torch.nn.Linear(hidden, width, bias=False)
    module.up_proj = torch.nn.Linear(hidden, width, bias=False)
    module.down_proj = torch.nn.Linear(width, hidden, bias=False)
    module.act = activation
    torch.nn.init.zeros_(module.down_proj.weight)
    return module


def mlps(model: Any) -> Iterator[tuple[str, Any]]:
    """The feed-forward blocks of a decoder by name.

    Raises:
        TrainingError: the model has none of the gated kind.
    """
    found = [(n, m) for n, m in model.named_modules() if n.endswith(".mlp") and hasattr(m, "down_proj")]
    gated = [(n, m) for n, m in found if hasattr(m, "gate_proj") or hasattr(m, "gate_up_proj")]
    if not gated or len(gated) != len(found):
        raise TrainingError(
            f"tuning adapter needs gated feed-forward blocks, which {model.config.model_type} has not",
            "use tuning: lora",
        )
    yield from gated


def _widen(model: Any, width: int) -> None:
    """Freeze the model and put a bottleneck beside each feed-forward block; it starts with the output 0."""
    import torch

    for weight in model.parameters():
        weight.requires_grad_(False)
    spread = float(getattr(model.config, "initializer_range", 0.02))
    for _name, mlp in mlps(model):
        activation = getattr(mlp, "act_fn", None) or mlp.activation_fn
        beside = _beside(mlp.down_proj.out_features, width, activation)
        for matrix in (beside.gate_proj, beside.up_proj):
            torch.nn.init.normal_(matrix.weight, std=spread)
        mlp.beside = beside.to(mlp.down_proj.weight.device)
        mlp.register_forward_hook(_add_beside)


def _add_beside(mlp: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    b, x = mlp.beside, inputs[0]
    return output + b.down_proj(b.act(b.gate_proj(x)) * b.up_proj(x))


def save_adapter(handle: Any, training: Training, base: Path, out: Path) -> None:
    """Write the new weights alone into out/adapter: PEFT's files, or adapter.safetensors; and base.json."""
    from safetensors.torch import save_file

    folder = out / ADAPTER
    folder.mkdir(parents=True)
    if training.tuning == "adapter":
        weights = {n: w.detach().cpu().contiguous() for n, w in handle.named_parameters() if ".beside." in n}
        save_file(weights, folder / "adapter.safetensors", metadata={"format": "pt"})
    else:
        config = next(iter(handle.peft_config.values()))
        config.base_model_name_or_path = None  # a path of this machine would make the bytes depend on it
        handle.save_pretrained(folder, save_embedding_layers=training.lora.embeddings)
        (folder / "README.md").unlink(missing_ok=True)
        _sort(folder / "adapter_config.json")
    about = {"digest": base_digest(base), "tuning": training.tuning}
    (folder / BASE).write_text(json.dumps(about, sort_keys=True) + "\n", "utf-8")


def _sort(file: Path) -> None:
    """PEFT writes sets in any order; the same adapter has the same bytes here."""
    value = json.loads(file.read_text("utf-8"))
    for name in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(value.get(name), list):
            value[name] = sorted(value[name])
    file.write_text(json.dumps(value, sort_keys=True, indent=1) + "\n", "utf-8")


def merged(folder: Path, base: Path) -> Any:
    """The plain model that a base and the adapter in `folder` make.

    Raises:
        ModelError: the adapter belongs to another base, or is none.
    """
    from slmops.train.network import load

    require_base(folder, base)
    model = load(base)
    if (folder / "adapter.safetensors").exists():
        return _wider(model, folder / "adapter.safetensors")
    with _quiet():
        from peft import PeftModel

    try:
        with _quiet():
            return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder}: not an adapter of this base: {str(error).splitlines()[0]}") from error


def _wider(model: Any, file: Path) -> Any:
    """The model with feed-forward blocks that hold the bottlenecks of a file as further units."""
    import torch
    from safetensors.torch import load_file

    added = load_file(file)
    width = 0
    for name, mlp in mlps(model):
        gate, up, down = (added[f"{name}.beside.{part}.weight"] for part in ("gate_proj", "up_proj", "down_proj"))
        width = gate.shape[0]
        with torch.no_grad():
            if hasattr(mlp, "gate_up_proj"):
                old_gate, old_up = mlp.gate_up_proj.weight.chunk(2)
                joined = torch.cat([old_gate, gate, old_up, up])
                mlp.gate_up_proj = _linear(joined)
            else:
                mlp.gate_proj = _linear(torch.cat([mlp.gate_proj.weight, gate]))
                mlp.up_proj = _linear(torch.cat([mlp.up_proj.weight, up]))
            mlp.down_proj = _linear(torch.cat([mlp.down_proj.weight, down], 1))
    model.config.intermediate_size += width
    return model


def _linear(weight: torch.Tensor) -> Any:
    import torch

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(weight.clone())
    return layer
