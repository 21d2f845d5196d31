"""How long tests wait for a state before they fail: only a hang takes so long, on the slowest machine too."""

PATIENCE_S = 300.0
