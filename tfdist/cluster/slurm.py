"""The cluster that SLURM's variables describe: one worker for each task of an `srun` step."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import product

from tfdist.cluster.environment import whole_number
from tfdist.errors import ClusterError

# Below the range that Linux hands to outgoing connections (32768 and up). A job takes one
# block of ports, so that two jobs which share a node and have neighbouring ids do not meet.
_FIRST_PORT = 12000
_PORTS_PER_JOB = 64
_PORT_BLOCKS = 312

# No cluster has more: a longer list was not written by SLURM.
_MOST = 1_000_000

# SLURM gives the batch script and an interactive shell step numbers from here on.
_FIRST_RESERVED_STEP = 0xFFFF_FFF0


def workers_from_slurm(environ: Mapping[str, str]) -> tuple[tuple[str, ...], int] | None:
    """Reads the addresses of all workers and this process's position among them.

    Only a process that `srun` started in a step of several tasks is a worker. An `sbatch`
    script and an interactive shell have `SLURM_NTASKS` too, but they are not tasks.

    Args:
        environ: The environment variables.

    Returns:
        The workers' addresses and this process's index, or None if this process is not one
        of several SLURM tasks.

    Raises:
        ClusterError: SLURM's variables cannot be read, or do not agree with each other.
    """
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID"))
    if step is None or "SLURM_PROCID" not in environ:
        return None
    step_id = _number("SLURM_STEP_ID", step)
    if step_id >= _FIRST_RESERVED_STEP:
        return None
    tasks_name, tasks_text = _first(
        environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", default="1"
    )
    tasks = _number(tasks_name, tasks_text)
    if tasks < 2:
        return None

    index = _number("SLURM_PROCID", environ["SLURM_PROCID"])
    if index >= tasks:
        raise ClusterError(
            f"`SLURM_PROCID` must be less than `{tasks_name}`. "
            f"Received: SLURM_PROCID={index}, {tasks_name}={tasks}. "
            "Start the program with `srun`, which sets both."
        )
    if environ.get("SLURM_DISTRIBUTION", "block").split(",")[0].split(":")[0] not in (
        "block",
        "unknown",
    ):
        raise ClusterError(
            "SLURM's tasks must be distributed over the nodes in blocks. "
            f"Received: SLURM_DISTRIBUTION={environ['SLURM_DISTRIBUTION']!r}. "
            "Start the program with `srun --distribution=block`."
        )
    nodes_name, nodes_text = _first(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    nodes = expand_node_list(nodes_text, name=nodes_name)
    counts_name, counts_text = _first(
        environ, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"
    )
    counts = expand_task_counts(counts_text, name=counts_name)
    if len(counts) != len(nodes) or sum(counts) != tasks:
        raise ClusterError(
            f"`{counts_name}` must give the number of tasks of each node in `{nodes_name}`, "
            f"`{tasks_name}` in all. Received: {counts_name}={counts_text!r}, "
            f"{nodes_name}={nodes_text!r}, {tasks_name}={tasks}. "
            "Start the program with `srun`, or set TF_CONFIG, which comes first."
        )
    base = _base_port(environ, step_id, needed=max(counts))
    addresses = tuple(
        f"{node}:{base + local}"
        for node, count in zip(nodes, counts, strict=True)
        for local in range(count)
    )
    return addresses, index


def expand_node_list(text: str, name: str = "SLURM_STEP_NODELIST") -> tuple[str, ...]:
    """Expands a node list in SLURM's notation.

    Args:
        text: The list, such as `"node[01-03,07],gpu5"`.
        name: The variable that holds it, for the error message.

    Returns:
        The node names in SLURM's order.

    Raises:
        ClusterError: `text` is not in SLURM's notation.

    Example:
        >>> expand_node_list("node[09-11],gpu5")
        ('node09', 'node10', 'node11', 'gpu5')
    """

    def malformed(part: str) -> ClusterError:
        return ClusterError(
            f"`{name}` must be a list of nodes such as 'node[01-03,07],gpu5'. "
            f"Received: {name}={text!r}, in which {part!r} cannot be read. "
            "Start the program with `srun`, or set TF_CONFIG, which comes first."
        )

    nodes: list[str] = []
    # A comma inside brackets separates ranges, one outside separates nodes.
    for entry in re.split(r",(?![^\[]*\])", text.strip()):
        if not re.fullmatch(r"(?:[\w.-]+|\[[\d,-]+\])+", entry):
            raise malformed(entry)
        choices: list[list[str]] = []
        for literal, ranges in re.findall(r"([\w.-]+)|\[([\d,-]+)\]", entry):
            if literal:
                choices.append([literal])
                continue
            numbers: list[str] = []
            for piece in ranges.split(","):
                match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", piece)
                if match is None:
                    raise malformed(entry)
                first, last = match[1], match[2] or match[1]
                if not 0 <= int(last) - int(first) < _MOST:
                    raise malformed(entry)
                numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
            choices.append(numbers)
        if math.prod(map(len, choices)) > _MOST:
            raise malformed(entry)
        nodes += ["".join(parts) for parts in product(*choices)]
    return tuple(nodes)


def expand_task_counts(text: str, name: str = "SLURM_STEP_TASKS_PER_NODE") -> tuple[int, ...]:
    """Expands SLURM's numbers of tasks on each node.

    Args:
        text: The numbers, such as `"2(x3),1"`.
        name: The variable that holds them, for the error message.

    Returns:
        One number for each node.

    Raises:
        ClusterError: `text` is not in SLURM's notation.

    Example:
        >>> expand_task_counts("2(x3),1")
        (2, 2, 2, 1)
    """
    counts: list[int] = []
    for entry in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:\(x(\d{1,18})\))?\s*", entry)
        if match is None or int(match[2] or 1) > _MOST:
            raise ClusterError(
                f"`{name}` must be a list of task counts such as '2(x3),1'. "
                f"Received: {name}={text!r}. "
                "Start the program with `srun`, or set TF_CONFIG, which comes first."
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return tuple(counts)


def _base_port(environ: Mapping[str, str], step_id: int, needed: int) -> int:
    if "TFDIST_PORT" in environ:
        port = _number("TFDIST_PORT", environ["TFDIST_PORT"])
        if not 1 <= port <= 65536 - needed:
            raise ClusterError(
                f"`TFDIST_PORT` must be between 1 and {65536 - needed}, so that {needed} "
                f"workers of one node each get a port. Received: TFDIST_PORT={port}. "
                "Choose a lower port, or unset TFDIST_PORT to have one derived from the job."
            )
        return port
    job_name, job_text = _first(environ, "SLURM_JOB_ID", "SLURM_JOBID")
    # Every task must compute the same port by itself, and they share nothing but these ids.
    block = (_number(job_name, job_text) + 37 * step_id) % _PORT_BLOCKS
    return _FIRST_PORT + _PORTS_PER_JOB * block


def _first(
    environ: Mapping[str, str], *names: str, default: str | None = None
) -> tuple[str, str]:
    for name in names:
        if name in environ:
            return name, environ[name]
    if default is not None:
        return names[0], default
    raise ClusterError(
        f"`{names[0]}` must be set in a task of a SLURM step. Received: {names[0]}=None. "
        "Start the program with `srun`, or set TF_CONFIG, which comes first."
    )


def _number(name: str, text: str) -> int:
    number = whole_number(text)
    if number is None:
        raise ClusterError(
            f"`{name}` must be a whole number, 0 or more. Received: {name}={text[:40]!r}. "
            "Start the program with `srun`, which sets it, or unset it."
        )
    return number
