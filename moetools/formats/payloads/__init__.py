"""How moetools' own format stores the tensors of one kind of grid; one file per kind."""
