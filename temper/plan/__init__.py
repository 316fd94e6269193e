"""What a run would need, before anything is loaded: memory by part, communication, operations,
time.
"""

from temper.plan.cost import Cost, Pass, Setup
from temper.plan.memory import Memory
from temper.plan.report import Device, Plan, make_plan

__all__ = ["Cost", "Device", "Memory", "Pass", "Plan", "Setup", "make_plan"]
