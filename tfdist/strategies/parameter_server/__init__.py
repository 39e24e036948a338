"""Parameters on servers, computation on workers, and the script on the chief."""

from tfdist.strategies.parameter_server.strategy import ParameterServer
from tfdist.strategies.parameter_server.update_log import Staleness

__all__ = ["ParameterServer", "Staleness"]
