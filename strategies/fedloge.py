"""FedLoGe. Xiao, Chen, Liu, Wang, Feng, Hao, Zhou, Wu, Yang, Liu: FedLoGe: Joint Local and Generic Federated Learning
under Long-tailed Data, ICLR 2024."""

from clients.etf import sparse_etf
from clients.realign import realign_global, realign_local

__all__ = ["realign_global", "realign_local", "sparse_etf"]
