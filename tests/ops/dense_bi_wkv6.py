"""Bi-WKV6 as a sum over all pairs of tokens, differentiable by autograd."""

import torch
import torch.nn.functional as F


def dense_bi_wkv6(r, k, v, w, u, causal=False):
    """The decay between two tokens is the product over the tokens between them."""
    r, k, v, w = (x.unflatten(2, u.shape).transpose(1, 2) for x in (r, k, v, w))
    tokens, log_decay = r.shape[2], -torch.exp(w)
    rows = []
    for t in range(tokens):
        between = [u.expand(r.shape[0], *u.shape)[:, :, None]]
        if t > 0:
            logs = log_decay[:, :, 1:t].flip(2).cumsum(2).flip(2)
            between.insert(0, F.pad(logs, (0, 0, 0, 1)).exp())
        if t + 1 < tokens and not causal:
            logs = log_decay[:, :, t + 1 : -1].cumsum(2)
            between.append(F.pad(logs, (0, 0, 1, 0)).exp())
        weights = torch.cat(between, 2)  # of the tokens that token t sees
        seen = weights.shape[2]
        scores = (r[:, :, t : t + 1] * weights * k[:, :, :seen]).sum(3, keepdim=True)
        rows.append((scores * v[:, :, :seen]).sum(2))
    return torch.stack(rows, 1).flatten(2)
