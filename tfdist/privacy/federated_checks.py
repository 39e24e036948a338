"""What private federated training of clients and of examples checks alike."""

from __future__ import annotations

import hashlib

from tfdist.errors import ArgumentError
from tfdist.federated.clients import Clients
from tfdist.privacy import validation
from tfdist.training.request import Request


def check_request(request: Request) -> None:
    """Refuses arguments of `fit` that the `privacy` of FedAvg does not cover.

    Args:
        request: The arguments of `fit`.

    Raises:
        ArgumentError: There is such an argument.
    """
    if request.is_private:
        raise ArgumentError(
            "Either examples or clients must be protected, not both at once. Received: "
            "`privacy` of `fit`, and `privacy` of FedAvg. Leave one of them out."
        )
    validation.check_class_weight(request.class_weight)
    validation.check_sums(request.session)


def fingerprint_of(clients: Clients) -> str:
    """Returns a hash of which rows of this process belong to which client.

    Args:
        clients: The clients.
    """
    digest = hashlib.sha256(clients.sizes.tobytes() + clients.workers.tobytes())
    for client in sorted(clients.members):
        digest.update(clients.members[client].tobytes())
    return digest.hexdigest()
