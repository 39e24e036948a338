"""Starts, watches and ends the worker processes of `tfdist run`. No TensorFlow is needed."""

from tfdist.launch.cause import Failure
from tfdist.launch.client import CoordinatorClient
from tfdist.launch.console import say_last
from tfdist.launch.exposure import exposed_ports
from tfdist.launch.health import health_of
from tfdist.launch.hosts import Host, check_names, parse_hosts
from tfdist.launch.journal import Journal, events_name
from tfdist.launch.outcome import Outcome
from tfdist.launch.plan import DEFAULT_PORT, plan_workers
from tfdist.launch.processes import SAVING_S, run_workers
from tfdist.launch.restarts import RestartLimit, Restarts, restart_lines
from tfdist.launch.roster import Roster
from tfdist.launch.several_machines import NODE_TIMEOUT_S, connect_launchers
from tfdist.launch.slots import parse_elastic
from tfdist.launch.standard_streams import open_standard_streams
from tfdist.launch.token import TOKEN, share_token
from tfdist.launch.worker import Worker, script_command

__all__ = [
    "DEFAULT_PORT",
    "NODE_TIMEOUT_S",
    "SAVING_S",
    "TOKEN",
    "CoordinatorClient",
    "Failure",
    "Host",
    "Journal",
    "Outcome",
    "RestartLimit",
    "Restarts",
    "Roster",
    "Worker",
    "check_names",
    "connect_launchers",
    "events_name",
    "exposed_ports",
    "health_of",
    "open_standard_streams",
    "parse_elastic",
    "parse_hosts",
    "plan_workers",
    "restart_lines",
    "run_workers",
    "say_last",
    "script_command",
    "share_token",
]
