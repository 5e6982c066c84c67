"""The event file of a comparison's report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metalearn.commands.compare.report import ReportLogger
from metalearn.training.tracking.event_files import EVENT_FILES

IMAGE = np.full((4, 6, 3), 200, dtype=np.uint8)


def test_report_replaces_an_earlier_one(tmp_path: Path) -> None:
    for text, names in (("| old |\n|---|", ["accuracy", "gone"]), ("| new |\n|---|", ["accuracy"])):
        with ReportLogger(tmp_path) as tensorboard:
            tensorboard.log_report(text, dict.fromkeys(names, IMAGE), runs=[{"inner.lr": 0.1}])
    (_,) = tmp_path.glob(EVENT_FILES)
    events = EventAccumulator(str(tmp_path)).Reload()
    (text_event,) = events.Tensors("report/text_summary")
    assert text_event.tensor_proto.string_val[0].decode() == "| new |\n|---|"
    assert events.Tags()["images"] == ["report/accuracy"]
    (image,) = events.Images("report/accuracy")
    assert (image.height, image.width) == (4, 6)
