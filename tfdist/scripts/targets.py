"""Finds the model that a command line names: a script's, a saved one, or a function's."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any

import keras

from tfdist import _keras
from tfdist.errors import ArgumentError
from tfdist.scripts.captured import first_fit
from tfdist.scripts.refusals import Call


def call_of(arguments: list[str], batch_size: int | None = None) -> Call:
    """Finds what a target trains.

    Args:
        arguments: The target, and the arguments of a script. The target is a script, `-m` and
            a module, a `.keras` file, or `module:function`.
        batch_size: The batch size; None for that of the script, or 32.

    Raises:
        ArgumentError: There is no model to find.
    """
    target = arguments[0]
    if target.endswith((".keras", ".h5")):
        call = Call(_with_loss(_saved(target)))
    elif _is_function(target):
        call = _returned(target)
    else:
        call = first_fit(arguments)
    if batch_size is None:
        return call
    return Call(call.model, call.x, call.y, {**call.others, "batch_size": batch_size})


def _is_function(target: str) -> bool:
    module, _, function = target.partition(":")
    is_dotted = all(part.isidentifier() for part in module.split("."))
    return is_dotted and function.isidentifier() and not os.path.exists(target)


def _saved(path: str) -> Any:
    if not Path(path).is_file():
        raise ArgumentError(
            f"The model must be a file. Received: {path!r}, which is not there. Check the path."
        )
    try:
        return keras.saving.load_model(path)
    except Exception as error:  # a file of another kind, or classes that are not there
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ArgumentError(
            f"The model must load by itself. Received: {path}, which raised "
            f"{type(error).__name__}: {reason} Register its own classes, or pass "
            "module:function."
        ) from None


def _returned(target: str) -> Call:
    """Calls a function that returns a model, or a model and its data."""
    module_name, _, name = target.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, name)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(
            "The target must be a function that can be imported. Received: "
            f"{target!r}: {error}. It is looked for in this folder and in what is installed."
        ) from None
    try:
        # Those of keras.applications would download weights.
        has_weights = "weights" in inspect.signature(function).parameters
        result = function(weights=None) if has_weights else function()
    except Exception as error:
        raise ArgumentError(
            f"{target} must run without arguments. Received: {type(error).__name__}: {error}."
        ) from None
    model, *columns = result if isinstance(result, tuple) else (result,)
    if not isinstance(model, keras.Model) or len(columns) > 2:
        raise ArgumentError(
            f"{target} must return a keras.Model, or a tuple (model, x, y). Received: "
            f"{type(result).__name__}."
        )
    return Call(_with_loss(model), *columns)


def _with_loss(model: Any) -> Any:
    """Compiles a model that is not compiled, as most are trained."""
    if model.compiled:
        return model
    if not model.built:
        raise ArgumentError(
            "The model must be built, so that its weights have shapes. Received: "
            f"model {model.name!r} without weights, not compiled. Give it a keras.Input."
        )
    print(
        f"tfdist: {model.name} is not compiled: Adam and squares are assumed.", file=sys.stderr
    )
    model.compile(optimizer="adam", loss="mse")
    return model


def with_policy(call: Call, policy: str) -> Call:
    """Makes a call's model again, with another dtype policy.

    Args:
        call: The call.
        policy: Such as "mixed_bfloat16".

    Raises:
        ArgumentError: The model cannot be made from its config.
    """
    model = call.model
    try:
        with _keras.keeping_random_state():
            copy = keras.models.clone_model(
                model, clone_function=_with_dtype(policy), recursive=True
            )
            copy.compile_from_config(model.get_compile_config())
    except Exception as error:  # a model's own code may fail in any way
        raise ArgumentError(
            "The dtype can be changed only of a model that is made from its config. "
            f"Received: model {model.name!r}, {type(error).__name__}: {error}. Set the policy "
            f"in the script: keras.config.set_dtype_policy({policy!r})."
        ) from None
    return Call(copy, call.x, call.y, call.others)


def _with_dtype(policy: str) -> Any:
    def clone(layer: Any) -> Any:
        config = layer.get_config()
        if not isinstance(layer, keras.layers.InputLayer):
            config["dtype"] = policy
        return type(layer).from_config(config)

    return clone
