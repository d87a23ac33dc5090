"""How weights are rounded to a grid: one file per method. Pure tensor maths."""
