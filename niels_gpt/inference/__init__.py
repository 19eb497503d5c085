"""Using a model: load, generate, chat, export."""
