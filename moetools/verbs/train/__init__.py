"""Training of a checkpoint towards a teacher: healing, and students."""
