"""What callers call: functions, the torch.library operations under them, and what they would run."""
