"""TensorBoard's HParams: which keys a run was trained with, and which of them a table of runs shows.

A run says what it was trained with. What the columns are is said once for all runs of a folder: TensorBoard takes the
first such list that it finds, so that a run, which knows its own keys alone, must not write one. Without a list
TensorBoard makes its own: all keys, and every curve for a metric.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import (
    DATA_TYPE_FLOAT64,
    DATA_TYPE_STRING,
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams as torch_hparams

Value = bool | int | float | str | Sequence[Any] | None
"""What a key of a configuration may hold."""

METRICS = {
    "test/accuracy": "test accuracy",
    "memory/peak_mib": "peak memory, MiB",
    "time/median_meta_step_ms": "meta-step, ms (median)",
}
"""Tags of the figures that runs are compared by, with the headings of their columns."""


def to_hparam_value(value: Value) -> float | str:
    """Numbers as they are, all else as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, (int, float, str)):
        return value
    return f"[{', '.join(str(to_hparam_value(v)) for v in value)}]"


def session_summaries(values: Mapping[str, Value]) -> list[Summary]:
    """That a run was trained with these, and is finished."""
    _, start, end = torch_hparams({name: to_hparam_value(value) for name, value in values.items()}, {})
    return [start, end]


def experiment_summary(runs: Iterable[Mapping[str, Value]]) -> Summary:
    """The columns of a table of runs: the keys that differ or that some lack, if there are any, and the metrics.

    With all keys, those alike in every run would push the metrics off the screen; the run's text ``config`` has them.
    No range of values is given: TensorBoard would hide runs outside of it, such as those of another comparison.
    """
    texts = [{name: to_hparam_value(value) for name, value in run.items()} for run in runs]
    infos = []
    for name in sorted({name for run in texts for name in run}):
        found = [run.get(name) for run in texts]
        number = all(isinstance(value, (int, float)) for value in found if value is not None)
        kind = DATA_TYPE_FLOAT64 if number else DATA_TYPE_STRING
        infos.append(HParamInfo(name=name, type=kind, differs=len(set(found)) > 1))
    infos = [info for info in infos if info.differs] or infos
    metrics = [MetricInfo(name=MetricName(tag=tag), display_name=heading) for tag, heading in METRICS.items()]
    data = HParamsPluginData(
        experiment=Experiment(hparam_infos=infos, metric_infos=metrics), version=metadata.PLUGIN_DATA_VERSION
    )
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString())
    value = Summary.Value(tag=metadata.EXPERIMENT_TAG, metadata=SummaryMetadata(plugin_data=plugin))
    return Summary(value=[value])
