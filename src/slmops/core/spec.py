"""The strict form of slmops.yaml: what a user may write, with the defaults of every stage.

Only shapes and defaults stand here. Reading the file (YAML 1.2, line numbers, `--set`) is `slmops.flow.project`;
what the stages do with the values is in their own modules. Units are in the field names or their descriptions.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from slmops.core.engine import KvCache
from slmops.core.fit import FitSpec
from slmops.core.forms import Form
from slmops.core.model import Value
from slmops.core.search import Search

TaskType = Literal["classification", "extraction", "chat", "question_answering", "summarisation", "generation"]
DataFormat = Literal[
    "auto", "messages", "alpaca", "sharegpt", "prompt_completion", "preference", "csv", "tsv", "json", "jsonl",
    "huggingface",
]  # fmt: skip
Precision = Literal["fp32", "int8", "int4"]
Arithmetic = Literal["auto", "fp32", "bf16"]
Tuning = Literal["full", "lora", "rslora", "dora", "qlora", "adapter"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
LessThanAll = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


class Task(Value):
    """What the model has to do.

    `extraction` covers function calling: the answer is one JSON object, judged field by field.
    """

    type: TaskType
    instruction: str = Field("", description="system message put before every prompt that has none")
    labels: tuple[str, ...] | None = Field(None, description="allowed answers; default: those seen in training")
    out_of_scope: str | None = Field(None, description="the label that means 'none of these'; its recall is reported")


class Columns(Value):
    """Which column (by name, or by position for rows that are lists) holds what."""

    prompt: str | int | None = None
    answer: str | int | None = None
    context: str | int | None = Field(None, description="put before the prompt, an empty line between")
    system: str | int | None = None
    rejected: str | int | None = Field(None, description="an answer that is worse than `answer`, for dpo and orpo")


class Splits(Value):
    """Where the splits come from.

    With names (keys of a JSON file, splits of a Hugging Face dataset, or files beside `data.path`), they are taken as
    they are. With shares, each example goes where the digest of its prompt sends it, never by its row number.
    """

    train: tuple[str, ...] | None = None
    validation: tuple[str, ...] | Share | None = None
    test: tuple[str, ...] | Share | None = None


class Gold(Value):
    """How many gold labels the student has. Both unset: all of the examples that are not left to the pool."""

    per_label: NonNegative | None = None
    total: NonNegative | None = None

    @model_validator(mode="after")
    def _one(self) -> Gold:
        if self.per_label is not None and self.total is not None:
            raise ValueError("give per_label or total, not both")
        return self


class Overlap(Value):
    """When two messages count as the same for keeping test data out of training."""

    near_duplicate: Share = Field(0.9, description="Jaccard similarity of word 3-shingles at or above which they do")
    ngram: NonNegative = Field(0, description="a shared run of this many words is contamination; 0: not looked at")


class Augment(Value):
    """Further copies of answered training examples, for every model that learns from them (teacher, student, baselines).

    swap (extraction): values that stand in the message are exchanged in message and answer alike, so that a model learns
    to copy them (arXiv 1606.03622). A copy that is longer than the context is left out where a model learns, and counted.
    """

    method: Literal["swap"] = "swap"
    copies: Positive = Field(3, description="copies of each example that has a value to exchange")
    made_up: Share = Field(
        0.5, description="share of made-up values, where an argument's values are all different; less where they recur"
    )


class Data(Value):
    """Where the examples come from and who may see which of them."""

    path: str = Field(description="file, folder, hf:ORG/NAME[:CONFIG][@REVISION]")
    format: DataFormat = "auto"
    columns: Columns = Columns()
    splits: Splits = Splits()
    gold: Gold = Gold()
    teacher_share: Share = Field(
        1.0, description="share of the training examples whose gold labels a teacher trained here learns from"
    )
    overlap: Overlap = Overlap()
    augment: Augment | None = Field(
        None, description="more examples by exchanging values; nothing is added where unset"
    )
    max_examples: Positive | None = Field(None, description="keep this many training examples, chosen by digest")


class Architecture(Value):
    """A decoder from scratch. Widths in units, `context` in tokens."""

    type: Literal["qwen3", "llama"] = "llama"
    layers: Positive = 2
    hidden: Positive = 128
    heads: Positive = 4
    kv_heads: Positive | None = None
    ffn: Positive | None = Field(None, description="default: 8/3 of hidden, rounded up to a multiple of 32")
    context: Positive = 256
    tie_embeddings: bool = True

    @model_validator(mode="after")
    def _divides(self) -> Architecture:
        if self.hidden % self.heads:
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of heads ({self.heads})")
        if (self.hidden // self.heads) % 2:
            raise ValueError("hidden / heads must be even (rotary positions)")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self


class Lora(Value):
    """Low-rank additions to linear layers (arXiv 2106.09685), for tunings lora, rslora, dora and qlora."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] | None = Field(None, description="the additions' weight; default: 2 × rank")
    dropout: Share = 0.0
    targets: tuple[str, ...] | None = Field(
        None, description="names of linear layers, such as q_proj; default: all those of the decoder's blocks"
    )
    embeddings: bool = Field(
        False,
        description="train the token embedding and the output matrix too, whole: for a base that is small or far from the task",
    )

    @property
    def strength(self) -> float:
        """`alpha`, or its default."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


class Training(Value):
    """How a model learns. Defaults suit models of 0.1 to 30 M parameters on a CPU.

    `tuning` says which weights move: all of them (full), or few new ones beside a frozen model. lora, rslora (arXiv
    2312.03732), dora (arXiv 2402.09353): low-rank additions; qlora (arXiv 2305.14314): the same over a base held in 4
    bits; adapter: a bottleneck beside each feed-forward block (arXiv 2110.04366).
    """

    tuning: Tuning = "full"
    lora: Lora = Lora()
    adapter_width: Positive = Field(64, description="units of the bottleneck in tuning adapter")
    checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, about a third more time"
    )

    epochs: Annotated[float, Field(gt=0)] = 10.0
    max_steps: Positive | None = None
    batch_size: Positive = Field(64, description="examples per optimiser step, over all accumulation parts")
    accumulate: Positive = Field(1, description="split each batch into this many parts to save memory")
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    warmup: Share = Field(0.05, description="share of the steps with rising learning rate")
    final_learning_rate: Share = Field(0.02, description="where the cosine ends, as a share of learning_rate")
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    dropout: Share = Field(0.0, description="of the embedding and of what each attention and feed-forward block adds")
    label_smoothing: Share = 0.0
    clip: Annotated[float, Field(gt=0)] = 1.0
    precision: Arithmetic = "auto"
    prompt_weight: Share = Field(0.0, description="weight of the loss on prompt tokens; 0: answers only")
    max_length: Positive | None = Field(None, description="tokens per example; default: the model's context")
    batching: Literal["bucket", "pack"] = "bucket"
    evaluations: Positive = Field(10, description="how many times validation is looked at over the whole training")
    patience: NonNegative = Field(4, description="stop after this many looks without a better one; 0: never")
    holdout: Share = Field(
        0.05,
        description="share of the examples kept for validation where there is no split for it, or where it would be more labels than "
        "data.gold gives a student beside its teacher",
    )
    quantization_aware: Literal["off", "int4", "ternary"] = Field(
        "off",
        description="int4: train on weights rounded as the converter will round them, in the last part; ternary: on layers of three values "
        "a weight from the start (arXiv 2402.17764); widths must be multiples of 256",
    )
    block_size: Literal[16, 32, 64, 128] = Field(
        32, description="weights that share a scale in quantization_aware: int4"
    )


class TokenizerSpec(Value):
    """A byte-level BPE trained on the training text."""

    vocabulary: Annotated[int, Field(ge=300)] = 2048
    answer_weight: Positive = Field(4, description="how many times an answer counts against a prompt in the merges")


class Pricing(Value):
    """Money per million tokens, in any one currency."""

    input_per_million: Annotated[float, Field(ge=0)] = 0.0
    output_per_million: Annotated[float, Field(ge=0)] = 0.0


class Endpoint(Value):
    """An OpenAI-compatible chat/completions endpoint. Keys come from the environment, never from the file."""

    url: str = Field(description="base URL up to and without /chat/completions")
    model: str
    api_key_env: str | None = Field(None, description="name of the environment variable that holds the key")
    api: Literal["openai", "azure"] = "openai"
    api_version: str | None = Field(None, description="azure only")
    concurrency: Positive = 8
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    retries: NonNegative = 6
    min_success_ratio: Share = 0.95
    max_output_tokens: Positive = 256
    temperature: Annotated[float, Field(ge=0)] = 0.0
    price: Pricing = Pricing()


ENDPOINT_NEUTRAL = (
    "endpoint.api_key_env",
    "endpoint.concurrency",
    "endpoint.timeout_s",
    "endpoint.retries",
    "endpoint.min_success_ratio",
    "endpoint.price",
)
"""Settings of an endpoint that cannot change an answer: they stay out of the keys of steps."""


class OtherTeacher(Value):
    """One more teacher with the first one's tokenizer: the student learns from the mean of their distributions."""

    model: Architecture | None = None
    base: str | None = Field(None, description="folder or hf:ORG/NAME[@REVISION]")
    train: Training = Training()
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        None, description="default: the first one's, plus its place"
    )
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="against the first teacher's 1")

    @model_validator(mode="after")
    def _one(self) -> OtherTeacher:
        if (self.model is None) == (self.base is None):
            raise ValueError("give exactly one of model, base")
        return self


