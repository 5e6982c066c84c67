"""Adapt a trained model to a few labelled images and predict others, with the interface of a scikit-learn estimator.

    learner = metalearn.load("outputs/...").adapt(support_images, support_labels)
    learner.predict(images)

theta is the run's best checkpoint. Adapting takes ``inner.eval_steps`` steps of the run's own inner loop, without a
graph of gradients.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalearn.algorithms import Algorithm
from metalearn.config.options import CustomDataConfig
from metalearn.config.run_config import to_yaml, without_paths
from metalearn.config.schema import TrainConfig, result_keys
from metalearn.core import serialization as files
from metalearn.core.errors import DataError, MetalearnError, RunError
from metalearn.core.params import expand_over_tasks
from metalearn.core.paths import expand_home
from metalearn.core.short_repr import short_repr
from metalearn.core.threads import one_thread_at_a_time
from metalearn.core.types import Episodes, Forward, Params
from metalearn.data.image_decoding import FolderImages, UnreadableImagesError, read_folder
from metalearn.data.omniglot import SIZE
from metalearn.inference.inputs import (
    Examples,
    as_images,
    as_labels,
    as_numbers,
    as_targets,
    class_indices,
    unique_classes,
)
from metalearn.inference.inversion import apply_inversion, should_invert, warn_if_inverted
from metalearn.inference.new_head import inner_for_ways
from metalearn.inference.weights_file import SUPPORT_X, AdaptedModel, CheckpointOrigin, read_weights, write_weights
from metalearn.inner import adapt, meta_params_at_step, predict
from metalearn.inner.batch_norm_statistics import is_norm_statistic, statistics_at
from metalearn.pretrained.model_file import ModelRecord, model_bytes, tensor_digest
from metalearn.training.evaluation import predict_nontransductive
from metalearn.training.experiment import build_metric
from metalearn.training.runtime.precision import precision_context
from metalearn.training.state import check_same_shapes

_PIXELS_PER_PASS = 4096 * SIZE * SIZE
"""Inputs of one forward pass of non-transductive prediction, support sets included; bounds its memory."""


class NotAdaptedError(MetalearnError, ValueError, AttributeError):
    """A learner was used before it was adapted; has the base classes of scikit-learn's ``NotFittedError``."""


