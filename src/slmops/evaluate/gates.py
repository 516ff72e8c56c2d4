"""Gates of the project file, judged on the numbers of a report. The rule itself is `slmops.core.gate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from slmops.core import gate as rule
from slmops.core import report as r
from slmops.core.spec import GateSpec
from slmops.evaluate.words import NOUNS, bound, inside, interval, shown

Unit = Literal["examples", "prompts", "rounds"]


class _Found(NamedTuple):
    estimate: r.Estimate
    n: int
    unit: Unit


def judge_gates(
    gates: Sequence[GateSpec], variants: Sequence[r.Variant], comparisons: Sequence[r.Comparison],
    headline: r.Headline, shipped: str, n: int,
) -> tuple[r.Gate, ...]:  # fmt: skip
    """Every gate with its value, interval and verdict, in the order of the project file.

    Args:
        n: test examples.
    """
    variant = next(v for v in variants if v.name == shipped)
    return tuple(_judge(gate, _find(gate.metric, variant, comparisons, headline, n)) for gate in gates)


def summary(gates: Sequence[r.Gate]) -> tuple[rule.Verdict, str]:
    """The verdict over all gates and a sentence that says why."""
    verdict = rule.overall([gate.verdict for gate in gates])
    if not gates:
        return verdict, "No gates are set, so nothing could fail."
    failed = [inside(gate.metric) for gate in gates if gate.verdict == "failed"]
    open_ = [inside(gate.metric) for gate in gates if gate.verdict == "undecided"]
    total = f"{len(gates)} gate" if len(gates) == 1 else f"{len(gates)} gates"
    if failed:
        return verdict, f"{len(failed)} of {total} failed: {', '.join(failed)}."
    if open_:
        return verdict, f"{len(open_)} of {total} cannot be decided yet: {', '.join(open_)}."
    return verdict, "The gate passed." if len(gates) == 1 else f"All {total} passed."


def _find(metric: str, variant: r.Variant, comparisons: Sequence[r.Comparison], headline: r.Headline, n: int) -> _Found:
    if metric in variant.scores:
        score = variant.scores[metric]
        return _Found(score, score.n, "examples")
    if metric == "p95_ms":
        latency = variant.latency
        return _Found(
            latency.p95_ms if latency else r.Estimate(value=None), latency.prompts if latency else 0, "prompts"
        )
    if metric == "file_mb":
        mb = variant.file_bytes / 1e6 if variant.file_bytes is not None else None
        return _Found(r.Estimate(value=mb, low=mb, high=mb), 0, "examples")
    if metric == "quantization_loss":
        step = next((c.accuracy for c in comparisons if c.name == "quantising"), None)
        if step is None:
            return _Found(r.Estimate(value=None), n, "examples")
        return _Found(r.Estimate(value=-step.value, low=-step.high, high=-step.low), n, "examples")
    figure: r.Figure = getattr(headline, metric)
    if metric == "inference_time_reduction":
        return _Found(figure, variant.latency.prompts if variant.latency else 0, "prompts")
    return _Found(
        figure, n if metric == "accuracy_retained" else 0, "rounds" if metric == "memory_reduction" else "examples"
    )


def _judge(gate: GateSpec, found: _Found) -> r.Gate:
    value, low, high = found.estimate.value, found.estimate.low, found.estimate.high
    verdict = rule.judge(low, high, at_least=gate.at_least, at_most=gate.at_most)
    needed = None
    if verdict == "undecided" and value is not None and low is not None and high is not None and found.n:
        need = rule.needed(value, low, high, found.n, at_least=gate.at_least, at_most=gate.at_most)
        needed = r.Needed(count=need.count, more_than=need.more_than, unit=found.unit)
    facts = {"metric": gate.metric, "at_least": gate.at_least, "at_most": gate.at_most}
    ends = interval(gate.metric, {"low": low, "high": high})
    measured = f"{shown(gate.metric, value)}" + (f" ({ends})" if ends else "")
    wanted = bound(facts)
    if value is None:
        says = f"Not measured, so it cannot be said whether it is {wanted}."
    elif verdict == "passed":
        says = f"{measured} is {wanted}."
    elif verdict == "failed":
        says = f"{measured} is not {wanted}."
    elif low is None:
        says = f"{measured} was measured once: raise evaluate.measure.rounds to know how sure it is."
    elif needed is None:
        says = f"{measured} lies on both sides of {wanted}: raise evaluate.measure.rounds."
    else:
        amount = f"{'more than' if needed.more_than else 'about'} {needed.count:,} {NOUNS[needed.unit]}"
        says = f"{measured} lies on both sides of {wanted}: add {amount} to decide."
    return r.Gate(
        metric=gate.metric, at_least=gate.at_least, at_most=gate.at_most, value=value, low=low, high=high,
        verdict=verdict, needed=needed, says=says,
    )  # fmt: skip
