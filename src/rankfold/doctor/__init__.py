"""Which engine loads an adapter, which refuses or mis-scales it, why, and what to do.

from rankfold.doctor import diagnose
print(diagnose("adapter").to_json())
"""

from __future__ import annotations

from rankfold.doctor.diagnosis import Diagnosis, diagnose
from rankfold.doctor.findings import Finding, Status

__all__ = ["Diagnosis", "Finding", "Status", "diagnose"]
