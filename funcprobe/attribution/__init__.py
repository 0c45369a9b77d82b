"""Who makes the predicted change: exact shares of it, and what it answers to."""
