"""The program that `tfdist recommend` and `tfdist estimate` start.

It gets its options as JSON in its first argument, then the target and its arguments. It
prints a table, or JSON on a single line for the command that has started it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console

from tfdist.errors import TfdistError

_WIDTH = 140
_DTYPES = {"float32": None, "bfloat16": "mixed_bfloat16"}


def recommend(options: dict[str, Any], target: list[str]) -> Any:
    """Answers `tfdist recommend`."""
    from tfdist.scripts.recommend import Where, recommend_call
    from tfdist.scripts.targets import call_of

    call = call_of(target, options["batch_size"])
    where = Where(options["workers"], options["hosts"], options["servers"], options["link"])
    return recommend_call(call, where, measure=options["measure"], script=" ".join(target))


def estimate(options: dict[str, Any], target: list[str]) -> Any:
    """Answers `tfdist estimate`."""
    from tfdist.scripts.recommend import Where, hardware_here, workload
    from tfdist.scripts.targets import call_of, with_policy
    from tfdist.strategies.choice.estimate import estimate_for, parse_size, replica_counts

    limit = None if options["memory"] is None else parse_size(options["memory"])
    call = call_of(target, options["batch_size"])
    loads = {}
    for dtype in options["dtypes"]:
        policy = _DTYPES[dtype]
        chosen = call if policy is None else with_policy(call, policy)
        loads[dtype] = workload(chosen, replica_counts(options["replicas"]))
    hardware = hardware_here(Where(), measure=False)
    return estimate_for(loads, hardware, options["replicas"], limit)


def main() -> None:
    """Answers the question of the command line."""
    options = json.loads(sys.argv[1])
    try:
        answer = {"recommend": recommend, "estimate": estimate}[options["what"]](
            options, sys.argv[2:]
        )
    except TfdistError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    if options["json"]:
        print(json.dumps(answer.to_dict(), indent=2))
    else:
        # The columns need this much; a narrower terminal wraps whole lines.
        Console(highlight=False, width=max(_WIDTH, Console().width)).print(answer)


if __name__ == "__main__":
    main()
