"""What runs that repeat bit for bit make possible: differences, values of clients, unlearning, audits."""
