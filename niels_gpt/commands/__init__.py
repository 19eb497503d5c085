"""One thin click command a file: parse, call one function, print. Torch is imported on the call."""
