"""Configurations of ``metalearn verify``, a short run of it, and engines that are wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from metalearn import Episodes, InnerLoop, MetaGradient, Params
from metalearn.commands.verify import run as verification
from metalearn.commands.verify.cases import MODEL_CASES
from metalearn.commands.verify.run import run_verification
from metalearn.config.commands_schema import VerifyConfig
from metalearn.config.compose import compose, to_dataclass
from metalearn.core.types import Forward, Loss
from metalearn.metagrad import Engine
from metalearn.metagrad.unroll import unroll

MLP_ONLY = tuple(model for model in MODEL_CASES if model.name == "mlp")
CPU = torch.device("cpu")


def config_with(*overrides: str) -> VerifyConfig:
    return to_dataclass(compose("verify", ["run.device=cpu", *overrides]), VerifyConfig)


def verify_mlp(output_dir: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[bool, dict[str, Any]]:
    monkeypatch.setattr(verification, "MODEL_CASES", MLP_ONLY)
    output_dir.mkdir(exist_ok=True)
    right = run_verification(config_with("verify.steps=[1]", *overrides), output_dir)
    report: dict[str, Any] = json.loads((output_dir / "verify.json").read_text())
    assert report["right"] == right
    return right, report


def scaled(factor: float) -> Engine:
    def engine(forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, loss: Loss) -> MetaGradient:
        result = unroll(forward, params, episodes, inner, loss)
        return dataclasses.replace(result, grads={name: factor * g for name, g in result.grads.items()})

    return engine


def first_order(forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, loss: Loss) -> MetaGradient:
    return unroll(forward, params, episodes, dataclasses.replace(inner, second_order=False), loss)
