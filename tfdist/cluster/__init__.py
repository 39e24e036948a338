"""The processes of a cluster: their places, their messages, and how long they wait.

No TensorFlow is needed here.
"""

from tfdist.cluster.cluster import Cluster
from tfdist.cluster.jobs import CHIEF, EVALUATOR, PS, WORKER
from tfdist.cluster.tf_config import check_address

__all__ = ["CHIEF", "EVALUATOR", "PS", "WORKER", "Cluster", "check_address"]
