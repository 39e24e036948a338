"""The only package that uses private parts of Keras and its TensorFlow trainer.

Each use says what it relies on. `tests/keras/test_contract.py` fails if a Keras release
changes it.

tfdist runs Keras's own `train_step`, on every strategy. It was written for one process. While
several replicas train, the modules here replace the few places that must know that a batch is
a share of a global batch:

========================  ==========================================================
place                     what changes
========================  ==========================================================
the loss's reduction      no division by the number of replicas; a masked or weighted
                          mean is over the global batch
the optimizer's update    the backend-neutral one: each replica updates its own copy
                          with the same, already reduced, gradient
BatchNormalization        moments over the global batch when `synchronized=True`
dropout, random seeds     a function of the example's position in the global batch; dropout
                          also in a single process, with the same result with or without XLA;
                          in private training all of `keras.random` is a function of the
                          example's contents
a layer's losses          each replica has its own
Variable assignment       is recorded, so that variables that the forward pass changes can
                          get the same value on all replicas
========================  ==========================================================
"""

from tfdist._keras.attached import attached
from tfdist._keras.batch_norm import synchronized_variables
from tfdist._keras.building import (
    build,
    build_from_shapes,
    build_layers,
    compiled_state,
    computes_coarsely,
    computes_in,
    global_seed_variable,
    has_global_seed,
    has_own,
    has_own_code,
    is_compiled_as,
    is_seeded,
    layers_of,
    step_of,
)
from tfdist._keras.checkpoints import CheckpointSaver
from tfdist._keras.clients import (
    built_copy,
    first_values,
    iterations_of,
    rates_of,
    schedules_after,
    statistics_of,
)
from tfdist._keras.deferred import Deferred, deferred, deferring
from tfdist._keras.discovery import StepTrace, keeping_random_state, random_ops, rows_of
from tfdist._keras.groups import GroupCollectives
from tfdist._keras.interception import replaced
from tfdist._keras.keyed import RowKeys, row_numbers
from tfdist._keras.layers import sublayers
from tfdist._keras.loop import (
    EVALUATE,
    FIT,
    PREDICT,
    StreamAdapter,
    around,
    end_of_data_unless,
    loop_functions,
)
from tfdist._keras.means import rows_to_try
from tfdist._keras.metrics import (
    metric_that_begins_elsewhere,
    metric_variables,
    metrics_of,
    note_metrics,
)
from tfdist._keras.model_graph import LayerCall, ends, functional_of, layer_calls
from tfdist._keras.noise import OwnNoise, generator
from tfdist._keras.optimizers import (
    optimizers_of,
    reindex_optimizer,
    swap_strategy,
    trained_variables,
    watch_updates,
    with_nested,
)
from tfdist._keras.overflows import overflowing_as
from tfdist._keras.parallel_axes import dividing_axes
from tfdist._keras.parallel_plan import ParallelPlan, parallel_plan
from tfdist._keras.piped import set_piped
from tfdist._keras.piped_units import PipedStage
from tfdist._keras.piped_updates import set_updated_in_place
from tfdist._keras.probe import metric_that_is_no_sum, what_is_no_mean
from tfdist._keras.recomputation import recomputed_calls, regathered, set_recomputed
from tfdist._keras.replica import ReplicaBatch, on_replica, seeding
from tfdist._keras.replicated import alone, replicated
from tfdist._keras.runtime import (
    EagerTensor,
    configure_coordination,
    has_devices,
    is_deterministic,
    key_value_store,
    without_retracing_warning,
)
from tfdist._keras.saving import carry_in_files
from tfdist._keras.scopes import (
    layout_map_of,
    leave_scope,
    outside_scopes,
    scope_of,
    undistributed,
)
from tfdist._keras.served_updates import is_elementwise, trained_by
from tfdist._keras.sharded import slots_in_parts, updating_parts
from tfdist._keras.sharded_updates import Sharding
from tfdist._keras.sharded_weights import (
    Gathering,
    InParts,
    LostWeight,
    in_parts,
    is_lost,
    register_parts_of_weights,
    showing_parts,
    weights_of_layers,
)
from tfdist._keras.slices import has_fixed_rows, has_unique_rows, once_each
from tfdist._keras.snapshots import Snapshot, slots_of
from tfdist._keras.step_graph import StepGraph, batch_specs, step_graph
from tfdist._keras.traced_parts import TracedPart, named, tracing_part
from tfdist._keras.traces import keeping_variable_scope, map_fn
from tfdist._keras.unfilled import built_unfilled, fill, note_filled, unfilled_value
from tfdist._keras.variables import (
    backing_variable,
    empty,
    exchange_value,
    is_empty,
    num_bytes,
    refill,
    swap_value,
)

__all__ = [
    "EVALUATE",
    "FIT",
    "PREDICT",
    "CheckpointSaver",
    "Deferred",
    "EagerTensor",
    "Gathering",
    "GroupCollectives",
    "InParts",
    "LayerCall",
    "LostWeight",
    "OwnNoise",
    "ParallelPlan",
    "PipedStage",
    "ReplicaBatch",
    "RowKeys",
    "Sharding",
    "Snapshot",
    "StepGraph",
    "StepTrace",
    "StreamAdapter",
    "TracedPart",
    "alone",
    "around",
    "attached",
    "backing_variable",
    "batch_specs",
    "build",
    "build_from_shapes",
    "build_layers",
    "built_copy",
    "built_unfilled",
    "carry_in_files",
    "compiled_state",
    "computes_coarsely",
    "computes_in",
    "configure_coordination",
    "deferred",
    "deferring",
    "dividing_axes",
    "empty",
    "end_of_data_unless",
    "ends",
    "exchange_value",
    "fill",
    "first_values",
    "functional_of",
    "generator",
    "global_seed_variable",
    "has_devices",
    "has_fixed_rows",
    "has_global_seed",
    "has_own",
    "has_own_code",
    "has_unique_rows",
    "in_parts",
    "is_compiled_as",
    "is_deterministic",
    "is_elementwise",
    "is_empty",
    "is_lost",
    "is_seeded",
    "iterations_of",
    "keeping_random_state",
    "keeping_variable_scope",
    "key_value_store",
    "layer_calls",
    "layers_of",
    "layout_map_of",
    "leave_scope",
    "loop_functions",
    "map_fn",
    "metric_that_begins_elsewhere",
    "metric_that_is_no_sum",
    "metric_variables",
    "metrics_of",
    "named",
    "note_filled",
    "note_metrics",
    "num_bytes",
    "on_replica",
    "once_each",
    "optimizers_of",
    "outside_scopes",
    "overflowing_as",
    "parallel_plan",
    "random_ops",
    "rates_of",
    "recomputed_calls",
    "refill",
    "regathered",
    "register_parts_of_weights",
    "reindex_optimizer",
    "replaced",
    "replicated",
    "row_numbers",
    "rows_of",
    "rows_to_try",
    "schedules_after",
    "scope_of",
    "seeding",
    "set_piped",
    "set_recomputed",
    "set_updated_in_place",
    "showing_parts",
    "slots_in_parts",
    "slots_of",
    "statistics_of",
    "step_graph",
    "step_of",
    "sublayers",
    "swap_strategy",
    "swap_value",
    "synchronized_variables",
    "tracing_part",
    "trained_by",
    "trained_variables",
    "undistributed",
    "unfilled_value",
    "updating_parts",
    "watch_updates",
    "weights_of_layers",
    "what_is_no_mean",
    "with_nested",
    "without_retracing_warning",
]
