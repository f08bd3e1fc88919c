"""All targets, by name."""

from __future__ import annotations

from fuzz.data_targets import DATA_TARGETS
from fuzz.file_targets import FILE_TARGETS
from fuzz.port_targets import PORT_TARGETS
from fuzz.wire_targets import WIRE_TARGETS

TARGETS = (*WIRE_TARGETS, *DATA_TARGETS, *FILE_TARGETS, *PORT_TARGETS)
