"""Parameter servers store the variables, workers compute, and the chief runs the script."""

from tfdist.strategies.parameter_server.strategy import ParameterServer
from tfdist.strategies.parameter_server.update_log import Staleness

__all__ = ["ParameterServer", "Staleness"]
