"""Examples, in one process and in two, and the Python code of the documentation.

Most run in the places that all tests share. What a user types is launched as it is typed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.examples.program import EXAMPLES
from tests.jobs import finished, tfdist_run
from tests.places.clusters import Clusters, on, workers_of

ROOT = EXAMPLES.parent
LIMIT_S = 500  # only a broken product reaches it, also on a slow machine
SINGLE, TWO, HOROVOD = "single-1", "multi_worker-2", "horovod-2"
SERVERS = "parameter_server-2"

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


def example(command: str) -> str:
    return f"tests.examples.program {command}"


def run_on(*places: str, command: str) -> pytest.MarkDecorator:
    """Runs a test once a place, with what the chief printed there."""
    cells = [pytest.param(place, marks=on(place, example(command))) for place in places]
    return pytest.mark.parametrize("place", cells)


def printed_on(clusters: Clusters, place: str, command: str) -> str:
    printed: str = clusters.outcomes(place, example(command))[0]
    return printed


def facts_of(printed: str) -> dict[str, str]:
    return dict(re.findall(r"^(.+?): +(.+)$", printed, re.MULTILINE))


def launched(command: list[str]) -> str:
    """Runs a command to its end; gives what it printed, without the tasks' prefixes."""
    environ = {"PYTHONIOENCODING": "utf-8", "COLUMNS": "100"}
    status, printed = finished(command, LIMIT_S, environ)
    assert status == 0, printed
    return re.sub(r"^(?:worker|chief|ps) *\d? *│ ?", "", printed, flags=re.MULTILINE)


@on(SINGLE, example("quickstart.py"))
def test_quickstart_trains_as_one_process_and_all_workers_hold_the_same(clusters):
    alone = printed_on(clusters, SINGLE, "quickstart.py")
    both = launched(tfdist_run(2, EXAMPLES / "quickstart.py"))
    figures = r"(accuracy: \S+ - loss: \S+) *$"
    curves = []
    for printed, workers in ((alone, 1), (both, 2)):
        rows = dict(re.findall(r"│ *([^│]*?) *│ *([^│]*?) *│", printed))
        assert rows["strategy"] == ("single" if workers == 1 else "multi_worker")
        assert rows["replicas"] == f"{workers} (workers: {workers})"
        assert float(rows["examples/s"].replace(",", "")) > 0
        assert float(rows["held-out accuracy"].split("%")[0]) > 95
        assert rows["weights of all workers"] == "equal"
        assert len([name for name in rows if name.startswith("sha256")]) == workers
        assert printed.count("Epoch 8/8") == 1  # progress, from the chief alone
        lines = re.findall(figures, printed, re.MULTILINE)
        curves.append([[float(f) for f in re.findall(r"\d+\.\d+", line)] for line in lines])
    one, two = curves
    assert len(one) == 8
    # How much Adam makes of last bits depends on the processor: on one of them, inputs times
    # 1 + 3e-7 changed the second epoch's loss by 1e-3 in one process. Other batches change it
    # by more than 1e-2. The equivalence suite is exact.
    for (accuracy, loss), (expected_accuracy, expected_loss) in zip(two, one, strict=True):
        assert accuracy == pytest.approx(expected_accuracy, abs=0.01)
        assert loss == pytest.approx(expected_loss, abs=5e-3)


@run_on(TWO, command="distributed_gradient_descent.py")
def test_distributed_gradient_descent_equals_one_process(place, clusters):
    facts = facts_of(printed_on(clusters, place, "distributed_gradient_descent.py"))
    assert facts["equal to one process's"] == "True"
    assert facts[f"the same on all {workers_of(place)} worker(s)"] == "True"
    assert facts["rows of each replica"].count("..") == workers_of(place)
    assert float(facts["largest difference to one"]) < 1e-5


@run_on(SINGLE, TWO, command="larger_optimizer_state.py")
def test_larger_optimizer_state_has_half_of_it_and_the_same_weights(place, clusters):
    facts = facts_of(printed_on(clusters, place, "larger_optimizer_state.py"))
    part, whole = re.findall(r"[\d,]+", facts["bytes of the optimizer's state on a worker"])
    ratio = int(part.replace(",", "")) / int(whole.replace(",", ""))
    assert ratio == pytest.approx(1 / workers_of(place), rel=0.1)
    assert facts["weights equal, bit by bit"] == "True"
    assert facts["optimizer equal, bit by bit"] == "True"


