"""Writes `model.tflite`; runs as a script in the environment of litert-torch, where nothing of slmops is installed.

`python litert_tool.py JOB.json`: the job holds what `slmops.convert.litert` made of config.json (`plan`), the safetensors files
(`weights`) and the names of their `tensors`, a file with codes and scales of those that are rounded (`rounded`) to so many `bits`, the
tokens that end an answer (`stop`), the chat `template` for LiteRT-LM, and the folder to write into, where the tokenizer lies (`out`).

The decoder is written here in plain operations of torch and traced once for each signature, all with the same weights:

    decode           tokens (1, 1)   one token, and the logits after it (1, 1, vocabulary)
    prefill_LENGTH   tokens (1, LENGTH)   puts that many tokens into keys and values, no logits

Each takes `input_pos` int32 (LENGTH,), `mask` float32 (1, 1, LENGTH, context), which is added to scores, and of each layer
`kv_cache_k_N` (1, groups, context, size) and `kv_cache_v_N` (1, groups, size, context), which it gives back with the new tokens
in: the names and shapes that LiteRT-LM feeds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy
import torch
from ai_edge_quantizer import algorithm_manager, qtyping
from ai_edge_quantizer.algorithms.uniform_quantize import common_quantize, dequantized_weight_recovery
from ai_edge_quantizer.quantizer import Quantizer
from litert_lm_builder import litertlm_builder
from litert_lm_builder.litertlm_builder import DType, LitertLmFileBuilder, Metadata, TfLiteModelType
from litert_lm_builder.runtime.proto import llm_metadata_pb2
from litert_torch import Converter
from litert_torch.generative.custom_ops.bmm_4d import bmm_4d
from litert_torch.generative.custom_ops.dynamic_update_slice import dynamic_update_slice
from safetensors.torch import load_file
from torch.nn import functional

LOWEST = -1e4
"""Added to scores of keys outside of a layer's window."""


