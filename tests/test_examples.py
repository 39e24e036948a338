"""Examples, in one process and in two, and the Python code of the documentation."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
LIMIT_S = 240

ALONE = pytest.param((), 1, id="python")
TWO = pytest.param(
    ("-m", "tfdist.cli", "run", "-n", "2"), 2, id="tfdist run -n 2", marks=pytest.mark.cluster
)
SERVERS = ("-m", "tfdist.cli", "run", "-n", "2", "--ps", "2")
HOROVOD = pytest.param(
    ("-m", "tfdist.cli", "run", "--strategy", "horovod", "-n", "2"),
    2,
    id="tfdist run --strategy horovod -n 2",
    marks=pytest.mark.cluster,
)
pytestmark = pytest.mark.timeout(LIMIT_S + 30)


@functools.cache
def run(launcher: tuple[str, ...], script: str, *arguments: str) -> str:
    """Runs an example to its end, once; gives what it printed, without the tasks' prefixes."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("TF_CONFIG", "SLURM_"))}
    environ |= {"PYTHONIOENCODING": "utf-8", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / script), *arguments],
        env=environ,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return re.sub(r"^(?:worker|chief|ps) *\d? *│ ?", "", done.stdout, flags=re.MULTILINE)


@pytest.mark.parametrize(("launcher", "workers"), [ALONE, TWO])
def test_quickstart_trains_and_all_workers_hold_the_same_weights(launcher, workers):
    printed = run(launcher, "quickstart.py")
    rows = dict(re.findall(r"│ *([^│]*?) *│ *([^│]*?) *│", printed))
    assert rows["strategy"] == ("single" if workers == 1 else "multi_worker")
    assert rows["replicas"] == f"{workers} (workers: {workers})"
    assert float(rows["examples/s"].replace(",", "")) > 0
    assert float(rows["held-out accuracy"].split("%")[0]) > 95
    assert rows["weights of all workers"] == "equal"
    assert len([name for name in rows if name.startswith("sha256")]) == workers
    assert printed.count("Epoch 8/8") == 1  # progress, from the chief alone


@pytest.mark.cluster
def test_quickstart_history_is_the_same_on_one_and_on_two_workers():
    figures = r"(accuracy: \S+ - loss: \S+)$"
    launch = ("-m", "tfdist.cli", "run", "-n")
    one, two = (
        [
            [float(f) for f in re.findall(r"\d+\.\d+", line)]
            for line in re.findall(figures, run((*launch, n), "quickstart.py"), re.MULTILINE)
        ]
        for n in ("1", "2")
    )
    assert len(one) == 8
    # How much Adam makes of last bits depends on the processor: on one of them, inputs times
    # 1 + 3e-7 changed the second epoch's loss by 1e-3 in one process. Other batches change it
    # by more than 1e-2. The equivalence suite is exact.
    for (accuracy, loss), (expected_accuracy, expected_loss) in zip(two, one, strict=True):
        assert accuracy == pytest.approx(expected_accuracy, abs=0.01)
        assert loss == pytest.approx(expected_loss, abs=5e-3)


@pytest.mark.parametrize(("launcher", "workers"), [ALONE, TWO])
def test_distributed_gradient_descent_equals_one_process(launcher, workers):
    printed = run(launcher, "distributed_gradient_descent.py")
    facts = dict(re.findall(r"^(.+?): +(.+)$", printed, re.MULTILINE))
    assert facts["equal to one process's"] == "True"
    assert facts[f"the same on all {workers} worker(s)"] == "True"
    assert facts["rows of each replica"].count("..") == workers
    assert float(facts["largest difference to one"]) < 1e-5


@pytest.mark.parametrize(("launcher", "ranks"), [ALONE, HOROVOD])
def test_horovod_digits_trains_and_all_ranks_hold_the_same_weights(launcher, ranks):
    printed = run(launcher, "horovod_digits.py")
    facts = dict(re.findall(r"^(.+?): +(.+)$", printed, re.MULTILINE))
    assert facts["strategy"] == ("single" if ranks == 1 else "horovod")
    assert facts["ranks"] == str(ranks)
    assert float(facts["held-out accuracy"].split("%")[0]) > 95
    hashes = facts["sha256 of weights"].split(", ")
    assert len(hashes) == ranks
    assert len(set(hashes)) == 1
    assert printed.count("Epoch 15/15") == 1  # progress, from rank 0 alone


