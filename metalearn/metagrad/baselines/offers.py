"""What a peer does not offer, it refuses: a setting that it ignored would give numbers of another inner loop."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields

from metalearn.core.errors import ConfigError
from metalearn.inner import SGD, InnerLoop

SupportedSettings = Mapping[str, Sequence[object] | None]
"""Settings of ``InnerLoop`` that a peer computes, and which of their values: ``None`` for all, of rules the classes."""

_OF_ALL = frozenset({"lr", "steps", "second_order"})
_WITHOUT_MEANING = frozenset({"engine", "task_chunk", "snapshot_every"})  # how it is computed, and not what


class UnsupportedSettingError(ConfigError, ValueError):
    """An inner loop that another library does not compute."""

    def __init__(self, peer: str, wanted: str, offered: str) -> None:
        super().__init__(
            f"{peer} does not offer {wanted}; {offered}. Leave it out, or take metalearn's own engines "
            "(algorithm.backend=metalearn), which offer all."
        )


def check_supported(name: str, inner: InnerLoop, *, offers: SupportedSettings) -> None:
    """Refuse an inner loop of which a peer computes only a part.

    A setting that neither the peer nor this module knows is refused unless it has its default value.

    Args:
        name: the peer's.
        inner: the settings.
        offers: what the peer computes beside plain steps.

    Raises:
        NotOfferedError: naming the first setting, the peer and what it offers.
    """
    for setting in fields(InnerLoop):
        value = getattr(inner, setting.name)
        if setting.name not in _OF_ALL | _WITHOUT_MEANING and not _is_offered(setting, value, offers):
            raise UnsupportedSettingError(
                name, f"{setting.name}={reprlib.repr(value)}", f"it offers {_in_words(offers)}"
            )


def _is_offered(setting: Field[object], value: object, offers: SupportedSettings) -> bool:
    if setting.name == "rule":  # by class: one that derives from ours may do anything
        return type(value) in (offers.get("rule") or (SGD,))
    default = setting.default if setting.default_factory is MISSING else setting.default_factory()
    if value == default:
        return True
    values = offers.get(setting.name, ())
    return values is None or value in values


def _in_words(offers: SupportedSettings) -> str:
    beside = [
        setting
        if values is None
        else f"{setting}={' or '.join(v.__name__ if isinstance(v, type) else repr(v) for v in values)}"
        for setting, values in offers.items()
    ]
    return " and ".join(["plain gradient steps", *beside])
