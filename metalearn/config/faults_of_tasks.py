"""What of a configuration's tasks does not fit its data; found before anything is loaded, without torch."""

from __future__ import annotations

from metalearn.config.schema import (
    Conv4Config,
    ImagesConfig,
    MLPConfig,
    ModelConfig,
    ResNet12Config,
    SinusoidConfig,
    TrainConfig,
)
from metalearn.core.errors import DataError
from metalearn.data.image_folder import check_split_sizes, list_splits
from metalearn.data.metadata import DRAWINGS_PER_CLASS


def task_faults(config: TrainConfig) -> list[str]:
    """What does not fit the data set; its size is known without loading it."""
    if isinstance(config.data, ImagesConfig):
        return _image_faults(config, config.data)
    if isinstance(config.data, SinusoidConfig):
        return _sinusoid_faults(config)
    faults = []
    task, queries = config.task, max(config.task.queries, config.eval.queries)
    classes, where = config.data.smallest_split()
    if task.ways > classes:
        faults.append(f"task.ways={task.ways}: at most {classes}, the smallest part {where}")
    if (each := task.shots + queries) > DRAWINGS_PER_CLASS:
        name = "task.queries" if queries == task.queries else "eval.queries"
        faults.append(
            f"task.shots={task.shots} and {name}={queries}: together {each}, "
            f"and a class has {DRAWINGS_PER_CLASS} drawings; "
            f"choose at most {DRAWINGS_PER_CLASS} in all (unless it is set, eval.queries is task.shots)"
        )
    return faults


def _image_faults(config: TrainConfig, data: ImagesConfig) -> list[str]:
    """What does not fit a folder of images; it is listed, and no image is read."""
    faults = []
    if data.channels == 2:
        faults.append("data.channels=2: must be 1 (grey) or 3 (colour)")
    if len(data.fractions) != 3 or abs(sum(data.fractions) - 1) > 1e-6:
        faults.append(
            f"data.fractions={data.fractions}: must be three shares that add up to 1, of classes for training, "
            "validation and test"
        )
    if data.size < (least := _least_size(config.model)):
        faults.append(
            f"data.size={data.size}: model={config.model.name} halves images {least.bit_length() - 1} times and needs "
            f"at least {least} pixels a side"
        )
    if not faults:
        try:
            splits = list_splits(data.root, fractions=data.fractions, seed=data.seed)
            sizes = {split: [(one.name, len(one.files)) for one in classes] for split, classes in splits.items()}
            check_split_sizes(sizes, data.root, ways=config.task.ways, needed=config.images_per_class())
        except DataError as error:
            faults.append(str(error))
    return faults


def _least_size(model: ModelConfig) -> int:
    """Pixels a side, below which a network has none left after its pooling."""
    if isinstance(model, ResNet12Config):
        return int(2 ** len(model.widths))
    return 16 if isinstance(model, Conv4Config) and model.pool == "max" else 1


def _sinusoid_faults(config: TrainConfig) -> list[str]:
    if isinstance(config.model, MLPConfig):
        return []
    return [f"model={config.model.name}: data=sinusoid has numbers for inputs, and no images; take model=mlp"]