@pytest.mark.cluster
@pytest.mark.parametrize("arguments", [(), ("--synchronous",)])
def test_parameter_server_shows_its_servers(arguments):
    printed = run(SERVERS, "parameter_server.py", *arguments)
    facts = dict(re.findall(r"^(.+?): +(.+)$", printed, re.MULTILINE))
    assert float(facts["held-out accuracy"].split("%")[0]) > 95
    assert facts["updates"] == "516 of 516 steps"
    if arguments:
        assert facts["staleness"] == "none, every update was computed with the newest weights"
    else:
        assert re.match(r"\d\.\d\d updates, \d+ at most", facts["staleness"])
    shown = re.findall(r"epoch 12: (\S+) +on (ps \d)", printed)
    assert {server for _, server in shown} == {"ps 0", "ps 1"}


@pytest.mark.cluster
def test_click_through_updates_the_rows_it_has_seen():
    printed = run(SERVERS, "click_through.py")
    facts = dict(re.findall(r"^(.+?): +(.+)$", printed, re.MULTILINE))
    assert float(facts["held-out AUC"]) > 0.6
    assert facts["rows changed"].endswith("of 300000, those of the users that were seen: True")
    assert re.findall(r"users/embeddings .* ps (\d)", printed) == ["0", "1"]


@pytest.mark.cluster
def test_imbalanced_digits_has_the_same_figures_on_one_and_on_two_workers():
    one, two = (
        {
            name.strip(): [float(figure) for figure in re.findall(r"([\d.]+)%", figures)]
            for name, figures in re.findall(
                r"^│ (nothing|class_weight\S+|ClassBalanced\(\)) *(│.*)$", printed, re.MULTILINE
            )
        }
        for printed in (
            run(launcher, "imbalanced_digits.py") for launcher in ((), TWO.values[0])
        )
    )
    assert len(one) == 3
    for name, figures in one.items():
        # An image may lie so near to two classes that the last digit decides: 1 of 45 or more.
        assert two[name] == pytest.approx(figures, abs=1.0)
    recall_of_odd = {name: figures[2] for name, figures in one.items()}
    assert recall_of_odd["ClassBalanced()"] > recall_of_odd["nothing"] + 10
    assert recall_of_odd['class_weight="balanced"'] > recall_of_odd["nothing"] + 10


