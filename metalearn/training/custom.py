"""A user's own model, data, update rule and algorithm, as a configuration names them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from metalearn.algorithms import Algorithm
from metalearn.config.options import CustomAlgorithmConfig, CustomDataConfig, CustomModelConfig
from metalearn.config.schema import InnerConfig, TrainConfig
from metalearn.config.target import call_target, import_target, parameter_names
from metalearn.core.errors import ConfigError
from metalearn.core.module_parts import ModuleParts
from metalearn.core.types import Episodes
from metalearn.data.sampler import EpisodeSampler, TaskSampler, TaskShape
from metalearn.inner import InnerLoop, UpdateRule

SPLITS = ("train", "validation", "test")


def build_custom_model(model: CustomModelConfig, example_shape: torch.Size, outputs: int) -> nn.Module:
    """Return the module that ``model.target`` makes: of its options, and of ``ways`` and ``example_shape`` if it asks.

    Raises:
        ConfigError: if it makes something else.
    """
    module = call_target("model.target", model.target, model.options, ways=outputs, example_shape=example_shape)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"model.target={model.target}: this made a {type(module).__name__}; it must be an nn.Module")
    return module


def check_output_shape(module: nn.Module, label: str, example_shape: torch.Size, outputs: int) -> None:
    """Check by two examples of zeros that a model fits the data, and has an output for each class or target.

    Args:
        module: the model; it is not changed.
        label: what to call it, ``model=conv4``.
        example_shape: of one input.
        outputs: size of an output.

    Raises:
        ConfigError: if it does not.
    """
    x = torch.zeros(2, *example_shape)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = copy.deepcopy(module)(x)
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{label}: it cannot take two examples, {list(x.shape)} ({reason})") from error
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
    made = call_target("algorithm.target", algorithm.target, algorithm.options, inner, parts)
    if not isinstance(made, Algorithm):
        raise ConfigError(
            f"algorithm.target={algorithm.target}: this made a {type(made).__name__}; it must be a metalearn.Algorithm"
        )
    return made


def build_custom_rule(settings: InnerConfig) -> UpdateRule:
    """Return the update rule that ``inner.optimizer_target`` makes of its options.

    Raises:
        ConfigError: if it lacks a method of one.
    """
    target = settings.optimizer_target
    assert target is not None, "validation requires it"
    rule = call_target("inner.optimizer_target", target, settings.optimizer_options)
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

    Raises:
        ConfigError: if it returns anything else, or the task does not fit.
    """
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
    return samplers


class ClassSampler(EpisodeSampler):
    """A sampler from examples by class of any shape, of uint8 or floating point."""

    def _check_images(self) -> None:
        dims, form = (3, "[classes, examples, ...]") if self.counts is None else (2, "[examples, ...] for each class")
        x = self.images
        if x.dim() < dims or not (x.dtype == torch.uint8 or x.is_floating_point()):
            raise ValueError(f"examples must be uint8 or floating point {form}, got {x.dtype} {tuple(x.shape)}")


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
        episodes = self.source.tasks(first, count)
        if not isinstance(episodes, Episodes):
            raise TypeError(f"tasks({first}, {count}) returned a {type(episodes).__name__}; it must be Episodes")
        if episodes.tasks != count:
            raise ValueError(f"tasks({first}, {count}) returned {episodes.tasks} tasks; it must be {count}")
        moved = (tensor.to(self.device) for tensor in _tensors(episodes))
        return Episodes(*(tensor.float() if tensor.is_floating_point() else tensor for tensor in moved))


def _tensors(episodes: Episodes) -> list[Tensor]:
    return [getattr(episodes, f.name) for f in fields(episodes)]


def _by_class(part: Any) -> tuple[Tensor, list[int] | None]:
    """Return examples by class in the form of ``EpisodeSampler``: a tensor, and the sizes of classes if they differ."""
    if not isinstance(part, (list, tuple)):
        return torch.as_tensor(part), None
    classes = [torch.as_tensor(each) for each in part]
    return torch.cat(classes), [len(each) for each in classes]


def _check_tasks(sampler: TaskSampler, ways: int, *, is_regression: bool) -> None:
    """Check the first two tasks.

    Raises:
        ValueError: if they differ from one draw to the next, or their targets are not of the kind that they should be.
    """
    episodes = sampler.tasks(0, 2)
    if any(not torch.equal(a, b) for a, b in zip(_tensors(episodes), _tensors(sampler.tasks(0, 2)), strict=True)):
        raise ValueError("tasks(0, 2) differ from one call to the next; make them a function of seed and number alone")
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
