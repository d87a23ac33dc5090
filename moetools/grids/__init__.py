"""Which numbers a quantized weight can take: one file per kind of grid. Pure tensor maths."""
