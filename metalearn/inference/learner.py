"""A trained run, ready to adapt to a few labelled images and to predict others, as scikit-learn's estimators do.

    learner = metalearn.load("outputs/...").adapt(support_images, support_labels)
    learner.predict(images)

theta is the run's best checkpoint; theta_K its own inner loop after ``inner.eval_steps`` steps, without gradients kept.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalearn.algorithms import Algorithm
from metalearn.config.run_config import load_run_config
from metalearn.config.schema import DataConfig, ImagesConfig, SinusoidConfig, TrainConfig, result_keys
from metalearn.core.errors import ConfigError, DataError, MetalearnError, RunError
from metalearn.core.functional import expand_over_tasks, functionalize
from metalearn.core.module_parts import module_parts
from metalearn.core.types import Episodes, Forward, Params
from metalearn.data.image_decoding import FolderImages, UnreadableImagesError, read_folder
from metalearn.data.omniglot import SIZE
from metalearn.inference import weights_file as file
from metalearn.inference.inputs import Examples, as_images, as_labels, as_numbers, class_indices, unique_classes
from metalearn.inference.inversion import apply_inversion, should_invert, warn_if_inverted
from metalearn.inference.new_head import inner_for_ways
from metalearn.inference.weights_file import AdaptedModel, CheckpointOrigin
from metalearn.inner import InnerLoop, adapt, meta_params_at_step, predict
from metalearn.inner.batch_norm_statistics import is_norm_statistic, statistics_at
from metalearn.training.checkpoints import load_best
from metalearn.training.evaluation import collect_norm_statistics, predict_nontransductive
from metalearn.training.experiment import build_algorithm, build_metric, build_model, resolve_device
from metalearn.training.runtime.precision import precision_context
from metalearn.training.state import check_same_shapes

_NUMBERS_PER_PASS = 4096 * SIZE * SIZE  # of predicting one by one, support sets included; bounds its memory


class NotAdaptedError(MetalearnError, ValueError, AttributeError):
    """A learner that was asked before it was adapted; of the kinds that scikit-learn's ``NotFittedError`` is of."""


def load(run_dir: str | Path, device: str = "auto") -> Learner:
    """The best checkpoint of a finished or running training, ready to adapt; its data set need not be there.

    Args:
        run_dir: the run's folder, with its ``config.yaml`` and ``checkpoints/``.
        device: ``auto`` (the GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        RunError: if this is no run's folder, or its checkpoint is missing or damaged.
        ConfigError: if its configuration cannot be read, or the device is not there.
    """
    folder = Path(run_dir).expanduser()
    path = folder / "config.yaml"
    if not path.is_file():
        raise RunError(f"{folder}: not a run's folder, as it holds no config.yaml; name one that training has made.")
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]*))?", device):
        raise ConfigError(f"device={device}: must be auto, cpu, cuda or cuda:N")
    config, place = load_run_config(path), resolve_device(device)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are none of our business
        module = build_model(config, example_shape(config.data)).to(place)
    forward, params = functionalize(module)
    algorithm = build_algorithm(config, module)
    like = {**algorithm.init(params), **_statistics(config, algorithm, forward, params)}
    best = load_best(folder, like=like, device=place)
    return Learner(folder, config, place, forward, best.params, algorithm, module_parts(module).head, best.iteration)


def example_shape(data: DataConfig) -> torch.Size:
    """Of one input of a run, ``[channels, height, width]`` or ``[1]``, without its data set."""
    if isinstance(data, ImagesConfig):
        return torch.Size([data.channels, data.size, data.size])
    return torch.Size([1]) if isinstance(data, SinusoidConfig) else torch.Size([1, SIZE, SIZE])


def _statistics(config: TrainConfig, algorithm: Algorithm, forward: Forward, params: Params) -> Params:
    """Entries for BatchNorm's statistics of the shapes that a checkpoint has them in; their values mean nothing."""
    if not algorithm.tracks_norm_statistics:
        return {}
    device, ways, score = next(iter(params.values())).device, config.task.ways, build_metric(config)
    x = torch.zeros(1, ways, *example_shape(config.data), device=device)
    y = torch.zeros(1, ways, 1, device=device) if _is_regression(config) else torch.arange(ways, device=device)[None]
    tasks, inner = Episodes(x, y, x, y), algorithm.testing(config.inner.steps)
    return collect_norm_statistics(forward, algorithm.init(params), tasks, inner, loss=score.loss)


