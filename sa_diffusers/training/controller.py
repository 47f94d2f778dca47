"""What lets a run measure itself, tune what protects, and stop when it is done."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..configuration import SelectiveAmnesiaConfig
from ..families.base import Denoiser
from ..processes import say
from .probes import Probes, Reading

# Below this share of what drift is measured in, there is nothing of a concept to forget.
_NOTHING_TO_MEASURE = 0.05
_PROBED_SHARE = 0.15
_PASSES = 2
# Images are looked at after so many steps at the latest, and again when there are so many times as many.
_FIRST_LOOK = 120
_NEXT_LOOK = 1.5
# What the target says where nobody sets another: when images are worth a look.
_DEFAULT_TARGET = SelectiveAmnesiaConfig.forget_target or 1.0
# So many looks in a row have to agree. In the last one of 60 images may show the concept, in those before one of 40:
# with none, what stays at one in a hundred would be looked at for ever.
_ONE_OF, _ONE_OF_EARLIER = 60, 40
_LOOKS = 3
# With each of them what protects weighs so many times heavier, as long as more is forgotten than the target asks and
# the rest has drifted: what went along comes back. Where the concept did too, it is the root of that from then on.
_GIVEN_BACK = 8.0
# A surrogate may ask for so many times what a prompt changes. Where it asks for more, as noise does of a diffusion
# model that a class changes little, all that protects weighs as much more from the first step on.
_MOST_ASKED = 12.0
# What protects may be weighed so many times heavier than at first, and EWC so many times lighter.
_HEAVIEST, _LIGHTEST = 32.0, 8.0
# It is weighed twice as heavy at the most in one reading, and in so many steps.
_DOUBLING_STEPS = 32
# So fast that so many steps multiply the weight by how much the drift exceeds its tolerance.
_BALANCE_STEPS = 50
# Steps in a row at the heaviest weight in which drift does not become less, until the wishes are given up.
_PATIENCE = 300
_LESS = 0.95
# Of drift that is so many times what is tolerated only the half is less: at a twentieth every 300 steps it would take
# thousands to get there.
_HOPELESS, _MUCH_LESS = 10.0, 0.5
# As many in which no more is forgotten than so much of what is left, though the learning rate is the highest, or does
# not rise as next to nothing is left.
_GAIN = 0.05
_FEWEST_BETWEEN = 10
# What is left to forget is to be forgotten in so many steps, or the learning rate rises, unless it is as little as
# this: no rate makes that less in time, and a high one broke a model that was nearly done.
_WISHED_STEPS, _LITTLE = 75, 0.05
# What the rate that Prodigy finds is multiplied by, at first and at the most. At the whole of it neighbours of a taxi
# drifted in the first fifty steps by what hundreds did not bring back.
_FIRST_PACE, _FASTEST = 0.5, 8.0
# Drift, in units of its tolerance, up to which the learning rate may rise, and from which it falls.
_NEAR, _FAR = 0.5, 1.5
# Gradients longer than so many times the median of the last norms are clipped to that.
_CLIPPED = 3.0
_REMEMBERED_NORMS = 25
_DAMPING = 0.5
_MOST_CALIBRATED = 30.0


def step_cost(config: SelectiveAmnesiaConfig, rows: int) -> int:
    """What a step of so many samples takes, in forward passes: the student's forward and backward, which counts twice,
    and the teacher's."""
    return rows * (4 if config.target == "frozen" else 3)


def scheduled_looks(first: int, last: int) -> int:
    """How often images are looked at after these steps, as long as they disagree."""
    count, step = 0, _FIRST_LOOK
    while step <= last:
        count += step >= first
        step = math.ceil(_NEXT_LOOK * step)
    return count


def steps_between(predictions: int, step_cost: int) -> int:
    """Steps between two readings of the probes, so that they take no more than their share of a run."""
    return max(_FEWEST_BETWEEN, math.ceil(predictions / (_PROBED_SHARE * step_cost)))


def refuse_nothing(probes: Probes) -> None:
    """Refuse a pair of which there is nothing to forget that probes could see.

    Args:
        probes: The frozen model has predicted for them.

    Raises:
        ValueError: There is nothing to measure.
    """
    concept, share = probes.weakest()
    if share < _NOTHING_TO_MEASURE:
        raise ValueError(
            f'nothing to measure: what the model predicts for "{concept}" and for its surrogate differs by '
            f"{share:.1%} of what a prompt changes. The model does not know the concept, or the surrogate looks "
            "the same to it: choose another, or train without probes (num_probe_images 0, and an ewc_weight or ewc 0)"
        )


