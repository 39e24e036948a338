from __future__ import annotations

import json
import pickle

import pytest

from tfdist.cluster import Cluster
from tfdist.cluster.slurm import expand_node_list, expand_task_counts
from tfdist.errors import ClusterError

pytestmark = pytest.mark.quick

TWO = {"worker": ["a:1", "b:2"]}


def read(config: object) -> Cluster:
    text = config if isinstance(config, str) else json.dumps(config)
    return Cluster.from_environment({"TF_CONFIG": text})


def task(type_: object, index: object) -> dict[str, object]:
    return {"type": type_, "index": index}


class TestSingleProcess:
    @pytest.mark.parametrize(
        "environ",
        [{}, *({"TF_CONFIG": text} for text in ("", " ", "{}", '{"cluster": {}, "task": {}}'))],
    )
    def test_nothing_describes_a_cluster(self, environ):
        cluster = Cluster.from_environment(environ)
        assert cluster.num_workers == 1
        assert cluster.worker_index == 0
        assert cluster.is_chief
        assert cluster.to_tf_config() == "{}"

    def test_one_worker_needs_no_task(self):
        cluster = read({"cluster": {"worker": ["a:1"]}})
        assert cluster.num_workers == 1
        assert cluster.is_chief
        assert cluster.source == "TF_CONFIG"


class TestTfConfig:
    def test_worker(self):
        cluster = read({"cluster": TWO, "task": task("worker", 1)})
        assert cluster.workers == ("a:1", "b:2")
        assert cluster.worker_index == 1
        assert cluster.task == "worker 1"
        assert not cluster.is_chief
        assert not cluster.has_parameter_servers

    def test_first_worker_is_chief_only_without_a_chief_job(self):
        assert read({"cluster": TWO, "task": task("worker", 0)}).is_chief
        with_chief = {"worker": ["a:1"], "chief": ["c:1"], "ps": ["p:1"]}
        worker = read({"cluster": with_chief, "task": task("worker", 0)})
        assert worker.workers == ("c:1", "a:1")
        assert worker.worker_index == 1
        assert not worker.is_chief
        chief = read({"cluster": with_chief, "task": task("chief", 0)})
        assert chief.worker_index == 0
        assert chief.is_chief
        assert chief.task == "chief"
        assert chief.has_parameter_servers

    def test_index_may_be_a_string(self):
        assert read({"cluster": TWO, "task": task("worker", "1")}).index == 1

    def test_ipv6(self):
        assert read({"cluster": {"worker": ["[::1]:1", "[::1]:2"]}, "task": task("worker", 0)})

    def test_evaluator_may_stand_outside(self):
        cluster = read({"cluster": TWO, "task": task("evaluator", 0)})
        assert not cluster.is_chief
        assert (cluster.num_workers, cluster.workers) == (1, ())
        with pytest.raises(ClusterError, match="evaluator 0"):
            _ = cluster.worker_index

    def test_master_is_the_chief(self):
        jobs = {"master": ["m:1"], "worker": ["a:1"]}
        assert read({"cluster": jobs, "task": task("master", 0)}).is_chief
        assert read({"cluster": jobs, "task": task("worker", 0)}).workers == ("m:1", "a:1")

    def test_comes_before_slurm(self):
        environ = slurm(0) | {
            "TF_CONFIG": json.dumps({"cluster": TWO, "task": task("worker", 0)})
        }
        assert Cluster.from_environment(environ).source == "TF_CONFIG"

    def test_round_trip(self):
        cluster = read({"cluster": TWO, "task": task("worker", 1)})
        assert read(cluster.to_tf_config()) == cluster
        assert pickle.loads(pickle.dumps(cluster)) == cluster
        assert hash(cluster) == hash(read(cluster.to_tf_config()))
        with pytest.raises(TypeError):
            cluster.jobs["worker"] = ()

    @pytest.mark.parametrize(
        ("config", "field"),
        [
            ("{worker", "`TF_CONFIG` must be JSON"),
            ("[]", "`TF_CONFIG` must be a JSON object"),
            ({"cluster": [], "task": task("worker", 0)}, "`TF_CONFIG.cluster`"),
            ({"task": task("worker", 0)}, "`TF_CONFIG.cluster`"),
            ({"cluster": ["a:1"]}, "`TF_CONFIG.cluster` must be a JSON object"),
            ({"cluster": {"trainer": ["a:1"]}}, "a job 'trainer'"),
            ({"cluster": {"master": ["a:1"], "chief": ["b:1"]}}, "both 'chief' and 'master'"),
            ({"cluster": {"worker": {"1": "a:1"}, "ps": ["b:1"]}}, "enableDynamicWorker"),
            ({"sparseCluster": {"worker": {"1": "a:1"}}}, "enableDynamicWorker"),
            ({"cluster": {"worker": "a:1"}}, "`TF_CONFIG.cluster.worker` must be a list"),
            ({"cluster": {"worker": ["a:1", ""]}}, "`TF_CONFIG.cluster.worker\\[1\\]`"),
            ({"cluster": {"worker": ["a:1", None]}}, "`TF_CONFIG.cluster.worker\\[1\\]`"),
            ({"cluster": {"worker": ["a"]}}, "Add the port"),
            ({"cluster": {"worker": [":1"]}}, "`TF_CONFIG.cluster.worker\\[0\\]`"),
            ({"cluster": {"worker": ["a:0"]}}, "Correct the port"),
            ({"cluster": {"worker": ["a:65536"]}}, "Correct the port"),
            ({"cluster": {"worker": ["a:x"]}}, "Correct the port"),
            ({"cluster": {"worker": ["grpc://a:1"]}}, "Leave out the scheme"),
            ({"cluster": {"worker": ["::1:80"]}}, "brackets"),
            ({"cluster": {"worker": ["a:1", "a:1"]}}, "'a:1' in both TF_CONFIG.cluster.worker"),
            ({"cluster": {"worker": ["a:1"], "ps": ["a:1"]}}, "TF_CONFIG.cluster.ps\\[0\\]"),
            ({"cluster": {"chief": ["a:1", "b:1"]}}, "`TF_CONFIG.cluster.chief`"),
            ({"cluster": TWO}, "`TF_CONFIG.task`"),
            ({"cluster": TWO, "task": ["worker", 0]}, "`TF_CONFIG.task` must be a JSON object"),
            ({"cluster": TWO, "task": {"index": 0}}, "TF_CONFIG.task.type=None"),
            ({"cluster": TWO, "task": task("chief", 0)}, "TF_CONFIG.task.type='chief'"),
            ({"cluster": TWO, "task": {"type": "worker"}}, "TF_CONFIG.task.index=None"),
            (
                {"cluster": TWO, "task": task("worker", 2)},
                "from 0 to 1.*TF_CONFIG.task.index=2",
            ),
            ({"cluster": TWO, "task": task("worker", -1)}, "TF_CONFIG.task.index=-1"),
            ({"cluster": TWO, "task": task("worker", 0.0)}, "TF_CONFIG.task.index=0.0"),
            ({"cluster": TWO, "task": task("worker", True)}, "TF_CONFIG.task.index=True"),
            ({"cluster": TWO, "task": task("worker", "x")}, "TF_CONFIG.task.index='x'"),
        ],
    )
    def test_malformed(self, config, field):
        with pytest.raises(ClusterError, match=field) as caught:
            read(config)
        assert "must" in str(caught.value)
        assert "Received: " in str(caught.value)


