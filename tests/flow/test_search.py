"""The search by itself: rules, studies in memory, resuming; no model is trained here."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.core.search import FIRST_LOOK, FIRST_WHOLE, Direction, Outcome, Range, Trial, dominates, front, hopeless
from slmops.core.step import Step
from slmops.errors import SlmopsError, UsageError
from slmops.flow.search_plan import merge
from slmops.flow.search_space import Dimension
from slmops.flow.search_study import Study, optimise

SPACE = (
    Dimension("rate", "number", Range(low=0.001, high=1.0, log=True)),
    Dimension("size", "whole", Range(low=1, high=9, step=2)),
    Dimension("way", "choice", Range(choices=("a", "b", {"deep": [1, None]}, True))),
)


def objective(trial: Trial) -> float:
    p = trial.parameters
    return abs(math.log10(p["rate"]) + 1.3) + abs(p["size"] - 5) / 8 + (0.0 if p["way"] == "b" else 0.3)


def evaluate(trials: Sequence[Trial], ended: Sequence[Trial]) -> Mapping[int, Outcome]:
    return {t.number: Outcome("complete", (objective(t),), (objective(t) + 1,)) for t in trials}


def searched(study: Study, trials: int, parallel: int = 1) -> tuple[Trial, ...]:
    optimise(study, trials, parallel, evaluate, lambda trial: None)
    return study.trials()


def parameters(trials: Sequence[Trial]) -> list[Mapping[str, object]]:
    return [trial.parameters for trial in trials]


# ------------------------------------------------------------------------------------------------------------- the rules


def test_giving_up_is_what_optunas_median_pruner_does() -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rng = random.Random(3)
    agreed = {True: 0, False: 0}
    for _ in range(60):
        pruner = optuna.pruners.MedianPruner(n_startup_trials=FIRST_WHOLE, n_warmup_steps=FIRST_LOOK)
        study = optuna.create_study(pruner=pruner)
        earlier = [[rng.uniform(0, 4) for _ in range(rng.randrange(3, 9))] for _ in range(rng.randrange(4, 9))]
        for curve in earlier:
            trial = study.ask()
            for look, loss in enumerate(curve, 1):
                trial.report(loss, look)
            study.tell(trial, curve[-1])
        trial, curve = study.ask(), []
        for look in range(1, 9):
            curve.append(rng.uniform(0, 4))
            trial.report(curve[-1], look)
            expected = trial.should_prune()
            assert hopeless(curve, earlier) == expected
            agreed[expected] += 1
    assert min(agreed.values()) > 30


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12))
def test_the_front_is_what_nobody_beats(values: list[tuple[int, int]]) -> None:
    ways: tuple[Direction, Direction] = ("maximize", "minimize")
    trials = [Trial(i, 0, {}, "complete", (float(a), float(b))) for i, (a, b) in enumerate(values)]
    trials.append(Trial(len(trials), 0, {}, "pruned"))
    best = front(trials, ways)
    for trial in trials[:-1]:
        beaten = any(dominates(other.values or (), trial.values or (), ways) for other in trials[:-1])
        twin = any(other.values == trial.values and other.number < trial.number for other in trials)
        assert (trial in best) == (not beaten and not twin)


def test_one_objective_has_one_best_and_the_first_of_equals_wins() -> None:
    trials = [Trial(i, 0, {}, "complete", (v,)) for i, v in enumerate((0.2, 0.9, 0.9, 0.1))]
    assert [t.number for t in front(trials, ("maximize",))] == [1]
    assert [t.number for t in front(trials, ("minimize",))] == [3]


# ------------------------------------------------------------------------------------------------------------ the studies


def test_values_keep_to_their_ranges_and_types() -> None:
    for trial in searched(Study("s", SPACE, ("minimize",)), 30):
        rate, size, way = (trial.parameters[key] for key in ("rate", "size", "way"))
        assert isinstance(rate, float) and 0.001 <= rate <= 1
        assert isinstance(size, int) and size in (1, 3, 5, 7, 9)
        assert any(way == choice and type(way) is type(choice) for choice in ("a", "b", {"deep": [1, None]}, True))


def test_the_sampler_learns() -> None:
    """The mean of three seeds: after 40 trials TPE has come nearer than chance."""
    best: dict[str, float] = {}
    for sampler in ("tpe", "random"):
        ends = [searched(Study("s", SPACE, ("minimize",), sampler=sampler, seed=s), 40) for s in (1, 2, 3)]
        best[sampler] = sum(min(t.values[0] for t in trials if t.values) for trials in ends) / 3
    assert best["tpe"] < best["random"]


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_same_seed_same_trials_other_seed_others(parallel: int, sampler: str) -> None:
    first, second, other = (
        searched(Study("s", SPACE, ("minimize",), sampler=sampler, seed=seed), 20, parallel) for seed in (5, 5, 6)
    )
    assert first == second
    assert parameters(first) != parameters(other)
    assert [t.batch for t in first] == [n - n % parallel for n in range(20)]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_search_that_is_killed_anywhere_has_the_same_trials(
    tmp_path: Path, parallel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before, within and after choosing, running and noting; every finished trial is run once."""
    untouched = searched(Study("s", SPACE, ("minimize",), seed=1), 14, parallel)
    url = f"sqlite:///{tmp_path / 's.db'}"
    ran: list[int] = []
    rng = random.Random(parallel)
    kills = 0

    def maybe() -> None:
        nonlocal kills
        if rng.random() < 0.1:
            kills += 1
            raise Killed

    import optuna

    def checked(name: str, owner: type) -> None:
        original = getattr(owner, name)

        def call(*args: object, **named: object) -> object:
            maybe()
            out = original(*args, **named)
            maybe()
            return out

        monkeypatch.setattr(owner, name, call)

    for name, owner in (("set_user_attr", optuna.Trial), ("suggest_int", optuna.Trial), ("tell", optuna.Study)):
        checked(name, owner)

    def run(trials: Sequence[Trial], ended: Sequence[Trial]) -> Mapping[int, Outcome]:
        maybe()
        ran.extend(t.number for t in trials)
        return evaluate(trials, ended)

    for _attempt in range(400):
        study = Study("s", SPACE, ("minimize",), seed=1, url=url)
        finished = {t.number for t in study.trials() if t.state != "running"}
        before = len(ran)
        try:
            optimise(study, 14, parallel, run, lambda trial: None)
            break
        except Killed:
            assert not finished & set(ran[before:]), "a finished trial ran again"
    assert kills > 8
    resumed = Study("s", SPACE, ("minimize",), seed=1, url=url).trials()
    assert resumed == untouched


