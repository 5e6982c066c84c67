"""The image of a task shows every example, and which predictions are wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from metalearn.training.tracking.images import _CORRECT_COLOUR, _WRONG_COLOUR, draw_tasks
from tests.factories import image_episodes


def count(picture: np.ndarray, colour: tuple[int, int, int]) -> int:  # type: ignore[type-arg]
    return int((picture == np.array(colour)).all(axis=-1).sum())


def test_frames_show_wrong_predictions() -> None:
    episodes = image_episodes(tasks=2, ways=3, queries=2)
    right = torch.nn.functional.one_hot(episodes.query_y, 3).double()
    all_right = draw_tasks(episodes, right)
    assert all_right.dtype == np.uint8
    assert all_right.shape[2] == 3
    assert count(all_right, _WRONG_COLOUR) == 0
    one_wrong = right.clone()
    one_wrong[1, 0] = torch.tensor([0.0, 1.0, 0.0])
    picture = draw_tasks(episodes, one_wrong)
    half = picture.shape[1] // 2
    assert count(picture[:, :half], _WRONG_COLOUR) == 0
    assert count(picture[:, half:], _WRONG_COLOUR) > 100
    frame = count(all_right, _CORRECT_COLOUR) // 12
    assert count(picture, _CORRECT_COLOUR) == 11 * frame


def test_draw_tasks_limits_rows_and_queries() -> None:
    episodes = image_episodes(tasks=1, ways=30, queries=10)
    support_x, query_x = (x.expand(-1, -1, 3, -1, -1) for x in (episodes.support_x, episodes.query_x))
    rgb = dataclasses.replace(episodes, support_x=support_x, query_x=query_x)
    picture = draw_tasks(rgb, torch.zeros(1, 300, 30))
    assert picture.shape[0] < 1500
    assert picture.shape[1] < 800


def test_tasks_are_arranged_so_that_texts_stay_legible() -> None:
    narrow, wide = image_episodes(tasks=4, ways=3, queries=1), image_episodes(tasks=4, ways=3, queries=8)
    in_pairs, below = (draw_tasks(e, torch.zeros(*e.query_y.shape, 3)).shape for e in (narrow, wide))
    assert in_pairs[1] < 550, "two in a row: TensorBoard shrinks them to 350 pixels"
    assert below[0] > 2 * in_pairs[0] * 0.9, "one above the other"
    assert below[1] < 900