class Decoder(torch.nn.Module):
    """All signatures of a model; `last` adds the output matrix."""

    def __init__(self, plan: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.plan = plan
        self.names = {name: name.replace(".", "_") for name in weights}
        for name, place in self.names.items():
            values = weights[name] + 1.0 if plan["gemma"] and name.endswith("norm.weight") else weights[name]
            self.register_parameter(place, torch.nn.Parameter(values, requires_grad=False))
        for name, turning in plan["rotary"].items():
            self.register_buffer(f"speeds_{name}", torch.tensor(turning["speeds"], dtype=torch.float32))

    def weight(self, name: str) -> torch.Tensor:
        found: torch.Tensor = getattr(self, self.names[name])
        return found

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        bias = self.weight(f"{name}.bias") if f"{name}.bias" in self.names else None
        return functional.linear(x, self.weight(f"{name}.weight"), bias)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.plan["eps"])
        return x * root * self.weight(f"{name}.weight")

    def turns(self, positions: torch.Tensor, layers: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (1, 1, tokens, rotated)."""
        speeds = getattr(self, f"speeds_{layers}")
        angles = positions.to(torch.float32)[:, None] * speeds[None]
        angles = torch.cat([angles, angles], -1)[None, None]
        stretch = self.plan["rotary"][layers]["stretch"]
        return angles.cos() * stretch, angles.sin() * stretch

    def turn(self, x: torch.Tensor, how: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        cos, sin = how
        rotated, size = cos.shape[-1], x.shape[-1]
        part = x[..., :rotated]
        half = rotated // 2
        turned = part * cos + torch.cat([-part[..., half:], part[..., :half]], -1) * sin
        return turned if rotated == size else torch.cat([turned, x[..., rotated:]], -1)

    def attention(
        self,
        x: torch.Tensor,
        layer: int,
        how: Any,
        mask: torch.Tensor,
        at: torch.Tensor,
        cache: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        plan, name = self.plan, f"model.layers.{layer}.self_attn"
        heads, groups, size, tokens = plan["heads"], plan["groups"], plan["size"], x.shape[1]
        if plan["packed"]:
            q, k, v = torch.split(self.linear(x, f"{name}.qkv_proj"), [heads * size, groups * size, groups * size], -1)
        else:
            q, k, v = (self.linear(x, f"{name}.{part}_proj") for part in "qkv")
        q, k, v = (part.reshape(1, tokens, -1, size) for part in (q, k, v))
        if plan["norms"]:
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        q, k = self.turn(q.transpose(1, 2), how), self.turn(k.transpose(1, 2), how)
        zero = torch.zeros_like(at)
        keys = dynamic_update_slice(cache[f"kv_cache_k_{layer}"], k, [zero, zero, at, zero])
        values = dynamic_update_slice(cache[f"kv_cache_v_{layer}"], v.permute(0, 2, 3, 1), [zero, zero, zero, at])
        share = heads // groups
        q = (q * plan["scale"]).reshape(1, groups, share * tokens, size)
        scores = bmm_4d(q, keys) + (mask if share == 1 else torch.cat([mask] * share, 2))
        mixed = bmm_4d(torch.softmax(scores, -1), values)
        mixed = mixed.reshape(1, heads, tokens, size).transpose(1, 2).reshape(1, tokens, heads * size)
        return self.linear(mixed, f"{name}.o_proj"), keys, values

    def feed_forward(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        name = f"model.layers.{layer}.mlp"
        if self.plan["packed"]:
            gate, up = self.linear(x, f"{name}.gate_up_proj").chunk(2, -1)
        else:
            gate, up = self.linear(x, f"{name}.gate_proj"), self.linear(x, f"{name}.up_proj")
        acted = functional.gelu(gate, approximate="tanh") if self.plan["gemma"] else functional.silu(gate)
        return self.linear(acted * up, f"{name}.down_proj")

    def forward(
        self,
        tokens: torch.Tensor,
        input_pos: torch.Tensor,
        mask: torch.Tensor,
        last: bool,
        cache: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        plan, gemma = self.plan, self.plan["gemma"]
        x = functional.embedding(tokens, self.weight("model.embed_tokens.weight"))
        if gemma:
            x = x * plan["hidden"] ** 0.5
        at = input_pos[0].clone()
        full = (self.turns(input_pos, "full_attention"), mask)
        local = full
        if any(plan["windows"]):
            keys = torch.arange(plan["context"], dtype=torch.int32)[None]
            outside = (keys <= input_pos[:, None] - plan["window"]).to(torch.float32)
            local = (self.turns(input_pos, "sliding_attention"), mask + (outside * LOWEST)[None, None])
        result: dict[str, torch.Tensor] = {}
        for layer, slides in enumerate(plan["windows"]):
            name = f"model.layers.{layer}"
            how, seen = local if slides else full
            made, keys, values = self.attention(self.norm(x, f"{name}.input_layernorm"), layer, how, seen, at, cache)
            result |= {f"kv_cache_k_{layer}": keys, f"kv_cache_v_{layer}": values}
            if gemma:
                x = x + self.norm(made, f"{name}.post_attention_layernorm")
                made = self.feed_forward(self.norm(x, f"{name}.pre_feedforward_layernorm"), layer)
                x = x + self.norm(made, f"{name}.post_feedforward_layernorm")
            else:
                x = x + made
                x = x + self.feed_forward(self.norm(x, f"{name}.post_attention_layernorm"), layer)
        if last:
            head = "model.embed_tokens" if plan["tied"] else "lm_head"
            logits = self.linear(self.norm(x, "model.norm"), head)
            cap = plan["cap"]
            result["logits"] = torch.tanh(logits / cap) * cap if cap else logits
        return result


class Signature(torch.nn.Module):
    """A signature's view of the decoder: keys and values by name."""

    def __init__(self, decoder: Decoder, last: bool) -> None:
        super().__init__()
        self.decoder, self.last = decoder, last

    def forward(
        self, tokens: torch.Tensor, input_pos: torch.Tensor, mask: torch.Tensor, **cache: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = self.decoder(tokens, input_pos, mask, self.last, cache)
        return found


def write(plan: dict[str, Any], weights: dict[str, torch.Tensor], out: Path) -> None:
    """Trace all signatures and write one file."""
    decoder = Decoder(plan, weights).eval()
    converter = Converter()
    shape = (1, plan["groups"], plan["context"], plan["size"])
    for length in [*plan["prefill"], 1]:
        sample = {
            "tokens": torch.ones((1, length), dtype=torch.int32),
            "input_pos": torch.arange(length, dtype=torch.int32),
            "mask": torch.zeros((1, 1, length, plan["context"])),
        }
        for layer in range(len(plan["windows"])):
            sample[f"kv_cache_k_{layer}"] = torch.zeros(shape)
            sample[f"kv_cache_v_{layer}"] = torch.zeros(shape).transpose(2, 3).contiguous()
        last = length == 1
        name = "decode" if last else f"prefill_{length}"
        converter.add_signature(name, Signature(decoder, last).eval(), sample_kwargs=sample)
    with torch.no_grad():
        converter.convert(strict_export=False).export(str(out))


def quantise(whole: Path, rounded: dict[bytes, tuple[int, Any, Any]], out: Path) -> None:
    """Write the file again with matrices as codes and scales that the job gives.

    ai-edge-quantizer finds the operations of each matrix and writes its tensor anew; what stands here in the place of its algorithm
    for weights that were rounded before looks codes and scales up by what the matrix holds.

    Args:
        rounded: by the digest of a matrix's values, bits, signed codes int8 (rows, columns), and scales float32 (rows, groups).
    """
    found = set()

    def given(_op: Any, _config: Any, content: Any = None, _range: Any = None) -> Any:
        key = digest(content)
        bits, codes, scales = rounded[key]
        found.add(key)
        return qtyping.UniformQuantParams(
            num_bits=bits, quantized_dimension=0, scale=scales, zero_point=numpy.zeros(scales.shape, numpy.int32),
            quantized_data=codes, block_size=codes.shape[1] // scales.shape[1] if bits == 4 else 0,
        )  # fmt: skip

    ours, ops = algorithm_manager.AlgorithmName.DEQUANTIZED_WEIGHT_RECOVERY, qtyping.TFLOperationName
    quantizer = Quantizer(str(whole))
    for op, materialize in (
        (ops.FULLY_CONNECTED, common_quantize.materialize_fc_conv),
        (ops.EMBEDDING_LOOKUP, common_quantize.materialize_embedding_lookup),
    ):
        algorithm_manager.register_quantized_op(
            ours, op, dequantized_weight_recovery.init_qsvs, dequantized_weight_recovery.calibrate,
            functools.partial(materialize, given),
        )  # fmt: skip
        quantizer.add_dynamic_config(".*", op, 8, algorithm_key=ours)
    quantizer.quantize().export_model(str(out), overwrite=True)
    if len(found) != len(rounded):
        raise SystemExit(f"{len(rounded) - len(found)} of {len(rounded)} matrices are not in the graph")


def digest(values: Any) -> bytes:
    """What a matrix is known by: its values in float32, row by row."""
    return hashlib.sha256(numpy.ascontiguousarray(values, numpy.float32).tobytes()).digest()


def bundle(out: Path, context: int, stop: list[int], template: str) -> None:
    """`model.litertlm` beside `model.tflite`: that, the tokenizer, the chat template and the tokens that end an answer."""
    told = llm_metadata_pb2.LlmMetadata(max_num_tokens=context)
    told.llm_model_type.generic_model.SetInParent()
    for token in stop:
        told.stop_tokens.add().token_ids.ids.append(token)
    told.jinja_prompt_template = template
    place = Path("llm_metadata.pb")
    place.write_bytes(told.SerializeToString())
    made = hashlib.sha256((out / "model.tflite").read_bytes() + place.read_bytes()).digest()
    named = Metadata(key="uuid", value=str(uuid.UUID(bytes=made[:16])), dtype=DType.STRING)
    litertlm_builder.populate_system_metadata = lambda given: [*given, named]  # by itself: by chance, and with the time
    builder = LitertLmFileBuilder()
    builder.add_system_metadata(Metadata(key="Authors", value="slmops", dtype=DType.STRING))
    builder.add_llm_metadata(str(place))
    builder.add_hf_tokenizer(str(out / "tokenizer.json"))
    builder.add_tflite_model(str(out / "model.tflite"), TfLiteModelType.PREFILL_DECODE)
    with (out / "model.litertlm").open("wb") as file:
        builder.build(file)


def main(job: str) -> None:
    """Do a job; the folder in which it runs takes files in between."""
    given = json.loads(Path(job).read_text(encoding="utf-8"))
    plan, out = given["plan"], Path(given["out"])
    stored = {name: values for file in given["weights"] for name, values in load_file(file).items()}
    weights = {name: stored[name].to(torch.float32) for name in given["tensors"]}
    whole = Path("whole.tflite")
    write(plan, weights, whole)
    if given["bits"]:
        found = load_file(given["rounded"])
        rounded = {
            digest(weights[name].numpy()): (
                bits, found[f"{name}.codes"].numpy(), found[f"{name}.scales"].to(torch.float32).numpy(),
            )
            for name, bits in given["bits"].items()
        }  # fmt: skip
        quantise(whole, rounded, out / "model.tflite")
        whole.unlink()
    else:
        shutil.move(whole, out / "model.tflite")
    (out / "model.tflite").chmod(0o644)
    bundle(out, plan["context"], given["stop"], given["template"])


if __name__ == "__main__":
    main(sys.argv[1])
