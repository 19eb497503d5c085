"""What the trainer costs, measured against a plain loop and against the machine's own limit."""
