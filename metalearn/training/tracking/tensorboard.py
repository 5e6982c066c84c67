"""What a run shows in TensorBoard. The tags are listed in the README."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from metalearn.training.evaluation import Evaluation, MeanCI
from metalearn.training.tracking.event_files import EVENT_FILES, ScalarEvent, read_scalars
from metalearn.training.tracking.hparams import Value, experiment_summary, session_summaries

if TYPE_CHECKING:  # the lab brings all lessons and matplotlib, which no training needs
    from metalearn.lessons import Lesson


log = logging.getLogger(__name__)

_OF_THE_END = ("test/", "time/median_meta_step_ms")
_LONGEST_WAIT_S = 10.0


def _interval_tags(tag: str) -> list[str]:
    """The tags of an estimate: its mean and the ends of its interval."""
    return [tag, f"{tag}_low", f"{tag}_high"]


# Custom scalars. The tags of a multi-line chart are regular expressions, and one that is not anchored takes
# validation/accuracy_low for validation/accuracy; those of a margin chart are names. A margin chart is not smoothed.
LAYOUT: dict[str, dict[str, list[str | list[str]]]] = {
    "Accuracy": {
        "validation accuracy": ["Multiline", ["^validation/accuracy$"]],
        "validation accuracy, 95% interval": ["Margin", _interval_tags("validation/accuracy")],
        "query accuracy in training": ["Multiline", ["^train/query_accuracy$"]],
        "test accuracy by inner step, 95% interval": ["Margin", _interval_tags("test/accuracy_by_inner_step")],
    },
    "Cost": {
        "time of a meta-step, ms": ["Multiline", ["^time/meta_step_ms$"]],
        "peak memory, MiB": ["Multiline", ["^memory/peak_mib$"]],
        "training time, s": ["Multiline", ["^time/training_s$"]],
    },
    "Second order": {
        "cosine of first- and second-order meta-gradient": ["Multiline", ["^grad/cosine_first_vs_second$"]],
        "norm of the adjoint at every inner step": ["Multiline", ["^grad/adjoint_norm/.*"]],
        "largest eigenvalue of the support loss": ["Multiline", ["^grad/support_top_eigenvalue$"]],
        "norm of the meta-gradient": ["Multiline", ["^train/grad_norm$"]],
    },
}


class TensorBoardLogger:
    """Writes a run's event file; a context manager, so that nothing is lost when the run ends early.

    Args:
        run_dir: where the event file goes; its folder's name is the run's in TensorBoard.
        config: as YAML.
        resumed_at: the meta-step that an interrupted run goes on from; what it showed later is hidden, and what it
            showed before is not shown twice.
        position: what ``position`` gave then.
        aside: a folder that the event files of a finished run go to, where that goes on; its curves are copied, but for
            those of its test.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        config: str,
        resumed_at: int | None = None,
        position: Mapping[str, int] | None = None,
        aside: Path | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._shown: dict[tuple[str, int], float] = {}
        _warn_of_lost_points(run_dir, position or {})
        copied = _archive_event_files(run_dir, aside) if aside else {}
        earlier = resumed_at is not None and any(run_dir.glob(EVENT_FILES))
        if resumed_at is not None and earlier:
            curves = read_scalars(run_dir)
            self._shown = {(tag, p.step): p.value for tag in curves for p in curves[tag] if p.step <= resumed_at}
            _wait_for_next_second(run_dir)
        self._tags = {tag for tag, _ in self._shown} | set(copied)
        # Some readers purge only from the second session on: the first must be marked as well.
        self._writer = SummaryWriter(str(run_dir), purge_step=0 if resumed_at is None else resumed_at + 1)
        if not earlier:
            self._writer.add_text("config", f"```yaml\n{config}```")
            self._writer.add_custom_scalars(LAYOUT)
        for tag, points in copied.items():
            for point in points:
                self._writer.add_scalar(tag, point.value, point.step, point.wall_time)

    def __enter__(self) -> TensorBoardLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Points of several curves at one meta-step."""
        for tag, value in values.items():
            if self._shown.get((tag, iteration)) != _as_float32(value):
                self._writer.add_scalar(tag, value, iteration)
            self._tags.add(tag)

    def position(self) -> dict[str, int]:
        """Bytes of every event file, after all that was shown is written."""
        self._writer.flush()
        return {path.name: path.stat().st_size for path in sorted(self._run_dir.glob(EVENT_FILES))}

    def validation(self, result: Evaluation, iteration: int) -> None:
        """Score on validation tasks, with the ends of its interval as curves of their own."""
        self._estimate(f"validation/{result.score.name}", result.final, iteration)
        self._writer.flush()

    def test(self, result: Evaluation, iteration: int = 0) -> None:
        """Test score, and with its interval against the number of inner steps (on the step axis).

        Args:
            result: on test classes.
            iteration: meta-steps that the tested parameters have taken.
        """
        name = result.score.name
        self.scalars({f"test/{name}": result.final.mean}, iteration)
        for step, estimate in enumerate(result.per_step):
            self._estimate(f"test/{name}_by_inner_step", estimate, step)
        if result.nontransductive:
            steps = len(result.per_step) - 1
            self.scalars({f"test/{name}_nontransductive": result.nontransductive.mean}, steps)

    def _estimate(self, tag: str, estimate: MeanCI, step: int) -> None:
        mean, ci95 = estimate.mean, estimate.ci95
        self.scalars(dict(zip(_interval_tags(tag), (mean, mean - ci95, mean + ci95), strict=True)), step)

    def hparams(self, values: Mapping[str, Value], metrics: Mapping[str, float], iteration: int = 0) -> None:
        """Make the run a row of the HParams table; once, at its end.

        Args:
            values: dotted keys of the configuration.
            metrics: by tag, those of ``hparams.METRICS``; one that the run shows already is left alone.
            iteration: meta-steps taken.
        """
        for summary in session_summaries(values):
            self._writer._get_file_writer().add_summary(summary)  # add_hparams would make a run of its own
        self.scalars({tag: value for tag, value in metrics.items() if tag not in self._tags}, iteration)
        self._writer.flush()

    def histogram(self, tag: str, values: Tensor, iteration: int) -> None:
        """How the entries of a tensor are spread."""
        self._writer.add_histogram(tag, values.detach().cpu().numpy(), iteration)

    def image(self, tag: str, picture: NDArray[np.uint8], iteration: int) -> None:
        """A picture ``[height, width, 3]``."""
        self._writer.add_image(tag, picture, iteration, dataformats="HWC")


def _as_float32(value: float) -> float:
    """As an event file keeps it, in single precision."""
    return float(np.float32(value))


def _warn_of_lost_points(run_dir: Path, position: Mapping[str, int]) -> None:
    """Say so if an event file has lost what it held when the state was put away."""
    for name, size in position.items():
        path = run_dir / name
        now = path.stat().st_size if path.exists() else 0
        if now < size:
            log.warning(
                "%s has %d bytes and had %d at the checkpoint: its curves lack points that were shown before. The "
                "training itself has lost nothing.",
                path,
                now,
                size,
            )


def _archive_event_files(run_dir: Path, folder: Path) -> dict[str, list[ScalarEvent]]:
    """Move the event files of a finished run, and return its curves but for what its end has shown."""
    files = list(run_dir.glob(EVENT_FILES))
    curves = read_scalars(run_dir) if files else {}
    for path in files:
        path.replace(folder / path.name)
    return {tag: points for tag, points in curves.items() if not tag.startswith(_OF_THE_END)}


def _wait_for_next_second(run_dir: Path) -> None:
    """Wait until a new event file's name, which begins with the second, sorts behind all: they are read by name."""
    newest = int(max(path.name for path in run_dir.glob(EVENT_FILES)).split(".")[3])
    if (ahead := newest + 1 - time.time()) > _LONGEST_WAIT_S:
        log.warning("This machine's clock is %.0f s behind that of the latest event file: curves may look cut", ahead)
    elif ahead > 0:
        time.sleep(ahead)


