"""What `razor-jax doctor` examines: the devices, the kernels that run on them, and how fast they attend."""

from .examination import Checked, Choice, Report, examine
from .speed import Speed, Speeds

__all__ = ["Checked", "Choice", "Report", "Speed", "Speeds", "examine"]
