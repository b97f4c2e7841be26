"""Every operation equals torchvision's v2 functional one for the same drawn parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from sslzoo.data import photometric as ph
from sslzoo.data.crops import CROP_DRAWS, channels_last, crop_batch, crop_into, evaluation_crop
from sslzoo.data.views import (
    applied_together,
    apply_to_image,
    apply_view,
    draw_boxes,
    draw_image_boxes,
    draw_images,
    draw_uniforms,
    draw_view,
    expand_views,
)
from sslzoo.recipe.sections import PlainView, ViewConfig

STRONG = ViewConfig(
    size=24,
    scale=(0.2, 1.0),
    flip_p=0.5,
    jitter_p=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grayscale_p=0.2,
    blur_p=0.5,
    solarize_p=0.2,
)


def images(n: int, channels: int, height: int, width: int) -> Tensor:
    """Smooth colour with noise, and some grey and black rows, as uint8."""
    coarse = torch.rand(n, channels, 5, 5)
    out = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic") + 0.1 * torch.randn(
        n, channels, height, width
    )
    out[:, :, :2] = out[:, :1, :2]
    out[:, :, 2:4] = 0
    return (out.clamp(0, 1) * 255).round().to(torch.uint8)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance


OPERATIONS = {
    "brightness": (ph.blend_, TF.adjust_brightness, (0.0, 1.8)),
    "contrast": (lambda x, f: ph.blend_(x, f, mean=1 - f), TF.adjust_contrast, (0.0, 1.8)),
    "saturation": (lambda x, f: ph.blend_(x, f, luma=1 - f), TF.adjust_saturation, (0.0, 1.8)),
    "hue": (ph.shift_hue_, TF.adjust_hue, (-0.5, 0.5)),
}


@pytest.mark.parametrize(
    ("name", "channels"), [*((name, 3) for name in OPERATIONS), ("brightness", 1), ("contrast", 1)]
)
def test_colour_equals_torchvision(name: str, channels: int) -> None:
    ours, theirs, (low, high) = OPERATIONS[name]
    x = images(16, channels, 20, 26).float() / 255
    factor = torch.linspace(low, high, 16)
    want = torch.stack([theirs(x[i], float(factor[i])) for i in range(16)])
    close(ours(x.clone(), factor[:, None, None, None]), want)
    close(torch.stack([ours(x[i].clone(), float(factor[i])) for i in range(16)]), want)
    assert (want - x).abs().max() > 0.05


@pytest.mark.parametrize(("size", "taps"), [((28, 28), 23), ((20, 31), 23), ((12, 12), 23), ((40, 40), 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_blur_equals_torchvision(size: tuple[int, int], taps: int, channels: int) -> None:
    x = images(6, channels, *size).float() / 255
    sigma = torch.tensor([0.1, 0.2, 0.5, 1.0, 1.5, 2.0])
    want = torch.stack([TF.gaussian_blur(x[i], [taps, taps], [float(sigma[i])]) for i in range(6)])
    close(ph.gaussian_blur(x, sigma, taps), want)
    one_by_one = torch.stack([ph.blur_(x[i].clone(), float(sigma[i]), taps) for i in range(6)])
    close(one_by_one, want, 2e-5)  # taps are cut off


@pytest.mark.parametrize("size", [1, 2, 7])
def test_blur_longer_than_the_image_keeps_the_mean_of_a_constant(size: int) -> None:
    x = torch.full((2, 3, size, size), 0.25)
    close(ph.gaussian_blur(x, torch.tensor([0.5, 2.0]), 23), x)
    close(ph.blur_(x[0].clone(), 2.0, 23), x[0])


def test_grayscale_solarize_and_normalize_equal_torchvision() -> None:
    x = images(8, 3, 21, 21).float() / 255
    close(ph.grayscale(x), TF.rgb_to_grayscale(x))
    close(ph.solarize(x, 128 / 255), TF.solarize(x, 128 / 255), 0)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    close(ph.normalize(x, mean, std), TF.normalize(x, list(mean), list(std)), 1e-6)


def reference_rule(u: list[float], h: int, w: int, cfg: ViewConfig) -> list[int]:
    """The RandomResizedCrop rule, one attempt after the other, in Python floats."""
    import math

    assert cfg.scale is not None
    low, high = math.log(cfg.ratio[0]), math.log(cfg.ratio[1])
    for k in range(10):
        area = h * w * (cfg.scale[0] + (cfg.scale[1] - cfg.scale[0]) * u[k])
        aspect = math.exp(low + (high - low) * u[10 + k])
        cw, ch = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < cw <= w and 0 < ch <= h:
            return [int((h - ch + 1) * u[20]), int((w - cw + 1) * u[21]), ch, cw]
    if w / h < cfg.ratio[0]:
        ch, cw = round(w / cfg.ratio[0]), w
    elif w / h > cfg.ratio[1]:
        ch, cw = h, round(h * cfg.ratio[1])
    else:
        ch, cw = h, w
    return [(h - ch) // 2, (w - cw) // 2, ch, cw]


@pytest.mark.parametrize("size", [(28, 28), (500, 375), (100, 900), (900, 100), (1, 1), (3, 2)])
def test_boxes_follow_the_rule_and_stay_inside(size: tuple[int, int]) -> None:
    cfg = ViewConfig(size=24, scale=(0.5, 1.0))
    u = draw_uniforms(3, 1, 0, torch.arange(300))[:, :CROP_DRAWS]
    h, w = (torch.full((300,), s) for s in size)
    boxes = draw_boxes(cfg, u, h, w)
    assert boxes.tolist() == [reference_rule(row, *size, cfg) for row in u.tolist()]
    assert boxes.tolist() == [box.on(*size) for box in draw_image_boxes(cfg, u)]
    top, left, height, width = boxes.unbind(1)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > 0).all()
    assert (top + height <= size[0]).all() and (left + width <= size[1]).all()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("shape", "out"), [((1, 28, 28), 28), ((3, 96, 96), 64), ((3, 40, 30), 48)])
def test_crops_of_arrays_equal_torchvision(shape: tuple[int, ...], out: int, interpolation: str) -> None:
    x = images(24, *shape)
    cfg = ViewConfig(size=out, scale=(0.05, 1.0))
    h, w = torch.full((24,), shape[1]), torch.full((24,), shape[2])
    boxes = draw_boxes(cfg, draw_uniforms(0, 0, 0, torch.arange(24)), h, w)
    mode = InterpolationMode(interpolation)
    crops = []
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        image = x[i].float() / 255
        crops.append(TF.resized_crop(image, top, left, height, width, [out, out], mode, antialias=True))
    want = torch.stack(crops).clamp(0, 1)
    close(crop_batch(x, boxes, out, interpolation), want)
    close(crop_batch(x[:8], boxes[[*range(16, 24), *range(8)]], out, interpolation)[8:], want[:8])


def cropped(x: Tensor, boxes: Tensor, size: int, interpolation: str) -> Tensor:
    """Crops of images of files."""
    crops = torch.empty((len(x), size, size, x.shape[1]), dtype=torch.uint8).permute(0, 3, 1, 2)
    for crop, image, box in zip(crops, x, boxes.tolist(), strict=True):
        crop_into(crop, channels_last(image), box, interpolation)
    return crops


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_of_files_are_within_a_grey_level(channels: int, interpolation: str) -> None:
    x = images(12, channels, 75, 60)
    cfg = ViewConfig(size=32, scale=(0.05, 1.0))
    h, w = torch.full((12,), 75), torch.full((12,), 60)
    boxes = draw_boxes(cfg, draw_uniforms(0, 0, 0, torch.arange(12)), h, w)
    got = cropped(x, boxes, 32, interpolation)
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        # Columns, then rows, rounded and clipped in between: uint8 keeps no overshoot of bicubic.
        want = x[i, :, top : top + height, left : left + width].float()
        for size in ([height, 32], [32, 32]):
            want = (
                TF.resize(want, size, InterpolationMode(interpolation), antialias=True).clamp(0, 255).round()
            )
        close(got[i].float(), want, 1.0)
    if interpolation == "bilinear":
        close(got.float(), 255 * crop_batch(x, boxes, 32, interpolation), 1.0)


def chain(cfg: ViewConfig, x: Tensor, u: list[float]) -> Tensor:
    """One sample through torchvision, parameters read from its uniforms."""
    from sslzoo.data import views as v

    def between(low: float, high: float, column: int) -> float:
        return low + (high - low) * u[column]

    if u[v.JITTER] < cfg.jitter_p:
        operations = [
            (u[v.ORDER], lambda x: TF.adjust_brightness(x, between(0.6, 1.4, v.BRIGHTNESS))),
            (u[v.ORDER + 1], lambda x: TF.adjust_contrast(x, between(0.6, 1.4, v.CONTRAST))),
            (u[v.ORDER + 2], lambda x: TF.adjust_saturation(x, between(0.8, 1.2, v.SATURATION))),
            (u[v.ORDER + 3], lambda x: TF.adjust_hue(x, between(-0.1, 0.1, v.HUE))),
        ]
        for _, operation in sorted(operations, key=lambda pair: pair[0]):
            x = operation(x)
    if u[v.GRAYSCALE] < cfg.grayscale_p and len(x) == 3:
        x = TF.rgb_to_grayscale(x, num_output_channels=3)
    if u[v.BLUR] < cfg.blur_p:
        x = TF.gaussian_blur(x, [23, 23], [between(0.1, 2.0, v.SIGMA)])
    if u[v.SOLARIZE] < cfg.solarize_p:
        x = TF.solarize(x, cfg.solarize_threshold)
    return TF.horizontal_flip(x) if u[v.FLIP] < cfg.flip_p else x


@pytest.mark.parametrize("channels", [1, 3])
def test_the_chain_equals_torchvision(channels: int) -> None:
    x = images(64, channels, 24, 24).float() / 255
    u = draw_uniforms(7, 2, 1, torch.arange(64))
    want = torch.stack([chain(STRONG, x[i], u[i].tolist()) for i in range(64)])
    together = apply_view(STRONG, x.clone(), draw_view([STRONG], [u], channels))
    draws = draw_images(STRONG, u, channels)
    alone = torch.stack([apply_to_image(STRONG, x[i].clone(), draws[i]) for i in range(64)])
    for got in (together, alone):
        # Solarisation is discontinuous at its threshold: rounding may put a pixel on the other side.
        differ = (got - want).abs() > 2e-5
        assert differ.float().mean() < 1e-4
        assert ((got - x).abs().amax(dim=(1, 2, 3)) > 1e-3).float().mean() > 0.9


@pytest.mark.parametrize("off", ["brightness", "contrast", "saturation", "hue", "jitter_p"])
def test_both_ways_of_applying_a_view_agree_whatever_is_left_out(off: str) -> None:
    idle = ["brightness", "contrast", "saturation", "hue"] if off == "jitter_p" else []
    cfg = replace(STRONG, solarize_p=0.0, **dict.fromkeys([off, *idle], 0.0))
    x = images(32, 3, 24, 24).float() / 255
    u = draw_uniforms(7, 2, 1, torch.arange(32))
    alone = torch.stack(
        [apply_to_image(cfg, x[i].clone(), draws) for i, draws in enumerate(draw_images(cfg, u, 3))]
    )
    close(apply_view(cfg, x, draw_view([cfg], [u], 3)), alone, 2e-5)


def test_views_of_one_size_are_those_of_each_alone() -> None:
    """Taken together whatever their probabilities and strengths are; other sizes and jitters apart."""
    other = replace(
        STRONG, jitter_p=0.3, hue=0.3, grayscale_p=0.5, blur_p=0.1, blur_sigma=(1.0, 3.0), flip_p=0.9
    )
    views = [STRONG, replace(STRONG, size=12), other, replace(STRONG, hue=0.0), replace(STRONG, size=12)]
    assert applied_together(views, 3) == ((0, 2), (1, 4), (3,))
    assert applied_together(views, 1) == ((0, 2, 3), (1, 4))
    x = images(32, 3, 24, 24).float() / 255
    u = [draw_uniforms(7, 2, k, torch.arange(16)) for k in range(2)]
    together = apply_view(STRONG, x.clone(), draw_view([STRONG, other], u, 3))
    alone = [
        apply_view(view, part.clone(), draw_view([view], [uniforms], 3))
        for view, part, uniforms in zip((STRONG, other), x.split(16), u, strict=True)
    ]
    close(together, torch.cat(alone), 1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_views_of_an_image_do_not_depend_on_the_number_of_threads(channels: int) -> None:
    """Workers have one, and the main process, which does their work without them, has more."""
    x = images(4, channels, 224, 224).float() / 255
    cfg = replace(STRONG, size=224, jitter_p=1.0, contrast=1.0)
    draws = draw_images(cfg, draw_uniforms(0, 0, 0, torch.arange(4)), channels)
    before, views = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            views.append(torch.stack([apply_to_image(cfg, x[i].clone(), draws[i]) for i in range(4)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*views)


def test_a_view_that_states_nothing_changes_nothing() -> None:
    cfg = ViewConfig(size=24, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    x = images(8, 3, 24, 24)
    u = draw_uniforms(0, 0, 0, torch.arange(8))
    side = torch.full((8,), 24)
    crops = crop_batch(x, draw_boxes(cfg, u, side, side), 24, "bilinear")
    close(apply_view(cfg, crops, draw_view([cfg], [u], 3)), x.float() / 255, 1e-6)


def test_probabilities_and_ranges_of_the_draws() -> None:
    u = draw_uniforms(0, 0, 0, torch.arange(20_000))
    draws = draw_view([STRONG], [u], 3)
    for rows, p in ((draws.grayscale, 0.2), (draws.blur, 0.5), (draws.solarize, 0.2), (draws.flip, 0.5)):
        assert abs(len(rows) / 20_000 - p) < 0.015
    assert draws.sigma.min() >= 0.1 and draws.sigma.max() <= 2.0 and abs(draws.sigma.mean() - 1.05) < 0.02
    # 16,000 jittered samples, each of the four operations at each of the four places for a quarter of them.
    jitter = [d.jitter for d in draw_images(STRONG, u, 3) if d.jitter]
    assert abs(len(jitter) / 16_000 - 1) < 0.015
    for place in range(4):
        for name in OPERATIONS:
            assert abs(sum(operations[place][0] == name for operations in jitter) / 4_000 - 1) < 0.1
    assert draws.jitter is not None and draws.jitter.hue is not None
    hue = draws.jitter.hue
    assert -0.1 <= hue.min() < -0.099 and 0.099 < hue.max() <= 0.1


def test_expand_views_counts_crops() -> None:
    locals_ = ViewConfig(size=12, scale=(0.05, 0.2), role="local", count=3)
    assert [v.size for v in expand_views([STRONG, locals_])] == [24, 12, 12, 12]


def test_padded_crops_equal_torchvision() -> None:
    """At every place, of images in memory and of files; the draws are uniform over all places."""
    x = images(200, 3, 9, 12)
    cfg = ViewConfig(size=8, padding=2)
    u = draw_uniforms(1, 0, 0, torch.arange(len(x)))
    boxes = draw_boxes(cfg, u, torch.full((len(x),), 9), torch.full((len(x),), 12))
    assert set(boxes[:, 0].tolist()) == set(range(-2, 4)) and set(boxes[:, 1].tolist()) == set(range(-2, 7))
    assert set(boxes[:, 2:].flatten().tolist()) == {8}
    assert boxes.tolist() == [box.on(9, 12) for box in draw_image_boxes(cfg, u)]
    padded = TF.pad(x, [2])
    want = torch.stack(
        [image[:, t + 2 : t + 10, l + 2 : l + 10] for image, (t, l, *_) in zip(padded, boxes, strict=True)]
    )
    close(crop_batch(x, boxes, 8, "bilinear", 2), want.float() / 255, 0.0)
    assert torch.equal(cropped(x, boxes, 8, "bilinear"), want)
    large = ViewConfig(size=14, padding=2)
    too_small = "a crop of 14 px does not fit into an image of 9 px with 2 px of padding"
    with pytest.raises(ValueError, match=too_small):
        draw_boxes(large, u, torch.full((len(x),), 9), torch.full((len(x),), 12))
    with pytest.raises(ValueError, match=too_small):
        draw_image_boxes(large, u)[0].on(9, 12)


def test_plain_views_equal_torchvision() -> None:
    x = images(2, 3, 40, 62)
    bicubic = InterpolationMode.BICUBIC
    want = TF.center_crop(TF.resize(x, [20], bicubic, antialias=True), [16, 16])
    assert torch.equal(evaluation_crop(x, PlainView(size=16, resize=20, interpolation="bicubic")), want)
    # SimCLR's TensorFlow code: a square, 0.875 of the shorter side.
    want = TF.resize(TF.center_crop(x, [35, 35]), [16, 16], bicubic, antialias=True)
    assert torch.equal(
        evaluation_crop(x, PlainView(size=16, proportion=0.875, interpolation="bicubic")), want
    )
    # MMCL's: 0.875 of both sides, which are then squeezed.
    want = TF.resize(TF.center_crop(x, [35, 54]), [16, 16], bicubic, antialias=True)
    squeezed = PlainView(size=16, proportion=0.875, square=False, interpolation="bicubic")
    assert torch.equal(evaluation_crop(x, squeezed), want)
