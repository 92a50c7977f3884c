"""Where in a kernel's source the banks of shared memory had to wait for each other."""

from __future__ import annotations

import subprocess
from collections import defaultdict
from types import ModuleType

WRAPPERS = ("device.cuh", "tensor_core.cuh")


def by_place(module: ModuleType) -> dict[str, dict[str, int]]:
    """ "file:line" -> accesses and conflicts, of the launches since ``module.count_banks(True)``."""
    counted = module.banks()
    found: dict[str, dict[str, int]] = defaultdict(lambda: {"accesses": 0, "conflicts": 0})
    for address, banks in counted.items():
        # what was inlined where: the innermost first, "function", "file:line" each
        command = ["addr2line", "-i", "-e", module.__file__, hex(address)]
        frames = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
        places = [frame.split(" ")[0].rpartition("/")[2] for frame in frames if frame]
        place = next(place for place in places if place.partition(":")[0] not in WRAPPERS)
        for what, number in banks.items():
            found[place][what] += number
    return dict(found)


def conflicts(module: ModuleType) -> dict[str, int]:
    """ "file:line" -> conflicts, where there are any; raises if nothing was counted at all."""
    counted = by_place(module)
    if not counted:
        raise ValueError("no access to shared memory was counted")
    return {place: banks["conflicts"] for place, banks in counted.items() if banks["conflicts"]}
