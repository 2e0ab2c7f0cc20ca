"""
Muon, an optimiser for matrices: every step has singular values of about one (Jordan et al., 2024).

    B  <- momentum * B + G                  G is the gradient of a matrix
    W  <- W - lr * orthogonal(G + momentum * B)

The rest of a network (embeddings, norms, biases, the first and the last layer) is left to AdamW.
torch.optim.Muon always computes in bfloat16, which takes 15 times as long on a CPU without such
instructions; this one computes in the type of the weights.
"""

import torch


def orthogonal(G, steps=5):
    """Nearly U V^T of G = U S V^T [rows, columns], by the quintic Newton-Schulz iteration whose
    coefficients are those of the Muon post: singular values come between 0.7 and 1.2, about."""
    wide = G if G.shape[0] <= G.shape[1] else G.T
    X = wide / wide.norm().clamp(min=1e-7)  # no singular value above one
    for _ in range(steps):
        A = X @ X.T
        X = 3.4445 * X + (2.0315 * A @ A - 4.7750 * A) @ X
    return X if G.shape[0] <= G.shape[1] else X.T


class Muon(torch.optim.Optimizer):
    """For matrices, of any shape; lr about 0.02. Weight decay is that of AdamW."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                B = self.state[p]["momentum"].mul_(group["momentum"]).add_(p.grad)
                # With more rows than columns the numbers of a step are smaller, as all its columns
                # have length one: the original correction.
                lr = group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(lr * orthogonal(p.grad + group["momentum"] * B))
