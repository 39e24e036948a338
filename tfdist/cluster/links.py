"""What `tfdist test` has measured of the links between workers, kept in a file."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tfdist.cluster import strict_json
from tfdist.cluster.cache import cache_folder

_MOST_KEPT = 100
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class LinkMeasurement:
    """The time of an all-reduce among some workers, as a straight line.

    An all-reduce of a tensor of n bytes takes `latency_s + n / bytes_per_s` seconds. It is the
    time of the whole operation, whatever algorithm the strategy uses for it.

    Attributes:
        strategy: The name of the strategy. With "parameter_server", it is the time in which a
            worker reads and adds to a variable of n bytes on a server.
        workers: How many workers took part.
        hosts: On how many hosts they ran.
        latency_s: Seconds that an all-reduce of a few bytes takes.
        bytes_per_s: Bytes of the tensor in each further second.
        measured_at: When it was measured, as ISO 8601 in UTC.
    """

    strategy: str
    workers: int
    hosts: int
    latency_s: float
    bytes_per_s: float
    measured_at: str

    def seconds(self, size: float) -> float:
        """Returns the predicted time of an all-reduce.

        Args:
            size: Bytes of the tensor.

        Example:
            >>> LinkMeasurement("multi_worker", 2, 2, 0.001, 1e8, "").seconds(1e6)
            0.011
        """
        return self.latency_s + size / self.bytes_per_s


def links_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Returns the file of the measurements, in tfdist's cache folder.

    Args:
        environ: The environment variables, of which TFDIST_CACHE_DIR and XDG_CACHE_HOME count.
    """
    return cache_folder(None, environ) / "links.json"


def record(measurement: LinkMeasurement) -> Path:
    """Adds a measurement to the file.

    The file is written atomically. The newest measurements are kept.

    Args:
        measurement: The measurement.

    Returns:
        The file.

    Raises:
        OSError: The file cannot be written.
    """
    target = links_file()
    kept = [*read(), measurement][-_MOST_KEPT:]
    content = json.dumps({"version": 1, "links": [asdict(link) for link in kept]}, indent=1)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=target.parent, prefix=".links-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(content + "\n")
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    return target


def read() -> list[LinkMeasurement]:
    """Returns the measurements of earlier runs of `tfdist test`, the newest last.

    A file that cannot be read counts as empty, and one line says so.
    """
    file = links_file()
    try:
        content = strict_json.loads(file.read_bytes(), _MOST_BYTES)
        return [_measurement(entry) for entry in content["links"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged"
        print(
            f"tfdist: the measurements in {file} are ignored: {reason}. `tfdist test` measures "
            "again.",
            file=sys.stderr,
        )
        return []


def _measurement(entry: Any) -> LinkMeasurement:
    """Reads an entry of the file; raises ValueError if a value is not as it was written."""
    values = {field.name: entry[field.name] for field in fields(LinkMeasurement)}
    texts = (values["strategy"], values["measured_at"])
    counts = (values["workers"], values["hosts"])
    numbers = (values["latency_s"], values["bytes_per_s"])
    are_numbers = all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
    if (
        not all(isinstance(text, str) for text in texts)
        or not all(type(count) is int and count > 0 for count in counts)
        or not are_numbers
        or values["latency_s"] < 0
        or values["bytes_per_s"] <= 0
    ):
        raise ValueError("not a measurement")
    return LinkMeasurement(**values)
