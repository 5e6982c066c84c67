"""All faults, in the order of the README's table."""

from __future__ import annotations

from tests.faults.archives import ARCHIVES
from tests.faults.bad_configs import BAD_CONFIGS
from tests.faults.damage import CUT, FLIPPED, PICKLES
from tests.faults.endurance import COST, MEMORY
from tests.faults.folders import DISKS, EVENT_FILE, OTHER_CONFIG, TOGETHER
from tests.faults.fuzz import FUZZED
from tests.faults.kills import KILLED, KILLED_SAVING, SIGNALS
from tests.faults.numbers import NONFINITE
from tests.faults.ranks import RANKS
from tests.faults.suite import Row

ROWS: list[Row] = [
    KILLED,
    KILLED_SAVING,
    FLIPPED,
    CUT,
    PICKLES,
    SIGNALS,
    NONFINITE,
    DISKS,
    ARCHIVES,
    BAD_CONFIGS,
    OTHER_CONFIG,
    TOGETHER,
    EVENT_FILE,
    RANKS,
    *FUZZED,
    MEMORY,
    COST,
]
