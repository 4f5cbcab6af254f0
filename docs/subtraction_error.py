"""Compare two float32 computations of Bi-WKV with a dense float64 one: see operator.md."""

import torch

from vrwkv_ops import bi_wkv


def dense(w, u, k, v):
    """Evaluate the definition, a softmax over all pairs of tokens, for one channel at a time."""
    t = torch.arange(k.shape[1])
    distance = (t[:, None] - t).abs() - 1
    channels = []
    for c in range(k.shape[2]):
        bias = torch.where(distance < 0, u[c], -w[c] * distance)
        channels.append(torch.softmax(k[:, None, :, c] + bias, -1) @ v[:, :, c, None])
    return torch.cat(channels, -1)


def subtracting(w, u, k, v):
    """Sum over all later tokens first, then subtract one token from that sum at every step."""
    weight = k.exp()
    future = k.new_zeros(2, *k[:, 0].shape)
    terms = torch.stack([weight * v, weight])
    for t in range(1, k.shape[1]):
        future += (-w * (t - 1)).exp() * terms[:, :, t]
    past = torch.zeros_like(future)
    outputs = []
    for t in range(k.shape[1]):
        total = past + future + u.exp() * terms[:, :, t]
        outputs.append(total[0] / total[1])
        past = (-w).exp() * past + terms[:, :, t]
        if t + 1 < k.shape[1]:
            future = (future - terms[:, :, t + 1]) * w.exp()
    return torch.stack(outputs, 1)


def main():
    """Print a row of the table for each length and range of decays."""
    torch.manual_seed(0)
    channels = 64
    x = torch.arange(channels) / (channels - 1)
    for tokens in (196, 1024, 4096):
        for name, w in (('initial', (-5 + 8 * x**0.7) / tokens), ('0 to 0.1', 0.1 * x)):
            u = torch.randn(channels)
            k, v = torch.randn(2, 1, tokens, channels)
            truth = dense(*(tensor.double() for tensor in (w, u, k, v)))
            errors = [
                ((f(w, u, k, v) - truth).abs().max() / truth.abs().max()).item()
                for f in (bi_wkv, subtracting)
            ]
            print(f'| {tokens} | {name} | {errors[0]:.0e} | {errors[1]:.0e} |')


if __name__ == '__main__':
    main()