class Teacher(Value):
    """Exactly one of: a model trained by this file (`model`), a model that exists (`base`), or an `endpoint`."""

    model: Architecture | None = None
    base: str | None = Field(None, description="folder or hf:ORG/NAME[@REVISION]")
    endpoint: Endpoint | None = None
    instruct: bool | None = Field(
        None,
        description="tell the teacher the task in words, with gold examples; default: yes, unless it is trained here",
    )
    tokenizer: TokenizerSpec = TokenizerSpec()
    train: Training = Training()
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(None, description="default: the project's seed")
    others: tuple[OtherTeacher, ...] = Field((), description="further teachers for `train.method: logits`")
    max_new_tokens: Positive = 64

    @model_validator(mode="after")
    def _one(self) -> Teacher:
        given = [k for k in ("model", "base", "endpoint") if getattr(self, k) is not None]
        if len(given) == 1 and self.model is not None and self.instruct:
            raise ValueError("a teacher that is trained here is not instructed; take `instruct` out")
        if len(given) != 1:
            raise ValueError(f"give exactly one of model, base, endpoint (given: {', '.join(given) or 'none'})")
        return self

    @property
    def instructed(self) -> bool:
        """Whether prompts to the teacher tell the task in words."""
        return self.model is None if self.instruct is None else self.instruct


