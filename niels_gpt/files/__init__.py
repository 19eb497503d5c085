"""Bytes on disk: durable writes, safe reading, and what a checkpoint file may hold."""
