"""What the model tests share: a small model, VRWKV and VRWKV6 written out in plain PyTorch."""

import torch
import torch.nn.functional as F

from vrwkv_ops.reference import bi_wkv_reference

SMALL = {'img_size': 32, 'patch_size': 8, 'embed_dims': 12, 'depth': 2}


def shift_by_loop(x, mode, step, gamma, resolution=None):
    """Shift token by token, from the definition in the design."""
    tokens, channels = x.shape[1:]
    out = torch.zeros_like(x)
    for c in range(channels):
        group = next((n for n in range(4) if c < int(channels * gamma * (n + 1))), None)
        for t in range(tokens):
            if mode == 'single_shift':
                source = t - step
            elif mode == 'double_shift':
                source = {0: t - step, 1: t + step}.get(group, t)
            else:
                height, width = resolution
                row, column = divmod(t, width)
                drow, dcolumn = {0: (0, -step), 1: (0, step), 2: (-step, 0), 3: (step, 0)}.get(
                    group, (0, 0)
                )
                row, column = row + drow, column + dcolumn
                inside = 0 <= row < height and 0 <= column < width
                source = row * width + column if inside else -1
            if 0 <= source < tokens:
                out[:, t, c] = x[:, source, c]
    return out


def randomise(model, seed=0):
    """Give every parameter a random value, so that none hides behind a 0 or a 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(torch.randn(param.shape, generator=generator, dtype=param.dtype) * 0.3)
            if 'ln' in name or 'norm' in name or 'gamma' in name:
                param += 0.5
    return model


def reference(params, image, config):
    """Compute every layer's map from a state dict, by the design's formulas."""
    config = {
        'shift_mode': 'q_shift', 'shift_pixel': 1, 'channel_gamma': 1 / 4, 'post_norm': False,
        'num_heads': 1, 'causal': False, 'final_norm': True, 'interpolate_mode': 'bicubic',
    } | config  # fmt: skip
    dims, patch, depth = config['embed_dims'], config['patch_size'], config['depth']
    sides = (
        config['img_size'] if isinstance(config['img_size'], tuple) else (config['img_size'],) * 2
    )

    def norm(name, x):
        if f'{name}.weight' not in params:
            return x
        return F.layer_norm(x, x.shape[-1:], params[f'{name}.weight'], params[f'{name}.bias'])

    def neighbour(x):
        shift = [config[name] for name in ('shift_mode', 'shift_pixel', 'channel_gamma')]
        heads = x.chunk(config['num_heads'], -1)
        return torch.cat([shift_by_loop(head, *shift, grid) for head in heads], -1)

    def shifted(name, x):
        if config['shift_mode'] == 'none':
            return x
        neighbours = neighbour(x)
        mix = params[name]
        return x * mix + neighbours * (1 - mix)

    def attention(name, x):
        k = shifted(f'{name}.spatial_mix_k', x) @ params[f'{name}.key.weight'].T
        v = shifted(f'{name}.spatial_mix_v', x) @ params[f'{name}.value.weight'].T
        r = shifted(f'{name}.spatial_mix_r', x) @ params[f'{name}.receptance.weight'].T
        w, u = (params[f'{name}.{p}'] / x.shape[1] for p in ('spatial_decay', 'spatial_first'))
        y = norm(f'{name}.key_norm', bi_wkv_reference(w, u, k, v, config['causal']))
        return (r.sigmoid() * y) @ params[f'{name}.output.weight'].T

    def attention6(name, x):
        delta = neighbour(x) - x
        z = x + delta * params[f'{name}.time_maa_x']
        low = (z @ params[f'{name}.time_maa_w1']).tanh().chunk(5, -1)
        w, k, v, r, g = (
            x + delta * (params[f'{name}.time_maa_{f}'] + part @ params[f'{name}.time_maa_w2'][i])
            for i, (f, part) in enumerate(zip('wkvrg', low, strict=True))
        )
        k, v, r, g = (
            y @ params[f'{name}.{linear}.weight'].T
            for y, linear in ((k, 'key'), (v, 'value'), (r, 'receptance'), (g, 'gate'))
        )
        low_w = (w @ params[f'{name}.time_decay_w1']).tanh() @ params[f'{name}.time_decay_w2']
        log_decay = -(params[f'{name}.time_decay'] + low_w).exp()
        y = torch.zeros_like(x)
        size = dims // config['num_heads']
        for first in range(0, dims, size):
            head = slice(first, first + size)
            for t in range(x.shape[1]):
                for i in range(x.shape[1]):
                    between = log_decay[:, min(t, i) + 1 : max(t, i), head].sum(1).exp()
                    if i == t:
                        between = params[f'{name}.time_faaaa'][first // size]
                    a = (r[:, t, head] * between * k[:, i, head]).sum(-1, keepdim=True)
                    y[:, t, head] += a * v[:, i, head]
        y = norm(f'{name}.key_norm', y).unflatten(-1, (-1, size))
        y = F.layer_norm(y, (size,)).flatten(-2)
        y = y * params[f'{name}.ln_x.weight'] + params[f'{name}.ln_x.bias']
        return (y * g * g.sigmoid()) @ params[f'{name}.output.weight'].T

    def feed_forward(name, x):
        k = shifted(f'{name}.spatial_mix_k', x) @ params[f'{name}.key.weight'].T
        r = shifted(f'{name}.spatial_mix_r', x) @ params[f'{name}.receptance.weight'].T
        hidden = norm(f'{name}.key_norm', k.clamp(min=0) ** 2)
        return r.sigmoid() * (hidden @ params[f'{name}.value.weight'].T)

    kernel, bias = params['patch_embed.projection.weight'], params['patch_embed.projection.bias']
    x = F.conv2d(image, kernel, bias, stride=patch)
    grid = tuple(x.shape[2:])
    pos = params['pos_embed'].reshape(1, sides[0] // patch, sides[1] // patch, dims)
    pos = pos.permute(0, 3, 1, 2)
    if pos.shape[2:] != x.shape[2:]:
        pos = F.interpolate(pos, size=grid, mode=config['interpolate_mode'], align_corners=False)
    x = (x + pos).flatten(2).transpose(1, 2)
    maps = []
    for i in range(depth):
        layer = f'layers.{i}'
        x = norm(f'{layer}.ln0', x)
        spatial = attention6 if f'{layer}.att.time_decay' in params else attention
        for part, ln, gamma in ((spatial, 'ln1', 'gamma1'), (feed_forward, 'ln2', 'gamma2')):
            name = f'{layer}.{"att" if part is spatial else "ffn"}'
            if config['post_norm']:
                y = norm(f'{layer}.{ln}', part(name, x))
            else:
                y = part(name, norm(f'{layer}.{ln}', x))
            x = x + params.get(f'{layer}.{gamma}', 1) * y
        if i == depth - 1 and config['final_norm']:
            x = norm('ln1', x)
        maps.append(x.transpose(1, 2).reshape(x.shape[0], dims, *grid))
    return maps