def _is_regression(config: TrainConfig) -> bool:
    return isinstance(config.data, SinusoidConfig)


@dataclass(eq=False)
class Learner:
    """A trained model that adapts to new classes; ``load`` makes it. ``adapt`` and ``restore`` change it, nothing else.

    Args:
        run_dir: where it was trained.
        config: how.
        device: where it computes.
        forward: the model as a pure function.
        theta: meta-parameters, with learned step sizes and kept statistics.
        algorithm: with its inner loop.
        head: names of weight and bias of the last linear layer.
        iteration: meta-steps that the checkpoint was trained for.

    Attributes:
        classes_: labels that were adapted to, sorted, as a list.

    Example: ``metalearn.load(run).adapt(support, ["cat", "cat", "dog"]).predict(images)``
    """

    run_dir: Path
    config: TrainConfig = field(repr=False)
    device: torch.device
    forward: Forward = field(repr=False)
    theta: Params = field(repr=False)
    algorithm: Algorithm = field(repr=False)
    head: tuple[str, ...] = field(repr=False)
    iteration: int
    _adapted: AdaptedModel | None = field(default=None, init=False, repr=False)

    @property
    def example_shape(self) -> torch.Size:
        """Of one input, ``[channels, height, width]``, or ``[1]`` of a regression."""
        return example_shape(self.config.data)

    @property
    def is_regression(self) -> bool:
        """Whether the run predicts numbers and no classes (``data=sinusoid``)."""
        return _is_regression(self.config)

    @property
    def classes_(self) -> list[Any]:
        """Labels that were adapted to, sorted: the columns of ``predict_proba``; none of a regression.

        Raises:
            NotAdaptedError: before ``adapt``.
        """
        return list(self._state().classes)

    @property
    def steps_(self) -> int:
        """Inner steps that were taken.

        Raises:
            NotAdaptedError: before ``adapt``.
        """
        return self._state().steps

    def read(
        self,
        folder: Path | str,
        *,
        invert: bool | str = "auto",
        unreadable: str = "stop",
        may_be_flat: bool = True,
    ) -> FolderImages:
        """A folder of images, cropped and resized as the run's were; one sub-folder a class, or images alone.

        Args:
            folder: of the images.
            invert: exchange black and white: ``True``, ``False``, or ``"auto"`` for runs of white drawings on black
                where the images' borders are light; it is said in the log.
            unreadable: ``"stop"``, or ``"skip"`` files that cannot be read with a warning.
            may_be_flat: whether images without classes will do.

        Returns:
            ``images`` for ``adapt`` and ``predict``, ``labels`` (positions in ``classes``; ``None`` of a flat folder),
            ``classes`` and ``paths``.

        Raises:
            DataError: if an image cannot be read, or there is none.
        """
        if self.is_regression:
            raise DataError(f"{folder}: the run predicts numbers (data={self.config.data.name}), and no images.")
        channels, size, _ = self.example_shape
        try:
            found = read_folder(folder, size=size, channels=channels, unreadable=unreadable, may_be_flat=may_be_flat)
        except UnreadableImagesError as error:  # it names the key by which a training passes them over
            raise UnreadableImagesError(str(error).replace("data.on_unreadable", "unreadable")) from None
        inverted = should_invert(invert, found.images, self.config.data)
        return found._replace(images=apply_inversion(found.images, inverted))

    def adapt(self, images: Examples, labels: Examples | Iterable[Any], *, steps: int | None = None) -> Learner:
        """Forget earlier classes and adapt to these, from the checkpoint, by the run's own algorithm.

        With another number of classes than ``task.ways`` the head is made of the classes' mean embeddings
        (``PrototypeHead``) and then adapted by the usual steps.

        Args:
            images: support set ``[S, C, H, W]`` (or ``[S, H, W]`` of grey ones), uint8 or floating point in [0, 1]; of
                a regression the inputs, ``[S]`` or ``[S, 1]``.
            labels: any hashable and sortable things, one an image; of a regression the targets, ``[S]`` or ``[S, 1]``.
            steps: inner steps; ``None``: the run's ``inner.eval_steps``.

        Returns:
            The learner itself.

        Raises:
            DataError: if the images do not fit the run, the labels do not fit them, or there are fewer than 2 classes.
            RunError: if the algorithm cannot take that many classes.
            NonFiniteLossError: if adapting diverges.
        """
        x = self._inputs(images)
        steps = self.config.inner.eval_steps if steps is None else steps
        classes: tuple[Any, ...] = ()
        if self.is_regression:
            inner, y = self.algorithm.testing(steps), as_numbers("targets", labels)
            if len(y) != len(x):
                raise DataError(f"{len(y)} targets for {len(x)} inputs; give one target an input.")
        else:
            given = as_labels(labels, len(x))
            classes = unique_classes(given)
            inner, y = self._inner(len(classes), steps), class_indices(given, classes)
        x, y = x.to(self.device), y.to(self.device)
        with torch.no_grad(), self._precision():
            fast = adapt(self.forward, self.theta, x[None], y[None], inner, loss=build_metric(self.config).loss)
        self._adapted = _laid_out(AdaptedModel({name: w[0] for name, w in fast.items()}, x, classes, inner.steps))
        return self

    def predict(self, images: Examples, *, transductive: bool = False) -> list[Any]:
        """The most probable label of each image; of a regression a float for each input.

        Args:
            images: ``[Q, ...]``, as for ``adapt``.
            transductive: as for ``predict_proba``.

        Raises:
            NotAdaptedError: before ``adapt``.
            DataError: if the images do not fit the run.
        """
        outputs = self._outputs(images, transductive)
        if self.is_regression:
            numbers: list[float] = outputs.squeeze(1).tolist()
            return numbers
        classes = self.classes_
        return [classes[i] for i in outputs.argmax(dim=-1).tolist()]

    def predict_proba(
        self, images: Examples, *, transductive: bool = False, progress: Callable[[int], None] = lambda done: None
    ) -> Tensor:
        """Probabilities of the classes in the order of ``classes_``, ``[Q, N]`` float32 in main memory.

        Args:
            images: ``[Q, ...]``, as for ``adapt``.
            transductive: whether BatchNorm sees all these images as one batch, as papers on MAML do; then a prediction
                depends on what else is predicted. If not, each image is predicted without the others: by the statistics
                that the run has kept, or in a batch of the support set and itself.
            progress: called with the number of images done.

        Raises:
            NotAdaptedError: before ``adapt``.
            DataError: if the images do not fit the run.
            RunError: of a regression.
        """
        if self.is_regression:
            raise RunError("a regression (data=sinusoid) has no classes, and so no probabilities; take predict.")
        return self._outputs(images, transductive, progress).softmax(dim=-1)

    def score(self, images: Examples, labels: Examples | Iterable[Any], *, transductive: bool = False) -> float:
        """Share of right predictions; of a regression the mean squared error, as in ``metrics.json``.

        Args:
            images: ``[Q, ...]``, as for ``adapt``.
            labels: the true ones, each of a class that was adapted to; of a regression the targets.
            transductive: as for ``predict_proba``.

        Raises:
            NotAdaptedError: before ``adapt``.
            DataError: if the images do not fit the run, or a label is none of the classes.
        """
        outputs = self._outputs(images, transductive)
        if self.is_regression:
            y = as_numbers("targets", labels)
            if len(y) != len(outputs):
                raise DataError(f"{len(y)} targets for {len(outputs)} inputs; give one target an input.")
        else:
            y = class_indices(as_labels(labels, len(outputs)), self.classes_)
        return build_metric(self.config).of(outputs[None], y[None]).item()

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write what was adapted as one safetensors file; ``restore`` of the same run predicts the same bits again.

        Args:
            path: the file; folders are made.
            overwrite: whether it may replace another.

        Returns:
            The path.

        Raises:
            NotAdaptedError: before ``adapt``.
            RunError: if the file is there already, or if labels are neither text nor whole numbers.
        """
        place = Path(path).expanduser()
        file.write(self._state(), self._origin, place, overwrite=overwrite)
        return place

    def restore(self, path: str | Path) -> Learner:
        """Take what ``save`` wrote in the place of adapting.

        Returns:
            The learner itself.

        Raises:
            RunError: if the file is missing, damaged, or of another run; then with what differs.
        """
        place = Path(path).expanduser()
        found = file.read(place, self._origin)
        model = {name: p for name, p in self.theta.items() if not is_norm_statistic(name)}
        like = meta_params_at_step(model, self.algorithm.inner, found.steps)
        if self.head and not self.is_regression:  # as many outputs as classes
            like |= {name: like[name].new_empty(len(found.classes), *like[name].shape[1:]) for name in self.head}
        try:
            check_same_shapes(found.weights, like)
        except RunError as error:
            raise RunError(f"{place}: {error}") from None
        weights = {name: w.to(self.device) for name, w in found.weights.items()}
        self._adapted = _laid_out(AdaptedModel(weights, found.support_x.to(self.device), found.classes, found.steps))
        return self

    def _state(self) -> AdaptedModel:
        if self._adapted is None:
            raise NotAdaptedError("this learner is not adapted yet: call adapt(images, labels), or restore(path).")
        return self._adapted

    def _inputs(self, images: Examples) -> Tensor:
        if self.is_regression:
            return as_numbers("inputs", images)
        found = as_images(images, self.example_shape)
        warn_if_inverted(found, self.config.data)
        return found

    def _precision(self) -> AbstractContextManager[None]:
        return precision_context(self.config.run.precision, self.device)

    def _inner(self, ways: int, steps: int) -> InnerLoop:
        """The inner loop of a task of that many classes."""
        return inner_for_ways(
            self.algorithm.testing(steps),
            ways,
            trained=self.config.task.ways,
            algorithm=self.algorithm.name,
            head=self.head,
        )

    @torch.no_grad()
    def _outputs(
        self, images: Examples, transductive: bool, progress: Callable[[int], None] = lambda done: None
    ) -> Tensor:
        """What the model gives for each image, ``[Q, N]`` (or ``[Q, 1]``) float32 in main memory."""
        adapted, x = self._state(), self._inputs(images).to(self.device)
        fast = expand_over_tasks(adapted.weights, 1)
        with self._precision():
            if transductive:
                outputs = predict(self.forward, fast, x[None])
                progress(len(x))
                return outputs[0].float().cpu()
            statistics, support_x = statistics_at(self.theta, adapted.steps), adapted.support_x[None]
            each, parts = max(1, _NUMBERS_PER_PASS // (x[0].numel() * (len(adapted.support_x) + 1))), []
            none = x.new_zeros(1, max(len(x), len(adapted.support_x)))  # targets, which nothing looks at
            for first in range(0, len(x), each):
                part = x[None, first : first + each]
                tasks = Episodes(support_x, none[:, : support_x.shape[1]], part, none[:, : part.shape[1]])
                parts.append(predict_nontransductive(self.forward, fast, tasks, statistics))
                progress(first + part.shape[1])
        return torch.cat(parts, dim=1)[0].float().cpu()

    @functools.cached_property
    def _origin(self) -> CheckpointOrigin:
        config = (self.run_dir / "config.yaml").read_bytes()
        return CheckpointOrigin(
            run=str(self.run_dir),
            algorithm=self.algorithm.name,
            config_digest=hashlib.sha256(config).hexdigest(),
            keys=result_keys(self.config),
            theta_digest=file.digest(self.theta),
        )


def _laid_out(adapted: AdaptedModel) -> AdaptedModel:
    """The same in memory of its own and one layout: products round by layout and alignment, which files do not keep."""
    weights = {name: w.clone(memory_format=torch.contiguous_format) for name, w in adapted.weights.items()}
    support_x = adapted.support_x.clone(memory_format=torch.contiguous_format)
    return replace(adapted, weights=weights, support_x=support_x)
