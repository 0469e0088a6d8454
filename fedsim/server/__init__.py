"""The server's side: the round loop, exchanges, evaluation, checkpoints, client states, colluding attackers."""
