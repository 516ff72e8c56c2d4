"""The schema of report.json: what one project's comparison says, as frozen typed values.

Numbers are plain: scores and reductions are shares (0.92, not 92), times are milliseconds, sizes are bytes. A number
that was not measured is null, never left out. `schema` is 1 until a change that an old reader would misread; new
fields may come without one. The documentation in `docs/reference/report.md` is made from this module.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from slmops.core.gate import Verdict
from slmops.core.model import Value
from slmops.core.spec import Task

SCHEMA = 1
Finding = Literal["helped", "hurt", "no difference found"]
Delta = Literal["distilling", "quantising", "pruning", "trimming", "calibrating", "both", "as_shipped"]


class Estimate(Value):
    """A number with its interval; `low` and `high` are null where nothing says how sure it is."""

    value: float | None = Field(description="the number; null: not measured")
    low: float | None = Field(None, description="lower end of the interval at `confidence`")
    high: float | None = Field(None, description="upper end")


class Figure(Estimate):
    """A number, its interval, and in words what it was computed from."""

    basis: str = Field(description="what is compared with what, in which runtime, and what the interval is")


class Headline(Value):
    """The five numbers that a reader looks for first."""

    inference_time_reduction: Figure = Field(
        description="1 - time per response of the shipped student / of the teacher"
    )
    memory_reduction: Figure = Field(description="1 - memory of the shipped student / of the teacher")
    accuracy_retained: Figure = Field(description="score of the shipped student / of the teacher")
    size_reduction_vs_fp32: Figure = Field(description="1 - model file / the same student's fp32 file")
    size_reduction_vs_fp16: Figure = Field(description="1 - model file / half of the fp32 weight bytes")


class Subject(Value):
    """What the report is about."""

    name: str = Field(description="the project")
    version: str = Field(description="its version in the project file")
    variant: str = Field(description="the model variant that ships and that gates judge")


class Score(Estimate):
    """One metric of one variant."""

    n: int = Field(description="examples that the metric looks at")


class Latency(Value):
    """Times of one variant over `prompts` test prompts, each answered once in every round by a process of its own."""

    prompts: int = Field(description="timed prompts")
    rounds: int = Field(description="processes that timed them")
    p50_ms: Estimate = Field(description="median time per response")
    p95_ms: Estimate = Field(description="time that 95 % of the responses stay under")
    mean_ms: Estimate = Field(description="mean time per response")
    first_token_p50_ms: Estimate = Field(description="median time to the first token")
    first_token_p95_ms: Estimate = Field(description="95 % quantile of the time to the first token")
    mean_tokens: float | None = Field(None, description="mean number of new tokens per response")


class Memory(Value):
    """Peak resident memory of a fresh process that answers the prompts, over that of the runtime alone."""

    over_baseline_bytes: Estimate = Field(
        description="mean over the rounds; low and high are the least and the greatest round, not a confidence interval"
    )
    peak_bytes: float | None = Field(None, description="mean peak of the whole process")
    baseline_bytes: float | None = Field(None, description="mean peak of a process that loads the runtime alone")


class FieldScore(Value):
    """How well one field of a JSON answer is filled."""

    field: str = Field(description="its path, such as `arguments.items[]`")
    n: int = Field(description="times it occurs in gold")
    f1: float = Field(description="F1 over all examples")


class Variant(Value):
    """One model in one form, judged on the whole test set."""

    name: str = Field(description="such as `teacher-fp32`, `student-int4`, `few-int4`")
    role: Literal["teacher", "student", "baseline"] = Field(description="`baseline`: the student without the teacher")
    runtime: Literal[
        "torch", "onnxruntime-genai", "llama.cpp", "mlx", "openvino", "litert", "executorch", "endpoint"
    ] = Field(description="what ran it")
    about: str = Field(description="the same in words")
    scores: dict[str, Score] = Field(description="metric to score")
    fields: tuple[FieldScore, ...] = Field((), description="per field, worst first; extraction only")
    unfinished: int = Field(0, description="answers that were cut off at the token limit")
    mean_answer_tokens: float | None = Field(None, description="mean number of new tokens per test answer")
    file_bytes: int | None = Field(None, description="bytes of the model files alone")
    folder_bytes: int | None = Field(None, description="bytes of everything that ships with them (tokenizer, settings)")
    latency: Latency | None = Field(None, description="null: not measured")
    memory: Memory | None = Field(None, description="null: not measured")
    fidelity: dict[str, Any] | None = Field(None, description="what the converter measured against torch")


class Difference(Value):
    """A paired difference of scores, candidate minus reference, on the same examples."""

    metric: str = Field(description="what is compared")
    n: int = Field(description="examples")
    value: float = Field(description="score of the candidate minus that of the reference")
    low: float = Field(description="lower end of its interval")
    high: float = Field(description="upper end")
    better: int | None = Field(
        description="examples that only the candidate got right; null for scores between 0 and 1"
    )
    worse: int | None = Field(description="examples that only the reference got right")
    p: float = Field(description="two-sided p value of no difference")
    test: str = Field(description="`mcnemar_exact`, or `bootstrap` for scores between 0 and 1")
    detectable: float = Field(description="smallest difference that this test set shows with 80 % power")


class Comparison(Value):
    """What one step of the way from teacher to shipped student changes."""

    name: Delta = Field(
        description="`distilling`: fp32 teacher to fp32 student; `quantising`: fp32 student to shipped; `pruning`: the student as "
        "trained to pruned (and trained again), same precision; `trimming`: whole vocabulary to trimmed, same precision; "
        "`calibrating`: weights rounded each alone to rounded on training texts; "
        "`both`: fp32 teacher to shipped, same runtime; `as_shipped`: the teacher in its own runtime to shipped"
    )
    reference: str = Field(description="variant before")
    candidate: str = Field(description="variant after")
    accuracy: Difference = Field(description="of the metric that models are compared by")
    accuracy_retained: Estimate = Field(description="ratio of the two scores")
    time_reduction: Estimate = Field(description="1 - mean time per response after / before, same prompts")
    memory_reduction: Estimate = Field(description="the interval is the widest that the rounds allow")
    size_reduction: Estimate = Field(description="of the model files; exact")


class Baseline(Value):
    """The same student without the teacher."""

    variant: str = Field(description="its name")
    trained_on: str = Field(description="in words")
    gold_labels: int | None = Field(description="labels that it learnt from")
    metric: str = Field(description="what it is judged by")
    value: float = Field(description="its own score")
    low: float = Field(description="lower end of the score's interval")
    high: float = Field(description="upper end")
    difference: Difference = Field(description="shipped student minus this baseline")
    finding: Finding = Field(description="whether the interval of the difference lies above, below or across zero")
    says: str = Field(description="the finding as a sentence")


class NoTeacher(Value):
    """What distilling gained, or did not, over training the same student on gold labels."""

    few: Baseline | None = Field(description="on the gold labels that the student has; null: not trained")
    all: Baseline | None = Field(description="on the gold labels of all training examples; null: not trained")


class Needed(Value):
    """What would decide an undecided gate."""

    count: int = Field(description="how many more")
    more_than: bool = Field(description="true: the estimate is so large that only a lower bound is given")
    unit: Literal["examples", "prompts", "rounds"] = Field(description="more of what")


class Gate(Value):
    """One bound and what became of it."""

    metric: str = Field(description="a score, a headline number, `p95_ms`, `file_mb` or `quantization_loss`")
    at_least: float | None = Field(description="lower bound, or null")
    at_most: float | None = Field(description="upper bound, or null")
    value: float | None = Field(description="what was measured, in the metric's unit; null: not measured")
    low: float | None = Field(description="lower end of its interval")
    high: float | None = Field(description="upper end")
    verdict: Verdict = Field(description="`passed`: the whole interval meets the bound; `failed`: the whole misses it")
    needed: Needed | None = Field(None, description="how many more would decide it if the value stayed as it is")
    says: str = Field(description="the verdict as a sentence")


class Drop(Value):
    """What one filter of the synthesis took out."""

    filter: str = Field(description="name of the filter")
    count: int = Field(description="rows it took out")
    examples: tuple[str, ...] = Field((), description="a few dropped rows, shortened: prompt → answer (why)")


class Synthesis(Value):
    """What became of the teacher's answers before the student saw them."""

    seen: int | None = Field(description="answered prompts that came in")
    kept: int | None = Field(description="rows the student trained on")
    dropped: tuple[Drop, ...] = Field(description="per filter, in the order in which they ran")


