"""Bytes on disk: durable writes, safe reading, and the schema of a checkpoint file."""
