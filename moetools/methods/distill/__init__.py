"""How the FFN of a dense student starts out, from one MoE layer: one file per method."""