class ReportLogger:
    """Writes the event file of a comparison's report, over that of an earlier report.

    Args:
        folder: of the report, beside those of the runs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def report(
        self, text: str, pictures: Mapping[str, NDArray[np.uint8]], *, runs: Sequence[Mapping[str, Value]]
    ) -> None:
        """Show the report, and give the HParams table its columns.

        Args:
            text: Markdown.
            pictures: ``[height, width, 3]`` by name.
            runs: dotted keys of every run's configuration.
        """
        for path in self._folder.glob(EVENT_FILES):
            path.unlink()
        with SummaryWriter(str(self._folder)) as writer:
            writer._get_file_writer().add_summary(experiment_summary(runs))
            writer.add_text("report", text)
            for name, picture in pictures.items():
                writer.add_image(f"report/{name}", picture, dataformats="HWC")


class LessonLogger:
    """Writes the event file of the lab; close it, as with ``contextlib.closing``."""

    def __init__(self, folder: Path) -> None:
        self._writer = SummaryWriter(str(folder))

    def lesson(self, name: str, lesson: Lesson, pictures: Mapping[str, NDArray[np.uint8]], *, seconds: float) -> None:
        """Claim, code and pictures, and every number with what it must be as a scalar of its own, at step 0."""
        self._writer.add_text(name, f"{lesson.claim}\n\n```python\n{lesson.code}\n```")
        self._writer.add_scalar(f"{name}/seconds", seconds)
        for check in lesson.checks:
            if not (isinstance(check.computed, str) or isinstance(check.expected, str)):
                self._writer.add_scalar(f"{name}/{check.name}", check.computed)
                self._writer.add_scalar(f"{name}/{check.name} (expected)", check.expected)
        for figure, picture in pictures.items():
            self._writer.add_image(f"{name}/{figure}", picture, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
