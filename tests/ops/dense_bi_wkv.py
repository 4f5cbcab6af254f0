"""The truth of these tests: design section 2 written out as a T x T softmax in float64."""

import torch


def dense_bi_wkv(w, u, k, v, causal=False, rows=None):
    """Bi-WKV of the tokens ``rows`` (default: all), in float64 and by autograd differentiable.

    Token i weighs e^(k_i - w (|t-i| - 1)) in the output of token t, and e^(u + k_t) if i = t.
    """
    w, u, k, v = (x.to(torch.float64) for x in (w, u, k, v))
    source = torch.arange(k.shape[1], device=k.device)
    target = source if rows is None else rows
    distance = (target[:, None] - source).abs()[..., None]  # (S, T, 1)
    logits = torch.where(distance == 0, u, -w * (distance - 1)) + k[:, None]  # (B, S, T, C)
    if causal:
        logits = logits.masked_fill((source > target[:, None])[..., None], float('-inf'))
    return (logits.softmax(dim=2) * v[:, None]).sum(dim=2)


def dense_with_gradients(w, u, k, v, gy, causal=False, rows=None):
    """Output, and gradients of w, u, k and v where ``gy`` is that of the output, all in float64."""
    inputs = [x.detach().to(torch.float64).requires_grad_() for x in (w, u, k, v)]
    y = dense_bi_wkv(*inputs, causal, rows)
    # Neither w (T = 1) nor u (its weight cancels out there) need take part.
    gradients = torch.autograd.grad(y, inputs, gy.to(torch.float64), materialize_grads=True)
    return [y.detach(), *gradients]
