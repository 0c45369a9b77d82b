"""What the model is needed for, a microbatch at a time: token statistics, gradients, tangents."""
