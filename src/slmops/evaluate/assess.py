"""From predictions and measurements to the values of report.json. Deterministic: same material and seed, same report."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import slmops
from slmops.core import forms
from slmops.core import report as r
from slmops.core.spec import Evaluate, Metric, Task
from slmops.errors import DataError
from slmops.evaluate import metrics as m
from slmops.evaluate import statistics as s
from slmops.evaluate.background import confusions, data_summary, shortened, synthesis, training
from slmops.evaluate.gates import judge_gates, summary
from slmops.evaluate.inputs import Material, Prediction
from slmops.evaluate.words import count, percent, points

WRONG_SHOWN = 20
FIELDS_SHOWN = 40
SAME_RUNTIME = "ONNX Runtime GenAI"


def assess(
    name: str, version: str, task: Task, evaluate: Evaluate, shipped: str, material: Material, seed: int
) -> r.Report:
    """The whole report.

    Raises:
        DataError: there are no predictions of the shipped variant.
        UsageError: a metric does not fit the task.
    """
    if shipped not in material.predictions:
        raise DataError(f"there are no predictions of {shipped}, which ships", "run `slmops run`, which makes them")
    return _Assessment(task, evaluate, shipped, material, seed).report(name, version)


def role(variant: str) -> str:
    """`teacher`, `student` or `baseline`, from a variant's name."""
    first = variant.partition("-")[0]
    if first in ("nearest", "whole", "unpruned"):
        return "student"
    return first if first in ("teacher", "student") else "baseline"


def runtime(variant: str) -> str:
    """What ran a variant, from its name."""
    last = variant.rpartition("-")[2]
    form = forms.of(variant.partition("-")[2])
    if form is not None:
        return form.reported
    return last if last in ("torch", "endpoint") else "onnxruntime-genai"


def about(variant: str) -> str:
    """A variant in words."""
    first, _, form = variant.partition("-")
    who = {
        "teacher": "the teacher",
        "student": "the distilled student",
        "unpruned": "the student before it was pruned",
        "whole": "the student before its vocabulary was trimmed",
        "nearest": "the student with its weights rounded each alone",
        "few": "the student without the teacher, on its few gold labels",
        "all": "the student without the teacher, on all gold labels",
    }.get(first, first)
    where = {"torch": "PyTorch, as trained", "endpoint": "remote, as served"}.get(form, f"{SAME_RUNTIME}, {form}")
    found = forms.of(form)
    if found is not None:
        where = f"{found.title}, {forms.split(form)[1]}"
    elif form.startswith("olive-"):
        where = f"{SAME_RUNTIME}, converted by Olive, {form.removeprefix('olive-')}"
    return f"{who}; {where}"


def _order(variant: str) -> tuple[int, str]:
    names = (
        "teacher-endpoint",
        "teacher-torch",
        "teacher-fp32",
        "student-fp32",
        "unpruned",
        "whole",
        "nearest",
        "student",
        "few",
        "all",
    )
    return next((i for i, start in enumerate(names) if variant.startswith(start)), len(names)), variant


def _estimate(interval: s.Interval | None) -> r.Estimate:
    if interval is None or not math.isfinite(interval.value):
        return r.Estimate(value=None)
    high = interval.high if math.isfinite(interval.high) else None
    return r.Estimate(value=interval.value, low=interval.low if high is not None else None, high=high)


def _scaled(interval: s.Interval, factor: float) -> r.Estimate:
    return r.Estimate(value=interval.value * factor, low=interval.low * factor, high=interval.high * factor)


def score_of(rows: Sequence[Prediction], metric: Metric, task: Task, labels: Sequence[str]) -> s.Score:
    """A metric of one model's answers."""
    golds, answers = [row.gold for row in rows], [row.answer for row in rows]
    if metric == "macro_f1":
        return s.MacroF1Score(golds, answers)
    return s.RatioScore(m.columns(metric, golds, answers, task, labels))


def difference_of(paired: s.Paired, metric: str, n: int) -> r.Difference:
    """A paired comparison as it stands in reports."""
    d = paired.difference
    return r.Difference(
        metric=metric, n=n, value=d.value, low=d.low, high=d.high, better=paired.better,
        worse=paired.worse, p=paired.p, test=paired.test, detectable=paired.detectable,
    )  # fmt: skip


