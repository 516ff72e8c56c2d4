"""Who picks the parameters of trials and remembers what came of them: an Optuna study behind a few calls.

Promises: the parameters of a trial depend on the seed, its number and the trials that had ended when its batch was chosen,
not on time, process or machine; so a search that is killed and goes on has the same trials as one that was not. A trial
that has ended is never asked for again, one that was running when the search was killed is asked for first.

The sampler is made anew for each draw, seeded by trial and parameter (TPE, arXiv 2304.11127; trials of a batch that still run
count as bad ones, so that they keep apart). Storage is Optuna's: any SQLAlchemy URL, or memory.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slmops.core.digest import digest_text
from slmops.core.search import Direction, Outcome, Trial, TrialState
from slmops.errors import MissingExtraError, SlmopsError, UsageError
from slmops.flow.search_space import Dimension

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

FIRST_RANDOM = 10
"""So many trials are drawn at random before the sampler learns from them."""

BUSY = ("another search is at work on the same trials", "wait until it has ended, or end it; then run this one again")

BATCH, WHY = "slmops:batch", "slmops:why"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's notes on features that may change in later versions of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Study:
    """The trials of one search.

    Args:
        name: trials of one name in one storage belong together.
        space: the parameters.
        ways: the direction of each objective.
        url: where trials are kept; None: in memory.
        sampler: `tpe` or `random`.
        seed: seeds every choice.

    Raises:
        MissingExtraError: Optuna is not installed.
        UsageError: the storage cannot be opened.
    """

    def __init__(
        self, name: str, space: Sequence[Dimension], ways: Sequence[Direction], *,
        url: str | None = None, sampler: str = "tpe", seed: int = 0,
    ) -> None:  # fmt: skip
        try:
            import optuna
        except ImportError as error:
            raise MissingExtraError("optuna", "search") from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space, self.ways, self.sampler, self.seed = tuple(space), tuple(ways), sampler, seed
        self._sign = -1.0 if ways[0] == "maximize" else 1.0  # Optuna ranks trials that were given up by their losses
        self._distributions = {d.key: _distribution(d) for d in self.space}
        with _quiet(), _storage_errors():
            self._study = optuna.create_study(
                study_name=name, storage=url, directions=list(ways), load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(seed=0), pruner=optuna.pruners.NopPruner(),
            )  # fmt: skip

    def trials(self) -> tuple[Trial, ...]:
        """All trials so far, by number."""
        with _storage_errors():
            found = self._study.get_trials(deepcopy=False)
        return tuple(self._trial(frozen) for frozen in found)

    def batch(self, size: int, total: int) -> list[Trial]:
        """The trials to run now: those of a batch that was not finished, or else up to `size` new ones.

        Args:
            total: no more trials than this in all.

        Returns:
            Running trials by number; none if all have ended.
        """
        with _quiet(), _storage_errors():
            known = self._study.get_trials(deepcopy=False)
            running = [frozen for frozen in known if not frozen.state.is_finished()]
            start = min((f.user_attrs.get(BATCH, f.number) for f in running), default=len(known))
            chosen = [self._choose(f.number, start, f._trial_id) for f in running]
            if len(running) == len(known) - start:  # nobody of this batch has ended, so it may be filled up
                chosen += [self._choose(number, start) for number in range(len(known), min(total, start + size))]
        numbers = set(chosen)
        return [trial for trial in self.trials() if trial.number in numbers]

    def _choose(self, number: int, batch: int, id: int | None = None) -> int:
        """Give a trial its parameters; one that has them keeps them.

        Args:
            id: of a trial that is there already.
        """
        import optuna

        self._study.sampler = self._sampler(f"{number}")
        trial = self._study.ask() if id is None else optuna.trial.Trial(self._study, id)
        if trial.number != number:
            raise UsageError(*BUSY)
        trial.set_user_attr(BATCH, batch)
        _ = trial.relative_params  # what is drawn together is drawn now, whatever a killed search had noted of it
        for key, distribution in self._distributions.items():
            self._study.sampler = self._sampler(f"{number}:{key}")
            _suggest(trial, key, distribution)
        return number

    def _sampler(self, use: str) -> BaseSampler:
        """A sampler without a past: what it draws depends on the seed, the use and the trials in the storage."""
        from optuna.samplers import RandomSampler, TPESampler

        seed = int(digest_text(f"{self.seed}:{use}")[7:15], 16)
        if self.sampler == "random":
            return RandomSampler(seed=seed)
        return TPESampler(seed=seed, n_startup_trials=FIRST_RANDOM, constant_liar=True)

    def tell(self, number: int, outcome: Outcome) -> None:
        """Note how a trial ended."""
        import optuna
        from optuna.trial import TrialState as States

        with _quiet(), _storage_errors():
            frozen = self._study.get_trials(deepcopy=False)[number]
            if frozen.state.is_finished():
                raise UsageError(*BUSY)
            trial = optuna.trial.Trial(self._study, frozen._trial_id)
            if outcome.why:
                trial.set_user_attr(WHY, outcome.why)
            for look, loss in enumerate(outcome.curve) if len(self.ways) == 1 else ():
                if look not in frozen.intermediate_values:
                    trial.report(self._sign * loss, look)
            if outcome.state == "complete":
                self._study.tell(trial, list(outcome.values or ()))
            else:
                self._study.tell(trial, state=States.PRUNED if outcome.state == "pruned" else States.FAIL)

    def _trial(self, frozen: FrozenTrial) -> Trial:
        names: dict[str, TrialState] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
        state = names.get(frozen.state.name, "running")
        return Trial(
            number=frozen.number,
            batch=frozen.user_attrs.get(BATCH, frozen.number),
            parameters={d.key: _decoded(d, frozen.params[d.key]) for d in self.space if d.key in frozen.params},
            state=state,
            values=tuple(frozen.values) if state == "complete" else None,
            curve=tuple(self._sign * value for _look, value in sorted(frozen.intermediate_values.items())),
            why=frozen.user_attrs.get(WHY, ""),
        )

    def importance(self) -> dict[str, float]:
        """How much each parameter decides whether a trial is among the best, most first; shares that add up to 1.

        PED-ANOVA (arXiv 2304.10255). Empty where there are too few complete trials to say, or only one parameter.
        """
        import optuna

        done = [trial for trial in self.trials() if trial.state == "complete"]
        if len(done) < FIRST_RANDOM or len(self.space) < 2 or len({trial.values for trial in done}) < 2:
            return {}
        with _quiet(), _storage_errors():
            # Among the best fifth: of 20 trials that is four, of which a tenth would be two.
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.2)
            found = optuna.importance.get_param_importances(self._study, evaluator=evaluator)
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0]))) if any(found.values()) else {}


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    """Errors of the storage in our words; its address is not repeated, since it may hold a password."""
    from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except ImportError as error:
        hint = "for PostgreSQL: pip install 'psycopg[binary]'"
        raise UsageError("the database driver that search.storage needs is not installed", hint) from error
    except UpdateFinishedTrialError as error:
        raise UsageError(*BUSY) from error
    except (SQLAlchemyError, StorageInternalError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        text = (str(getattr(cause, "orig", None) or cause).strip().splitlines() or ["no reason given"])[0]
        raise SlmopsError(f"the storage of the search does not answer: {text}", "check search.storage") from None


def _encoded(value: Any) -> Any:
    """A choice as Optuna keeps it: plain values as they are, sections and lists as JSON."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False) if isinstance(value, dict | list | tuple) else value