def slurm(index: int, **changes: str | None) -> dict[str, str]:
    environ = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(index),
        "SLURM_NTASKS": "5",
        "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_STEP_NODELIST": "node[01-02],gpu5",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    }
    environ.update({name: value for name, value in changes.items() if value is not None})
    return {n: v for n, v in environ.items() if changes.get(n, "") is not None}


class TestSlurm:
    def test_every_task_sees_the_same_cluster(self):
        clusters = [Cluster.from_environment(slurm(i)) for i in range(5)]
        assert [c.worker_index for c in clusters] == [0, 1, 2, 3, 4]
        assert len({c.workers for c in clusters}) == 1
        hosts = [address.split(":")[0] for address in clusters[0].workers]
        assert hosts == ["node01", "node01", "node02", "node02", "gpu5"]
        assert len(set(clusters[0].workers)) == 5
        assert {c.source for c in clusters} == {"SLURM"}

    def test_port(self):
        cluster = Cluster.from_environment(slurm(0, TFDIST_PORT="5000"))
        assert cluster.workers[:3] == ("node01:5000", "node01:5001", "node02:5000")

    def test_steps_and_neighbouring_jobs_do_not_share_ports(self):
        workers = [
            Cluster.from_environment(slurm(0, SLURM_JOB_ID=job, SLURM_STEP_ID=step)).workers
            for job in ("4711", "4712")
            for step in ("0", "1")
        ]
        assert len({address for some in workers for address in some}) == 20

    def test_job_variables_serve_where_the_step_has_none(self):
        environ = slurm(
            3,
            SLURM_STEP_NUM_TASKS=None,
            SLURM_STEP_NODELIST=None,
            SLURM_STEP_TASKS_PER_NODE=None,
            SLURM_JOB_NODELIST="n[1-5]",
            SLURM_TASKS_PER_NODE="1(x5)",
        )
        assert Cluster.from_environment(environ).workers[3].startswith("n4:")

    @pytest.mark.parametrize(
        "changes",
        [
            {"SLURM_STEP_ID": None, "SLURM_STEP_NUM_TASKS": None},  # an sbatch script
            {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # salloc's shell
            {"SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
            {"SLURM_PROCID": None},
        ],
    )
    def test_an_allocation_is_not_a_task(self, changes):
        assert Cluster.from_environment(slurm(0, **changes)).num_workers == 1

    @pytest.mark.parametrize(
        ("changes", "name"),
        [
            ({"SLURM_PROCID": "5"}, "SLURM_PROCID"),
            ({"SLURM_PROCID": "x"}, "SLURM_PROCID"),
            ({"SLURM_STEP_NODELIST": "node[01-"}, "SLURM_STEP_NODELIST"),
            ({"SLURM_STEP_NODELIST": None}, "SLURM_STEP_NODELIST"),
            ({"SLURM_STEP_TASKS_PER_NODE": "2(x3"}, "SLURM_STEP_TASKS_PER_NODE"),
            ({"SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, "SLURM_STEP_TASKS_PER_NODE"),
            ({"SLURM_JOB_ID": None}, "SLURM_JOB_ID"),
            ({"SLURM_DISTRIBUTION": "cyclic"}, "SLURM_DISTRIBUTION"),
            ({"TFDIST_PORT": "65535"}, "TFDIST_PORT"),
        ],
    )
    def test_malformed(self, changes, name):
        with pytest.raises(ClusterError, match=f"Received: .*{name}="):
            Cluster.from_environment(slurm(0, **changes))

    @pytest.mark.parametrize(
        ("text", "nodes"),
        [
            ("gpu5", ["gpu5"]),
            ("a,b", ["a", "b"]),
            ("n[1-3]", ["n1", "n2", "n3"]),
            ("n[08-10,12]", ["n08", "n09", "n10", "n12"]),
            ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
            ("n[1-2].example.org,m", ["n1.example.org", "n2.example.org", "m"]),
        ],
    )
    def test_node_list(self, text, nodes):
        assert list(expand_node_list(text)) == nodes

    @pytest.mark.parametrize("text", ["", "a,", "n[]", "n[3-1]", "n[1-2", "n[a]", "n 1"])
    def test_malformed_node_list(self, text):
        with pytest.raises(ClusterError, match="must be a list of nodes"):
            expand_node_list(text)

    def test_task_counts(self):
        assert expand_task_counts("2(x3),1") == (2, 2, 2, 1)
        assert expand_task_counts("4") == (4,)


class TestRanks:
    def test_horovodrun(self):
        cluster = Cluster.from_environment({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "3"})
        assert (cluster.launched, cluster.num_workers, cluster.worker_index) == (3, 3, 1)
        assert (cluster.source, cluster.is_chief, cluster.workers) == ("Horovod", False, ())
        assert pickle.loads(pickle.dumps(cluster)) == cluster

    @pytest.mark.parametrize(
        "environ",
        [
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
            {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"},
        ],
    )
    def test_mpirun(self, environ):
        cluster = Cluster.from_environment(environ)
        assert (cluster.launched, cluster.is_chief, cluster.source) == (2, True, "MPI")

    def test_what_is_closest_to_the_process_comes_first(self):
        config = json.dumps({"cluster": TWO, "task": task("worker", 1)})
        horovod = {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}
        mpi = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
        everything = {"TF_CONFIG": config, **horovod, **mpi}
        assert Cluster.from_environment(everything).source == "Horovod"
        assert Cluster.from_environment({"TF_CONFIG": config, **mpi}).source == "TF_CONFIG"
        assert Cluster.from_environment(slurm(0) | mpi).source == "MPI"
        # srun --mpi=pmi2 sets these two for every task.
        pmi = {"PMI_RANK": "0", "PMI_SIZE": "2"}
        assert Cluster.from_environment(slurm(0) | pmi).source == "SLURM"

    @pytest.mark.parametrize(
        ("rank", "size"), [("2", "2"), ("-1", "2"), ("a", "2"), ("0", "0")]
    )
    def test_malformed(self, rank, size):
        with pytest.raises(ClusterError, match="HOROVOD_RANK"):
            Cluster.from_environment({"HOROVOD_RANK": rank, "HOROVOD_SIZE": size})
