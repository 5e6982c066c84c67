"""A user's own model, data, update rule and algorithm, as a configuration names them."""

from __future__ import annotations

import copy
import re
import reprlib
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import metalearn
from metalearn.algorithms import Algorithm
from metalearn.config.compatibility import NO_RULE
from metalearn.config.options import CustomAlgorithmConfig, CustomDataConfig
from metalearn.config.schema import TrainConfig
from metalearn.config.target import call_target, import_target, parameter_names
from metalearn.core.errors import ConfigError
from metalearn.core.functional import functionalize
from metalearn.core.module_checks import BatchNormMode
from metalearn.core.module_parts import ModuleParts
from metalearn.core.text import first_line, plural
from metalearn.core.types import Episodes
from metalearn.data.class_split import SPLITS
from metalearn.data.sampler import EpisodeSampler, TaskSampler, TaskShape
from metalearn.inner import InnerLoop, UpdateRule
from metalearn.training.state import preserve_rng_state, seed_all

_PACKAGE = Path(metalearn.__file__).parent


def build_custom_model(target: str, options: Mapping[str, Any], example_shape: torch.Size, outputs: int) -> nn.Module:
    """Return the module that ``model.target`` makes: of its options, and of ``ways`` and ``example_shape`` if it asks.

    It draws its parameters from the global random generators.

    Raises:
        ConfigError: if it makes something else.
    """
    module = call_target("model.target", target, options, ways=outputs, example_shape=example_shape)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"model.target={target}: this made a {type(module).__name__}; it must be an nn.Module")
    return module


def check_output_shape(
    module: nn.Module,
    label: str,
    example_shape: torch.Size,
    outputs: int,
    batch_norm: BatchNormMode | None = None,
) -> None:
    """Check by two examples of zeros that a model can be adapted, fits the data, and has an output for each class.

    Args:
        module: the model; it is not changed.
        label: what to call it, ``model=conv4``.
        example_shape: of one input.
        outputs: size of an output.
        batch_norm: as ``functionalize`` takes it.

    Raises:
        ConfigError: if it does not.
    """
    x = torch.zeros(2, *example_shape)
    try:
        functionalize(module, batch_norm=batch_norm)
    except (TypeError, ValueError) as error:
        reason = re.sub(r"functionalize\(model, (.*?)\)", r"\1", str(error))  # as the command line says it
        reason = re.sub(r"batch_norm='(\w+)'", r"model.batch_norm=\1", reason)
        raise ConfigError(f"{label}: {reason}") from error
    try:
        with torch.no_grad(), preserve_rng_state():
            output = copy.deepcopy(module)(x)
    except Exception as error:
        reason = first_line(error)
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if not {Path(torch.__file__).parent, _PACKAGE} & set(Path(f.filename).parents)]
        place = f", {own[-1].filename} line {own[-1].lineno}" if own else ""
        raise ConfigError(f"{label}: it cannot take two examples, {list(x.shape)} ({reason}{place})") from error
    shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if shape != [2, outputs]:
        raise ConfigError(
            f"{label}: it returns {shape} for two examples, {list(x.shape)}, and must return {[2, outputs]}, a number "
            "for each class of a task (or for each target of a regression). A parameter called ways is given that "
            "number, and one called example_shape the shape of an example"
        )


def build_custom_algorithm(algorithm: CustomAlgorithmConfig, inner: InnerLoop, parts: ModuleParts) -> Algorithm:
    """Return what ``algorithm.target`` makes of the inner loop, the model's parts and its options.

    Raises:
        ConfigError: if it is not an ``Algorithm``.
    """
    with preserve_rng_state():
        made = call_target("algorithm.target", algorithm.target, algorithm.options, inner, parts)
    if not isinstance(made, Algorithm):
        raise ConfigError(
            f"algorithm.target={algorithm.target}: this made a {type(made).__name__}; it must be a metalearn.Algorithm"
        )
    return made


def build_custom_rule(target: str | None, options: Mapping[str, Any]) -> UpdateRule:
    """Return the update rule that ``inner.optimizer_target`` makes of its options.

    Raises:
        ConfigError: if there is no target, or what it makes lacks a method of an update rule.
    """
    if target is None:
        raise ConfigError(NO_RULE)
    with preserve_rng_state():
        rule = call_target("inner.optimizer_target", target, options)
    for method in ("init", "update"):
        if not callable(getattr(rule, method, None)):
            raise ConfigError(
                f"inner.optimizer_target={target}: this made a {type(rule).__name__} without a method {method}; it "
                "must be an update rule, with init and update (metalearn.UpdateRule)"
            )
    return rule


