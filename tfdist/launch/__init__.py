"""Starts, watches and ends the worker processes of `tfdist run`. No TensorFlow is needed."""

from tfdist.launch.cause import Failure
from tfdist.launch.client import CoordinatorClient
from tfdist.launch.console import say_last
from tfdist.launch.exposure import exposed_ports
from tfdist.launch.health import health_of
from tfdist.launch.hidden_output import Shows
from tfdist.launch.hosts import Host, check_names, parse_hosts
from tfdist.launch.journal import Journal, events_name
from tfdist.launch.outcome import Outcome
from tfdist.launch.output import is_start_up_noise
from tfdist.launch.plan import DEFAULT_PORT, count_on_processor, plan_workers
from tfdist.launch.processes import SAVING_S, run_workers
from tfdist.launch.remote_hosts import (
    INTERRUPTED_S,
    READY,
    RemoteTask,
    check_first_host,
    forwarded,
    remote_launchers,
)
from tfdist.launch.resources import crowded_cores
from tfdist.launch.restarts import RestartLimit, Restarts, restart_lines
from tfdist.launch.roster import Roster
from tfdist.launch.script_check import check_syntax, find_script
from tfdist.launch.several_machines import NODE_TIMEOUT_S, connect_launchers
from tfdist.launch.slots import parse_elastic
from tfdist.launch.standard_streams import open_standard_streams
from tfdist.launch.token import TOKEN, share_token
from tfdist.launch.worker import Worker, script_command

__all__ = [
    "DEFAULT_PORT",
    "INTERRUPTED_S",
    "NODE_TIMEOUT_S",
    "READY",
    "SAVING_S",
    "TOKEN",
    "CoordinatorClient",
    "Failure",
    "Host",
    "Journal",
    "Outcome",
    "RemoteTask",
    "RestartLimit",
    "Restarts",
    "Roster",
    "Shows",
    "Worker",
    "check_first_host",
    "check_names",
    "check_syntax",
    "connect_launchers",
    "count_on_processor",
    "crowded_cores",
    "events_name",
    "exposed_ports",
    "find_script",
    "forwarded",
    "health_of",
    "is_start_up_noise",
    "open_standard_streams",
    "parse_elastic",
    "parse_hosts",
    "plan_workers",
    "remote_launchers",
    "restart_lines",
    "run_workers",
    "say_last",
    "script_command",
    "share_token",
]