def test_a_repeated_set_of_parameters_costs_nothing() -> None:
    space = (Dimension("way", "choice", Range(choices=("a", "b"))),)
    ran: list[Mapping[str, object]] = []

    def run(trials: Sequence[Trial], ended: Sequence[Trial]) -> Mapping[int, Outcome]:
        ran.extend(t.parameters for t in trials)
        return {t.number: Outcome("complete", (float(t.parameters["way"] == "b"),)) for t in trials}

    study = Study("s", space, ("maximize",))
    optimise(study, 12, 3, run, lambda trial: None)
    assert len(study.trials()) == 12 and len(ran) == 2
    for trial in study.trials():
        assert trial.values == (float(trial.parameters["way"] == "b"),)


def test_failures_and_given_up_trials_are_remembered_and_not_repeated() -> None:
    def run(trials: Sequence[Trial], ended: Sequence[Trial]) -> Mapping[int, Outcome]:
        kinds = (
            Outcome("failed", why="it broke"),
            Outcome("pruned", None, (3.0, 2.0)),
            Outcome("complete", (1.0,), (2.0,)),
        )
        return {t.number: kinds[t.number % 3] for t in trials}

    study = Study("s", SPACE, ("maximize",))
    optimise(study, 9, 1, run, lambda trial: None)
    states = [trial.state for trial in study.trials()]
    assert states == ["failed", "pruned", "complete"] * 3
    assert study.trials()[0].why == "it broke"
    assert study.trials()[1].curve == (3.0, 2.0)
    optimise(study, 9, 1, evaluate, lambda trial: pytest.fail("all have ended"))


def test_more_trials_go_on_where_the_search_was() -> None:
    study = Study("s", SPACE, ("minimize",))
    first = searched(study, 6)
    assert searched(study, 9)[:6] == first


def test_importance_names_what_matters() -> None:
    space = tuple(Dimension(key, "number", Range(low=0.0, high=1.0)) for key in ("big", "small"))

    def run(trials: Sequence[Trial], ended: Sequence[Trial]) -> Mapping[int, Outcome]:
        return {t.number: Outcome("complete", (t.parameters["big"] + t.parameters["small"] / 100,)) for t in trials}

    study = Study("s", space, ("minimize",), sampler="random")
    optimise(study, 5, 1, run, lambda trial: None)
    assert study.importance() == {}, "five trials do not tell"
    optimise(study, 40, 1, run, lambda trial: None)
    shares = study.importance()
    assert list(shares) == ["big", "small"] and shares["big"] > 0.7
    assert math.isclose(sum(shares.values()), 1)


def test_two_searches_on_the_same_trials_are_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    one, other = (Study("s", SPACE, ("minimize",), url=url) for _ in range(2))

    def slow(trials: Sequence[Trial], ended: Sequence[Trial]) -> Mapping[int, Outcome]:
        searched(other, 3)
        return evaluate(trials, ended)

    with pytest.raises(UsageError, match="another search is at work"):
        optimise(one, 3, 1, slow, lambda trial: None)


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////no/such/folder/x.db"])
def test_a_storage_that_does_not_work_says_so_without_its_address(url: str) -> None:
    with pytest.raises(SlmopsError) as caught:
        Study("s", SPACE, ("minimize",), url=url)
    assert "storage" in caught.value.message and url not in caught.value.message and caught.value.hint


# ----------------------------------------------------------------------------------------------------------------- plans


def test_trials_share_their_steps() -> None:
    def plan(data: int, rate: float) -> list[Step]:
        return [
            Step("data", "a", {"n": data}),
            Step("teacher", "b", {}, {"data": "data"}),
            Step("student", "b", {"rate": rate}, {"teacher": "teacher"}),
        ]

    merged = merge(plan(1, 0.1), {3: plan(1, 0.2), 4: plan(1, 0.2), 5: plan(1, 0.1), 6: plan(2, 0.1)})
    assert [s.id for s in merged.steps] == [
        "data",
        "teacher",
        "student@3",
        "student",
        "data@6",
        "teacher@6",
        "student@6",
    ]
    assert merged.names[4] == {"data": "data", "teacher": "teacher", "student": "student@3"}
    assert merged.trials_of("student@3") == [3, 4]
    assert merged.trials_of("data") == [3, 4, 5]
    by_id = {s.id: s for s in merged.steps}
    assert by_id["student@6"].inputs == {"teacher": "teacher@6"}
    for earlier, later in itertools.combinations(merged.steps, 2):
        assert later.id not in earlier.inputs.values(), "each comes after its inputs"