@dataclass
class Verdict:
    """What a run says of itself when it ends.

    Attributes:
        done: Whether the rest had not drifted and images agreed; without a check, whether both wishes held.
        sentence: What held, what did not, and what to try.
    """

    done: bool
    sentence: str


@dataclass
class Control:
    """What a controller goes on from; all of it is kept in checkpoints.

    Attributes:
        calibrated: Loss that a unit of the penalty stands for, as it was first measured; None before.
        ewc_scale: The same, as it was measured last.
        balance: What replay and EWC are multiplied by, from 1 on.
        ease: What EWC is multiplied by besides, up to 1: less while nothing drifts and the concept is not forgotten.
        passes: Readings in a row for which both wishes held.
        target: Of forgetting; it rises when images disagree with the probes.
        look: The step from which images are looked at, whatever is forgotten, if the rest has not drifted.
        agreed: Looks in a row in which no image, or next to none, showed the concept.
        usual: What `balance` was before the first of them.
        given_back: What it is multiplied by with each of them.
        least: The least drift at the heaviest weight so far.
        at_bound: Steps in a row at the heaviest weight in which it has not become less.
        most: The most that was forgotten, to within what counts as more.
        stalled: Steps in a row in which no more was forgotten, at the highest learning rate or with next to all gone.
        norms: Gradient norms of the last steps.
        readings: For every reading its step and figures.
        checks: For every sampled check its step, and how many of its images still showed a concept.
        rate: The learning rate that the excursion found; None where it is given.
        pace: What it is multiplied by: more while nothing drifts and the concept is not forgotten.
        near: Prompts of the replay set that drifted most in the excursion.
        probed: The same of the probes' prompts.
    """

    calibrated: float | None = None
    ewc_scale: float = 0.0
    balance: float = 1.0
    ease: float = 1.0
    passes: int = 0
    target: float = 0.0
    look: int = 0
    agreed: int = 0
    usual: float = 1.0
    given_back: float = _GIVEN_BACK
    least: float | None = None
    at_bound: int = 0
    most: float | None = None
    stalled: int = 0
    norms: list[float] = field(default_factory=list)
    readings: list[dict[str, float]] = field(default_factory=list)
    checks: list[dict[str, float]] = field(default_factory=list)
    rate: float | None = None
    pace: float = _FIRST_PACE
    near: list[str] = field(default_factory=list)
    probed: list[str] = field(default_factory=list)