def test_a_stopped_training_goes_on_to_the_weights_of_one_never_stopped(tmp_path):
    command = [sys.executable, str(EXAMPLES / "checkpoint.py")]
    stopped = subprocess.run(
        [*command, str(tmp_path / "stopped"), "--sigterm-after", "60"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    assert "tfdist: saved after step 16 of epoch 3" in stopped.stdout
    never, went_on = (run((), "checkpoint.py", str(tmp_path / n)) for n in ("never", "stopped"))
    pattern = r"^held-out accuracy \S+\nweights \w{16}$"
    result = re.search(pattern, never, re.MULTILINE)
    assert result is not None, never
    assert result[0] in went_on


@pytest.mark.cluster
def test_two_workers_are_started_again_after_sigterm(tmp_path):
    launcher = (*TWO.values[0], "--max-restarts", "1")
    printed = run(launcher, "checkpoint.py", str(tmp_path), "--sigterm-after", "60")
    assert "tfdist: training goes on from" in printed
    assert re.search(r"^held-out accuracy 8\d\.\d%$", printed, re.MULTILINE), printed


@pytest.mark.cluster
def test_own_records_have_the_same_figures_as_all_records_in_one_process():
    one, two = (run(launcher, "own_records.py") for launcher in ((), TWO.values[0]))
    losses = [re.findall(r"loss: ([\d.]+)", printed) for printed in (one, two)]
    assert len(losses[0]) == 5
    np.testing.assert_allclose(*(np.array(found, float) for found in losses), atol=2e-4)
    right = [
        int(re.findall(r"held out: (\d+) of 89 right", printed)[0]) for printed in (one, two)
    ]
    assert min(right) > 80
    assert max(right) - min(right) <= 1
    assert re.search(r"1 +22 +1\.\d +0\.0% +100\.0%", two)


@pytest.mark.cluster
def test_smote_has_the_same_figures_on_one_and_on_two_workers():
    pytest.importorskip("imblearn")
    one, two = (
        {
            name.strip(): [float(figure) for figure in re.findall(r"[\d.]+", figures)]
            for name, figures in re.findall(
                r"^│ (nothing|SMOTE|ClassBalanced\(\)(?:, Augment)?) *(│.*)$",
                printed,
                re.MULTILINE,
            )
        }
        for printed in (run(launcher, "smote.py") for launcher in ((), TWO.values[0]))
    )
    assert len(one) == 4
    for name, figures in one.items():
        # An image may lie so near to two classes that the last digit decides: 1 of 45 or more.
        assert two[name] == pytest.approx(figures, abs=1.0)
    rows, _, recall_of_odd = zip(*(one[name] for name in ("nothing", "SMOTE")), strict=True)
    assert rows[1] > rows[0]
    assert recall_of_odd[1] > recall_of_odd[0] + 5
    assert one["ClassBalanced(), Augment"][2] > recall_of_odd[0] + 10


@pytest.mark.parametrize(("launcher", "workers"), [ALONE, TWO])
def test_private_digits_keeps_to_its_budget(launcher, workers):
    printed = run(launcher, "private_digits.py")
    facts = dict(re.findall(r"^(.+?): +(.+)$", printed, re.MULTILINE))
    assert facts["strategy"] == ("single" if workers == 1 else "multi_worker")
    assert float(facts["held-out accuracy"].split("%")[0]) > 85
    assert 2.9 < float(facts["epsilon"].split(" ")[0]) <= 3.0
    assert 100 < int(facts["steps"]) < 200
    shown_auc = re.match(r"1347 members and 450 non-members: AUC ([\d.]+),", facts["attack"])
    assert float(shown_auc[1]) < 0.6
    assert "The weights are differentially private with epsilon = " in printed
    shown = [float(e) for e in re.findall(r"- epsilon: (\S+)", printed)]
    assert shown == sorted(shown)  # progress, from the chief alone
    assert shown[-1] <= 3.0
    assert "Epoch 100/100" not in printed


def test_private_embedding_hides_which_words_nobody_wrote():
    printed = run((), "private_embedding.py")
    found = re.findall(
        r"^(.+): held-out accuracy ([\d.]+)%; changed were 1000 written and (\d+)",
        printed,
        re.M,
    )
    (plain, most, unwritten), (private, some, hidden) = found
    assert (plain, private) == ("without privacy", "private")
    assert (unwritten, hidden) == ("0", "200")
    assert float(most) > float(some) > 65
    assert float(re.findall(r"^epsilon ([\d.]+) of 3.0", printed, re.M)[0]) <= 3.0


@pytest.mark.parametrize(
    ("launcher", "workers"),
    [
        ALONE,
        pytest.param(
            ("-m", "tfdist.cli", "run", "-n", "2", "--drop-in"),
            2,
            id="tfdist run -n 2 --drop-in",
            marks=pytest.mark.cluster,
        ),
        pytest.param(
            ("-m", "tfdist.cli", "run", "-n", "2", "--ps", "1", "--drop-in"),
            1,  # the chief alone runs the script
            id="tfdist run -n 2 --ps 1 --drop-in",
            marks=pytest.mark.cluster,
        ),
    ],
)
def test_unmodified_keras_script(launcher, workers, tmp_path):
    assert "import tfdist" not in (EXAMPLES / "unmodified_keras.py").read_text()
    printed = run(launcher, "unmodified_keras.py", str(tmp_path))
    results = re.findall(r"held-out accuracy ([\d.]+), (\d+) of 450 right", printed)
    assert len(results) == workers
    assert len(set(results)) == 1
    assert float(results[0][0]) > 0.9
    assert [path.name for path in tmp_path.iterdir()] == ["digits.keras"]


# TensorFlow's devices are set once in a process, so the page that sets them comes first.
RUN_PAGES = """
import pathlib, re, sys
pages = sorted(map(pathlib.Path, sys.argv[1:]), key=lambda page: page.name != "mirrored.md")
for page in pages:
    blocks = re.findall(r"^```python\\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    for number, block in enumerate(blocks):
        print(f"running {page.name} {number}", flush=True)
        exec(compile(block, f"{page.name}, block {number}", "exec"), {})
"""


def test_python_code_of_the_documentation(tmp_path):
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    if not (ROOT / "docs").is_dir():
        pytest.skip("the documentation is not part of this copy")
    done = subprocess.run(
        [sys.executable, "-c", RUN_PAGES, *map(str, pages)],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "TF_CONFIG"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("running ") >= 8
