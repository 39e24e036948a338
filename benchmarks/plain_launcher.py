"""Starts a script on several local workers with nothing but TF_CONFIG, for other libraries.

python -m benchmarks.plain_launcher WORKERS SCRIPT [ARGUMENT ...]
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def main(workers: int, command: list[str]) -> int:
    addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
    processes = []
    for index in range(workers):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environ = os.environ | {"TFDIST_LOCAL_RANK": str(index), "TF_CPP_MIN_LOG_LEVEL": "3"}
        environ |= dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS"), "1")
        if workers > 1:
            environ["TF_CONFIG"] = json.dumps(config)
        processes.append(subprocess.Popen([sys.executable, *command], env=environ))
    try:
        return max(process.wait(timeout=600) for process in processes)
    finally:
        for process in processes:
            process.kill()


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), sys.argv[2:]))
