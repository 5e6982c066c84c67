"""What of a configuration does not fit its algorithm; found before anything is loaded, without torch."""

from __future__ import annotations

from metalearn.config.schema import MAMLPPConfig, MLPConfig, SinusoidConfig, TrainConfig

_BY_BACKENDS = {"learn2learn": ("maml", "anil", "meta_sgd"), "higher": ("maml",), "torchopt": ("maml",)}


def algorithm_faults(config: TrainConfig) -> list[str]:
    """Every key at fault, with what to do."""
    return [*_rule_faults(config), *_own_faults(config), *_backend_faults(config)]


def _rule_faults(config: TrainConfig) -> list[str]:
    inner, faults = config.inner, []
    if len(inner.betas) != 2 or not all(beta < 1 for beta in inner.betas):
        faults.append(f"inner.betas={inner.betas}: must be two numbers below 1, of Adam's mean and of its square")
    if inner.rule != "sgd" and inner.steps == inner.eval_steps == 0:
        faults.append(f"inner.rule={inner.rule} with inner.steps=0 and inner.eval_steps=0: no step is taken by it")
    if inner.momentum >= 1:
        faults.append(f"inner.momentum={inner.momentum:g}: must be below 1")
    return faults


def _own_faults(config: TrainConfig) -> list[str]:
    name, context, faults = config.algorithm.name, getattr(config.model, "context", 0), []
    if name == "cavia" and not context:
        faults.append(
            f"algorithm=cavia with model={config.model.name}: it adapts context parameters, of which the model has "
            "none; take model=conv4 or mlp with model.context=100"
        )
    if name != "cavia" and context:
        faults.append(f"model.context={context}: only algorithm=cavia adapts context parameters; leave it at 0")
    if name == "protonet" and isinstance(config.data, SinusoidConfig):
        faults.append("algorithm=protonet with data=sinusoid: prototypes are of classes, and numbers have none")
    if name in ("reptile", "imaml") and config.inner.steps == 0:
        faults.append(f"inner.steps=0 with algorithm={name}: it learns from where the steps lead; take 1 or more")
    if name == "reptile" and config.inner.second_order:
        faults.append("inner.second_order=true with algorithm=reptile: it has no second order; leave it at false")
    for key, value, only in (
        ("inner.engine", config.inner.engine, "unroll"),
        ("inner.snapshot_every", config.inner.snapshot_every, 1),
    ):
        if name in ("reptile", "imaml") and value != only:
            faults.append(f"{key}={value} with algorithm={name}: it has a gradient of its own; leave it at {only}")
    normless = isinstance(config.model, MLPConfig) and not (config.model.batch_norm and config.model.context == 0)
    for key in ("per_step_affine", "per_step_statistics"):
        if normless and getattr(config.algorithm, key, False):
            faults.append(
                f"algorithm.{key}=true with model.batch_norm=false: the model has no BatchNorm; set it to false"
            )
    is_annealed = isinstance(config.algorithm, MAMLPPConfig) and (
        config.algorithm.multi_step_share > 0 or config.algorithm.first_order_share > 0
    )
    if config.run.cuda_graph and (is_annealed or name == "imaml"):
        faults.append(
            f"run.cuda_graph=true with algorithm={name}: a graph repeats one computation, and this one "
            + (
                "stops where its residual is small"
                if name == "imaml"
                else "changes as the training goes on (algorithm.multi_step_share=0 algorithm.first_order_share=0 "
                "keep it)"
            )
        )
    return faults


def _backend_faults(config: TrainConfig) -> list[str]:
    backend, faults = config.algorithm.backend, []
    if backend == "metalearn":
        return []
    if config.algorithm.name not in _BY_BACKENDS[backend]:
        faults.append(
            f"algorithm.backend={backend} with algorithm={config.algorithm.name}: {backend} is trained with for "
            f"comparison, on {', '.join(_BY_BACKENDS[backend])}; take algorithm.backend=metalearn"
        )
    wrong: dict[str, tuple[object, object]] = {
        "inner.clip_norm": (config.inner.clip_norm, None),
        "run.cuda_graph": (config.run.cuda_graph, False),
        "run.precision": (config.run.precision, "float32"),
        "inner.engine": (config.inner.engine, "unroll"),
        "inner.task_chunk": (config.inner.task_chunk, None),
    }
    if backend == "learn2learn":
        wrong |= {"inner.rule": (config.inner.rule, "sgd"), "inner.weight_decay": (config.inner.weight_decay, 0)}
    for key, (value, only) in wrong.items():
        if value != only:
            shown = "null" if only is None else str(only).lower()
            faults.append(
                f"{key}={value} with algorithm.backend={backend}: {backend} has no such thing; leave it at {shown}"
            )
    return faults
