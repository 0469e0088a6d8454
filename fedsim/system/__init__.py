"""Devices, links, availability and a virtual clock: how long a run would take, and who would not answer in time."""

from fedsim.system.clock import Clock
from fedsim.system.devices import Fleet
from fedsim.system.schedule import Schedule
from fedsim.system.start import start_clock
from fedsim.system.system import System

__all__ = ["Clock", "Fleet", "Schedule", "System", "start_clock"]
