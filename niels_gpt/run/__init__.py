"""One training run, from the options of the command to the files in its output folder."""
