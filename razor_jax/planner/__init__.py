"""Does a model fit on TPUs or GPUs that this machine lacks? Answers by arithmetic and by the TPU compiler."""

from .compiler import STEPS, Compiled, Step, compile_step
from .hardware import GIB, Hardware, find_hardware
from .known import CONFIGS, find_config
from .memory import Job, Memory, largest_batch, largest_context, memory
from .plan import Plan, Row, balanced, default_split, make_plan, why_not_by_head

__all__ = [
    "CONFIGS",
    "GIB",
    "STEPS",
    "Compiled",
    "Hardware",
    "Job",
    "Memory",
    "Plan",
    "Row",
    "Step",
    "balanced",
    "compile_step",
    "default_split",
    "find_config",
    "find_hardware",
    "largest_batch",
    "largest_context",
    "make_plan",
    "memory",
    "why_not_by_head",
]
