"""A client at work: its job, optimiser, amount of work, what it keeps, and kinds of clients."""
