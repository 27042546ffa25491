"""The ablations of the small world: what is compared, its rows, one seed, the table, the command."""
