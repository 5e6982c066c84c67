"""Check the configuration of ``metalearn verify``. Imports torch only for a user's code."""

from __future__ import annotations

from metalearn.config.commands_schema import VerifyConfig
from metalearn.config.target import target_errors
from metalearn.core.errors import ConfigError


def check_verify(config: VerifyConfig) -> None:
    """Raise ``ConfigError``, listing every reason, if a user's own code cannot be found or is named in part."""
    errors = target_errors(config.targets())
    if config.model.options and config.model.target is None:
        errors.append(
            f"model.options={config.model.options}: give model.target=MODULE:NAME too, what makes the network"
        )
    given = [config.inner.optimizer == "custom", config.inner.optimizer_target is not None]
    if any([*given, config.inner.optimizer_options]) and not all(given):
        errors.append("inner.optimizer=custom and inner.optimizer_target=MODULE:NAME, what makes the rule: give both")
    if errors:
        raise ConfigError("\n".join(errors))
