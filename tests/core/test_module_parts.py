"""Which layer is the head: torchvision's models, tied weights, wrappers, and unusual orders of layers."""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

import pytest
import torch
import torchvision
from torch import Tensor, nn

from metalearn import Episodes, InnerLoop, Params, functionalize, module_parts
from metalearn.algorithms import anil, protonet
from metalearn.inner import PrototypeHead

TASKS = Episodes(torch.randn(2, 6, 5), torch.arange(3).repeat(2, 2), torch.randn(2, 3, 5), torch.arange(3).repeat(2, 1))

HEADS = {
    "fc": "googlenet inception_v3 resnet18 resnext50_32x4d shufflenet_v2_x0_5 wide_resnet50_2",
    "head": "swin_t swin_v2_t",
    "heads.head": "vit_b_16",
    "classifier": "densenet121",
    "classifier.1": "efficientnet_b0 efficientnet_v2_s mnasnet0_5 mobilenet_v2",
    "classifier.2": "convnext_tiny",
    "classifier.3": "mobilenet_v3_small",
    "classifier.6": "alexnet vgg11_bn",
}


@pytest.mark.filterwarnings("ignore")  # of initialisations to come
@pytest.mark.parametrize(("name", "head"), [(name, head) for head, names in HEADS.items() for name in names.split()])
def test_finds_heads_of_torchvision_models(name: str, head: str) -> None:
    with torch.device("meta"):
        module = torchvision.models.get_model(name, weights=None)
    assert module_parts(module).head == (f"{head}.weight", f"{head}.bias")


def test_head_is_empty_if_not_linear_and_may_lack_a_bias() -> None:
    with torch.device("meta"):
        assert module_parts(torchvision.models.squeezenet1_1()).head == ()
        assert module_parts(torchvision.models.maxvit_t()).head == ("classifier.5.weight",)
    assert module_parts(torchvision.models.regnet_y_400mf()).head == ("fc.weight", "fc.bias")
    excited = nn.ModuleDict({"se": nn.ModuleDict({"fc": nn.Linear(4, 4)}), "classifier": nn.Conv2d(4, 3, 1)})
    assert module_parts(excited).head == (), "an inner layer is no head where the head is a convolution"


def inner_fc() -> nn.Module:
    squeezed = nn.Sequential(OrderedDict(fc=nn.Linear(8, 8), gate=nn.Sigmoid()))
    return nn.Sequential(OrderedDict(stem=nn.Linear(5, 8), tanh=nn.Tanh(), se=squeezed, output=nn.Linear(8, 3)))


class HeadFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out, self.stem, self.deep = nn.Linear(8, 3), nn.Linear(5, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.deep(torch.tanh(self.stem(x)))))


def tied_head(*, head_first: bool = False) -> nn.Module:
    layers = {"embed": nn.Linear(5, 5, bias=False), "head": nn.Linear(5, 5)}
    layers["head"].weight = layers["embed"].weight
    return nn.Sequential(OrderedDict(sorted(layers.items(), reverse=head_first)))


def test_head_names_count_only_at_top_level() -> None:
    assert module_parts(inner_fc()).head == ("output.weight", "output.bias")


@pytest.mark.parametrize(
    "wrap",
    [
        torch.optim.swa_utils.AveragedModel,
        lambda m: nn.ModuleDict({"net": m}),
        lambda m: cast(nn.Module, torch.compile(m, backend="eager")),
        lambda m: nn.ModuleDict({"outer": nn.ModuleDict({"net": m})}),
    ],
)
def test_finds_head_inside_wrappers(wrap: type[nn.Module]) -> None:
    out_of_order = nn.ModuleDict({"head": nn.Linear(8, 3), "body": nn.Linear(4, 8)})
    wrapped = wrap(out_of_order)
    assert module_parts(wrapped).head == tuple(name for name, _ in wrapped.named_parameters() if "head" in name)


