"""Methods that drop experts. One file per method."""