class DataSummary(Value):
    """The data, as it was split."""

    counts: dict[str, int] = Field(description="examples per file")
    labels: int | None = Field(description="number of labels, for a classification")
    removed: dict[str, int] = Field(
        description="rows taken out by kind: `train_exact`, `train_near` and `train_ngram` are copies of evaluation data"
    )


class Point(Value):
    """One look at a training loss."""

    step: int = Field(description="optimiser steps done")
    loss: float = Field(description="nats per answer token")


class Training(Value):
    """How one model learnt."""

    name: str = Field(description="`teacher`, `student`, `few`, `all`")
    train: tuple[Point, ...] = Field(description="training loss, mean since the point before")
    validation: tuple[Point, ...] = Field(description="validation loss")
    best_step: int | None = Field(description="step whose weights were kept")
    facts: dict[str, Any] = Field(description="other plain facts that the trainer wrote")


class Confusion(Value):
    """A label of the test set and what the shipped student makes of it."""

    label: str = Field(description="gold label")
    n: int = Field(description="test examples")
    recall: float = Field(description="share that the shipped student gets right")
    teacher_recall: float | None = Field(description="the same of the teacher; null: no teacher")
    taken_for: str = Field(description="its most frequent wrong answer")
    taken_count: int = Field(description="how often that was")


