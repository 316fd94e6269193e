"""What a run would need, before anything is loaded: memory by part, communication, operations, time."""

from temper.plan.cost import Cost, Pass
from temper.plan.memory import Memory
from temper.plan.report import Device, Plan, make_plan
from temper.plan.setup import Setup

__all__ = ["Cost", "Device", "Memory", "Pass", "Plan", "Setup", "make_plan"]