def memory_ratio(before: Sequence[float], after: Sequence[float]) -> r.Estimate:
    """One minus the ratio of mean memory over the baseline, bytes per round; the interval is the widest of the rounds.

    Memory below the baseline counts as none. Null where there is nothing to divide, without ends for a single round.
    """
    if not before or not after or min(before) <= 0:
        return r.Estimate(value=None)
    rest = [max(0.0, part) for part in after]
    value = 1 - s.spread(rest)[0] / s.spread(before)[0]
    if len(before) == 1 or len(rest) == 1:
        return r.Estimate(value=value)
    return r.Estimate(value=value, low=1 - max(rest) / min(before), high=1 - min(rest) / max(before))


class _Assessment:
    def __init__(self, task: Task, evaluate: Evaluate, shipped: str, material: Material, seed: int) -> None:
        self.task, self.evaluate, self.shipped, self.material, self.seed = task, evaluate, shipped, material, seed
        self.metrics = m.metrics_for(task, evaluate.metrics, evaluate.gates)
        self.primary = self.metrics[0]
        self.variants = sorted(material.predictions, key=_order)
        self.rows = material.predictions[shipped]
        self.n = len(self.rows)
        self.bootstrap = s.Bootstrap(self.n, evaluate.resamples, seed)
        self._scores: dict[tuple[str, str], s.Score] = {}
        self._timings = {
            variant: s.Timings(measured.total_s)
            for variant, measured in (material.measurement.variants if material.measurement else {}).items()
            if measured.total_s
        }
        self.notes: list[str] = []

    def report(self, name: str, version: str) -> r.Report:
        comparisons = self.comparisons()
        variants = tuple(self.variant(v) for v in self.variants)
        headline = self.headline(comparisons)
        gates = judge_gates(self.evaluate.gates, variants, comparisons, headline, self.shipped, self.n)
        verdict, says = summary(gates)
        wrong, wrong_count = self.wrong()
        return r.Report(
            subject=r.Subject(name=name, version=version, variant=self.shipped),
            task=self.task,
            verdict=verdict,
            says=says,
            metric=self.primary,
            n_test=self.n,
            confidence=self.evaluate.confidence,
            resamples=self.evaluate.resamples,
            headline=headline,
            gates=gates,
            variants=variants,
            comparisons=comparisons,
            hops=self.material.hops,
            no_teacher_baseline=r.NoTeacher(few=self.baseline("few"), all=self.baseline("all")),
            data=data_summary(self.material.info),
            synthesis=synthesis(self.material.synthesis),
            self_check=dict(self.material.self_check) if self.material.self_check else None,
            training=training(self.material.training),
            confusions=confusions(self.rows, self.teacher_rows) if self.task.type == "classification" else (),
            wrong=wrong,
            wrong_count=wrong_count,
            environment=self.environment(),
            notes=tuple(self.notes),
        )

    # Scores

    @cached_property
    def labels(self) -> list[str]:
        if self.task.labels is not None:
            return list(self.task.labels)
        return list(self.material.info.get("labels") or sorted({row.gold.strip() for row in self.rows}))

    def score(self, variant: str, metric: Metric) -> s.Score:
        key = (variant, metric)
        if key not in self._scores:
            self._scores[key] = score_of(self.material.predictions[variant], metric, self.task, self.labels)
        return self._scores[key]

    def scored(self, variant: str, metric: Metric) -> r.Score:
        score = self.score(variant, metric)
        n = int((score.below > 0).sum()) if isinstance(score, s.RatioScore) else self.n
        estimate = _estimate(s.score_interval(score, self.bootstrap, self.evaluate.confidence))
        return r.Score(value=estimate.value, low=estimate.low, high=estimate.high, n=n)

    def paired(self, reference: str, candidate: str) -> s.Paired:
        first, second = self.score(reference, self.primary), self.score(candidate, self.primary)
        return s.compare_scores(first, second, self.bootstrap, self.evaluate.confidence)

    # Variants

    def variant(self, name: str) -> r.Variant:
        rows = self.material.predictions[name]
        tokens = [row.tokens for row in rows if row.tokens is not None]
        converted = self.material.converted.get(name)
        return r.Variant.model_validate(
            {
                "name": name,
                "role": role(name),
                "runtime": runtime(name),
                "about": about(name),
                "scores": {metric: self.scored(name, metric) for metric in self.metrics},
                "fields": self.fields(rows) if self.task.type == "extraction" else (),
                "unfinished": sum(1 for row in rows if not row.finished),
                "mean_answer_tokens": sum(tokens) / len(tokens) if tokens else None,
                "file_bytes": converted.file_bytes if converted else None,
                "folder_bytes": converted.folder_bytes if converted else None,
                "latency": self.latency(name),
                "memory": self.memory(name),
                "fidelity": dict(converted.fidelity) if converted and converted.fidelity else None,
            }
        )

    def fields(self, rows: Sequence[Prediction]) -> tuple[r.FieldScore, ...]:
        totals: dict[str, list[int]] = {}
        for row in rows:
            for field, counts in m.field_counts(row.gold, row.answer).items():
                total = totals.setdefault(field, [0, 0, 0])
                for i, part in enumerate(counts):
                    total[i] += part
        scores = [
            r.FieldScore(field=field or "(whole answer)", n=hit + missed, f1=2 * hit / (2 * hit + extra + missed))
            for field, (hit, extra, missed) in totals.items()
        ]
        asked = [score for score in scores if score.n]
        return tuple(sorted(asked, key=lambda f: (f.f1, -f.n, f.field))[:FIELDS_SHOWN])

    def latency(self, name: str) -> r.Latency | None:
        timings = self._timings.get(name)
        if timings is None or self.material.measurement is None:
            return None
        measured = self.material.measurement.variants[name]
        first = s.Timings(measured.first_token_s) if measured.first_token_s else timings

        def quantile(of: s.Timings, share: float | None) -> r.Estimate:
            e = self.evaluate
            return _scaled(s.time_quantile(of, share, e.confidence, e.resamples, self.seed), 1000)

        return r.Latency(
            prompts=timings.seconds.shape[1],
            rounds=timings.seconds.shape[0],
            p50_ms=quantile(timings, 0.5),
            p95_ms=quantile(timings, 0.95),
            mean_ms=quantile(timings, None),
            first_token_p50_ms=quantile(first, 0.5),
            first_token_p95_ms=quantile(first, 0.95),
            mean_tokens=sum(measured.tokens) / len(measured.tokens) if measured.tokens else None,
        )

    def memory(self, name: str) -> r.Memory | None:
        measured = self.material.measurement.variants.get(name) if self.material.measurement else None
        if measured is None or not measured.peak_bytes:
            return None
        value, low, high = s.spread(measured.over_baseline)
        return r.Memory(
            over_baseline_bytes=r.Estimate(value=value, low=low, high=high),
            peak_bytes=sum(measured.peak_bytes) / len(measured.peak_bytes),
            baseline_bytes=sum(measured.baseline_bytes) / len(measured.baseline_bytes),
        )

    # Comparisons

    def comparisons(self) -> tuple[r.Comparison, ...]:
        has = set(self.variants)
        precision = self.shipped.rpartition("-")[2]
        nearest, whole = f"nearest-{precision}", f"whole-{precision}"
        own = next((v for v in ("teacher-torch", "teacher-endpoint") if v in has), None)
        wanted = [
            ("distilling", "teacher-fp32", "student-fp32"),
            ("quantising", "student-fp32", self.shipped),
            ("pruning", f"unpruned-{precision}", next((v for v in (whole, nearest) if v in has), self.shipped)),
            ("trimming", whole, nearest if nearest in has else self.shipped),
            ("calibrating", nearest, self.shipped),
            ("both", "teacher-fp32", self.shipped),
            ("as_shipped", own, self.shipped),
        ]
        return tuple(
            self.comparison(name, before, after)
            for name, before, after in wanted
            if before is not None and before in has and after in has and before != after
        )

    def comparison(self, name: str, reference: str, candidate: str) -> r.Comparison:
        paired = self.paired(reference, candidate)
        files = [self.material.converted.get(v) for v in (reference, candidate)]
        size = r.Estimate(value=None)
        if files[0] is not None and files[1] is not None and files[0].file_bytes:
            size = _exact(1 - files[1].file_bytes / files[0].file_bytes)
        return r.Comparison.model_validate(
            {
                "name": name,
                "reference": reference,
                "candidate": candidate,
                "accuracy": difference_of(paired, self.primary, self.n),
                "accuracy_retained": _estimate(paired.ratio),
                "time_reduction": self.time_reduction(reference, candidate),
                "memory_reduction": self.memory_reduction(reference, candidate),
                "size_reduction": size,
            }
        )

    def time_reduction(self, reference: str, candidate: str) -> r.Estimate:
        before, after = self._timings.get(reference), self._timings.get(candidate)
        if before is None or after is None or before.seconds.shape != after.seconds.shape:
            return r.Estimate(value=None)
        e = self.evaluate
        return _estimate(s.time_ratio(before, after, e.confidence, e.resamples, self.seed).reduction())

    def memory_reduction(self, reference: str, candidate: str) -> r.Estimate:
        measured = self.material.measurement.variants if self.material.measurement else {}
        before = measured[reference].over_baseline if reference in measured else ()
        after = measured[candidate].over_baseline if candidate in measured else ()
        return memory_ratio(before, after)

    def headline(self, comparisons: Sequence[r.Comparison]) -> r.Headline:
        by_name = {c.name: c for c in comparisons}
        main = by_name.get("both") or by_name.get("as_shipped")
        sure = f"{percent(self.evaluate.confidence, 0)}"
        absent = "not measured: there is no teacher to compare with"
        missing = r.Figure(value=None, basis=absent)
        time = memory = accuracy = missing
        if main is None:
            self.notes.append("There is no teacher, so nothing is compared with one.")
        else:
            pair = f"{main.candidate} against {main.reference}"
            remote = main.reference == "teacher-endpoint"
            where = f"both in {SAME_RUNTIME}, same threads" if main.name == "both" else "each as it is served"
            accuracy = _figure(
                main.accuracy_retained,
                f"{self.primary} of {main.candidate} divided by that of {main.reference} on the same {self.n:,} test "
                f"examples, {where}; {sure} paired bootstrap interval",
            )
            if main.time_reduction.value is None:
                why = "the remote teacher" if remote else main.reference
                time = r.Figure(value=None, basis=f"not measured: there are no timings of {why}")
            else:
                timed = self._timings[main.candidate].seconds.shape
                time = _figure(
                    main.time_reduction,
                    f"{pair}: mean time per response over {count(timed[1], 'test prompt')}, one at a time, median of "
                    f"{count(timed[0], 'round')}, {where}; {sure} bootstrap interval over prompts and rounds",
                )
            if main.memory_reduction.value is None:
                why = "a remote teacher's memory cannot be seen" if remote else "no memory was measured for both"
                memory = r.Figure(value=None, basis=f"not measured: {why}")
            else:
                memory = _figure(main.memory_reduction, self._memory_basis(pair, where, main.memory_reduction))
            self.notes += [f.basis for f in (time, memory) if f.value is None]
        small, big = self.material.converted.get(self.shipped), self.material.converted.get("student-fp32")
        vs32 = vs16 = r.Figure(value=None, basis="not known: there is no fp32 file of the student")
        if small is not None and big is not None and big.file_bytes:
            vs32 = _figure(
                _exact(1 - small.file_bytes / big.file_bytes),
                f"model file of {self.shipped} ({small.file_bytes:,} bytes) against the same student's fp32 ONNX file "
                f"({big.file_bytes:,} bytes); exact",
            )
            half = big.weight_bytes / 2
            vs16 = _figure(
                _exact(1 - small.file_bytes / half),
                f"model file of {self.shipped} ({small.file_bytes:,} bytes) against half of the student's fp32 weight "
                f"bytes ({half:,.0f}), which is what its weights alone take in fp16; no fp16 file was made; exact",
            )
        return r.Headline(
            inference_time_reduction=time, memory_reduction=memory, accuracy_retained=accuracy,
            size_reduction_vs_fp32=vs32, size_reduction_vs_fp16=vs16,
        )  # fmt: skip

    def _memory_basis(self, pair: str, where: str, estimate: r.Estimate) -> str:
        how = "one fresh process each, so how sure it is is not known"
        if estimate.low is not None:
            how = "mean of fresh processes; the interval is the widest that the rounds allow, not a confidence interval"
        return f"{pair}: peak resident memory over that of the runtime alone, {where}; {how}"

    # Without the teacher

    def baseline(self, name: str) -> r.Baseline | None:
        variant = next((v for v in self.variants if v.startswith(f"{name}-")), None)
        if variant is None:
            return None
        labels = data_summary(self.material.info).counts.get({"few": "gold", "all": "oracle"}[name])
        trained_on = f"{count(labels, 'gold label')} alone"
        if name == "all":
            trained_on = f"gold labels for all {count(labels, 'training example') if labels else 'training examples'}"
        paired = self.paired(variant, self.shipped)
        d = paired.difference
        finding: r.Finding = "helped" if d.low > 0 else "hurt" if d.high < 0 else "no difference found"
        score = self.scored(variant, self.primary)
        value = score.value if score.value is not None else 0.0
        return r.Baseline(
            variant=variant, trained_on=trained_on, gold_labels=labels, metric=self.primary, value=value,
            low=score.low if score.low is not None else value, high=score.high if score.high is not None else value,
            difference=difference_of(paired, self.primary, self.n), finding=finding, says=_finding(name, finding, paired, trained_on),
        )  # fmt: skip

    # The rest

    @cached_property
    def teacher_rows(self) -> tuple[Prediction, ...] | None:
        names = ("teacher-fp32", "teacher-torch", "teacher-endpoint")
        return next((self.material.predictions[v] for v in names if v in self.variants), None)

    def wrong(self) -> tuple[tuple[r.Wrong, ...], int]:
        metric: Metric = "accuracy" if self.primary == "macro_f1" else self.primary
        score = self.score(self.shipped, metric)
        assert isinstance(score, s.RatioScore)
        lost = [i for i in range(self.n) if score.above[i] < score.below[i]]
        teacher = self.teacher_rows
        shown = sorted(lost, key=lambda i: self.rows[i].id)[:WRONG_SHOWN]
        return (
            tuple(
                r.Wrong(
                    id=self.rows[i].id, prompt=shortened(self.rows[i].prompt, 600), gold=shortened(self.rows[i].gold, 600),
                    answer=shortened(self.rows[i].answer, 600),
                    teacher=shortened(teacher[i].answer, 600) if teacher is not None else None,
                )
                for i in shown
            ),
            len(lost),
        )  # fmt: skip

    def environment(self) -> dict[str, Any]:
        measurement = self.material.measurement
        out: dict[str, Any] = {"slmops": slmops.__version__, "python": platform.python_version()}
        if measurement is not None:
            out |= dict(measurement.environment)
            if measurement.threads is not None:
                out["threads"] = measurement.threads
        return out


