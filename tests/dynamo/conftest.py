"""Dynamo's own trace log is not captured: it takes longer to format than the graphs to compile."""

from __future__ import annotations

import logging

for _name in ("torch.__trace", "torch"):
    logging.getLogger(_name).propagate = False
