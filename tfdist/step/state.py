"""All state of a training, and the role of each variable in it."""

from __future__ import annotations

import contextlib
import enum
from dataclasses import dataclass
from typing import Any

from tfdist import _keras
from tfdist.step.composition import traced_steps


class Role(enum.Enum):
    """How the values of a variable on all replicas belong together."""

    REPLICATED = "replicated"  # equal on all replicas, such as weights and metrics
    PER_REPLICA = "per replica"  # each replica has its own, and only their sum matters


@dataclass(frozen=True)
class Sharded:
    """The role of a variable whose values on all replicas are parts of one tensor.

    The parts have equal shapes. They follow each other along axis 0 in the replicas' order, and
    padding follows the tensor. Or, with `ways`, they are that many slices along an axis:
    replica r has slice r % ways. As with `Role.PER_REPLICA`, only the first local replica's
    part of an extension's variable is kept where `hold` ends. A variable of the model is in
    parts only while `Exchange.training` lasts, and whole before and after it.

    Attributes:
        rows: Number of rows of the tensor, without the padding.
        shape: The tensor's shape. None if a part has the tensor's shape but for axis 0.
        axis: The axis along which it is cut into `ways` slices.
        ways: Number of slices, or 0.
    """

    rows: int
    shape: tuple[int, ...] | None = None
    axis: int = 0
    ways: int = 0

    def is_copy(self, replica: int) -> bool:
        """Tells whether a replica before this one has the same part.

        Args:
            replica: The replica's global index.
        """
        return 0 < self.ways <= replica


AnyRole = Role | Sharded


@dataclass(frozen=True)
class TrainState:
    """The variables of a training.

    Code that compares, broadcasts, saves or commits state asks for variables by role.

    Attributes:
        of_model: `keras.Variable`s of the model, its optimizers and metrics. They are
            replicated, but for those in `parts`.
        of_extensions: `keras.Variable`s of extensions, each with its role.
        parts: The variables of `of_model` that are in parts while training, each with its
            role.
    """

    of_model: tuple[Any, ...]
    of_extensions: tuple[tuple[Any, AnyRole], ...] = ()
    parts: tuple[tuple[Any, Sharded], ...] = ()

    @property
    def replicated(self) -> tuple[Any, ...]:
        """Variables that are equal on all replicas."""
        in_parts = {id(variable) for variable, _ in self.parts}
        return tuple(v for v in self.named if id(v) not in in_parts)

    @property
    def named(self) -> tuple[Any, ...]:
        """Variables with one value: the replicated ones, and those of the model in parts."""
        return self.of_model + self._with(Role.REPLICATED)

    def role_in_parts(self, variable: Any) -> Sharded | None:
        """Returns the role of a variable of the model that is in parts, or None.

        Args:
            variable: A variable of `named`.
        """
        return next((role for v, role in self.parts if v is variable), None)

    def showing_parts(self) -> contextlib.AbstractContextManager[None]:
        """Makes a context in which each variable in parts has the shape of its part."""
        return _keras.showing_parts([variable for variable, _ in self.parts])

    @property
    def per_replica(self) -> tuple[Any, ...]:
        """Variables of which each replica has its own value."""
        return self._with(Role.PER_REPLICA)

    @property
    def sharded(self) -> tuple[tuple[Any, Sharded], ...]:
        """Variables of which each replica has a part, each with its role."""
        return tuple((v, role) for v, role in self.of_extensions if isinstance(role, Sharded))

    @property
    def is_everywhere(self) -> bool:
        """Whether each process has all state: then saving needs no exchange."""
        are_replicated = all(role is Role.REPLICATED for _, role in self.of_extensions)
        return are_replicated and not self.parts

    @property
    def variables(self) -> tuple[Any, ...]:
        """All variables, of each role."""
        return self.of_model + tuple(variable for variable, _ in self.of_extensions)

    def _with(self, role: Role) -> tuple[Any, ...]:
        return tuple(variable for variable, its_role in self.of_extensions if its_role is role)

    def is_of(self, model: Any) -> bool:
        """Returns whether a model still has these variables.

        Args:
            model: A built `keras.Model`.
        """
        # In the same order as well: a checkpoint names tensors by their positions.
        return [id(v) for v in self.of_model] == [id(v) for v in variables_of(model)]


def optimizers_of(model: Any) -> list[Any]:
    """Lists a model's optimizers, including those that only its steps use; each once.

    Args:
        model: A `keras.Model`.
    """
    of_steps = [optimizer for step in traced_steps(model) for optimizer in step.optimizers]
    return _keras.with_nested([*_keras.optimizers_of(model), *of_steps])


def variables_of(model: Any) -> list[Any]:
    """Lists all state of a model: weights, seeds, state of optimizers and metrics; each once.

    Args:
        model: A built `keras.Model`.
    """
    optimizers = optimizers_of(model)
    parts = [model.variables, *(o.variables for o in optimizers)]
    # A step may train weights that are in no layer.
    parts += [_keras.trained_variables(o) for o in optimizers]
    if model.compiled:
        parts.append(_keras.metric_variables(model))
    parts += [step.variables for step in traced_steps(model)]
    return list({id(v): v for part in parts for v in part}.values())
