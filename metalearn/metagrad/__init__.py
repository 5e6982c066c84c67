"""The meta-gradient d L_query(adapt(theta)) / d theta, by engines that agree in value and differ in cost."""

from metalearn.metagrad.meta_gradient import ENGINES, Engine, meta_gradient

__all__ = ["ENGINES", "Engine", "meta_gradient"]