@pytest.mark.full  # it computes with some 250 MiB of weights
@pytest.mark.parametrize("workers", [1, 2])
def test_larger_than_memory_trains_on_two_workers_only(workers, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))
    script = EXAMPLES / "larger_than_memory.py"
    command = [sys.executable, str(script)] if workers == 1 else tfdist_run(2, script)
    facts = facts_of(launched(command))
    state, limit = (
        int(facts[name])
        for name in ("weights and Adam's state, MiB", "limit of a process, MiB")
    )
    assert state > limit
    assert facts["trained"].startswith(str(workers == 2))


@pytest.mark.full  # it sets the devices of its process
@pytest.mark.parametrize("is_alone", [True, False], ids=["one process", "servers"])
def test_pipeline_ends_with_the_weights_of_plain_keras(is_alone):
    script = EXAMPLES / "pipeline.py"
    on_servers = tfdist_run(1, script, options=["--ps", "1"])
    printed = launched([sys.executable, str(script)] if is_alone else on_servers)
    assert float(facts_of(printed)["largest difference from plain Keras"]) < 1e-5
    assert ("ps 0, CPU:0:" in printed) == (not is_alone)


@pytest.mark.full  # it sets the devices of its process
def test_tensor_parallel_ends_with_the_weights_of_one_device():
    facts = facts_of(launched([sys.executable, str(EXAMPLES / "tensor_parallel.py")]))
    assert float(facts["largest difference from one device"]) < 1e-3


@run_on(HOROVOD, command="horovod_digits.py")
def test_horovod_digits_trains_and_all_ranks_hold_the_same_weights(place, clusters):
    printed = printed_on(clusters, place, "horovod_digits.py")
    facts = facts_of(printed)
    assert facts["strategy"] == place.partition("-")[0]
    assert facts["ranks"] == str(workers_of(place))
    assert float(facts["held-out accuracy"].split("%")[0]) > 95
    hashes = facts["sha256 of weights"].split(", ")
    assert len(hashes) == workers_of(place)
    assert len(set(hashes)) == 1
    assert printed.count("Epoch 15/15") == 1


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=on(SERVERS, example(command)))
        for command in ("parameter_server.py", "parameter_server.py --synchronous")
    ],
)
def test_parameter_server_shows_its_servers(command, clusters):
    printed = printed_on(clusters, SERVERS, command)
    facts = facts_of(printed)
    assert float(facts["held-out accuracy"].split("%")[0]) > 95
    assert facts["updates"] == "516 of 516 steps"
    if "--synchronous" in command:
        assert facts["staleness"] == "none, every update was computed with the newest weights"
    else:
        assert re.match(r"\d\.\d\d updates, \d+ at most", facts["staleness"])
    shown = re.findall(r"epoch 12: (\S+) +on (ps \d)", printed)
    assert {server for _, server in shown} == {"ps 0", "ps 1"}


@on(SERVERS, example("click_through.py"))
def test_click_through_updates_the_rows_it_has_seen(clusters):
    printed = printed_on(clusters, SERVERS, "click_through.py")
    facts = facts_of(printed)
    assert float(facts["held-out AUC"]) > 0.6
    assert facts["rows changed"].endswith("of 300000, those of the users that were seen: True")
    assert re.findall(r"users/embeddings .* ps (\d)", printed) == ["0", "1"]


def figures(printed: str, name: str, number: str) -> dict[str, list[float]]:
    """Reads the rows of a table whose names match."""
    rows = re.findall(rf"^│ ({name}) *(│.*)$", printed, re.MULTILINE)
    return {row.strip(): [float(f) for f in re.findall(number, rest)] for row, rest in rows}


BALANCING = r"untreated|class_weight\S+|ClassBalanced\(\)"


@on(SINGLE, example("imbalanced_digits.py"))
def test_imbalanced_digits_finds_the_rare_digits(clusters):
    printed = printed_on(clusters, SINGLE, "imbalanced_digits.py")
    found = figures(printed, BALANCING, r"([\d.]+)%")
    assert len(found) == 3
    recall_of_odd = {name: row[2] for name, row in found.items()}
    assert recall_of_odd["ClassBalanced()"] > recall_of_odd["untreated"] + 10
    assert recall_of_odd['class_weight="balanced"'] > recall_of_odd["untreated"] + 10


