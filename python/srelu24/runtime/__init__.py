"""From a call to a launch: which kernel, its arguments, its memory, the driver."""
