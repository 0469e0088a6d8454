"""Equations of ensembles of classifiers, of the images that test them, and of learning from them.

Symbols as in Co-Boosting (Dai, Zhang, Li, Liu, Tian, Han: Enhancing One-Shot Federated Learning Through Data and
Ensemble Co-Boosting, ICLR 2024, arXiv 2402.15070): logits ``f`` (K, B, C) of K clients' models, ensemble weights ``w``
(K,) >= 0, ensemble logits ``a`` (B, C) = A_w(x), the student's logits ``s`` (B, C), labels ``y`` (B,).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NOBODY = 1e-8  # a sum of weights below this means that all are 0


def ensemble(f: Tensor, w: Tensor) -> Tensor:
    """``A_w = sum_k w_k f_k / sum_k w_k`` (B, C)."""
    w = w.to(f.dtype)
    a: Tensor = torch.tensordot(w, f, dims=1) / w.sum()
    return a


def uniform(f: Tensor) -> Tensor:
    """The mean of logits (B, C), as the sum of ``f_k * (1/K)``."""
    return (f * (1 / len(f))).sum(dim=0)


def usable(w: Tensor) -> tuple[Tensor, bool]:
    """``w`` (K,), or 1/K each where all are 0 and the quotient is undefined; and whether that was so."""
    lost = float(w.sum()) < NOBODY
    return (torch.full_like(w, 1 / len(w)) if lost else w), lost


def entropy(w: Tensor) -> float:
    """Of ``w / sum w``, in nats: log K where all count alike, 0 where one alone does."""
    p = w.double() / w.double().sum()
    return float(torch.special.entr(p).sum())


def hardness(a: Tensor, y: Tensor, h: float) -> Tensor:
    """``d_b = (1 - softmax(a_b)_{y_b})^h`` (B,), without gradient."""
    p = a.detach().softmax(dim=1).gather(1, y[:, None])[:, 0]
    return (1 - p).pow(h)


def hard_loss(a: Tensor, y: Tensor, h: float) -> Tensor:
    """``L_H = mean_b d_b CE(a_b, y_b)``: labels are met, most of all by samples that are hard for the ensemble."""
    return (hardness(a, y, h) * F.cross_entropy(a, y, reduction="none")).mean()


def kl(t: Tensor, s: Tensor, T: float = 1.0) -> Tensor:
    """``KL_T(t, s) = T^2 mean_b KL(softmax(t/T) || softmax(s/T))``."""
    return T * T * soft_loss(t, s, T)


def soft_loss(t: Tensor, s: Tensor, T: float = 1.0) -> Tensor:
    """``mean_b KL(softmax(t/T) || softmax(s/T))``, without the factor T^2 (FedDF, Lin et al. 2020)."""
    return _kl_each(t, s, T).mean()


def adversarial_loss(a: Tensor, s: Tensor, T: float = 1.0) -> Tensor:
    """``L_A = -KL_T(a, s)``: ensemble and student are to differ; gradient through both."""
    return -kl(a, s, T)


def disagreement(a: Tensor, s: Tensor) -> Tensor:
    """``omega_b`` (B,): 1 where student and ensemble choose different classes, else 0 (DENSE, Zhang et al. 2022)."""
    return (a.argmax(dim=1) != s.argmax(dim=1)).to(a.dtype)


def disagreement_loss(a: Tensor, s: Tensor) -> Tensor:
    """``L_adv = -mean_b omega_b KL(softmax(a_b) || softmax(s_b))`` (DENSE)."""
    return -(disagreement(a, s) * _kl_each(a, s, 1.0)).mean()


def weight_gradient(f: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """``dCE(A_w, y)/dw`` (K,) = ``mean_b sum_c r_bc (f_kbc - a_bc) / sum w``, ``r = softmax(a) - onehot(y)``.

    It is orthogonal to ``w``, since ``A_w`` does not depend on its length.
    """
    a = ensemble(f, w)
    r = (a.softmax(dim=1) - F.one_hot(y, a.shape[1]).to(a.dtype)) / len(y)
    return torch.einsum("bc,kbc->k", r, f - a) / w.to(f.dtype).sum()


def weight_step(w: Tensor, g: Tensor, mu: float, start: Tensor) -> Tensor:
    """``clip(w - mu sign(g))`` to [0, 1], and to within 1 of ``start``, the weights (K,) at the start of the pass."""
    moved = w - mu * g.sign().to(w.dtype)
    return torch.minimum(torch.maximum(moved, start - 1), start + 1).clamp(0, 1)


def direction(a: Tensor, u: Tensor, T: float, x: Tensor) -> Tensor:
    """``grad_x sum_b u_b . softmax(a_b/T)`` (B, ...), where ``a`` was computed from ``x``."""
    return torch.autograd.grad((u * (a / T).softmax(dim=1)).sum(), x)[0]


def perturbed(x: Tensor, g: Tensor, eps: float, kind: str = "sign") -> Tensor:
    """``x + eps sign(g)``, or with ``l2`` ``x + eps g/norm(g)`` sample by sample."""
    if kind == "sign":
        return x + eps * g.sign()
    length = g.flatten(1).norm(dim=1).clamp(min=torch.finfo(g.dtype).tiny)
    out: Tensor = x + eps * g / length.view(-1, *(1,) * (g.dim() - 1))
    return out


def cosine(lr: float, done: int, whole: int) -> float:
    """The rate after ``done`` of ``whole`` steps on its way to 0."""
    return lr * (1 + math.cos(math.pi * min(done, whole) / whole)) / 2


def mean_probabilities(f: Tensor) -> Tensor:
    """``log mean_k softmax(f_k)`` (B, C): logits whose softmax are the mean probabilities."""
    return torch.logsumexp(f.log_softmax(dim=2), dim=0) - math.log(len(f))


def majority(f: Tensor) -> Tensor:
    """Votes (B, C) of the models for the class that each of them prefers; of a tie the lowest class comes first."""
    return F.one_hot(f.argmax(dim=2), f.shape[2]).sum(dim=0).to(f.dtype)


def _kl_each(t: Tensor, s: Tensor, T: float) -> Tensor:
    log_p, log_q = (t / T).log_softmax(dim=1), (s / T).log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)