class Wrong(Value):
    """A test example that the shipped student gets wrong."""

    id: str = Field(description="of the example")
    prompt: str = Field(description="last message of the user")
    gold: str = Field(description="right answer")
    answer: str = Field(description="the shipped student's answer")
    teacher: str | None = Field(description="the teacher's answer")


class Meeting(Value):
    """Two models on the same prompts, along the same greedy answers."""

    prompts: int = Field(description="validation prompts")
    compared: int = Field(description="of these, prompts whose texts are the same tokens for both")
    positions: int = Field(description="next tokens that both gave for the same tokens before")
    token_agreement: float | None = Field(description="share of positions with the same most likely token")
    kept: float | None = Field(
        description="probability that the model before gives to the choices of the one after, over that of its own choices: two "
        "tokens that are equally likely may change places, a certain one may not be lost"
    )
    mean_kl: float | None = Field(
        description="mean KL divergence of the next tokens, nats; of the tokens that both have"
    )
    same_answers: float = Field(description="share of prompts to which both answer the same text")
    template_equal: float | None = Field(
        description="share of prompts that both turn into the same tokens, of those whose tokens both have; null: not to be compared"
    )
    furthest_weight: dict[str, Any] | None = Field(
        None, description="the matrix that changed most, and its relative distance; only where weights are to be alike"
    )
    first_divergence: dict[str, Any] | None = Field(None, description="where the most likely token first differs")
    first_template_difference: dict[str, Any] | None = Field(None, description="the first prompt with other tokens")


class Hop(Meeting):
    """From one form of the model to the next, and whether it did what such a step may do."""

    parent: str = Field(description="the model before")
    name: str = Field(description="the model that was made from it")
    expects: Literal["exact", "rounded", "learned"] = Field(
        description="what the step may change: nothing, the order of tokens of about the same probability, or all (then it is not judged)"
    )
    at_least: float | None = Field(
        description="`token_agreement` (exact) or `kept` (rounded) that it must reach; null: not judged"
    )
    broke: Literal["", "template", "weights", "nothing compared"] = Field(description="what it broke; empty: nothing")
    says: str = Field(description="the same as a sentence")


class Report(Value):
    """The whole of report.json."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True, validate_by_alias=True)

    schema_: Literal[1] = Field(1, alias="schema", description="version of this schema")
    subject: Subject = Field(description="what the report is about")
    task: Task = Field(description="as in the project file")
    verdict: Verdict = Field(description="failed if any gate failed, else undecided if any is, else passed")
    says: str = Field(description="the verdict as a sentence")
    metric: str = Field(description="the metric that models are compared by")
    n_test: int = Field(description="test examples that every variant answered")
    confidence: float = Field(description="of every interval")
    resamples: int = Field(description="bootstrap resamples")
    headline: Headline = Field(description="the five numbers to look for first")
    gates: tuple[Gate, ...] = Field(description="in the order of the project file")
    variants: tuple[Variant, ...] = Field(description="teacher first, then student, then baselines")
    comparisons: tuple[Comparison, ...] = Field(
        description="what each step from teacher to shipped student changes; those whose variants are there"
    )
    hops: tuple[Hop, ...] = Field(
        (), description="what each step between two forms of the model kept of it; empty: not compared"
    )
    no_teacher_baseline: NoTeacher = Field(description="the same student without the teacher")
    data: DataSummary = Field(description="how the data was split")
    synthesis: Synthesis | None = Field(description="null: no teacher answers")
    self_check: dict[str, Any] | None = Field(description="what logit distillation looked at before it began")
    training: tuple[Training, ...] = Field(description="how each model learnt")
    confusions: tuple[Confusion, ...] = Field(description="the labels with the lowest recall; classification only")
    wrong: tuple[Wrong, ...] = Field(description="up to 20 examples, chosen by id")
    wrong_count: int = Field(description="all test examples that do not score 1")
    environment: dict[str, Any] = Field(description="machine, threads and versions that the numbers come from")
    notes: tuple[str, ...] = Field(description="what could not be measured, and why")
