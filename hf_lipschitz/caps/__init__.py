"""Caps: functions from a weight to the nearest-in-spirit weight whose norm is at most a given value."""
