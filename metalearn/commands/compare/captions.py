"""What each plot shows and how to read it: its title, and the text below it in the report."""

from __future__ import annotations

from typing import NamedTuple

INTERVAL = (
    "95% intervals are over seeds and tasks: Student's t over the seeds' means, as each seed draws its own parameters "
    "and tasks; never narrower than over the test tasks alone, which is all that a single seed has."
)
BAND = "The line is the mean over seeds, the band reaches from the lowest to the highest seed."


class Caption(NamedTuple):
    """A plot in words."""

    title: str
    text: str


CAPTIONS = {
    "accuracy": Caption(
        "Test accuracy of each variant",
        "Filled: transductive, the queries of a task are predicted as one batch. Hollow: non-transductive, each query "
        f"is predicted without the others. Bars are 95% intervals, faint dots are seeds. {INTERVAL}",
    ),
    "difference": Caption(
        "Difference in test accuracy on the same seeds",
        "Right of zero the variant that is named first is ahead. The bar is the 95% interval of the mean, faint dots "
        f"are seeds; a bar that crosses zero does not show which of the two is better. {INTERVAL}",
    ),
    "accuracy_per_step": Caption(
        "Test accuracy after each inner step",
        "Left from step 0, the model before it has seen the task; right from step 1, on another "
        "scale. Points of one step are drawn side by side, so that their bars, 95% intervals, do not hide one another. "
        f"{INTERVAL}",
    ),
    "validation": Caption(
        "Validation accuracy during training",
        f"{BAND} Left against meta-steps, right against the time spent in them. The thin horizontal line is the "
        "accuracy that the time to target is about. The vertical axis may begin above the start of training, so that "
        "its end can be read.",
    ),
    "per_run_cost": Caption(
        "Time and memory of a meta-step, as the runs measured them",
        "Time is the median over seeds of a run's median; memory is the highest peak of the variant's runs.",
    ),
    "cost": Caption(
        "Memory and time of one meta-gradient against the inner steps",
        "Both axes are logarithmic. First order, and second order by each engine, on all tasks at once, measured in "
        "turns. A line ends where the peak went over the limit.",
    ),
    "cosine": Caption(
        "Agreement of the first- with the second-order meta-gradient",
        "Cosine of the angle between both on the same tasks: at 1 they point the same way, at 0 they are unrelated. "
        f"{BAND}",
    ),
}
