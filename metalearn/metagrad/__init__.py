"""The meta-gradient d L_query(adapt(theta)) / d theta, by engines that differ in price and agree in value."""

from metalearn.metagrad.meta_gradient import ENGINES, Engine, meta_gradient

__all__ = ["ENGINES", "Engine", "meta_gradient"]
