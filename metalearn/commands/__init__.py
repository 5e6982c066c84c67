"""The commands of ``metalearn``; ``train`` and ``evaluate`` run what is in ``training/``."""
