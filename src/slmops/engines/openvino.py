"""OpenVINO: the engine for a folder with `openvino_model.xml`, on the processor, with the tokenizer and chat template of the folder.

Answers come one prompt after the other; keys and values are a state of the model, so a new token costs one position. A folder that says
`fp32` is computed in float32 throughout. Others are run as the runtime does by default, except that bfloat16 is not used where
the processor has it, since results would depend on the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core import runtimes
from slmops.core.engine import Generation, Sampling
from slmops.engines import at_once, no_room, one_by_one, read_json
from slmops.engines.plain_tokenizer import PlainTokenizer, end_ids
from slmops.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FILE = "openvino_model.xml"


class OpenVinoEngine:
    """A folder with `openvino_model.xml`. See `slmops.core.engine.Engine`. Not safe for use by two threads at once."""

    name = "openvino"

    def __init__(self, folder: Path, *, threads: int = 1) -> None:
        try:
            import numpy
            import openvino
        except ImportError as error:
            raise MissingExtraError("OpenVINO", "openvino") from error
        self._np, self._ov = numpy, openvino
        config = read_json(folder / "config.json")
        self._tokenizer = PlainTokenizer(folder, "openvino")
        self._folder, self._threads = folder, threads
        self._whole: Any = None
        try:
            self._request: Any = self._compiled(last=True)
            self.context_length = runtimes.context({"max_position_embeddings": 2048} | config)
        except Exception as error:
            said = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise ModelError(f"{folder} cannot be loaded: {said[0]}", "convert the model again") from error
        self.end_ids = end_ids(folder, config, self._tokenizer.id_of(self._tokenizer.marks.get("eos_token", "")))

    def _compiled(self, last: bool) -> Any:
        """The model, ready to run; with `last` it computes logits of the last position alone."""
        from openvino import opset13 as ops

        core = self._ov.Core()
        model = core.read_model(self._folder / FILE)
        if last:
            head = model.outputs[0].get_node()
            while head.get_type_name() != "MatMul":
                head = head.input_value(0).get_node()
            at, axis = self._np.array([-1], self._np.int64), self._np.array(1, self._np.int64)
            head.input(0).replace_source_output(ops.gather(head.input_value(0), at, axis).output(0))
            model.validate_nodes_and_infer_types()
        options = {"INFERENCE_NUM_THREADS": self._threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        return core.compile_model(model, "CPU", options).create_infer_request()

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of the rendered prompt, ready for the answer."""
        return self._tokenizer.encode(messages)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens."""
        return self._tokenizer.decode(ids)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_done: Callable[[int], None] | None = None
    ) -> list[Generation]:
        """One answer per prompt, one prompt after the other. With sampling, prompt i is seeded with `seed + i`."""
        return one_by_one.generate(self, prompts, sampling, on_done)

    def at_once(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Generation]:
        """One answer of `new_tokens` tokens to each prompt, in one batch; see `slmops.core.engine.AtOnce`."""
        return at_once.generate(self, prompts, new_tokens)

    def start(self, length: int) -> None:
        """An empty context; it grows by itself."""
        self.start_rows(1, length)

    def start_rows(self, rows: int, length: int) -> None:
        """Empty contexts; they become as many as the first ids have rows, and grow by themselves."""
        self._request.reset_state()

    def feed(self, ids: Sequence[int], at: int) -> NDArray[np.float32]:
        """Put ids into the context from position `at`; the logits after the last of them, (vocabulary,)."""
        row: NDArray[np.float32] = self._infer(self._request, [ids], at)[0, -1]
        return row

    def feed_rows(self, ids: Sequence[Sequence[int]], at: int) -> NDArray[np.float32]:
        """Put ids (rows, tokens) into the contexts from position `at`; the logits after the last of each row, (rows, vocabulary)."""
        return self._infer(self._request, ids, at)[:, -1]

    def _infer(self, request: Any, ids: Sequence[Sequence[int]], at: int) -> NDArray[np.float32]:
        """Logits (rows, tokens, vocabulary) of ids (rows, tokens), valid until the next call."""
        rows, new = len(ids), len(ids[0])
        given = {
            "input_ids": self._np.array(ids, self._np.int64),
            "attention_mask": self._np.ones((rows, at + new), self._np.int64),
            "position_ids": self._np.tile(self._np.arange(at, at + new, dtype=self._np.int64), (rows, 1)),
            "beam_idx": self._np.arange(rows, dtype=self._np.int32),
        }
        try:
            request.infer(given, share_inputs=True)
        except Exception as error:
            raise ModelError(f"OpenVINO failed: {error}", "shorten the prompt, or convert the model again") from error
        logits: NDArray[np.float32] = request.get_tensor("logits").data
        return logits

    def logits(self, ids: Sequence[int], start: int = 0) -> NDArray[np.float32]:
        """Teacher-forced logits, float32 (len(ids) - start, vocabulary): the rows from position `start` on."""
        if not 0 < len(ids) <= self.context_length:
            raise no_room(0, len(ids), self.context_length)
        self._whole = self._whole or self._compiled(last=False)
        self._whole.reset_state()
        return self._np.array(self._infer(self._whole, [ids], 0)[0, start:], self._np.float32)

    def close(self) -> None:
        """Drop the model."""
        self._request = self._whole = None
