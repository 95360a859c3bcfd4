"""Exit schedules: how many blocks run at each noise level. No torch in here.

Source: Moon et al., "A Simple Early Exiting Framework for Accelerated Sampling in Diffusion
Models", ICML 2024, section 3.2 and Table 5.
"""

from asesearch.schedule.checks import PUBLISHED
from asesearch.schedule.elastic import ElasticDepths
from asesearch.schedule.exit_schedule import SLUG_BYTES, ExitSchedule
from asesearch.schedule.reading import read_schedule, schedule_from_text

__all__ = [
    "PUBLISHED",
    "SLUG_BYTES",
    "ElasticDepths",
    "ExitSchedule",
    "read_schedule",
    "schedule_from_text",
]
