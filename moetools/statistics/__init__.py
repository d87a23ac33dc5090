"""What is measured while the forward core streams tokens through the MoE blocks. One file per statistic."""
