"""`moray doctor`: check this machine for everything that moray needs."""
