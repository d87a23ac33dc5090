"""Scores that say what each expert is worth to each task; the file name is the name on the command line."""
