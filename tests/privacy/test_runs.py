"""Trees of trainings: whatever is copied, resumed, lost or loaded, each step counts once."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tfdist
from tfdist.privacy import Ledger, Phase, model_history
from tfdist.privacy.accounting.chains import mechanisms
from tfdist.privacy.accounting.correlated import coefficients
from tfdist.privacy.accounting.levels import Levels
from tfdist.privacy.model_history import History
from tfdist.privacy.progress import StepProgress
from tfdist.privacy.spending import _AGREED, Spending

pytestmark = pytest.mark.quick
STRATEGY = SimpleNamespace(
    elastic=False, broadcast_object=lambda it: it, place=SimpleNamespace(num_workers=1)
)
SESSION: Any = SimpleNamespace(strategy=STRATEGY, is_chief=True)
MODEL = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
MODEL.compile("sgd", "mse")
GIVEN, PLANNED = 5, 300  # so that three steps are written down at once
WORKERS = [Ledger((Phase(0.2, 1.0, 5),)) for _ in range(2)]
SPENT = Ledger((Phase(0.2, 1.0, GIVEN),))
KINDS = ["sampled", "scheduled", "cyclic", "in turn"]
SCHEDULE = Levels((0, 2, 5, 8), (4.0, 2.0, 4.0, 1.0))


def noise_of(kind: str, place: int) -> float:
    """SCHEDULE by hand."""
    if kind != "scheduled" or place >= 8:
        return 1.0
    return 2.0 if 2 <= place < 5 else 4.0


def covers(ledger: Ledger, true: frozenset[Any]) -> bool:
    """Whether a ledger has all steps, each with the noise that it had."""
    known, made = Counter[float](), Counter(noise for _, noise in true)
    for phase in ledger.phases:
        known[phase.noise_multiplier] += phase.steps
    return all(known[noise] >= count for noise, count in made.items())


@dataclasses.dataclass
class Folder:
    """Checkpoints, with what is really known of the steps behind them."""

    path: Path
    true: frozenset[Any]
    saved: str | None = None
    kept: int = 0


@dataclasses.dataclass
class Tree:
    kind: str
    root: Path
    folders: list[Folder] = dataclasses.field(default_factory=list)
    files: list[tuple[Any, frozenset[Any]]] = dataclasses.field(default_factory=list)
    kills: int = 0
    numbers: Any = dataclasses.field(default_factory=itertools.count)

    def process(self, folder: Folder) -> tuple[Spending, StepProgress, Any]:
        """A script that is started in a folder."""
        options: Any = {"noise_multiplier": 1.0, "delta": 1e-3, "spent": SPENT}
        phase = Phase(0.1, 1.0, 1, num_rows=20)
        if self.kind in ("cyclic", "in turn"):
            options["bands"] = 3
        if self.kind == "cyclic":
            phase = Phase(0.6, 1.0, 1, num_rows=20, bands=3, cyclic=True)
        elif self.kind == "in turn":
            phase = Phase(1.0, 1.0, 1, num_rows=20, bands=3, separation=4)
        privacy = (tfdist.DPFTRL if self.kind == "in turn" else tfdist.DPSGD)(1.0, **options)
        progress = StepProgress(MODEL, privacy)
        spending = Spending(privacy, SESSION, MODEL, progress, [], secret=True)
        saved = None if folder.saved is None else json.loads(folder.saved)
        state = spending.go_on(saved, folder.kept, folder.path)
        levels = SCHEDULE if self.kind == "scheduled" else None
        spending.plan(spending.named(phase, None), PLANNED, levels)
        return spending, progress, state

    def step(self, place: int) -> tuple[Any, float]:
        return next(self.numbers), noise_of(self.kind, place)

    def start(self) -> None:
        path = self.root / str(len(self.folders))
        self.folders.append(Folder(path, frozenset((f"given {i}", 1.0) for i in range(GIVEN))))

    def copy(self, which: int) -> None:
        old = self.folders[which % len(self.folders)]
        path = self.root / str(len(self.folders))
        if old.path.exists():
            shutil.copytree(old.path, path)
        self.folders.append(dataclasses.replace(old, path=path))

    def train(self, which: int, steps: int, save: int, load: int, killed: bool) -> None:
        folder = self.folders[which % len(self.folders)]
        with model_history.forgotten(MODEL):
            spending, progress, state = self.process(folder)
            wraps = spending.counting()
            if not killed:
                wraps.__enter__()
            if load >= 0 and self.files:
                said, true = self.files[load % len(self.files)]
                spending.absorb(History.from_dict(json.loads(said)))
                folder.true |= true
            spending.callbacks_began()
            begins = folder.kept
            for made in range(1, steps + 1):
                spending.before_steps(made)
                progress.settle(made)
                folder.true |= {self.step(begins + made - 1)}
                if made == save:
                    folder.saved, folder.kept = json.dumps(state), progress.position
            said = json.dumps(spending.history().to_dict())
            self.files.append((said, folder.true))
            assert covers(spending.ledger(steps), folder.true)
            self.kills += killed
            if not killed:
                wraps.__exit__(None, None, None)

    def race(self, which: int, steps: int, save: int) -> None:
        folder = self.folders[which % len(self.folders)]
        with model_history.forgotten(MODEL):
            processes = [self.process(folder) for _ in range(2)]
        begins = folder.kept
        for spending, _, _ in processes:
            spending.callbacks_began()
        for made in range(1, steps + 1):
            for spending, progress, state in processes:
                spending.before_steps(made)
                progress.settle(made)
                folder.true |= {self.step(begins + made - 1)}
                if made == save:
                    folder.saved, folder.kept = json.dumps(state), progress.position
        self.kills += 2

    def merged(self) -> Ledger:
        """What is known to who starts one more process in each folder, and loads all files."""
        found = Ledger()
        for folder in self.folders:
            with model_history.forgotten(MODEL):
                ledger = self.process(folder)[0].before.ledger
            assert covers(ledger, folder.true)
            found = found.merged(ledger) if len(found.phases) % 2 else ledger.merged(found)
        for said, _ in self.files:
            found = found.merged(History.from_dict(json.loads(said)).ledger)
        return found


ACTS = st.one_of(
    st.tuples(st.just("copy"), st.integers(0, 5)),
    st.tuples(st.just("race"), st.integers(0, 5), st.integers(0, 4), st.integers(1, 4)),
    st.tuples(
        st.just("train"), st.integers(0, 5), st.integers(0, 6), st.integers(1, 6),
        st.integers(-3, 5), st.booleans(),
    ),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTS, max_size=8), st.sampled_from(KINDS))
def test_no_tree_of_processes_counts_too_few(acts: list[Any], kind: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        tree = Tree(kind, Path(root))
        tree.start()
        for name, *options in acts:
            getattr(tree, name)(*options)
        true = frozenset[Any]().union(*(folder.true for folder in tree.folders))
        merged = tree.merged()
        steps = merged.steps
        assert covers(merged, true)
        # Files knew of more only by what a process that was killed had written down.
        assert len(true) <= steps <= len(true) + 2 * tree.kills


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=6), st.sampled_from(KINDS)
)
def test_a_history_in_a_line_is_that_of_one_process(runs: Any, kind: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        tree = Tree(kind, Path(root))
        tree.start()
        for steps, loads in runs:  # each ends by an exception, and has saved its last step
            tree.train(0, steps, steps, 0 if loads else -1, killed=False)
        spent, *made = tree.merged().mechanisms
        total = sum(steps for steps, _ in runs)
        assert (spent,) == SPENT.phases
        assert sum(phase.steps for phase in made) == total
        counts = Counter(noise_of(kind, place) for place in range(total))
        assert counts == sum((Counter({p.noise_multiplier: p.steps}) for p in made), Counter())
        if kind == "cyclic":  # each process is a mechanism
            costs = [phase.independent[1] for phase in made]
            assert costs == [-(-steps // 3) for steps, _ in runs if steps]
        if kind == "in turn":
            assert [(p.after, p.steps) for p in made] == [(0, total)] * bool(total)


@pytest.mark.parametrize("kind", ["scheduled", "cyclic"])
def test_steps_of_a_backup_that_says_nothing_are_not_private(kind: str, tmp_path: Path) -> None:
    """`test_counting` sees that they are noted."""
    tree = Tree(kind, tmp_path)
    tree.start()
    with model_history.forgotten(MODEL):
        spending, progress, _ = tree.process(tree.folders[0])
        with spending.counting():
            MODEL.optimizer.iterations.assign(4)  # as a callback does
            spending.callbacks_began()
            progress.settle(5)
            ledger = spending.ledger(progress.steps_made)
        MODEL.optimizer.iterations.assign(0)
    # A schedule goes on with the step after those in the weights.
    assert covers(ledger, frozenset(tree.step(place) for place in range(4, 9)))
    assert ledger.steps == GIVEN + 5


def test_phases_that_all_workers_make_by_hand_are_the_same() -> None:
    said: list[Any] = []
    place = SimpleNamespace(num_workers=2)
    gathers = [lambda it: said.append(it) or [it], lambda it: said]
    for gather in gathers:  # first what each of them says, then what they hear
        strategy = SimpleNamespace(elastic=True, gather_objects=gather, place=place)
        session: Any = SimpleNamespace(strategy=strategy, is_chief=True)
        ledgers = []
        for spent in WORKERS:
            with model_history.forgotten(MODEL):
                privacy = tfdist.DPSGD(1.0, noise_multiplier=1.0, delta=1e-3, spent=spent)
                progress = StepProgress(MODEL, privacy)
                spending = Spending(privacy, session, MODEL, progress, [], secret=True)
                spending.plan(spending.named(Phase(0.1, 1.0, 1), None), PLANNED)
                spending.callbacks_began()
                ledgers.append(spending.ledger(4))
    assert [ledger.steps for ledger in ledgers] == [GIVEN + 4] * 2
    assert ledgers[0].to_dict() == ledgers[1].to_dict()
    # So it is when they give them once more, after the model has got them.
    assert said[1][1].renamed(_AGREED).merged(said[0][1]).steps == GIVEN


def worst(parents: list[int], bands: int, separation: int | None) -> float:
    """The most that an example moves in a tree of steps, of all ways to take part."""
    size = len(parents)
    ways: list[list[int]] = []
    for node in range(size):
        way = [node]
        while parents[way[-1]] >= 0:
            way.append(parents[way[-1]])
        ways.append(way)
    inverse = np.eye(size)
    for node, way in enumerate(ways):
        for factor, other in zip(coefficients(bands)[1:], way[1:], strict=False):
            inverse[node, other] = factor
    matrix, most = np.linalg.inv(inverse), 0.0
    for takes in itertools.product((False, True), repeat=size):
        least = math.inf if separation is None else separation
        apart = all(
            ways[n].index(other) >= least
            for n in range(size)
            if takes[n]
            for other in ways[n][1:]
            if takes[other]
        )
        if apart:
            most = max(most, float(np.sum((matrix @ np.array(takes)) ** 2)))
    return most


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 4)), max_size=4),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([None, 2, 3]),
)
def test_no_way_to_take_part_in_a_tree_moves_more(
    runs: list[Any], bands: int, separation: int | None
) -> None:
    kind = {"bands": bands, "separation": separation}
    phases = [Phase(1.0, 1.0, 3, run_id="0", **kind)]
    parents, nodes = [-1, 0, 1], [[0, 1, 2]]
    for which, kept, steps in runs:
        of = which % len(phases)
        way = nodes[of]
        after = phases[of].after + 1 + kept % (len(way) - phases[of].after)
        if len(parents) + steps > 10:
            break
        new = [len(parents) + i for i in range(steps)]
        parents += [way[after - 1], *new[:-1]]
        nodes.append([*way[:after], *new])
        name = {"run_id": str(len(phases)), "continues": str(of), "after": after}
        phases.append(Phase(1.0, 1.0, steps, **name, **kind))
    found = mechanisms(phases)
    assert sum(phase.steps for phase in found) == len(parents)
    assert sum(phase.gaussian_square for phase in found) >= worst(
        parents, bands, separation
    ) * (1 - 1e-9)
    assert len(found) <= len(phases)