@dataclass(eq=False)
class Learner:
    """A trained model that adapts to new classes, made by ``load``. Only ``adapt`` and ``restore`` change it.

    Args:
        run_dir: the run's folder, or the model's file.
        theta: meta-parameters, learned step sizes and running statistics.
        head: names of weight and bias of the last linear layer.
        iteration: meta-steps of training before the checkpoint.
        validation_score: accuracy of the checkpoint on validation classes, a fraction; for a regression the error.
        example_shape: of one input: ``[channels, height, width]``, or ``[1]`` for sinusoids.
        outputs: size of the model's output.
        card: about the model's test, as ``metrics.json`` has it; a shipped model adds data, recipe and licence. Empty
            if the checkpoint was not tested.

    Example: ``metalearn.load(run).adapt(support, ["cat", "cat", "dog"]).predict(images)``
    """

    run_dir: Path = field(repr=False)
    config: TrainConfig = field(repr=False)
    device: torch.device
    forward: Forward = field(repr=False)
    theta: Params = field(repr=False)
    algorithm: Algorithm = field(repr=False)
    head: tuple[str, ...] = field(repr=False)
    iteration: int
    validation_score: float
    example_shape: torch.Size
    outputs: int
    card: Mapping[str, Any] = field(repr=False)
    _adapted: AdaptedModel | None = field(default=None, init=False, repr=False)

    def __repr__(self) -> str:
        classes = "not adapted" if self._adapted is None else self._adapted.classes
        return short_repr(self, model=self.run_dir.name, algorithm=self.algorithm.name, classes=classes)

    @property
    def is_regression(self) -> bool:
        """True if the run predicts numbers instead of classes (``data=sinusoid``)."""
        return self.config.data.is_regression

    @property
    def classes_(self) -> list[Any]:
        """Labels of the adapted model, sorted: the columns of ``predict_proba``; empty for a regression."""
        return list(self._state().classes)

    @property
    def steps_(self) -> int:
        """Number of inner steps taken."""
        return self._state().steps

    def read(
        self,
        folder: Path | str,
        *,
        invert: bool | str = "auto",
        on_unreadable: str = "stop",
        may_be_flat: bool = True,
        unreadable: str | None = None,
    ) -> FolderImages:
        """Read a folder of images, cropped and resized like the run's; one sub-folder a class, or images alone.

        Args:
            folder: path of the folder.
            invert: exchange black and white: ``True``, ``False``, or ``"auto"`` for runs of white drawings on black
                if the images' borders are light; the decision is logged.
            on_unreadable: ``"stop"`` at files that cannot be read, or ``"skip"`` them with a warning.
            may_be_flat: whether a folder of images without classes is accepted.
            unreadable: former name of ``on_unreadable``.

        Returns:
            ``images`` and ``labels`` for ``adapt`` (the class of each image, which is the name of its folder; ``None``
            for a flat folder), the sorted ``classes``, and the ``paths`` of the images.

        Raises:
            DataError: if an image cannot be read, or there is none.
        """
        if unreadable is not None:
            warnings.warn("Learner.read: unreadable= is called on_unreadable= now", FutureWarning, stacklevel=2)
            on_unreadable = unreadable
        if self.is_regression:
            raise DataError(f"{folder}: the run predicts numbers (data={self.config.data.name}), not images.")
        channels, size = self.example_shape[0], self.example_shape[-1]
        if tuple(self.example_shape) not in ((1, size, size), (3, size, size)):
            raise DataError(f"{folder}: the run's examples are {list(self.example_shape)}, not square images.")
        try:
            read = read_folder(
                folder, size=size, channels=channels, on_unreadable=on_unreadable, may_be_flat=may_be_flat
            )
        except UnreadableImagesError as error:  # its message names the key of train.py
            raise UnreadableImagesError(re.sub(r"\bdata\.(?=(on_)?unreadable)", "", str(error))) from None
        inverted = should_invert(invert, read.images, self.config.data)
        return read._replace(images=apply_inversion(read.images, inverted))

    def adapt(self, images: Examples, labels: Examples | Iterable[Any], *, steps: int | None = None) -> Learner:
        """Adapt the checkpoint to these classes by the run's algorithm, replacing earlier classes; return the learner.

        Fewer classes than ``task.ways`` take as many outputs of the trained head; for more, a head is built from the
        classes' mean embeddings (``PrototypeHead``). The usual steps follow.

        Args:
            images: support set ``[S, C, H, W]`` (or ``[S, H, W]`` if C is 1), uint8 or floating point in [0, 1]; for a
                regression the inputs, ``[S]`` or ``[S, 1]``.
            labels: one hashable and sortable label an image; for a regression the targets, ``[S]`` or ``[S, 1]``.
            steps: inner steps; ``None`` is the run's ``inner.eval_steps``.

        Raises:
            DataError: if the images do not fit the run, the labels do not fit them, or there are fewer than 2 classes.
            RunError: if the algorithm does not support that many classes.
            NonFiniteLossError: if adapting diverges.
        """
        x = self._inputs(images)
        steps = self.config.inner.eval_steps if steps is None else steps
        classes: tuple[Any, ...] = ()
        if self.is_regression:
            inner, y = self.algorithm.eval_inner(steps), as_targets(labels, len(x), self.outputs)
        else:
            label_list = as_labels(labels, len(x))
            classes = unique_classes(label_list)
            y = class_indices(label_list, classes)
            inner = inner_for_ways(
                self.algorithm.eval_inner(steps),
                len(classes),
                trained=self.config.task.ways,
                algorithm=self.algorithm.name,
                head=self.head,
            )
        x, y = x.to(self.device), y.to(self.device)
        with self._computing(), torch.no_grad():
            fast = adapt(self.forward, self.theta, x[None], y[None], inner, loss=build_metric(self.config).loss)
        weights = {name: w[0] for name, w in fast.items()}
        self._adapted = AdaptedModel(weights, x, classes, inner.steps).contiguous_copy()
        return self

    fit = adapt
    """``adapt`` under the name that scikit-learn users expect."""

    def predict(self, images: Examples, *, transductive: bool = False) -> list[Any]:
        """Return the most probable label of each image ``[Q, ...]``; for a regression a float for each input.

        ``transductive`` is as for ``predict_proba``.
        """
        adapted = self._state()
        outputs = self._outputs(adapted, images, transductive)
        if self.is_regression:
            numbers: list[Any] = (outputs.squeeze(1) if self.outputs == 1 else outputs).tolist()
            return numbers
        return [adapted.classes[i] for i in outputs.argmax(dim=-1).tolist()]

    def predict_proba(
        self, images: Examples, *, transductive: bool = False, progress: Callable[[int], None] = lambda done: None
    ) -> Tensor:
        """Return probabilities of the classes in the order of ``classes_``, ``[Q, N]`` float32 on the CPU.

        Args:
            images: ``[Q, ...]``, as for ``adapt``.
            transductive: if true, BatchNorm sees all these images as one batch, as in the MAML papers, and a prediction
                depends on the other images. If false, each image is predicted without the others: with the run's
                running statistics, or in a batch of the support set and itself.
            progress: called with the number of images done.

        Raises:
            NotAdaptedError: before ``adapt``.
            DataError: if the images do not fit the run.
            RunError: for a regression.
        """
        if self.is_regression:
            raise RunError("a regression (data=sinusoid) has no classes, and so no probabilities; use predict.")
        return self._outputs(self._state(), images, transductive, progress).softmax(dim=-1)

    def score(self, images: Examples, labels: Examples | Iterable[Any], *, transductive: bool = False) -> float:
        """Return the accuracy on images ``[Q, ...]``; for a regression the mean squared error, as in ``metrics.json``.

        ``labels`` are the true ones, each in ``classes_``, or the targets; ``transductive`` as for ``predict_proba``.
        """
        adapted = self._state()
        outputs = self._outputs(adapted, images, transductive)
        if self.is_regression:
            y = as_targets(labels, len(outputs), self.outputs)
        else:
            y = class_indices(as_labels(labels, len(outputs)), adapted.classes)
        return build_metric(self.config).per_task(outputs[None], y[None]).item()

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Save the adapted weights as a safetensors file; after ``restore`` predictions are bitwise the same.

        Missing folders are created.

        Raises:
            RunError: if the file exists and ``overwrite`` is false, or if labels are neither strings nor integers.
        """
        target = expand_home(path)
        write_weights(self._state(), self._origin, target, overwrite=overwrite)
        return target

    def export(self, path: str | Path, *, card: Mapping[str, Any] | None = None, overwrite: bool = False) -> Path:
        """Save the trained model itself, not adapted, as a safetensors file, which ``load`` takes like a run's folder.

        It holds the meta-parameters, the configuration without the folders of data (options of ``custom`` ones stay as
        they are), the card, and a digest of all that.

        Args:
            path: of the file; missing folders are created.
            card: what to say about the model, values that JSON has; ``None``: this learner's.
            overwrite: whether it may replace a file.

        Raises:
            RunError: if the file exists and ``overwrite`` is false, or the card holds values that JSON has not.
        """
        target = expand_home(path)
        files.check_new_file(target, "model.safetensors", overwrite=overwrite)
        files.atomic_write_bytes(target, self.to_bytes(card))
        return target

    def to_bytes(self, card: Mapping[str, Any] | None = None) -> bytes:
        """Return the content of the file that ``export`` writes."""
        about = self.card if card is None else card
        try:
            json.dumps(about)
        except (TypeError, ValueError) as error:
            raise RunError(
                f"card={about!r}: this cannot be written as JSON ({error}); give text, numbers and lists."
            ) from None
        record = ModelRecord(to_yaml(without_paths(self.config)), self.iteration, self.validation_score, about)
        return model_bytes(self.theta, record)

    def restore(self, path: str | Path) -> Learner:
        """Load the adapted weights that ``save`` wrote, in place of adapting; return the learner.

        Raises:
            RunError: if the file is missing or damaged, or of another run; then with the differences.
        """
        source = expand_home(path)
        saved = read_weights(source, self._origin)
        model = {name: p for name, p in self.theta.items() if not is_norm_statistic(name)}
        like = meta_params_at_step(model, self.algorithm.inner, saved.steps)
        if self.head and not self.is_regression:  # as many outputs as classes
            like |= {name: like[name].new_empty(len(saved.classes), *like[name].shape[1:]) for name in self.head}
        like[SUPPORT_X] = torch.empty(*saved.support_x.shape[:1], *self.example_shape, device="meta")
        try:
            check_same_shapes({**saved.weights, SUPPORT_X: saved.support_x}, like)
            if self.is_regression == bool(saved.classes):
                raise RunError(f"its classes are {list(saved.classes)}, which do not fit the run.")
        except RunError as error:
            raise RunError(f"{source}: {error}") from None
        weights = {name: w.to(self.device) for name, w in saved.weights.items()}
        support_x = saved.support_x.to(self.device)
        self._adapted = AdaptedModel(weights, support_x, saved.classes, saved.steps).contiguous_copy()
        return self

    def _state(self) -> AdaptedModel:
        if self._adapted is None:
            raise NotAdaptedError("this learner is not adapted yet: call adapt(images, labels), or restore(path).")
        return self._adapted

    def _inputs(self, images: Examples) -> Tensor:
        if self.is_regression or isinstance(self.config.data, CustomDataConfig):
            return as_numbers("inputs", images, self.example_shape)
        x = as_images(images, self.example_shape)
        warn_if_inverted(x, self.config.data)
        return x

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Compute in the run's precision, which is a setting of the process."""
        with one_thread_at_a_time(), precision_context(self.config.run.precision, self.device):
            yield

    @torch.no_grad()
    def _outputs(
        self,
        adapted: AdaptedModel,
        images: Examples,
        transductive: bool,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Tensor:
        """Return the model's output for each image, ``[Q, N]`` (or ``[Q, 1]``) float32 on the CPU."""
        x = self._inputs(images).to(self.device)
        fast = expand_over_tasks(adapted.weights, 1)
        if transductive:
            with self._computing():
                outputs = predict(self.forward, fast, x[None])
            progress(len(x))
            return outputs[0].float().cpu()
        statistics, support_x = statistics_at(self.theta, adapted.steps), adapted.support_x[None]
        chunk = max(1, _PIXELS_PER_PASS // (x[0].numel() * (len(adapted.support_x) + 1)))
        no_targets = x.new_zeros(1, max(len(x), len(adapted.support_x)))  # never read
        parts = []
        for first in range(0, len(x), chunk):
            part = x[None, first : first + chunk]
            support_y, query_y = no_targets[:, : support_x.shape[1]], no_targets[:, : part.shape[1]]
            with self._computing():
                tasks = Episodes(support_x, support_y, part, query_y)
                parts.append(predict_nontransductive(self.forward, fast, tasks, statistics))
            progress(first + part.shape[1])
        return torch.cat(parts, dim=1)[0].float().cpu()

    @functools.cached_property
    def _origin(self) -> CheckpointOrigin:
        return CheckpointOrigin(
            run=str(self.run_dir),
            algorithm=self.algorithm.name,
            config_digest=hashlib.sha256(to_yaml(self.config).encode()).hexdigest(),
            keys=result_keys(self.config),
            theta_digest=tensor_digest(self.theta),
        )