class Controller:
    """Reads the probes, balances forgetting against drift, and says when to stop.

    Nothing in it depends on the size of the loss or of the gradient: losses are in units of drift, the weight of the
    EWC term is what its penalty was measured to stand for, and gradients are clipped by their own running median.

    Args:
        probes: What is measured.
        config: Settings of the training.
        check: Samples a few images and says how many still show a concept, and of how many, given how many times it has
            been asked before and whether the training would stop by them; None leaves it out.
        step_cost: Network evaluations of a step, backward passes counted twice.
        mistaken: The share of images that the check does not count, as so many of the surrogate's look so too.

    Attributes:
        surplus: What all that protects is multiplied by besides, from 1 on: the more, the more the surrogates ask for.
    """

    def __init__(
        self,
        probes: Probes,
        config: SelectiveAmnesiaConfig,
        check: Callable[[int, bool], tuple[int, int]] | None,
        step_cost: int,
        mistaken: float = 0.0,
    ) -> None:
        self.probes = probes
        self.config = config
        self.check = check
        self.state = Control(target=config.forget_target or 1.0, look=_FIRST_LOOK)
        self.verdict: Verdict | None = None
        self.surplus = 1.0
        self._step_cost = step_cost
        self._mistaken = mistaken

    @property
    def every(self) -> int:
        """Steps between two readings."""
        return steps_between(self.probes.predictions, self._step_cost)

    @property
    def loss_scale(self) -> float:
        """What losses are divided by: so they are in units of drift, and no larger where what protects weighs more.

        A gradient that is eight times as long all at once is a learning rate that is too high, until the optimiser has
        got used to it: what was to come back drifted the farther.
        """
        return self.probes.denominator * (1 + self.state.balance) / 2

    @property
    def replay_weight(self) -> float:
        fixed = self.config.replay_weight
        return self.state.balance * self.surplus if fixed is None else fixed

    @property
    def ewc_weight(self) -> float:
        fixed = self.config.ewc_weight
        state = self.state
        return self.surplus * state.balance * state.ease * self.config.ewc * state.ewc_scale if fixed is None else fixed

    def begin(self, teacher: Denoiser) -> None:
        """Predict with the frozen model.

        Raises:
            ValueError: There is nothing to measure.
        """
        self.probes.prepare(teacher)
        if self.config.naive:
            return
        refuse_nothing(self.probes)
        self.surplus = max(1.0, self.probes.asked() / _MOST_ASKED)

    def calibrate(self, module: Denoiser, penalty: float) -> None:
        """Set the weight of the EWC term by what its penalty stands for, after an excursion without it.

        Args:
            module: The module as the excursion left it.
            penalty: `sum F (theta - theta*)^2` there.
        """
        self._calibrate(self.probes.read(module), penalty)
        self.state.calibrated = self.state.ewc_scale

    def _calibrate(self, reading: Reading, penalty: float) -> None:
        if not (penalty > 0 and reading.rise > 0 and math.isfinite(reading.rise / penalty)):
            return
        measured, state = reading.rise / penalty, self.state
        if state.calibrated:
            low, high = state.calibrated / _MOST_CALIBRATED, state.calibrated * _MOST_CALIBRATED
            measured = min(max(measured, low), high)
            state.ewc_scale = state.ewc_scale ** (1 - _DAMPING) * measured**_DAMPING
        else:
            state.ewc_scale = measured

    def clip(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        """Clip the gradient to a multiple of its norm's running median, or to the given norm; returns the norm."""
        limit, norms = self.config.max_grad_norm, self.state.norms
        if limit is None:
            limit = _CLIPPED * sorted(norms)[len(norms) // 2] if len(norms) >= 5 else math.inf
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        if torch.isfinite(norm):
            self.state.norms = [*norms, norm.item()][-_REMEMBERED_NORMS:]
        return norm

    def due(self, step: int) -> bool:
        """Whether the probes are to be read after a step (from 1)."""
        return step % self.every == 0

    def after(self, step: int, module: Denoiser, penalty: float | None, last: bool) -> bool:
        """Read the probes, balance, and say whether the training ends.

        Args:
            step: From 1.
            module: With the weights that would be saved.
            penalty: `sum F (theta - theta*)^2` of them; None without an EWC term.
            last: Whether the step limit is reached.
        """
        state, config = self.state, self.config
        reading = self.probes.read(module)
        if not all(map(math.isfinite, reading.values().values())):
            # Half precision may overflow for once; the gradient tells of a model that is broken.
            state.passes = 0
            if last and config.stops:
                self.verdict = Verdict(False, f"at the limit of {step} steps: what the model predicts is not finite")
            return False
        if penalty is not None:
            self._calibrate(reading, penalty)
        state.readings.append({"step": step, **reading.values(), "balance": state.balance})
        forget, tolerate = config.forget_target, config.drift_tolerance
        if forget is None or tolerate is None or config.naive:
            return False
        forgotten = reading.worst_forgotten >= state.target
        kept = reading.worst_drift <= tolerate
        self._weigh(reading.worst_drift / tolerate, forgotten)
        self._hurry(reading.worst_drift / tolerate)
        self._wait(reading.worst_forgotten, kept and reading.tells_of_all)
        state.passes = state.passes + 1 if forgotten and kept else 0
        # With all forgotten that they can tell of, and images that disagree, they have no more to say on when to look.
        is_content = state.passes >= _PASSES and not (state.checks and state.target >= 1)
        looks = self.check is not None and kept and self._is_asked(reading) and (
            step >= state.look or state.agreed > 0
        )  # fmt: skip
        looks_now = (is_content or looks) and not self._is_giving_back(step, reading)
        if looks_now and self._images_agree(step, reading, is_content):
            self.verdict = Verdict(
                True,
                f"forgotten {reading.worst_forgotten:.2f} (target {state.target:g}), drift {reading.worst_drift:.3f} "
                f"(tolerance {tolerate:g}){self._seen()}, after step {step}",
            )
            return True
        if state.at_bound >= _PATIENCE and not last:
            self.verdict = Verdict(False, self._open(reading, f"after step {step} with all that protects at its "
                                                              "heaviest, both cannot be had"))  # fmt: skip
            return True
        if state.stalled >= _PATIENCE and not last and not (kept and state.agreed):
            rate = "with the highest learning rate " if state.pace >= _FASTEST else ""
            others = ["a smaller ewc"] if config.consolidates and config.ewc_weight is None else []
            others += ["train_method full"] if config.train_method != "full" else []
            others += [] if self._is_asked(reading) else ["a smaller forget_target"]
            when = f"after step {step}, as {rate}no more is forgotten"
            self.verdict = Verdict(False, self._open(reading, when, *others))
            return True
        if last:
            excess = reading.worst_drift / tolerate
            more = [] if excess > _HOPELESS and state.balance >= _HEAVIEST else ["more steps (max_train_steps)"]
            self.verdict = Verdict(False, self._open(reading, f"at the limit of {step} steps", *more))
        return False

    def _is_asked(self, reading: Reading) -> bool:
        """Whether images may end the run: a target beyond the default's is a wish of its own."""
        return self.config.forget_target <= _DEFAULT_TARGET or reading.worst_forgotten >= self.config.forget_target

    def _open(self, reading: Reading, when: str, *further: str) -> str:
        """What did not hold, and what to try; further advice comes last."""
        config, checks = self.config, self.state.checks
        wishes, advice = [], []
        if not reading.worst_forgotten >= config.forget_target:
            wishes.append(f"forgotten is {reading.worst_forgotten:.2f}, {config.forget_target:.2f} was asked for")
        if self._disagree:
            seen = checks[-1]
            wishes.append(f"{seen['showing']} of {seen['images']} images still showed it after step {seen['step']}")
        # Of few steps nobody knows; nothing is less like a concept than noise.
        can_tell = self._disagree or self.state.readings[-1]["step"] >= _PATIENCE
        has_drifted = not reading.worst_drift <= config.drift_tolerance
        by_hand = self._by_hand(has_drifted) if wishes or has_drifted else []
        if by_hand:
            advice.append(f"no {' and no '.join(by_hand)} (a run finds its own)")
        # With next to nothing forgotten it is they that hold it.
        held = by_hand and reading.worst_forgotten <= _LITTLE
        if wishes and can_tell and not held and set(config.surrogate) != {"uniform_noise"}:
            advice.append("a surrogate that is less like the concept")
        if has_drifted:
            wishes.append(f"drift is {reading.worst_drift:.3f}, {config.drift_tolerance:g} is tolerated")
            advice.append("a larger drift_tolerance")
        if not wishes:
            wishes.append("both wishes have held for too few readings")
        advice += further
        return f"{when}: {', and '.join(wishes)}" + (f". Try {', or '.join(advice)}" if advice else "")

    def _by_hand(self, has_drifted: bool) -> list[str]:
        """What was given by hand, for one model, that may be why a wish is open."""
        values = {name: getattr(self.config, name) for name in ("learning_rate", "ewc_weight", "replay_weight")}
        # A term that is left out holds no concept.
        return [name for name, value in values.items() if value is not None and (value or has_drifted)]

    @property
    def _balances(self) -> bool:
        """Whether anything that protects is not weighed by the user."""
        config = self.config
        return config.replay_weight is None or (config.ewc_weight is None and bool(config.ewc))

    def _weigh(self, excess: float, forgotten: bool) -> None:
        """One multiplier for all that protects: up where the rest drifts too far, down where there is room."""
        state = self.state
        if not self._balances:
            return
        if state.agreed and not forgotten:
            state.balance = min(state.balance, state.usual)
        least = 1.0 if state.agreed and forgotten else 0.5
        factor = max(excess, 1e-3) ** (self.every / _BALANCE_STEPS)
        wanted = state.balance * min(max(factor, least), max(2.0, 2 ** (self.every / _DOUBLING_STEPS)))
        state.balance = min(max(wanted, 1.0), _HEAVIEST)
        if state.balance < _HEAVIEST or excess <= 1:
            state.at_bound, state.least = 0, None
        elif state.least is None or excess < (_MUCH_LESS if excess > _HOPELESS else _LESS) * state.least:
            state.at_bound, state.least = 0, excess
        else:
            state.at_bound += self.every

    def _hurry(self, excess: float) -> None:
        """The learning rate: up while the concept is forgotten too slowly and nothing drifts, down where it drifts on.

        EWC goes the other way: where it holds the concept too, no learning rate moves it.
        """
        state, factor = self.state, 2 ** min(self.every / _BALANCE_STEPS, 1.0)
        if excess > _FAR and not self._comes_back():
            state.pace = max(state.pace / min(excess / _FAR, factor), 1 / _FASTEST)
        elif excess < _NEAR and self._is_slow():
            state.pace = min(state.pace * factor, _FASTEST)
            state.ease = max(state.ease / factor, 1 / _LIGHTEST)
        if excess > 1:
            state.ease = min(state.ease * factor, 1.0)

    def _is_giving_back(self, step: int, reading: Reading) -> bool:
        """Whether what was forgotten beyond need comes back: the last look is at what is left then.

        It takes some steps until what protects is felt, and no more where nothing comes of it.
        """
        state = self.state
        has_drifted = reading.worst_drift > _NEAR * self.config.drift_tolerance
        if state.agreed < _LOOKS - 1 or not has_drifted or state.balance <= state.usual:
            return False
        return step - state.checks[-1]["step"] < _BALANCE_STEPS or self._comes_back()

    def _comes_back(self) -> bool:
        """Whether drift has become less: what protects takes it back, as fast as the learning rate lets it."""
        before, now = (_farthest(reading) for reading in ([{}, *self.state.readings])[-2:])
        return now < _LESS * before

    def _is_slow(self) -> bool:
        """Whether what is left to forget will take more steps than is wished."""
        state = self.state
        if len(state.readings) < 2:
            return False
        before, now = (reading["forgotten"] for reading in state.readings[-2:])
        # Where images still show the concept, the target is known to be too low.
        left = (1.0 if self._disagree else state.target) - now
        return left > _LITTLE and (now - before) * _WISHED_STEPS < left * self.every

    def _wait(self, forgotten: float, may_be_done: bool) -> None:
        """Count the steps in which nothing more is forgotten, though the learning rate is as high as it may be, or so
        little is left that it does not rise."""
        state = self.state
        # Where images stand in the concept's place, more than all may be forgotten.
        is_more = state.most is None or max(1 - forgotten, 0.0) < (1 - _GAIN) * max(1 - state.most, 0.0)
        is_nearly_done = may_be_done and 1 - forgotten <= _LITTLE
        if is_more or not (state.pace >= _FASTEST or is_nearly_done) or self.config.learning_rate is not None:
            state.most, state.stalled = max(forgotten, forgotten if state.most is None else state.most), 0
        else:
            state.stalled += self.every

    def _images_agree(self, step: int, reading: Reading, is_content: bool) -> bool:
        if self.check is None:
            return True
        state, forgotten = self.state, reading.worst_forgotten
        is_last = state.agreed == _LOOKS - 1
        showing, count = self.check(len(state.checks), is_last)
        seen = {"step": step, "showing": showing, "images": count}
        state.checks.append(seen)
        state.look = math.ceil(_NEXT_LOOK * step)
        if showing <= count // (_ONE_OF if is_last else _ONE_OF_EARLIER):
            state.usual = state.usual if state.agreed else state.balance
            has_drifted = reading.worst_drift > _NEAR * self.config.drift_tolerance
            if self._balances and has_drifted and not showing and forgotten >= state.target:
                state.balance = min(state.balance * state.given_back, _HEAVIEST)
            state.agreed += 1
            return state.agreed >= _LOOKS
        if state.agreed:
            state.balance, state.given_back = min(state.balance, state.usual), math.sqrt(state.given_back)
        if is_content or (state.agreed and forgotten >= state.target):
            # The probes were too easily content: half of what is left must go.
            state.target = max(state.target, forgotten)
            state.target += (1 - state.target) / 2
        state.passes = state.agreed = 0
        if self.probes.accelerator.is_main_process:
            say(f"after step {step} {showing} of {count} images still show the concept: on")
        return False

    @property
    def _disagree(self) -> bool:
        """Whether too many images showed the concept when they were last looked at."""
        return bool(self.state.checks) and not self.state.agreed

    def _seen(self) -> str:
        checks = self.state.checks
        if not checks:
            return ""
        showing, count = (sum(check[name] for check in checks[-_LOOKS:]) for name in ("showing", "images"))
        besides = f" besides {100 * self._mistaken:.0f} %, as of the surrogate's" if self._mistaken else ""
        return f", {showing or 'none'} of {count} images {'show' if showing > 1 else 'shows'} it{besides}"

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self.state))

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        self.state = Control(**values)


def _farthest(reading: Mapping[str, float]) -> float:
    """The largest of what must not drift, of a reading's figures."""
    return max(reading.get("drift_p90", 0.0), reading.get("drift_neighbours", 0.0))
