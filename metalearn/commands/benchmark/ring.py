"""What an all-reduce around a ring of GPUs takes of a meta-step: an estimate from assumed links."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Interconnect:
    """What joins GPUs; both figures are assumptions.

    Args:
        name: in words.
        gpus: N, how many are joined.
        bandwidth: bytes a second that a GPU sends.
        latency: seconds of one step of the ring.
    """

    name: str
    gpus: int
    bandwidth: float
    latency: float


LINKS = (
    Interconnect(
        "NVLink, 8 GPUs of a node", 8, 300e9, 3e-6
    ),  # 450 GB/s in one direction is what an H100's has nominally
    Interconnect("InfiniBand, 64 GPUs", 64, 25e9, 10e-6),  # half of 400 Gbit/s for each GPU
)


def all_reduce_s(size: float, link: Interconnect) -> float:
    """Seconds of an all-reduce around a ring: every GPU sends and receives 2 (N - 1) parts of 1/N.

        t_allreduce(N) = 2 (N - 1) / N bytes / bandwidth + 2 (N - 1) latency

    (Thakur, Rabenseifner & Gropp 2005, "Optimization of collective communication operations in MPICH", section 4.5.)
    For small gradients it is an upper bound: trees take 2 log2(N) steps.

    Args:
        size: bytes of the meta-gradient.
        link: what joins the GPUs.
    """
    n = link.gpus
    return 2 * (n - 1) / n * size / link.bandwidth + 2 * (n - 1) * link.latency


def efficiency(compute_s: float, size: float, link: Interconnect) -> float:
    """Share of a meta-step in which N GPUs compute, each ``compute_s`` seconds on tasks of its own.

    efficiency(N) = t_compute / (t_compute + t_allreduce(N))
    """
    return compute_s / (compute_s + all_reduce_s(size, link))


def tasks_per_second(at: float, tasks: int, size: float, link: Interconnect) -> float:
    """Where the all-reduce starts to matter: tasks a second and GPU beyond which the efficiency is below ``at``.

        efficiency = at    where    t_compute = at / (1 - at) t_allreduce(N)
        tasks / t_compute = tasks (1 - at) / (at t_allreduce(N))

    Args:
        at: an efficiency between 0 and 1.
        tasks: of a meta-step on each GPU.
        size: bytes of the meta-gradient.
        link: what joins the GPUs.
    """
    return tasks * (1 - at) / (at * all_reduce_s(size, link))