def build_custom_samplers(config: TrainConfig, device: torch.device) -> dict[str, TaskSampler]:
    """Return the samplers of each split from what ``data.target`` makes.

    The target is a function or class. It is called with ``data.options``, and with those of ``ways``, ``shots``,
    ``queries`` and ``eval_queries`` (per class), ``seed`` and ``device`` that it has parameters for. It returns a
    mapping with the keys ``train``, ``validation`` and ``test``. If it has a parameter ``split``, it is called once for
    each of these instead, with its ``queries``, and returns that split alone, as ``SinusoidSampler`` does. A split is

    - examples by class: ``[classes, examples of each, ...]``, or a list of one ``[examples, ...]`` a class if their
      numbers differ; tensors or arrays of uint8 (divided by 255) or floating point. Tasks are drawn from them; or
    - an object with ``tasks(first, count)``, which returns tasks ``first`` to ``first + count - 1`` as ``Episodes``,
      always the same ones for the same numbers. Labels are int64 from 0 to ``ways - 1``; with ``data.regression=true``
      targets are floating point, ``[T, S or Q, size]``.

    Whatever it draws from the global random generators is determined by ``run.seed``, and does not change the run's.

    Raises:
        ConfigError: if it returns anything else, or the task does not fit.
    """
    with preserve_rng_state():
        seed_all(config.run.seed)
        return _build_custom_samplers(config, device)


def _build_custom_samplers(config: TrainConfig, device: torch.device) -> dict[str, TaskSampler]:
    data, task = config.data, config.task
    assert isinstance(data, CustomDataConfig), "the caller has chosen"
    queries = dict(zip(SPLITS, (task.queries, config.eval.queries, config.eval.queries), strict=True))
    common = {"ways": task.ways, "shots": task.shots, "seed": config.run.seed, "device": device}

    # Call the target, once or for each split.
    key = f"data.target={data.target}"
    if "split" in parameter_names(import_target("data.target", data.target)):
        parts: Any = {
            split: call_target("data.target", data.target, data.options, **common, split=split, queries=queries[split])
            for split in SPLITS
        }
    else:
        both = {"queries": task.queries, "eval_queries": config.eval.queries}
        parts = call_target("data.target", data.target, data.options, **common, **both)
    if not isinstance(parts, Mapping) or not set(SPLITS) <= set(parts):
        found = f"a mapping of {', '.join(map(str, parts)) or 'nothing'}" if isinstance(parts, Mapping) else type(parts)
        raise ConfigError(f"{key}: this made {found}; it must be a mapping with the keys {', '.join(SPLITS)}")

    # Make a sampler of each.
    samplers: dict[str, TaskSampler] = {}
    for split in SPLITS:
        shape = TaskShape(task.ways, task.shots, queries[split])
        try:
            if hasattr(parts[split], "tasks"):
                samplers[split] = CustomSampler(parts[split], device)
            else:
                images, counts = _by_class(parts[split])
                samplers[split] = ClassSampler(images.to(device), shape, config.run.seed, split, counts)
            _check_tasks(samplers[split], task.ways, is_regression=data.is_regression)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{key}, {split}: {error}") from error
    shapes = {split: list(sampler.example_shape) for split, sampler in samplers.items()}
    if any(shape != shapes["train"] for shape in shapes.values()):
        listed = ", ".join(f"{shape} in {split}" for split, shape in shapes.items())
        raise ConfigError(f"{key}: examples are {listed}; make them all of one shape")
    return samplers


class ClassSampler(EpisodeSampler):
    """A sampler from a user's examples by class, of any shape, of uint8 or floating point."""

    def _check_images(self) -> None:
        dims, form = (3, "[classes, examples, ...]") if self.counts is None else (2, "[examples, ...] for each class")
        x, (ways, shots, queries) = self.images, (self.shape.ways, self.shape.shots, self.shape.queries)
        if x.dim() < dims or not (x.dtype == torch.uint8 or x.is_floating_point()):
            raise ValueError(
                f"examples must be uint8 or floating point {form}, got {x.dtype} {tuple(x.shape)}; convert them "
                "(.float(), .reshape)"
            )
        sizes = self._sizes
        if len(sizes) < ways:
            raise ValueError(
                f"task.ways={ways}: tasks of {ways} ways, but split '{self.split}' has only "
                f"{plural(len(sizes), 'class', 'classes')}; lower it, or give more classes"
            )
        if min(sizes) < shots + queries:
            name = "task.queries" if self.split == "train" else "eval.queries"
            raise ValueError(
                f"class {sizes.index(min(sizes))} has {plural(min(sizes), 'example')}, and a task takes "
                f"{shots + queries} of a class (task.shots={shots}, {name}={queries}); lower these, "
                "add examples, or leave the class out"
            )
        examples = x.flatten(0, 1) if self.counts is None else x
        if x.is_floating_point() and not (finite := examples.flatten(1).isfinite().all(dim=1)).all():
            owners = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
            first = int(owners[~finite.cpu()][0])
            raise ValueError(f"class {first} holds NaN or infinity; remove or correct these examples")


