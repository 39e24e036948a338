"""Starts, watches and ends the worker processes of `tfdist run`. No TensorFlow is needed."""

from tfdist.launch.cause import Failure
from tfdist.launch.horovod import rendezvous
from tfdist.launch.hosts import Host, parse_hosts
from tfdist.launch.plan import (
    DEFAULT_PORT,
    STRATEGIES,
    Worker,
    plan_workers,
    script_command,
)
from tfdist.launch.processes import SAVING_S, Outcome, run_workers
from tfdist.launch.restarts import Restarts, listed

__all__ = [
    "DEFAULT_PORT",
    "SAVING_S",
    "STRATEGIES",
    "Failure",
    "Host",
    "Outcome",
    "Restarts",
    "Worker",
    "listed",
    "parse_hosts",
    "plan_workers",
    "rendezvous",
    "run_workers",
    "script_command",
]