def _exact(value: float) -> r.Estimate:
    return r.Estimate(value=value, low=value, high=value)


def _figure(estimate: r.Estimate, basis: str) -> r.Figure:
    return r.Figure(value=estimate.value, low=estimate.low, high=estimate.high, basis=basis)


def _finding(name: str, finding: r.Finding, paired: s.Paired, trained_on: str) -> str:
    d, same = paired.difference, "the same student"
    if finding == "no difference found":
        return (
            f"The shipped student and {same} trained on {trained_on} differ by {points(d.value)} points "
            f"({points(d.low)} to {points(d.high)}): no difference found. This test set would show one of "
            f"{points(paired.detectable).lstrip('+')} points or more."
        )
    ends = sorted((abs(d.low), abs(d.high)))
    amount = f"{_plain(abs(d.value))} points ({_plain(ends[0])} to {_plain(ends[1])})"
    if finding == "helped":
        end = ": the teacher helped." if name == "few" else ": distilling gained more than those labels do."
        return f"The shipped student scores {amount} more than {same} trained on {trained_on}{end}"
    end = ": the teacher did harm." if name == "few" else ": where those labels can be had, they beat the teacher."
    return f"The shipped student scores {amount} less than {same} trained on {trained_on}{end}"


def _plain(share: float) -> str:
    return f"{100 * share:.1f}"
