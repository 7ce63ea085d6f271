"""The user's own steps: what network they call, with what, and how they are run beside training."""