def _decoded(dimension: Dimension, kept: Any) -> Any:
    if dimension.kind != "choice":
        return kept
    return next(
        choice for choice in dimension.ends if _encoded(choice) == kept and type(_encoded(choice)) is type(kept)
    )


def _distribution(dimension: Dimension) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    given = dimension.range
    if dimension.kind == "choice":
        return CategoricalDistribution([_encoded(choice) for choice in dimension.ends])
    assert given.low is not None and given.high is not None
    if dimension.kind == "whole":
        return IntDistribution(int(given.low), int(given.high), log=given.log, step=int(given.step or 1))
    return FloatDistribution(given.low, given.high, log=given.log, step=given.step)


def _suggest(trial: Any, key: str, distribution: BaseDistribution) -> None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(key, distribution.choices)
    elif isinstance(distribution, IntDistribution):
        trial.suggest_int(key, distribution.low, distribution.high, log=distribution.log, step=distribution.step)
    elif isinstance(distribution, FloatDistribution):
        trial.suggest_float(key, distribution.low, distribution.high, log=distribution.log, step=distribution.step)


Evaluate = Callable[[Sequence[Trial], Sequence[Trial]], Mapping[int, Outcome]]


def optimise(study: Study, trials: int, parallel: int, evaluate: Evaluate, told: Callable[[Trial], None]) -> None:
    """Run a search to its number of trials, batch by batch.

    Args:
        trials: how many there are to be in all, those of earlier runs included.
        parallel: how many are chosen and run together.
        evaluate: runs the trials of a batch, given all that ended before; sees each set of parameters once.
        told: is called for each trial when it has ended.
    """
    while batch := study.batch(parallel, trials):
        ended = {trial.number: trial for trial in study.trials() if trial.state != "running"}
        known = {
            _same(t): Outcome(t.state, t.values, t.curve) for t in ended.values() if t.state in ("complete", "pruned")
        }
        fresh: dict[str, Trial] = {}
        for trial in batch:
            if _same(trial) not in known:
                fresh.setdefault(_same(trial), trial)
        if fresh:
            found = evaluate(list(fresh.values()), [ended[number] for number in sorted(ended)])
            known |= {text: found[trial.number] for text, trial in fresh.items()}
        for trial in batch:  # in the order of their numbers, whichever ended first
            study.tell(trial.number, known[_same(trial)])
            told(study.trials()[trial.number])


def _same(trial: Trial) -> str:
    return json.dumps(trial.parameters, sort_keys=True)
