"""Routing that is changed at run time: task masks, sentence levels, the prompt classifier."""
