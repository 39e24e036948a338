"""Private parts of Keras and TensorFlow are touched in `tfdist/_keras/` alone.

    python -m tests.lint.private_parts

Names that begin with an underscore belong to whoever defines them: those that tfdist itself
defines, anywhere, are its own, and `self` and `cls` are looked at by nobody else.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2] / "tfdist"
PRIVATE_PACKAGES = ("keras.src", "tensorflow.python")
LEFT_OUT = (ROOT / "_keras",)
# Of Python itself, without another way.
PYTHON_S = {"_current_frames", "_exit", "_run_exitfuncs"}
# Of dp-accounting's distributions, which `accountants.py` checks when it reads them.
DP_ACCOUNTING_S = {
    "_infinity_mass",
    "_lower_loss",
    "_pmf_add",
    "_pmf_remove",
    "_probs",
    "_symmetric",
}


def touches(source: str, own: set[str]) -> Iterator[tuple[int, str]]:
    """Finds the private parts that a module touches.

    Args:
        source: The module.
        own: Names that tfdist defines.

    Yields:
        The line, and what is touched.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ImportFrom(module=str(name)) if name.startswith(PRIVATE_PACKAGES):
                yield node.lineno, name
            case ast.Import(names=names):
                for alias in names:
                    if alias.name.startswith(PRIVATE_PACKAGES):
                        yield node.lineno, alias.name
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(attr=name) if _is_private(name, own):
                yield node.lineno, ast.unparse(node)
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr"),
                args=[_, ast.Constant(value=str(name)), *_],
            ) if _is_private(name, own):
                yield node.lineno, ast.unparse(node)


def _is_private(name: str, own: set[str]) -> bool:
    if name == "__internal__":
        return True
    is_special = name.startswith("__") and name.endswith("__")
    return (
        name.startswith("_") and not is_special and name not in own | PYTHON_S | DP_ACCOUNTING_S
    )


def defined(source: str) -> Iterator[str]:
    """Lists the names that a module gives to something.

    Args:
        source: The module.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.alias(asname=name):
                yield name or ""
            case ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                yield name


def main() -> int:
    sources = {path: path.read_text() for path in sorted(ROOT.rglob("*.py"))}
    outside = {p: s for p, s in sources.items() if not set(LEFT_OUT) & set(p.parents)}
    own = {"_keras", *(name for source in sources.values() for name in defined(source))}
    found = [
        f"{path.relative_to(ROOT.parent)}:{line}: {what}"
        for path, source in outside.items()
        for line, what in touches(source, own)
    ]
    if found:
        print("Private parts of Keras or TensorFlow must be touched in tfdist/_keras/ alone:")
        print(*found, sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
