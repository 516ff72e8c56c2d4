"""The smallest model that each runtime can run: what an idle runtime is measured with, and what tests start from.

`write_minimal` makes a folder with one decoder layer, 32 wide, and a tokenizer of single bytes. Its weights are fixed
numbers; its answers mean nothing. The ONNX form holds float32 products and 4-bit ones, so that an idle runtime has
mapped the code of both.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slmops.core.runtimes import Named

HIDDEN, HEADS, FFN, CONTEXT = 32, 2, 32, 64
SPECIAL = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
VOCABULARY = len(SPECIAL) + 256
END = SPECIAL.index("<|end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PROMPT = [{"role": "user", "content": "hello"}]


def write_minimal(folder: Path, runtime: Named) -> None:
    """Write a minimal model for a runtime into an empty folder. Needs torch and transformers, or the runtime's own."""
    if runtime != "llama_cpp":  # whose file holds the tokenizer
        _write_tokenizer(folder)
    WRITERS[runtime](folder)


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")


def byte_alphabet() -> list[str]:
    """The printable stand-in of each byte in byte-level tokenizers, by byte value."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def _write_tokenizer(folder: Path) -> None:
    words = {token: i for i, token in enumerate([*SPECIAL, *byte_alphabet()])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": step,
        "post_processor": None,
        "decoder": step,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": words, "merges": []},
    }  # fmt: skip
    _dump(folder / "tokenizer.json", tokenizer)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|pad|>", "eos_token": "<|end|>"}
    _dump(folder / "tokenizer_config.json", {**settings, "model_max_length": CONTEXT})
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def _write_torch(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=1, intermediate_size=FFN,
        num_attention_heads=HEADS, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)


def _write_onnx(folder: Path) -> None:
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    head, half = HIDDEN // HEADS, HIDDEN // HEADS // 2
    angles = np.outer(np.arange(CONTEXT), 10000.0 ** (-np.arange(half) / half))
    weights = {
        "scales": np.full((VOCABULARY, 1), 0.05),
        "qkv": rng.normal(0, 0.1, (HIDDEN, 3 * HIDDEN)),
        "o": rng.normal(0, 0.1, (HIDDEN, HIDDEN)),
        "gate": rng.normal(0, 0.1, (HIDDEN, FFN)),
        "down": rng.normal(0, 0.1, (FFN, HIDDEN)),
        "norm": np.ones(HIDDEN),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
    }
    tensors = [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in weights.items()]
    codes = rng.integers(0, 256, (VOCABULARY, 1, HIDDEN // 2), np.uint8)
    tensors.append(numpy_helper.from_array(codes, "codes"))
    tensors.append(numpy_helper.from_array(codes[:, 0], "table"))
    tensors.append(numpy_helper.from_array(np.array([1], np.int64), "one"))
    tensors.append(numpy_helper.from_array(np.array(1, np.int64), "second"))
    ms = "com.microsoft"
    keep = ["", "", "skipped"]
    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["sum"], keepdims=0),
        helper.make_node("Sub", ["sum", "one"], ["last"]),
        helper.make_node("Cast", ["last"], ["lengths"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["shape"]),
        helper.make_node("Gather", ["shape", "second"], ["width"], axis=0),
        helper.make_node("Cast", ["width"], ["total"], to=TensorProto.INT32),
        helper.make_node(
            "GatherBlockQuantized", ["table", "input_ids", "scales"], ["x"],
            domain=ms, bits=4, block_size=32, gather_axis=0, quantize_axis=1,
        ),
        helper.make_node("SimplifiedLayerNormalization", ["x", "norm"], ["n"], axis=-1, epsilon=1e-6, stash_type=1),
        helper.make_node("MatMul", ["n", "qkv"], ["packed"]),
        helper.make_node(
            "GroupQueryAttention",
            ["packed", "", "", "past_key_values.0.key", "past_key_values.0.value", "lengths", "total", "cos", "sin"],
            ["mixed", "present.0.key", "present.0.value"],
            domain=ms, num_heads=HEADS, kv_num_heads=HEADS, do_rotary=1, scale=head**-0.5,
        ),
        helper.make_node("MatMul", ["mixed", "o"], ["projected"]),
        helper.make_node("SkipSimplifiedLayerNormalization", ["x", "projected", "norm"], ["m", *keep], domain=ms),
        helper.make_node("MatMul", ["m", "gate"], ["g"]),
        helper.make_node("Sigmoid", ["g"], ["s"]),
        helper.make_node("Mul", ["g", "s"], ["a"]),
        helper.make_node("MatMul", ["a", "down"], ["d"]),
        helper.make_node("SkipSimplifiedLayerNormalization", ["skipped", "d", "norm"], ["out"], domain=ms),
        helper.make_node(
            "MatMulNBits", ["out", "codes", "scales"], ["logits"],
            domain=ms, K=HIDDEN, N=VOCABULARY, bits=4, block_size=32, accuracy_level=4,
        ),
    ]  # fmt: skip

    def value(name: str, kind: int, *shape: Any) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    long, real = TensorProto.INT64, TensorProto.FLOAT
    cache = [f"{{}}.0.{part}" for part in ("key", "value")]
    inputs = [value("input_ids", long, "b", "s"), value("attention_mask", long, "b", "t")]
    inputs += [value(c.format("past_key_values"), real, "b", HEADS, "p", head) for c in cache]
    outputs = [value("logits", real, "b", "s", VOCABULARY)]
    outputs += [value(c.format("present"), real, "b", HEADS, "t", head) for c in cache]
    graph = helper.make_graph(nodes, "minimal", inputs, outputs, tensors)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(ms, 1)]
    model = helper.make_model(graph, producer_name="slmops", opset_imports=imports, ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    names = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    present = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    decoder = {
        "filename": "model.onnx", "head_size": head, "hidden_size": HIDDEN, "num_attention_heads": HEADS,
        "num_hidden_layers": 1, "num_key_value_heads": HEADS, "session_options": {"provider_options": [], "enable_mem_pattern": False},
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **names},
        "outputs": {"logits": "logits", **present},
    }  # fmt: skip
    head_of = {"context_length": CONTEXT, "eos_token_id": END, "pad_token_id": 0, "vocab_size": VOCABULARY}
    search = {"max_length": CONTEXT, "do_sample": False, "past_present_share_buffer": True}
    _dump(folder / "genai_config.json", {"model": {"type": "llama", "decoder": decoder, **head_of}, "search": search})


def _write_gguf(folder: Path) -> None:
    import gguf
    import numpy as np

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(CONTEXT)
    writer.add_vocab_size(VOCABULARY)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*SPECIAL, *byte_alphabet()])
    writer.add_token_types([int(gguf.TokenType.CONTROL)] * len(SPECIAL) + [int(gguf.TokenType.NORMAL)] * 256)
    writer.add_token_merges(["▁ ▁"])  # none: a list is never empty there
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(HIDDEN, np.float32))
    kind = gguf.GGMLQuantizationType.Q4_0
    shapes = {f"blk.0.{name}": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{name}": (FFN, HIDDEN) for name in ("ffn_gate", "ffn_up")}
    shapes |= {"blk.0.ffn_down": (HIDDEN, FFN), "token_embd": (VOCABULARY, HIDDEN)}
    for name, shape in shapes.items():
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_mlx(folder: Path) -> None:
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.utils import quantize_model, save_config, save_model

    config: dict[str, Any] = {
        "model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": 1, "intermediate_size": FFN, "num_attention_heads": HEADS,
        "rms_norm_eps": 1e-6, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "tie_word_embeddings": True,
        "eos_token_id": END,
    }  # fmt: skip
    model = Model(ModelArgs.from_dict(config))
    keys = iter(mx.random.split(mx.random.key(0), 64))

    def fixed(weights: Any) -> Any:
        return 0.1 * mx.random.normal(weights.shape, key=next(keys)) if weights.ndim == 2 else mx.ones(weights.shape)

    model.update(tree_map(fixed, model.parameters()))
    with contextlib.redirect_stdout(io.StringIO()):
        model, config = quantize_model(model, config, 32, 4)
    save_model(folder, model)
    save_config(config, folder / "config.json")


def _write_openvino(folder: Path) -> None:
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops

    rng = np.random.default_rng(0)
    head = HIDDEN // HEADS

    def ints(*values: int) -> Any:
        return ov.op.Constant(np.array(values, np.int64))

    zero = ov.op.Constant(np.array(0, np.int64))
    inputs = [ops.parameter([-1, -1], np.int64, name=name) for name in ("input_ids", "attention_mask", "position_ids")]
    inputs.append(ops.parameter([-1], np.int32, name="beam_idx"))
    codes = ov.op.Constant(rng.integers(-8, 8, (VOCABULARY, HIDDEN)).astype(np.int8))
    table = ops.convert(
        ops.multiply(ops.convert(codes, "f16"), ov.op.Constant(np.full((VOCABULARY, 1), 0.05, np.float16))), "f32"
    )
    x = ops.gather(table, inputs[0], zero)
    rows = ops.gather(ops.shape_of(inputs[0], "i64"), ints(0), zero)
    sinks, parts = [], []
    for name in ("query", "key", "value"):
        weight = ov.op.Constant(rng.normal(0, 0.1, (HIDDEN, HIDDEN)).astype(np.float32))
        part = ops.transpose(
            ops.reshape(ops.matmul(x, weight, False, True), ints(0, 0, HEADS, head), True), ints(0, 2, 1, 3)
        )
        if name != "query":
            empty = ops.broadcast(ov.op.Constant(np.array(0, np.float32)), ops.concat([rows, ints(HEADS, 0, head)], 0))
            past = ops.read_value(empty, name, ov.Type.f32, ov.PartialShape([-1, HEADS, -1, head]))
            part = ops.concat([ops.gather(past, inputs[3], zero), part], 2)
            sinks.append(ops.assign(part, name))
        parts.append(part)
    mask = ops.unsqueeze(ops.log(ops.convert(inputs[1], "f32")), ints(1, 2))
    mixed = ops.scaled_dot_product_attention(*parts, mask, causal=False)
    mixed = ops.reshape(ops.transpose(mixed, ints(0, 2, 1, 3)), ints(0, 0, HIDDEN), True)
    turned = ops.multiply(mixed, ops.unsqueeze(ops.cos(ops.convert(inputs[2], "f32")), ints(2)))
    model = ov.Model([ops.result(ops.matmul(ops.add(x, turned), table, False, True))], sinks, inputs, "minimal")
    for port in model.inputs:
        port.get_tensor().set_names({port.get_node().get_friendly_name()})
    model.outputs[0].get_tensor().set_names({"logits"})
    ov.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)
    _dump(folder / "config.json", {"max_position_embeddings": CONTEXT, "eos_token_id": END})


def _write_litert(folder: Path) -> None:
    from slmops.engines import minimal_litert

    minimal_litert.write(folder / "model.tflite", HIDDEN, HEADS, CONTEXT, VOCABULARY)
    _dump(folder / "config.json", {"max_position_embeddings": CONTEXT, "eos_token_id": END})


def _write_executorch(folder: Path) -> None:
    import torch
    from torch.nn import functional

    from slmops.engines import executorch_export

    numbers = torch.Generator().manual_seed(0)
    check: Any = torch._check

    class Minimal(torch.nn.Module):
        table: Any
        query: Any
        key: Any
        value: Any
        keys: Any
        values: Any

        def __init__(self) -> None:
            super().__init__()
            for name, rows in (("table", VOCABULARY), ("query", HIDDEN), ("key", HIDDEN), ("value", HIDDEN)):
                self.register_buffer(name, 0.1 * torch.randn(rows, HIDDEN, generator=numbers))
            for name in ("keys", "values"):
                self.register_buffer(name, torch.zeros(1, CONTEXT, HEADS, HIDDEN // HEADS))

        def forward(self, tokens: Any, start: Any) -> Any:
            first = start[0].item()
            check(first >= 0)
            check(first + tokens.shape[1] <= CONTEXT)
            x = functional.embedding(tokens, self.table)
            weights = (self.query, self.key, self.value)
            q, k, v = (functional.linear(x, w).view(1, -1, HEADS, HIDDEN // HEADS) for w in weights)
            torch.ops.llama.update_cache(k, self.keys, first)
            torch.ops.llama.update_cache(v, self.values, first)
            mixed = torch.ops.llama.custom_sdpa(q, self.keys, self.values, first, None, 0.0, True)
            return functional.linear((x + mixed.view(1, -1, HIDDEN))[:, -1:], self.table)[:, 0]

    with executorch_export.quiet(), torch.no_grad():
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

        program = executorch_export.lowered(Minimal().eval(), CONTEXT, {"get_max_context_len": CONTEXT})
    with (folder / "model.pte").open("wb") as file:
        program.write_to_file(file)
    _dump(folder / "config.json", {"max_position_embeddings": CONTEXT, "eos_token_id": END})


WRITERS: dict[str, Callable[[Path], None]] = {
    "torch": _write_torch, "onnx_genai": _write_onnx, "llama_cpp": _write_gguf, "mlx": _write_mlx, "openvino": _write_openvino,
    "litert": _write_litert,
    "executorch": _write_executorch,
}  # fmt: skip
