"""Nodes and paths of graphs that can be counted by hand."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from metalearn.lessons.graph_drawing import depth, draw, inputs, is_leaf, name_of, nodes, paths
from metalearn.lessons.lesson import leaf


def names(output: Tensor) -> list[str]:
    return [name_of(node) for node in nodes(output)]


def test_tensor_without_graph_has_no_nodes() -> None:
    x = leaf(3.0)
    for constant in (torch.ones(()), (x * x).detach()):
        assert (nodes(constant), paths(constant), depth(constant)) == ([], 0, 0)


def test_nodes_depth_and_paths() -> None:
    # x y + sin(x y): the product is shared, so four operations' nodes less none twice, and two leaves.
    x, y = leaf(2.0), leaf(3.0)
    product = x * y
    output = product + torch.sin(product)
    assert sorted(names(output)) == ["AccumulateGrad", "AccumulateGrad", "AddBackward0", "MulBackward0", "SinBackward0"]
    assert depth(output) == 4  # add, sin, mul, leaf
    assert paths(output) == 4  # two ways to the product, and two leaves from there
    assert sum(is_leaf(node) for node in nodes(output)) == 2


def test_nodes_are_in_topological_order() -> None:
    x = leaf(2.0)
    y = x * x
    found = nodes(y * torch.exp(y) + x)
    for i, node in enumerate(found):
        assert all(found.index(child) > i for child in inputs(node))


def test_constants_have_no_node() -> None:
    x = leaf(2.0)
    assert names(torch.ones(()) * x) == ["MulBackward0", "AccumulateGrad"]


def test_nodes_without_a_subgraph() -> None:
    x, y = leaf(2.0), leaf(3.0)
    left, right = torch.sin(x), torch.exp(y)
    output = left + right
    assert right.grad_fn is not None
    rest = nodes(output, without=[right.grad_fn])
    assert [name_of(node) for node in rest] == ["AddBackward0", "SinBackward0", "AccumulateGrad"]


def test_graph_deeper_than_the_stack() -> None:
    x = leaf(1.0)
    y = x
    for _ in range(5000):
        y = y + 1
    assert (len(nodes(y)), paths(y), depth(y)) == (5001, 1, 5001)


def test_draw_places_nodes_apart() -> None:
    x = leaf(2.0)
    y = torch.exp(x) * torch.sin(x)
    axes = Figure().add_subplot()
    (root, *_), added = nodes(y), {node for node in nodes(y) if name_of(node) == "SinBackward0"}
    draw(axes, y, title="e^x sin x", notes={root: "the product"}, added=added)
    boxes = [text for text in axes.texts if text.get_text().endswith(("Backward0", "AccumulateGrad"))]
    assert sorted(box.get_text() for box in boxes) == sorted(names(y))
    assert len({box.get_position() for box in boxes}) == len(boxes)
    assert axes.get_title() == "e^x sin x"
    assert "the product" in [text.get_text() for text in axes.texts]
