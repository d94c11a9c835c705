"""Where images come from, how they are divided, and the batches of a step."""
