"""TensorBoard event files of a run. docs/reference/files.md lists the tags.

A run records its own hyperparameters. Which of them a table of runs shows is recorded once for all runs of a folder,
because TensorBoard takes the first such list that it finds: a comparison's, whose runs write none, or else any run's.
In a sweep none is written, as TensorBoard then shows the keys that differ first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary, SummaryMetadata
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
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as torch_hparams

from metalearn.core.types import Params
from metalearn.inner import lr_key
from metalearn.training.evaluation import Evaluation, MeanCI, Metric
from metalearn.training.tracking.event_files import event_files, read_scalars
from metalearn.training.tracking.tags import describe_tag

log = logging.getLogger(__name__)

Value = bool | int | float | str | Sequence[Any] | Mapping[str, Any] | None
"""The value of a configuration key."""

_LONGEST_WAIT_S = 10.0


def _interval_tags(tag: str) -> list[str]:
    """Return the tags of a mean and of the ends of its interval."""
    return [tag, f"intervals/{tag}_low", f"intervals/{tag}_high"]


Layout = dict[str, dict[str, list[str | list[str]]]]
"""Charts of the page Custom Scalars by section: the kind and the tags of each."""

MAIN_KEYS = ("algorithm.name", "inner.lr", "inner.second_order", "inner.steps", "run.seed")
"""Keys that a table of runs shows first if none differ: as many as TensorBoard shows without being asked."""


def build_layout(metric: str, *, has_curvature: bool, has_eigenvalue: bool) -> Layout:
    """Return the charts of a run that has a metric and these diagnostics: no chart stays empty.

    The tags of a multi-line chart are regular expressions, and one that is not anchored takes
    intervals/accuracy/validation_low for accuracy/validation; those of a margin chart are names. A margin chart is not
    smoothed.
    """
    layout: Layout = {
        metric.capitalize(): {
            f"validation {metric}": ["Multiline", [f"^{metric}/validation$"]],
            f"validation {metric}, 95% interval": ["Margin", _interval_tags(f"{metric}/validation")],
            f"query {metric} in training": ["Multiline", [f"^{metric}/train$"]],
            f"test {metric} by inner step, 95% interval": ["Margin", _interval_tags(f"{metric}/test_by_inner_step")],
        },
        "Cost": {
            "time of a meta-step, ms": ["Multiline", ["^cost/meta_step_ms$"]],
            "peak memory, MiB": ["Multiline", ["^cost/peak_mib$"]],
            "training time, s": ["Multiline", ["^cost/training_s$"]],
        },
    }
    second_order: dict[str, list[str | list[str]]] = {}
    if has_curvature:
        second_order |= {
            "cosine of first- and second-order meta-gradient": ["Multiline", ["^gradients/cosine_first_vs_second$"]],
            "norm of the adjoint at every inner step": ["Multiline", ["^gradients/adjoint_norm/.*"]],
            "norm of the meta-gradient": ["Multiline", ["^gradients/norm$"]],
        }
    if has_eigenvalue:
        second_order["largest eigenvalue of the support loss"] = ["Multiline", ["^gradients/support_top_eigenvalue$"]]
    return layout | ({"Second order": second_order} if second_order else {})


def metric_columns(metric: str) -> dict[str, str]:
    """Return the tags of the metrics that a table of runs compares, with the headings of their columns."""
    nontransductive = {"accuracy/test_nontransductive": "non-transductive"} if metric == "accuracy" else {}
    return {
        f"{metric}/test": f"test {metric}",
        **nontransductive,
        "cost/peak_mib": "peak memory, MiB",
        "cost/median_meta_step_ms": "meta-step, ms (median)",
    }


Writer = TypeVar("Writer", bound="EventWriter")


class EventWriter:
    """Writes an event file; a context manager, so that nothing is lost when the run ends early.

    The folder's name is the run's in TensorBoard, which hides the steps of earlier event files from ``purge_step`` on.
    """

    def __init__(self, folder: Path, *, purge_step: int | None = None) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        self._described: set[str] = set()

    def __enter__(self: Writer) -> Writer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except OSError:
            if error is None:  # must not hide another
                raise

    def close(self) -> None:
        """Write what is left and close the file."""
        self._writer.close()

    def log_text(self, tag: str, markdown: str) -> None:
        """Log Markdown."""
        self._writer.add_text(tag, markdown)

    def log_scalars(self, values: Mapping[str, float], iteration: int = 0) -> None:
        """Log points of several curves at one meta-step."""
        for tag, value in values.items():
            text = "" if tag in self._described else describe_tag(tag)  # TensorBoard reads it in a tag's first record
            plugin = SummaryMetadata.PluginData(plugin_name="scalars")
            described = SummaryMetadata(summary_description=text, plugin_data=plugin, data_class=DATA_CLASS_SCALAR)
            point = Summary.Value(tag=tag, simple_value=value, metadata=described if text else None)
            self.add_summary(Summary(value=[point]), iteration)
            self._described.add(tag)

    def log_image(self, tag: str, image: NDArray[np.uint8], iteration: int = 0) -> None:
        """Log an image ``[height, width, 3]``."""
        self._writer.add_image(tag, image, iteration, dataformats="HWC")

    def add_summary(self, summary: Summary, iteration: int | None = None) -> None:
        """Write a record of TensorBoard's own format."""
        self._writer._get_file_writer().add_summary(summary, iteration)

    def flush(self) -> None:
        """Write everything logged so far to disk."""
        self._writer.flush()


