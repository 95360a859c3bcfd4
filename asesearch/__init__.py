"""asesearch: find, prove and ship early-exit schedules for diffusion transformers.

The names below load their rooms on first use, so `import asesearch` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asesearch.config import load_study as load_study
    from asesearch.deployment.export import export as export
    from asesearch.deployment.reading import load_bundle as load_bundle
    from asesearch.deployment.verify import verify as verify
    from asesearch.finetuning import finetune as finetune
    from asesearch.point import Point as Point
    from asesearch.report import compare as compare
    from asesearch.report import write_report as write_report
    from asesearch.sampler import Sampler as Sampler
    from asesearch.sampling import sample as sample
    from asesearch.schedule import ExitSchedule as ExitSchedule
    from asesearch.search import search as run_search  # noqa: F401 (re-exported lazily)
    from asesearch.study import Study as Study
    from asesearch.study import pick as pick
    from asesearch.study import pick_nearest as pick_nearest

__version__ = "0.1.0"

_HOMES = {
    "ExitSchedule": ("asesearch.schedule", "ExitSchedule"),
    "Point": ("asesearch.point", "Point"),
    "Sampler": ("asesearch.sampler", "Sampler"),
    "Study": ("asesearch.study", "Study"),
    "compare": ("asesearch.report", "compare"),
    "export": ("asesearch.deployment.export", "export"),
    "finetune": ("asesearch.finetuning", "finetune"),
    "load_bundle": ("asesearch.deployment.reading", "load_bundle"),
    "load_study": ("asesearch.config", "load_study"),
    "pick": ("asesearch.study", "pick"),
    "pick_nearest": ("asesearch.study", "pick_nearest"),
    "run_search": ("asesearch.search", "search"),
    "sample": ("asesearch.sampling", "sample"),
    "verify": ("asesearch.deployment.verify", "verify"),
    "write_report": ("asesearch.report", "write_report"),
}


__all__ = [
    "ExitSchedule",
    "Point",
    "Sampler",
    "Study",
    "__version__",
    "compare",
    "export",
    "finetune",
    "load_bundle",
    "load_study",
    "pick",
    "pick_nearest",
    "run_search",
    "sample",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'asesearch' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
