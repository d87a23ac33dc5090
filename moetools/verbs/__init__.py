"""One function per verb: open, stream, decide, write, verify, report. This is the Python API."""
