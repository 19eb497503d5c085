"""The cost of the trainer, compared with a plain loop and with the machine's limit."""