class Generate(Value):
    """New prompts, for when the data is short.

    sample: the teacher, given only the beginning of a user turn, writes one (arXiv 2406.08464);
    paraphrase, evolve: it rewrites known prompts; seed: it writes more like some examples;
    template: slots of `templates` are filled from `slots`, no model needed.
    """

    method: Literal["sample", "paraphrase", "evolve", "seed", "template"] = "sample"
    count: Positive = 1000
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 64
    templates: tuple[str, ...] = ()
    slots: dict[str, tuple[str, ...]] = Field(default_factory=dict)


class Filters(Value):
    """What a synthetic example must pass to be kept."""

    valid: bool = Field(
        True, description="drop answers that are not a known label, or not the JSON that the task wants"
    )
    min_characters: NonNegative = 2
    max_characters: Positive = 4000
    near_duplicate: Share = Field(0.95, description="drop prompts this similar to a kept one; 1: only exact copies")
    ngram: NonNegative = Field(0, description="drop prompts that share a run of this many words with evaluation data")
    min_agreement: Share = Field(0.0, description="drop answers that fewer than this share of the votes gave")
    judge: bool = Field(False, description="the teacher also says whether prompt and answer belong together")


class Synthesize(Value):
    """What the teacher is asked for."""

    label_pool: bool = Field(True, description="the teacher answers the messages that the student has no label for")
    generate: Generate | None = None
    votes: Positive = Field(1, description="answers sampled per prompt; the most frequent wins (self-consistency)")
    vote_temperature: Annotated[float, Field(gt=0)] = 0.7
    shards: Positive = Field(
        1,
        description="parts in which a local teacher writes prompts and answers: steps of their own, at once with `--jobs` or `--on ray`",
    )
    filters: Filters = Filters()


