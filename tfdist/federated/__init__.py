"""Federated training: clients make several steps alone, and a server averages them.

A round is an epoch of Keras's loop, and one step of it. `plan.py` chooses the clients of a
round and deals them to replicas. `source.py` turns the plan into the input of replicas.
`client.py` makes the local steps of a client, and `round.py` trains all clients of a replica
and updates the server's model.
"""

from tfdist.federated.settings import DiLoCo, FedAvg

__all__ = ["DiLoCo", "FedAvg"]
