"""Using a model: load it, generate text, chat, export it."""
