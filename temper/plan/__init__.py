"""Estimates of a training run before anything is loaded: memory, communication, FLOPs and time."""

from temper.plan.cost import Cost, Pass, Setup
from temper.plan.memory import Memory
from temper.plan.report import Device, Plan, make_plan

__all__ = ["Cost", "Device", "Memory", "Pass", "Plan", "Setup", "make_plan"]
