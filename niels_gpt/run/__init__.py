"""One training: from the options of the command to files in the output folder."""
