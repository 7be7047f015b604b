"""What a task is: its rows, how they become inputs, how a model is scored on them."""
