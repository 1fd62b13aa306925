"""The training loop and its parts: step plan, optimizer, loss, guard, checkpoints, early stopping."""