@dataclass(frozen=True, eq=False)
class CustomSampler:
    """A sampler from a user's object with ``tasks(first, count)``.

    Args:
        source: the object.
        device: of the episodes.
    """

    source: Any
    device: torch.device

    @property
    def example_shape(self) -> torch.Size:
        """Shape of one input."""
        return self.tasks(0, 1).support_x.shape[2:]

    def batch(self, index: int, tasks: int) -> Episodes:
        """Return batch number ``index`` of ``tasks`` tasks."""
        return self.tasks(index * tasks, tasks)

    def tasks(self, first: int, count: int) -> Episodes:
        """Return tasks ``first`` to ``first + count - 1``, with float32 numbers.

        Raises:
            TypeError: if the object returns no ``Episodes``.
            ValueError: if it returns another number of tasks.
        """
        with preserve_rng_state():
            episodes = self.source.tasks(first, count)
        if not isinstance(episodes, Episodes):
            raise TypeError(f"tasks({first}, {count}) returned a {type(episodes).__name__}; it must be Episodes")
        if episodes.tasks != count:
            raise ValueError(f"tasks({first}, {count}) returned {plural(episodes.tasks, 'task')}; it must be {count}")
        moved = (tensor.to(self.device) for tensor in _tensors(episodes))
        return Episodes(*(tensor.float() if tensor.is_floating_point() else tensor for tensor in moved))


def _tensors(episodes: Episodes) -> list[Tensor]:
    return [getattr(episodes, f.name) for f in fields(episodes)]


def _by_class(part: Any) -> tuple[Tensor, list[int] | None]:
    """Return examples by class in the form of ``EpisodeSampler``: a tensor, and the sizes of classes if they differ."""
    if not isinstance(part, (list, tuple)):
        return _as_tensor("a split", part), None
    classes = [_as_tensor(f"class {i}", each) for i, each in enumerate(part)]
    if not classes:
        raise ValueError("it is an empty list; give the examples of each class")
    kinds = [f"{each.dtype} {list(each.shape[1:])}" for each in classes]
    for i, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(f"an example of class {i} is {kind}, and one of class 0 {kinds[0]}; make them all alike")
    return torch.cat(classes), [len(each) for each in classes]


def _as_tensor(name: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value)
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    if tensor is None or tensor.dim() == 0:
        raise TypeError(
            f"{name} is a {type(value).__name__}, {reprlib.repr(value)}; it must be a tensor or an array of numbers, "
            "with as many in each row (see metalearn/training/custom.py)"
        )
    return tensor


def _check_tasks(sampler: TaskSampler, ways: int, *, is_regression: bool) -> None:
    """Check the first two tasks.

    Raises:
        ValueError: if they differ from one draw to the next, or their targets are not of the kind that they should be.
    """
    with preserve_rng_state():
        seed_all(0)
        episodes = sampler.tasks(0, 2)
        seed_all(1)  # of the global generators, on which tasks must not depend
        again = sampler.tasks(0, 2)
    for f in fields(episodes):
        tensor = getattr(episodes, f.name)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{f.name} of tasks(0, 2) holds NaN or infinity; remove or correct these numbers")
    if any(not torch.equal(a, b) for a, b in zip(_tensors(episodes), _tensors(again), strict=True)):
        raise ValueError("tasks(0, 2) differ from one call to the next; make them a function of seed and number alone")
    for support, query in ((episodes.support_x, episodes.query_x), (episodes.support_y, episodes.query_y)):
        if (support.dtype, support.shape[2:]) != (query.dtype, query.shape[2:]):
            raise ValueError(
                f"support is {support.dtype} {list(support.shape)} and query {query.dtype} {list(query.shape)}; they "
                "may differ in the number of examples alone"
            )
    if not episodes.support_x.is_floating_point():
        raise ValueError(f"inputs are {episodes.support_x.dtype}; they must be floating point")
    for y in (episodes.support_y, episodes.query_y):
        if is_regression and (not y.is_floating_point() or y.dim() != 3):
            raise ValueError(
                f"targets are {y.dtype} {list(y.shape)}; with data.regression=true they must be floating point "
                "[tasks, examples, size]"
            )
        if not is_regression and (y.dtype != torch.int64 or y.dim() != 2 or not 0 <= y.min() <= y.max() < ways):
            raise ValueError(
                f"labels are {y.dtype} {list(y.shape)} from {y.min()} to {y.max()}; they must be int64 [tasks, "
                f"examples] from 0 to {ways - 1} (task.ways={ways}), or data.regression=true for numbers to predict"
            )