class TensorBoardLogger(EventWriter):
    """Logs a run; ``config`` is its YAML, ``file_sizes`` those at the checkpoint that it resumes from.

    ``layout`` is of the page Custom Scalars.

    Of an interrupted run, points after meta-step ``resumed_at`` are hidden, and earlier ones are not written twice.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        config: str,
        layout: Layout | None = None,
        resumed_at: int | None = None,
        file_sizes: Mapping[str, int] | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._logged: dict[tuple[str, int], float] = {}
        _warn_truncated(run_dir, file_sizes or {})
        is_first = resumed_at is None or not event_files(run_dir)
        if resumed_at is not None and not is_first:
            curves = read_scalars(run_dir)
            self._logged = {(tag, p.step): p.value for tag in curves for p in curves[tag] if p.step <= resumed_at}
            _wait_for_next_second(run_dir)
        self._tags = {tag for tag, _ in self._logged}
        # Some readers purge only from the second session on, so the first must set it as well.
        super().__init__(run_dir, purge_step=0 if resumed_at is None else resumed_at + 1)
        if is_first:
            self.log_text("config", f"```yaml\n{config}```")
            self._writer.add_custom_scalars(layout or {})

    def log_scalars(self, values: Mapping[str, float], iteration: int = 0) -> None:
        """Log points of several curves at one meta-step, but for those that an earlier process has logged."""
        new = {t: value for t, value in values.items() if self._logged.get((t, iteration)) != float(np.float32(value))}
        super().log_scalars(new, iteration)
        self._tags.update(values)

    def file_sizes(self) -> dict[str, int]:
        """Return the bytes of every event file, after writing everything logged so far.

        What cannot be written is lost to the curves, and must not keep the training's state from being saved.
        """
        try:
            self.flush()
        except OSError as error:
            log.warning("What was logged last could not be written to the event file: %s", error)
        return {path.name: path.stat().st_size for path in event_files(self._run_dir)}

    def log_validation(self, result: Evaluation, iteration: int) -> None:
        """Log the score on validation tasks with the ends of its interval."""
        self._log_interval(f"{result.metric.name}/validation", result.final, iteration, result.metric)
        self.flush()

    def log_test(self, result: Evaluation, iteration: int = 0) -> None:
        """Log the test scores at their meta-step, and with its interval against the number of inner steps."""
        name = result.metric.name
        self.log_scalars({f"{name}/test": result.final.mean}, iteration)
        for step, estimate in enumerate(result.per_step):
            self._log_interval(f"{name}/test_by_inner_step", estimate, step, result.metric)
        if result.nontransductive:
            self.log_scalars({f"{name}/test_nontransductive": result.nontransductive.mean}, iteration)

    def _log_interval(self, tag: str, estimate: MeanCI, step: int, metric: Metric) -> None:
        values = estimate.mean, *estimate.ends(0, metric.highest)
        self.log_scalars(dict(zip(_interval_tags(tag), values, strict=True)), step)

    def log_hparams(self, values: Mapping[str, Value], metrics: Mapping[str, float], iteration: int = 0) -> None:
        """Make the run a row of the HParams table; once, at its end.

        ``values`` are of dotted configuration keys; ``metrics`` that the run has logged already are left alone.
        """
        # SummaryWriter.add_hparams would make a run of its own.
        _, start, end = torch_hparams({name: to_hparam_value(value) for name, value in values.items()}, {})
        self.add_summary(start)
        self.add_summary(end)
        self.log_scalars({tag: value for tag, value in metrics.items() if tag not in self._tags}, iteration)
        self.flush()

    def log_lr_histograms(self, params: Params, iteration: int) -> None:
        """Log histograms of the learned step sizes, one for each parameter of the model."""
        for name, p in params.items():
            if name.startswith(lr_key("")):
                tag = f"optimizer/learned_lr/{name.removeprefix(lr_key(''))}"
                self._writer.add_histogram(tag, p.detach().cpu().numpy(), iteration)


def learned_lr_metrics(params: Params) -> dict[str, float]:
    """Return mean, smallest and largest of the learned step sizes by tag; empty if none are learned."""
    rates = [p.flatten() for name, p in params.items() if name.startswith(lr_key(""))]
    if not rates:
        return {}
    flat = torch.cat(rates)
    values = torch.stack([flat.mean(), *flat.aminmax()]).tolist()
    return {
        f"optimizer/learned_lr/{name}": value
        for name, value in zip(("mean", "smallest", "largest"), values, strict=True)
    }


def to_hparam_value(value: Value) -> float | str:
    """Return fractions as they are, everything else as on the command line: TensorBoard shows a number 0 as 0.0000."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, (float, str)):
        return value
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {to_hparam_value(v)}' for name, v in value.items())}}}"
    return f"[{', '.join(str(to_hparam_value(v)) for v in value)}]"


