"""MM-Vet."""
