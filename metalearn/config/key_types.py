"""Types of keys: what values they may have. The words for messages are made from them in ``messages.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from metalearn.config.target import check_target

LARGEST_SEED = 2**63 - 1
"""The largest int64."""

LATE = "late"
"""Mark of a key that the files of older runs lack; those were trained as its default says."""

Bool = StrictBool
Text = Annotated[StrictStr, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
"""Text; a name of digits, such as a folder's, is an integer in YAML."""
Int = Annotated[
    StrictInt, BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
]
"""A whole number, which may be written as 1e3."""
Seed = Annotated[Int, Field(ge=0, le=LARGEST_SEED)]
Count = Annotated[Int, Field(ge=1)]
Steps = Annotated[Int, Field(ge=0)]
Episodes = Annotated[Int, Field(ge=2)]
Positive = Annotated[StrictFloat, Field(gt=0)]
LearningRate = Annotated[StrictFloat, Field(gt=0, le=1e30)]
"""Not so large that Adam's corrections for its first steps take it out of float32."""
NonNegative = Annotated[StrictFloat, Field(ge=0)]
Share = Annotated[StrictFloat, Field(ge=0, le=1)]
Momentum = Annotated[StrictFloat, Field(ge=0, lt=1)]
Device = Annotated[
    Text, Field(pattern=r"^(auto|cpu|cuda(:(0|[1-9][0-9]*))?)$", examples=["auto", "cpu", "cuda", "cuda:N"])
]
OnError = Literal["stop", "skip"]
BatchNormStatistics = Literal["task", "frozen"] | None
Target = Annotated[Text, Field(examples=["MODULE:NAME"]), AfterValidator(check_target)]
Options = dict[Annotated[Text, Field(pattern=r"^[^\W\d]\w*$")], Any]


@dataclass(frozen=True)
class Section:
    """A section of a configuration: no unknown key, no NaN, no infinity."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)
