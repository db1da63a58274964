"""What one step does: scale, take gradients, select, update."""
