"""Estimates of what a run needs and how long its steps take, and a layout for the devices that there are. Light."""
