"""What travels between server and clients: payloads, and how updates are folded into sums."""
