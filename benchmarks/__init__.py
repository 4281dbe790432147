"""Measurements: speed, memory and checkpoint size, each against what it is compared with."""
