"""Methods that combine experts into fewer. One file per method."""