@pytest.mark.full  # equivalence compares samplers and class weights
@on(SINGLE, example("imbalanced_digits.py"))
@on(TWO, example("imbalanced_digits.py"))
def test_imbalanced_digits_has_the_same_figures_on_one_and_on_two_workers(clusters):
    one, two = (
        figures(printed_on(clusters, place, "imbalanced_digits.py"), BALANCING, r"([\d.]+)%")
        for place in (SINGLE, TWO)
    )
    for name, row in one.items():
        # An image may lie so near to two classes that the last digit decides: 1 of 45 or more.
        assert two[name] == pytest.approx(row, abs=1.0)


@on(SINGLE, example("checkpoint.py FOLDER"))
def test_a_stopped_training_goes_on_to_the_weights_of_one_never_stopped(clusters, tmp_path):
    command = [sys.executable, str(EXAMPLES / "checkpoint.py"), str(tmp_path)]
    status, stopped = finished([*command, "--sigterm-after", "60"], LIMIT_S)
    assert status == 75, stopped
    assert "tfdist: saved after step 16 of epoch 3" in stopped
    went_on = launched(command)
    never = printed_on(clusters, SINGLE, "checkpoint.py FOLDER")
    pattern = r"^held-out accuracy \S+\nweights \w{16}$"
    result = re.search(pattern, never, re.MULTILINE)
    assert result is not None, never
    assert result[0] in went_on


@pytest.mark.full  # tests/launch/test_restarts.py sends it to two workers too
def test_two_workers_are_started_again_after_sigterm(tmp_path):
    arguments = EXAMPLES / "checkpoint.py", tmp_path, "--sigterm-after", "60"
    printed = launched(tfdist_run(2, *arguments, options=["--max-restarts", "1"]))
    assert "tfdist: training goes on from" in printed
    assert re.search(r"^held-out accuracy 8\d\.\d%$", printed, re.MULTILINE), printed


@on(SINGLE, example("own_records.py"))
@on(TWO, example("own_records.py"))
def test_own_records_have_the_same_figures_as_all_records_in_one_process(clusters):
    one, two = (printed_on(clusters, place, "own_records.py") for place in (SINGLE, TWO))
    losses = [re.findall(r"loss: ([\d.]+)", printed) for printed in (one, two)]
    assert len(losses[0]) == 5
    np.testing.assert_allclose(*(np.array(found, float) for found in losses), atol=2e-4)
    right = [
        int(re.findall(r"held out: (\d+) of 89 right", printed)[0]) for printed in (one, two)
    ]
    assert min(right) > 80
    assert max(right) - min(right) <= 1
    assert re.search(r"1 +22 +1\.\d +0\.0% +100\.0%", two)


@on(SINGLE, example("federated_digits.py"))
@on(TWO, example("federated_digits.py"))
def test_federated_digits_do_not_depend_on_the_number_of_workers(clusters):
    one, two = (printed_on(clusters, place, "federated_digits.py") for place in (SINGLE, TWO))
    losses = [re.findall(r"loss: ([\d.]+)", printed) for printed in (one, two)]
    assert len(losses[0]) == 40 + 4
    np.testing.assert_allclose(*(np.array(found, float) for found in losses), atol=2e-3)
    assert float(facts_of(one)["held-out accuracy"].rstrip("%")) > 85


@on("multi_worker-3", example("federated_hospitals.py"))
@pytest.mark.full
def test_federated_hospitals_train_a_model_that_none_has_alone(clusters):
    facts = facts_of(printed_on(clusters, "multi_worker-3", "federated_hospitals.py"))
    assert facts["clipped values"] == "0.0%"
    assert float(facts["held-out accuracy"].rstrip("%")) > 93


@on(SINGLE, example("federated_clients.py"))
@pytest.mark.full
def test_federated_clients_are_protected(clusters):
    printed = printed_on(clusters, SINGLE, "federated_clients.py")
    facts = facts_of(printed)
    assert 3.9 < float(facts["epsilon, of whole clients"]) <= 4.0
    assert float(facts["held-out accuracy"].rstrip("%")) > 88
    assert "60 rounds of federated averaging" in printed