def test_ambiguous_head_raises() -> None:
    listed = r"head=\.\.\.\), out of out \(8 to 3\), stem \(5 to 8\), deep \(8 to 8\)\."
    with pytest.raises(ValueError, match=f"which linear layer of HeadFirst is its head.*{listed}"):
        module_parts(HeadFirst())
    assert module_parts(HeadFirst(), head="out").head == ("out.weight", "out.bias")
    many = nn.ModuleDict({"out": nn.Linear(9, 3)} | {f"l{i}": nn.Linear(9, 9) for i in range(12)})
    with pytest.raises(ValueError, match=r"l8 \(9 to 9\) and 3 more\.$"):
        module_parts(many)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Linear(1, 40), nn.Linear(40, 40), nn.Linear(40, 1)],  # a regression whose outputs are like its inputs
        [nn.Linear(5, 8), nn.Linear(6, 8), nn.Linear(16, 3)],  # two towers
        [nn.Linear(4, 4), nn.Linear(128, 32), nn.Linear(32, 3)],  # after convolutions
    ],
)
def test_usual_layer_orders_are_not_ambiguous(layers: list[nn.Module]) -> None:
    assert module_parts(nn.ModuleList(layers)).head == ("2.weight", "2.bias")


def test_tied_head_weight_has_its_first_name() -> None:
    parts = module_parts(tied_head())
    assert parts.head == ("embed.weight", "head.bias")
    assert parts.tied == {"embed.weight"}
    assert parts.all_params == functionalize(tied_head())[1].keys()
    assert anil(InnerLoop(lr=0.1, steps=1), parts).inner.adapted_params == frozenset(parts.head)
    assert module_parts(tied_head(head_first=True)).tied == {"head.weight"}
    assert module_parts(inner_fc()).tied == frozenset()


def test_head_under_two_names_has_the_first() -> None:
    module = inner_fc()
    module.readout = module.output
    assert module_parts(module, head="readout").head == ("output.weight", "output.bias")


def test_weight_normalised_head_includes_all_its_parameters() -> None:
    module = nn.Sequential(nn.Linear(5, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 3)))
    assert set(module_parts(module).head) == {name for name, _ in module.named_parameters() if name.startswith("1.")}
    with pytest.raises(ValueError, match=r"needs a weight and a bias.*and has 1\.bias, 1\.param"):
        protonet(InnerLoop(lr=0.1, steps=0), module_parts(module))


@pytest.mark.parametrize("head_first", [False, True])
def test_protonet_raises_on_tied_head(head_first: bool) -> None:
    with pytest.raises(ValueError, match=r"protonet: the head shares .*weight with another layer.*head="):
        protonet(InnerLoop(lr=0.1, steps=0), module_parts(tied_head(head_first=head_first)))


@pytest.mark.parametrize(
    ("module", "head"), [(HeadFirst(), "stem"), (HeadFirst(), "deep"), (inner_fc(), "se.fc"), (inner_fc(), "stem")]
)
def test_protonet_raises_when_layer_is_not_the_head(module: nn.Module, head: str) -> None:
    algorithm = protonet(InnerLoop(lr=0.1, steps=0), module_parts(module, head=head))
    with pytest.raises(ValueError, match=rf"'{head}\.weight' does not belong to the model's head.*head="):
        algorithm.meta_gradient(*functionalize(module), TASKS)


def test_prototype_head_passes_on_shape_errors() -> None:
    forward, theta = functionalize(inner_fc())
    fast = {name: p.expand(2, *p.shape) for name, p in theta.items()}
    with pytest.raises(RuntimeError) as caught:
        PrototypeHead("output.weight", "output.bias")(forward, fast, TASKS.support_x[..., :4], TASKS.support_y)
    assert "head" not in str(caught.value)


def test_prototype_head_passes_on_out_of_memory() -> None:
    def forward(params: Params, x: Tensor) -> Tensor:
        if params["w"].shape == (5, 5):
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return x @ params["w"].T + params["b"]

    fast = {"w": torch.zeros(2, 3, 5), "b": torch.zeros(2, 3)}
    with pytest.raises(RuntimeError, match="not enough memory"):
        PrototypeHead("w", "b")(forward, fast, TASKS.support_x, TASKS.support_y)


def test_protonet_takes_a_head_declared_anywhere() -> None:
    for module, head in ((HeadFirst(), "out"), (inner_fc(), None)):
        algorithm = protonet(InnerLoop(lr=0.1, steps=0), module_parts(module, head=head))
        assert torch.isfinite(algorithm.meta_gradient(*functionalize(module), TASKS).loss)


@pytest.mark.parametrize(
    ("former", "new"), [("norms", "norm_params"), ("context", "context_params"), ("all", "all_params")]
)
def test_former_field_works_and_warns(former: str, new: str) -> None:
    parts = module_parts(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)))
    with pytest.warns(FutureWarning, match=f"ModuleParts.{former} is called {new} now"):
        assert getattr(parts, former) == getattr(parts, new)
