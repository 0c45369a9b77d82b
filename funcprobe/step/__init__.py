"""From rewards to the direction v of the optimizer step: objective, Adam."""