@on(SINGLE, example("smote.py"))
@pytest.mark.full  # which needs a package of its own
def test_smote_finds_the_rare_digits(clusters):
    names = r"untreated|SMOTE|ClassBalanced\(\)(?:, Augment)?"
    found = figures(printed_on(clusters, SINGLE, "smote.py"), names, r"[\d.]+")
    assert len(found) == 4
    rows, _, recall_of_odd = zip(*(found[name] for name in ("untreated", "SMOTE")), strict=True)
    assert rows[1] > rows[0]
    assert recall_of_odd[1] > recall_of_odd[0] + 5
    assert found["ClassBalanced(), Augment"][2] > recall_of_odd[0] + 10


@pytest.mark.full  # tests/keras/test_recomputation.py and equivalence compare weights
@run_on(SINGLE, command="recompute.py")
def test_recompute_saves_memory_and_keeps_the_weights(place, clusters):
    printed = printed_on(clusters, place, "recompute.py")
    facts = facts_of(printed)
    kept, recomputed = map(float, re.findall(r"([\d.]+) MiB", facts["activations kept"]))
    assert 10 * recomputed < kept
    assert float(facts["largest difference of a weight"]) < 1e-5
    assert printed.count("(Block)") == 4


@pytest.mark.full
@run_on(SINGLE, command="compressed_digits.py")
def test_compressed_digits_are_small_and_accurate(place, clusters):
    printed = printed_on(clusters, place, "compressed_digits.py")
    facts = facts_of(printed)
    assert float(facts["held-out accuracy"].rstrip("%")) > 95
    assert float(facts["times fewer"]) > 100
    rows = re.findall(r"^(\S.*\S) +(\d+) kB +([\d.]+)%$", printed, re.MULTILINE)
    size = {name: int(kilobytes) for name, kilobytes, _ in rows}
    assert len(rows) == 8
    assert size["Keras, with Adam"] > 2.5 * size["Keras"]
    assert size["Keras"] > 2.5 * size["Keras int8"] > 2.5 * size["Keras int4"]
    assert size["LiteRT float32"] > 3.5 * size["LiteRT int8, all"]
    assert min(float(accuracy) for *_, accuracy in rows) > 94


@run_on(SINGLE, command="private_digits.py")
def test_private_digits_keeps_to_its_budget(place, clusters):
    printed = printed_on(clusters, place, "private_digits.py")
    facts = facts_of(printed)
    assert facts["strategy"] == place.partition("-")[0]
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


@pytest.mark.full  # tests/privacy/test_check.py does the same
@on(SINGLE, example("private_check.py"))
def test_private_check_finds_nothing_wrong(clusters):
    printed = printed_on(clusters, SINGLE, "private_check.py")
    assert "all passed" in printed
    assert facts_of(printed)["every check passed"] == "True"


@pytest.mark.full
@on(SINGLE, example("private_embedding.py"))
def test_private_embedding_hides_which_words_nobody_wrote(clusters):
    printed = printed_on(clusters, SINGLE, "private_embedding.py")
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
    ("options", "scripts"),
    [
        (["--drop-in"], 2),
        pytest.param(["--ps", "1", "--drop-in"], 1, marks=pytest.mark.full),  # the chief's
    ],
    ids=["two workers", "servers"],
)
def test_unmodified_keras_script(options, scripts, tmp_path):
    script = EXAMPLES / "unmodified_keras.py"
    assert "import tfdist" not in script.read_text()
    printed = launched(tfdist_run(2, script, tmp_path, options=options))
    results = re.findall(r"held-out accuracy ([\d.]+), (\d+) of 450 right", printed)
    assert len(results) == scripts
    assert len(set(results)) == 1
    assert float(results[0][0]) > 0.9
    assert [path.name for path in tmp_path.iterdir()] == ["digits.keras"]


# TensorFlow's devices are set once in a process, so the page that sets them comes first.
# The others begin with one process: pages choose strategies of their own.
RUN_PAGES = """
import pathlib, re, sys
import tfdist
pages = sorted(map(pathlib.Path, sys.argv[1:]), key=lambda p: (p.name != "mirrored.md", p))
for page in pages:
    if page.name != "mirrored.md":
        tfdist.init("single")
    blocks = re.findall(r"^```python\\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    for number, block in enumerate(blocks):
        print(f"running {page.name} {number}", flush=True)
        exec(compile(block, f"{page.name}, block {number}", "exec"), {})
"""


@pytest.mark.parametrize("half", [0, 1])  # each stays far below the limit on a slow machine
def test_python_code_of_the_documentation(half, tmp_path):
    pages = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])[half::2]
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
    assert done.stdout.count("running ") >= 4