class Student(Value):
    """A decoder from scratch (`model`) or one that exists (`base`)."""

    model: Architecture | None = None
    base: str | None = None
    tokenizer: TokenizerSpec | Literal["teacher"] = Field(
        "teacher", description="logit distillation needs the teacher's; with an endpoint as teacher give your own"
    )

    @model_validator(mode="after")
    def _one(self) -> Student:
        if self.model is not None and self.base is not None:
            raise ValueError("give model or base, not both")
        return self


class OnPolicy(Value):
    """For method on_policy: the student writes, the teacher scores every token (arXiv 2306.13649)."""

    share: Share = Field(
        0.5, description="share of the batches whose answers the student writes; the rest are the data's"
    )
    beta: Share = Field(0.5, description="of the generalised JSD: 0 is KL(teacher ‖ student), 1 KL(student ‖ teacher)")
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="at which the student writes")
    refresh: Positive = Field(4, description="batches written at once; more is faster and less on-policy")
    max_new_tokens: Positive = 64


class Transfer(Value):
    """For method hidden_states: what else of the teacher's inside the student imitates."""

    hidden_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="of the distance between hidden states, through a learned map (arXiv 1909.10351)"
    )
    attention_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="of the divergence between query, key and value relations (arXiv 2012.15828)"
    )
    relation_heads: Positive | None = Field(None, description="default: the student's heads")


class Preference(Value):
    """For methods dpo (arXiv 2305.18290) and orpo (arXiv 2403.07691), on prompt/chosen/rejected data."""

    beta: Annotated[float, Field(gt=0)] = Field(
        0.1, description="how strongly dpo holds the model to the reference; orpo: λ"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(0.0, description="share of swapped labels assumed")
    supervised: Training = Field(
        Training(), description="how a student from scratch first learns the chosen answers, before dpo"
    )


FROM_TEACHER = ("logits", "on_policy", "hidden_states", "cross_tokenizer")
"""Methods that learn from more of a teacher than its text."""
PREFERENCE = ("dpo", "orpo")
"""Methods that learn from pairs."""
TrainMethod = Literal["sequence", "logits", "on_policy", "hidden_states", "cross_tokenizer", "dpo", "orpo"]


class Train(Training):
    """The student's training.

    sequence: learn the teacher's text (arXiv 1606.07947); logits: also its cached distributions (arXiv 2503.16870);
    on_policy: the student writes and the teacher scores; hidden_states: also the teacher's inner states;
    cross_tokenizer: distributions of a teacher with another tokenizer (arXiv 2402.12030); dpo, orpo: preferences.
    """

    method: TrainMethod = "sequence"
    logit_samples: Positive = Field(12, description="tokens drawn per position from the teacher (arXiv 2503.16870)")
    logit_selection: Literal["sampled", "top_k"] = "sampled"
    logit_weight: Share = Field(0.5, description="share of the loss that comes from the teacher's distribution")
    temperature: Annotated[float, Field(gt=0)] = 1.0
    teacher_batch: Positive = Field(
        64,
        description="examples that the teacher sees at once where its distributions are cached; fewer need less memory",
    )
    on_policy: OnPolicy = OnPolicy()
    transfer: Transfer = Transfer()
    preference: Preference = Preference()


class Recover(Value):
    """The student's training once more, from what pruning left of it: the same method, examples and teacher."""

    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="default: those of `train`")
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(None, description="default: that of `train`")


