"""Dynamo's trace log is off: pytest would format it all, which takes longer than the compiling."""

from __future__ import annotations

import logging

logging.getLogger("torch.__trace").disabled = True