def experiment_summary(runs: Iterable[Mapping[str, Value]], metric: str) -> Summary:
    """Return the columns of a table of runs: the metrics, and the keys that differ, or all if none do, main ones first.

    With all keys, those alike in every run would push the metrics off the screen; the run's text ``config`` has them.
    No range of values is set: TensorBoard would hide runs outside of it, such as those of another comparison.
    """
    texts = [{name: to_hparam_value(value) for name, value in run.items()} for run in runs]
    infos = []
    for name in sorted({name for run in texts for name in run}):
        found = [run.get(name) for run in texts]
        is_number = all(isinstance(value, float) for value in found if value is not None)
        kind = DATA_TYPE_FLOAT64 if is_number else DATA_TYPE_STRING
        infos.append(HParamInfo(name=name, type=kind, differs=len(set(found)) > 1))
    if not any(info.differs for info in infos):
        for info in infos:
            info.differs = info.name in MAIN_KEYS  # TensorBoard's order: those that differ, then by name
    else:
        infos = [info for info in infos if info.differs]
    columns = metric_columns(metric).items()
    metrics = [MetricInfo(name=MetricName(tag=tag), display_name=heading) for tag, heading in columns]
    data = HParamsPluginData(
        experiment=Experiment(hparam_infos=infos, metric_infos=metrics), version=metadata.PLUGIN_DATA_VERSION
    )
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString())
    plugin_metadata = SummaryMetadata(plugin_data=plugin)
    return Summary(value=[Summary.Value(tag=metadata.EXPERIMENT_TAG, metadata=plugin_metadata)])


def _warn_truncated(run_dir: Path, file_sizes: Mapping[str, int]) -> None:
    """Warn if an event file is smaller than it was at the checkpoint."""
    for name, size in file_sizes.items():
        path = run_dir / name
        now = path.stat().st_size if path.exists() else 0
        if now < size:
            log.warning(
                "%s has %d bytes and had %d at the checkpoint: its curves lack points that were shown before. The "
                "training itself has lost nothing.",
                *(path, now, size),
            )


def _wait_for_next_second(run_dir: Path) -> None:
    """Wait until a new event file sorts after the others: names begin with the second, and set the reading order."""
    newest = int(event_files(run_dir)[-1].name.split(".")[3])
    if (ahead := newest + 1 - time.time()) > _LONGEST_WAIT_S:
        log.warning("This machine's clock is %.0f s behind that of the latest event file: curves may look cut", ahead)
    elif ahead > 0:
        time.sleep(ahead)