class Prune(Value):
    """What is taken out of the trained student: whole blocks first, then heads and neurons, then single weights.

    layers: the blocks that change what goes through them least (arXiv 2403.03853); heads, ffn: groups of heads and neurons
    that add least, with the rest fitted to make up for them (arXiv 2407.14679); sparsity: weights that become zero, by
    `sparsity_method`: sparsegpt (arXiv 2301.00774) or wanda (arXiv 2306.11695).
    """

    layers: NonNegative = Field(0, description="blocks to take out")
    ffn: LessThanAll = Field(
        0.0, description="share of the feed-forward neurons to take out, in steps of 32 (in wide models up to 256)"
    )
    heads: LessThanAll = Field(
        0.0, description="share of the attention heads to take out, with the keys and values that they share"
    )
    sparsity: Annotated[float, Field(gt=0, lt=1)] | Literal["2:4"] | None = Field(
        None,
        description="share of the blocks' weights that become zero, or 2:4: two of every four in a row. No file is smaller by "
        "it and no runtime here is faster",
    )
    sparsity_method: Literal["sparsegpt", "wanda"] = "sparsegpt"
    recover: Recover | None = Field(
        None, description="train the student again after pruning; zeros of `sparsity` stay zero"
    )

    @model_validator(mode="after")
    def _some(self) -> Prune:
        if not (self.layers or self.ffn or self.heads or self.sparsity):
            raise ValueError("prunes nothing; give layers, ffn, heads or sparsity")
        return self


Quantization = Literal["none", "gptq", "awq", "autoround", "awq+gptq", "awq+autoround"]


class Compress(Value):
    """What is taken out of the student between its training and its conversion."""

    prune: Prune | None = Field(None, description="blocks, heads, neurons and single weights that are taken out")

    vocabulary: Literal["whole", "seen"] = Field(
        "whole",
        description="seen: keep only the tokens of the training texts, all bytes and all control marks; other texts take more tokens",
    )
    vocabulary_at_least: NonNegative = Field(
        0, description="with seen: keep this many tokens, those of the earliest merges beside the seen ones"
    )
    quantization: Quantization = Field(
        "none",
        description="round by what the weights do to training texts, not each weight alone. gptq (arXiv 2210.17323): each column makes up "
        "for those before it; awq (arXiv 2306.00978): inputs that carry much are scaled up first; autoround (arXiv 2309.05516): the way "
        "each weight is rounded is learned; awq+gptq, awq+autoround: one after the other",
    )
    calibration_examples: Positive = Field(
        256, description="training examples that `quantization` and `convert.file_mb` look at"
    )


class Convert(Value):
    """The format and precision that ship, and others to be judged beside it."""

    format: Literal["onnx_genai"] = "onnx_genai"
    precision: Precision = "int4"
    also: tuple[Form, ...] = Field(
        (),
        description="forms of the student that are made, judged and put into outputs/NAME/ beside the one that ships; each format needs "
        "the extra of its runtime: [llamacpp], [mlx], [openvino], [litert], [executorch]",
    )
    olive: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")], str] = Field(
        default_factory=dict,
        description="workflows of Olive that the student goes through, by a name of yours: the file that `olive run --config` "
        "takes, or a folder that Olive has made of this student. Each result is judged beside the one that ships and put into "
        "outputs/NAME/olive-NAME/",
    )
    importance: bool = Field(
        True,
        description="quantised types of GGUF: weigh errors by what training examples make of them (importance matrix)",
    )
    block_size: Literal[16, 32, 64, 128] = 32
    embedding_precision: Literal["int8", "int4"] | None = Field(
        None,
        description="of the token embedding and the output matrix; default: `precision`. int8 beside int4 loses less, in a larger file",
    )
    file_mb: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="the largest model file, in MB of 10^6 bytes: matrices get 2, 4 or 8 bits each, so that the answers to training "
        "examples change least; for precision int4",
    )
    layer_precision: Literal["int2"] | None = Field(
        None,
        description="of the layers of a student trained with quantization_aware: ternary, which int2 holds exactly in half the bytes of "
        "int4; default: `precision`",
    )
    fidelity_prompts: Positive = 32
    rounding: Literal["search", "plain"] | None = Field(
        None,
        description="of int4 scales; default: plain after quantization_aware training, else search (least error)",
    )
    min_token_agreement: Share = Field(
        0.99, description="an fp32 conversion whose next tokens agree less with torch is an error"
    )
    min_kept: Share = Field(
        0.85,
        description="a step that rounds is called broken in the report if its choices have less of the probability of those before",
    )

    def onnx(self, precision: Precision) -> dict[str, Any]:
        """The parameters of a conversion to ONNX Runtime GenAI in a precision; `rounding` may still be open."""
        mixed = precision == "int4" and self.embedding_precision == "int8"
        left_out = {"format", "also", "importance", "min_kept", "olive", "file_mb"} | (
            set() if mixed else {"embedding_precision"}
        )
        left_out |= set() if precision == "int4" and self.layer_precision else {"layer_precision"}
        return self.model_dump(mode="json", exclude=left_out) | {"precision": precision}

    @property
    def ternary(self) -> tuple[str, ...]:
        """Those of `also` that hold three values a weight."""
        return tuple(form for form in self.also if form.startswith("gguf-tq"))


