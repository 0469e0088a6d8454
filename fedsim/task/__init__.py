"""The learning problem: the task, flat vectors and their layout, heads, sub-models, evaluation."""
