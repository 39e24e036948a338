"""Writes docs/does_my_program_run.md: python -m tests.programs.table."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.programs.expected import EVERYWHERE, FAMILIES, Ends, Expected, Program
from tests.programs.run import SCRIPTS

PAGE = Path(__file__).parents[2] / "docs" / "does_my_program_run.md"

BEFORE = """\
# Does my program run?

Below are programs in the style of Keras's examples and TensorFlow's guides. They are ordinary
scripts that do not import tfdist. We ran each in plain Keras, and then with the drop-in on
each strategy:

```sh
python program.py
tfdist run -n 2 --drop-in program.py
```

We compared all weights, histories and printed numbers. Find the program most like yours.

| cell | meaning |
|---|---|
| equal | its weights and numbers equal those of plain Keras in one process |
| as one | they equal those of tfdist in one process, but not those of plain Keras |
| alike | it runs; all workers end with the same weights, but not with those of plain Keras |
| refused | it ends with the message in the last column |
| fails | it does not run, or gives a wrong result |

"Equal" means: to a ten-thousandth of a variable's norm. The programs call
`keras.utils.set_random_seed` and train for one to four epochs. `multi_worker`, `horovod` and
`parameter_server` had two workers, `mirrored` two devices. Parameter servers were synchronous.
[The promise](promise.md) says what is equal in general, and why.

"""


def page() -> str:
    """Gives the whole page."""
    return BEFORE + "\n".join(_table(title, family) for title, family in FAMILIES.items())


def _table(title: str, family: dict[str, Program]) -> str:
    heads = [f"`{place.rsplit('-', 1)[0]}`" for place in EVERYWHERE]
    rows = [
        f"## {title.capitalize()}\n",
        _cells(["program", *heads, "why"]),
        _cells(["---"] * (len(heads) + 2)),
        *(_row(name, program) for name, program in family.items()),
    ]
    return "\n".join(rows) + "\n"


def _row(name: str, program: Program) -> str:
    expected = [program.on(place) for place in EVERYWHERE]
    why = dict.fromkeys(_sentence(one) for one in expected if one.why)
    return _cells([_what(name), *(one.ends.value for one in expected), " ".join(why)])


def _cells(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _what(name: str) -> str:
    documented = ast.get_docstring(ast.parse((SCRIPTS / f"{name}.py").read_text("utf-8")))
    assert documented is not None, name
    return f"{documented.rstrip('.')} (`{name}`)"


def _sentence(expected: Expected) -> str:
    if expected.ends is Ends.REFUSED:
        return f'"{expected.why}"'
    return f"{expected.why[0].upper()}{expected.why[1:]}."


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