Metric = Literal[
    "accuracy", "macro_f1", "exact_match", "field_f1", "rouge_l", "token_f1", "valid", "in_scope_accuracy", "out_of_scope_recall",
]  # fmt: skip
GateMetric = Literal[
    "accuracy", "macro_f1", "exact_match", "field_f1", "rouge_l", "token_f1", "valid", "in_scope_accuracy", "out_of_scope_recall",
    "accuracy_retained", "inference_time_reduction", "memory_reduction", "size_reduction_vs_fp32",
    "size_reduction_vs_fp16", "p95_ms", "file_mb", "quantization_loss",
]  # fmt: skip


class GateSpec(Value):
    """One bound on the shipped student. Scores are shares (0.92, not 92)."""

    metric: GateMetric
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one(self) -> GateSpec:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give exactly one of at_least, at_most")
        return self


class Measure(Value):
    """Latency and memory: fresh processes, interleaved rounds."""

    prompts: Positive = Field(50, description="test prompts, chosen by digest")
    rounds: Positive = Field(3, description="times each variant's process runs")
    threads: NonNegative = Field(1, description="the same for every variant; 0: all cores")


class Evaluate(Value):
    """How the result is judged."""

    metrics: tuple[Metric, ...] | None = Field(None, description="default: by task")
    gates: tuple[GateSpec, ...] = ()
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    resamples: Positive = Field(2000, description="bootstrap resamples")
    baselines: tuple[Literal["few", "all"], ...] = Field(
        ("few", "all"), description="the same student without the teacher, on its gold labels and on all of them"
    )
    max_examples: Positive | None = Field(None, description="judge this many test examples, chosen by digest")
    max_new_tokens: Positive = 64
    kv_cache: KvCache | None = Field(
        None,
        description="how llama.cpp holds keys and values while GGUF forms of `convert.also` are judged and timed; default: f16, or f32 "
        "for gguf-fp32",
    )
    measure: Measure = Measure()

    def judging(self) -> dict[str, Any]:
        """These settings as JSON values; `kv_cache` where it is set."""
        return self.model_dump(mode="json", exclude={"kv_cache"} if self.kv_cache is None else None)


class AdapterTask(Value):
    """One more task over `student.base`, learned by low-rank additions that a runtime switches on for it.

    All adapters and the base become one model (step student-adapters). `train.tuning` must be lora, rslora or qlora.
    """

    data: Data
    task: Task | None = Field(None, description="default: the project's")
    train: Train | None = Field(None, description="default: the project's")


class Tracking(Value):
    """Where runs are told of, besides the report. Nothing here changes a result.

    TensorBoard files go to .slmops/tensorboard/, MLflow runs to .slmops/mlflow/, or to the server of the environment
    variable MLFLOW_TRACKING_URI.
    """

    tensorboard: bool = Field(False, description="write event files; needs the extra [tensorboard]")
    mlflow: bool = Field(False, description="log MLflow runs; needs the extra [mlflow]")
    experiment: Annotated[str, Field(pattern=r"^[A-Za-z0-9/][A-Za-z0-9 ._/@-]{0,199}$")] | None = Field(
        None, description="name under which runs are gathered; default: the project's"
    )


class Spec(Value):
    """A whole project file."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    version: str = "1"
    licence: str = Field("", description="SPDX name that the bundle carries")
    task: Task
    data: Data
    teacher: Teacher | None = None
    synthesize: Synthesize = Synthesize()
    student: Student = Student()
    train: Train = Train()
    adapters: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")], AdapterTask] = Field(
        default_factory=dict, description="further tasks over student.base by name, each an adapter of its own"
    )
    compress: Compress = Compress()
    convert: Convert = Convert()
    evaluate: Evaluate = Evaluate()
    search: Search | None = None
    fit: FitSpec = FitSpec()
    tracking: Tracking = Tracking()
