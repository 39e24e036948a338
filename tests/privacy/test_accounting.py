"""The accountant: published values, composition, the cost of a capacity, and its words."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys

import pytest

from tfdist.errors import ArgumentError
from tfdist.privacy import Ledger, Phase, capacity, epsilon, noise_multiplier, statement

MNIST = 256 / 60000


def quick(value):
    return pytest.param(value, marks=pytest.mark.quick)


def cost(q: float, noise: float, steps: int, delta: float = 1e-5, **options) -> float:
    return epsilon(
        sampling_probability=q, noise_multiplier=noise, steps=steps, delta=delta, **options
    )


class TestEpsilon:
    @pytest.mark.quick
    @pytest.mark.parametrize(
        ("q", "noise", "steps", "delta", "pld", "rdp"),
        [
            (0.01, 4, 10000, 1e-5, 0.947, 1.04),
            (0.01, 8, 1000, 1e-5, 0.125, 0.147),
            (0.1, 3, 512, 1e-6, 3.77, 4.05),
            (250 / 60000, 1.3, 3600, 1e-5, 0.853, 0.942),
        ],
    )
    def test_reference_values(self, q, noise, steps, delta, pld, rdp):
        assert cost(q, noise, steps, delta) == pytest.approx(pld, rel=0.01)
        assert cost(q, noise, steps, delta, accountant="rdp") == pytest.approx(rdp, rel=0.01)

    @pytest.mark.parametrize(
        ("q", "noise", "steps", "pld", "rdp"),
        [
            (MNIST, 1.1, 14100, 2.39, 2.60),
            (MNIST, 1.3, 3515, 0.864, 0.954),
            (MNIST, 0.7, 10546, 5.639, 6.319),
            (0.04, 1, 2250, 13.5, 14.67),
            (64 / 60000, 1, 9370, 0.494, 0.803),
        ],
    )
    def test_more_reference_values(self, q, noise, steps, pld, rdp):
        assert cost(q, noise, steps) == pytest.approx(pld, rel=0.01)
        assert cost(q, noise, steps, accountant="rdp") == pytest.approx(rdp, rel=0.01)

    @pytest.mark.quick
    @pytest.mark.parametrize(
        ("q", "noise", "steps", "delta", "rdp"),
        [
            (0.0025, 1.3, 6000, 1e-5, 0.7242),
            (0.001, 1.0, 30000, 1e-7, 1.4155),
            (0.04, 1.5, 2250, 1e-5, 7.3291),
        ],
    )
    def test_reference_values_of_rdp(self, q, noise, steps, delta, rdp):
        assert cost(q, noise, steps, delta, accountant="rdp") == pytest.approx(rdp, rel=0.01)

    def test_single_gaussian_is_exact(self):
        # One step on all examples: the analytic Gaussian mechanism (Balle and Wang, 2018).
        import dp_accounting

        for noise in (0.3, 1.0, 30.0):
            exact = dp_accounting.get_epsilon_gaussian(noise, 1e-5)
            received = cost(1.0, noise, 1)
            assert exact <= received * (1 + 1e-9)
            assert received == pytest.approx(exact, rel=0.01)

    @pytest.mark.quick
    def test_relations(self):
        added = cost(0.01, 4, 10000)
        assert cost(0.01, 4, 10000, relation="replace_special") == pytest.approx(added)
        assert 1.8 * added < cost(0.01, 4, 10000, relation="replace_one") < 2.3 * added

    @pytest.mark.quick
    def test_ends(self):
        assert cost(0.01, 0, 10) == math.inf
        assert cost(0.01, 0, 10, accountant="rdp") == math.inf
        assert cost(0.01, 1, 0) == 0
        assert cost(0, 0, 10) == 0

    @pytest.mark.quick
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"sampling_probability": 1.5}, "`sampling_probability` must be a number between"),
            ({"sampling_probability": None}, "Received: sampling_probability=None"),
            ({"noise_multiplier": -1}, "`noise_multiplier` must be a number of at least 0"),
            ({"noise_multiplier": math.nan}, "Received: noise_multiplier=nan"),
            ({"noise_multiplier": math.inf}, "Received: noise_multiplier=inf"),
            ({"steps": 1.5}, "`steps` must be a whole number of at least 0"),
            ({"steps": -1}, "Received: steps=-1"),
            ({"steps": True}, "Received: steps=True"),
            ({"delta": 0}, "`delta` must be a number above 0 and below 1. Received: delta=0"),
            ({"delta": 1}, "Received: delta=1"),
            ({"accountant": "moments"}, r"one of \('pld', 'rdp'\). Received"),
            ({"relation": "any"}, "`relation` must be one of"),
            ({"capacity": 5}, "`num_rows` must be given with `capacity`"),
            ({"capacity": 0, "num_rows": 9}, "`capacity` must be a whole number of at least 1"),
            ({"capacity": 5, "num_rows": 9, "accountant": "rdp"}, "Use accountant='pld'"),
            (
                {"relation": "replace_one", "accountant": "rdp"},
                "must be 'pld' for Poisson sampling",
            ),
        ],
    )
    def test_wrong_arguments(self, changes, message):
        good = {"sampling_probability": 0.1, "noise_multiplier": 1, "steps": 5, "delta": 1e-5}
        with pytest.raises(ArgumentError, match=message):
            epsilon(**(good | changes))


class TestNoiseMultiplier:
    @pytest.mark.parametrize("accountant", ["pld", quick("rdp")])
    @pytest.mark.parametrize("target", [0.2, 1.0])
    def test_reaches_the_target_and_no_more(self, accountant, target):
        options = {"sampling_probability": 0.01, "steps": 2000, "delta": 1e-5}
        options["accountant"] = accountant
        noise = noise_multiplier(target_epsilon=target, **options)
        assert 0.99 * target < epsilon(noise_multiplier=noise, **options) <= target
        assert epsilon(noise_multiplier=noise * 0.998, **options) > target

    @pytest.mark.full
    def test_large_and_small_targets(self):
        for target in (0.01, 50.0):
            options = {"sampling_probability": 0.02, "steps": 500, "delta": 1e-5}
            noise = noise_multiplier(target_epsilon=target, **options)
            assert 0.97 * target < epsilon(noise_multiplier=noise, **options) <= target

    @pytest.mark.full
    def test_with_a_capacity_that_costs_something(self):
        options = {"sampling_probability": 0.2, "steps": 10, "delta": 1e-5}
        options |= {"capacity": 14, "num_rows": 50}
        noise = noise_multiplier(target_epsilon=2.0, **options)
        assert 0.98 * 2.0 < epsilon(noise_multiplier=noise, **options) <= 2.0

    def test_what_was_spent_before_counts(self):
        spent = Ledger().add(Phase(0.01, 2.0, 1000))
        already = spent.epsilon(1e-5)
        options = {"sampling_probability": 0.01, "steps": 1000, "delta": 1e-5}
        noise = noise_multiplier(target_epsilon=2 * already, spent=spent, **options)
        together = spent.add(Phase(0.01, noise, 1000)).epsilon(1e-5)
        assert 0.99 * 2 * already < together <= 2 * already
        with pytest.raises(
            ArgumentError, match="must be above the epsilon of the steps before"
        ):
            noise_multiplier(target_epsilon=already, spent=spent, **options)

    @pytest.mark.quick
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"target_epsilon": 0}, "`target_epsilon` must be a number above 0"),
            ({"target_epsilon": math.inf}, "Received: target_epsilon=inf"),
            ({"steps": 0}, "`steps` must be a whole number of at least 1"),
            ({"delta": 2}, "`delta` must be"),
        ],
    )
    def test_wrong_arguments(self, changes, message):
        good = {"target_epsilon": 1, "sampling_probability": 0.1, "steps": 5, "delta": 1e-5}
        with pytest.raises(ArgumentError, match=message):
            noise_multiplier(**(good | changes))


class TestCapacity:
    def test_chosen_one_costs_nothing_and_a_tight_one_does(self):
        options = {"num_rows": 60000, "delta": 1e-5}
        chosen = capacity(num_rows=60000, sampling_probability=MNIST)
        free = cost(MNIST, 1.1, 14100)
        assert cost(MNIST, 1.1, 14100, capacity=chosen, **options) == pytest.approx(free, 1e-3)
        tight = cost(MNIST, 1.1, 14100, capacity=300, **options)
        assert tight == pytest.approx(3.47, rel=0.01)

    @pytest.mark.quick
    def test_is_the_least_with_so_small_a_tail(self):
        from scipy import stats

        for rows, q in [(60000, MNIST), (1000, 0.032), (50, 0.5), (10**7, 1e-5)]:
            chosen = capacity(num_rows=rows, sampling_probability=q, steps=1000, delta=1e-5)
            assert (
                stats.binom.sf(chosen, rows, q) <= 1e-11 < stats.binom.sf(chosen - 1, rows, q)
            )

    @pytest.mark.quick
    def test_small_data(self):
        assert capacity(num_rows=10, sampling_probability=0.5) == 10
        assert capacity(num_rows=10, sampling_probability=0) == 1
        assert capacity(num_rows=1, sampling_probability=1) == 1
        # Room for all examples is no truncation, and RDP can account for it.
        full = {"capacity": 10, "num_rows": 10, "accountant": "rdp"}
        assert cost(0.5, 4, 10, **full) == cost(0.5, 4, 10, accountant="rdp")


class TestLedger:
    @pytest.mark.quick
    def test_equal_steps_join(self):
        ledger, run = Ledger(), Ledger()
        for _ in range(5):
            ledger = ledger.add(Phase(0.01, 4.0, 2000))
            run = run.add(Phase(0.01, 4.0, 2000, run_id="one"))
        assert run.phases == (Phase(0.01, 4.0, 10000),)
        assert ledger == run
        assert ledger.epsilon(1e-5) == cost(0.01, 4, 10000)
        assert ledger.add(Phase(0.5, 9.0, 0)) is ledger

    @pytest.mark.quick
    @pytest.mark.parametrize("accountant", ["pld", "rdp"])
    def test_order_is_free_and_parts_cost_less_than_their_sum(self, accountant):
        parts = [Phase(0.01, 4.0, 1000), Phase(0.02, 6.0, 500), Phase(0.01, 4.0, 1000)]
        forward, backward = Ledger(), Ledger()
        for part in parts:
            forward = forward.add(part)
        for part in reversed(parts):
            backward = backward.add(part)
        assert len(forward.phases) == 3
        whole = forward.epsilon(1e-5, accountant=accountant)
        assert whole == pytest.approx(backward.epsilon(1e-5, accountant=accountant))
        alone = [Ledger((part,)).epsilon(1e-5, accountant=accountant) for part in parts]
        assert max(alone) < whole < sum(alone)
        split = Ledger((Phase(0.01, 4.0, 2000), Phase(0.02, 6.0, 500)))
        assert whole == split.epsilon(1e-5, accountant=accountant)

    @pytest.mark.quick
    def test_one_step_without_noise_is_the_end_of_it(self):
        ledger = Ledger().add(Phase(0.01, 4.0, 1000)).add(Phase(0.01, 0.0, 1))
        assert ledger.epsilon(1e-5) == math.inf
        assert "not differentially private" in statement(ledger, delta=1e-5)

    @pytest.mark.quick
    def test_goes_through_json(self):
        ledger = Ledger().add(Phase(0.01, 4.0, 1000)).add(Phase(0.02, 1.0, 3, 50, 1000))
        assert Ledger.from_dict(json.loads(json.dumps(ledger.to_dict()))) == ledger
        for broken in (None, 3, {}, {"phases": {}}, {"phases": [{"steps": 1}]}):
            with pytest.raises(ArgumentError, match=r"a result of `Ledger.to_dict`"):
                Ledger.from_dict(broken)

    @pytest.mark.quick
    @pytest.mark.parametrize("place", [0, 1])
    def test_edited_json_is_one_clear_error(self, place):
        phases = (Phase(0.01, 4.0, 10, 50, 1000), Phase(1.0, 4.0, 10, 50, 99, bands=4))
        good = Ledger(phases).to_dict()
        numbers = {"sampling_probability", "noise_multiplier"}
        counts = {"steps", "num_rows", "capacity", "bands", "separation", "after", "part"}
        flags, texts = {"at_most", "cyclic", "secret"}, {"run_id", "continues"}
        wrong: dict[str, tuple[object, ...]] = {
            **dict.fromkeys(numbers, ("3", True, math.nan, math.inf, -1, 10**400, None, ())),
            **dict.fromkeys(counts, ("3", True, math.nan, -1, 1.5, 10**400, ())),
            **dict.fromkeys(flags, ("false", 0, 1, None, ())),
            **dict.fromkeys([*texts, "groups", "unit"], (3, True, ())),
        }
        assert wrong.keys() == good["phases"][place].keys()
        for name, values in wrong.items():
            for value in values:
                edited = copy.deepcopy(good)
                edited["phases"][place][name] = value
                with pytest.raises(ArgumentError, match=f"`{name}` must "):
                    Ledger.from_dict(edited)

    @pytest.mark.parametrize("accountant", ["pld", quick("rdp")])
    def test_affordable_steps_are_the_most(self, accountant):
        options = {"delta": 1e-5, "accountant": accountant}
        spent = Ledger().add(Phase(0.02, 8.0, 100))
        planned = Phase(0.01, 4.0, 20000)
        steps = spent.affordable(planned, max_epsilon=1.0, **options)
        assert 0 < steps < 20000
        more = [spent.add(Phase(0.01, 4.0, n)).epsilon(**options) for n in (steps, steps + 1)]
        assert more[0] <= 1.0 < more[1]
        assert spent.affordable(Phase(0.01, 4.0, 10), max_epsilon=1.0, **options) == 10
        assert spent.affordable(planned, max_epsilon=1e-4, **options) == 0
        assert spent.affordable(Phase(0.01, 0.0, 10), max_epsilon=1.0, **options) == 0


@pytest.mark.quick
class TestStatement:
    def test_says_what_it_rests_on(self):
        ledger = Ledger().add(Phase(0.01, 4.0, 9000)).add(Phase(0.02, 8.0, 10, 500, 10000))
        text = statement(ledger, delta=1e-5)
        for part in (
            "delta = 1e-05",
            "differ by one example, added or removed",
            "9000 steps of DP-SGD, each example drawn into each step independently with "
            "probability 0.01, ",
            "then 10 steps",
            "at most 500 of them kept",
            "standard deviation 4 C",
            "privacy loss distributions",
            "weights of every step",
            "number of examples is assumed to be public",
            "`History`",
        ):
            assert part in text
        assert "not below" not in text

    def test_other_relations_and_a_careless_delta(self):
        ledger = Ledger().add(Phase(0.01, 4.0, 1000))
        text = statement(ledger, delta=1e-2, relation="replace_one", num_rows=1000)
        assert "replaced by any other" in text
        assert "delta is not below 1 / 1000" in text
        text = statement(ledger, delta=1e-5, accountant="rdp", relation="replace_special")
        assert "contributes nothing" in text
        assert "Rényi" in text

    def test_never_rounds_down(self):
        from tfdist.privacy.accounting.report import _rounded_up

        for value, shown in [(2.3852, "2.39"), (2.3901, "2.4"), (0.12501, "0.126"), (13, "13")]:
            assert _rounded_up(value) == shown

    def test_no_steps_and_too_many(self):
        assert "no step at all" in statement(Ledger(), delta=1e-5)
        many = Ledger().add(Phase(1.0, 0.1, 10))
        assert "protects nobody" in statement(many, delta=1e-5)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        timeout=120,
        check=False,
        text=True,
        capture_output=True,
    )


def test_needs_no_tensorflow():
    ended = run_python(
        "import sys, tfdist.privacy as p\n"
        "l = p.Ledger((p.Phase(0.01, 4.0, 100),))\n"
        "p.statement(l, delta=1e-5)\n"
        "p.noise_multiplier(target_epsilon=1, sampling_probability=.01, steps=9, delta=1e-5)\n"
        "print({'tensorflow', 'keras'}.isdisjoint(sys.modules))"
    )
    assert ended.stdout == "True\n", ended.stderr


@pytest.mark.quick
def test_missing_package_is_named_with_its_command():
    ended = run_python(
        "import sys; sys.modules['dp_accounting'] = None\n"
        "import tfdist.privacy as p\n"
        "l = p.Ledger((p.Phase(0.01, 4.0, 100),))\n"
        "try: l.epsilon(1e-5)\n"
        "except ImportError as e: print(type(e).__name__, e)"
    )
    assert ended.stdout.startswith("MissingPackageError Privacy accounting must have the")
    assert ended.stdout.endswith('Install it: pip install "tfdist[privacy]"\n')
