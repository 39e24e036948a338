"""Parameters on servers, computation on workers, and the script on the chief."""

from tfdist.strategies.parameter_server.ledger import Staleness
from tfdist.strategies.parameter_server.strategy import ParameterServer

__all__ = ["ParameterServer", "Staleness"]
