"""Localization by a regressor for each class, against oracles written out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fused_ops import FusedOps
from torch import Tensor

import fusedres
from fusedres.detection import Localizer, Prediction, RegionHead, Trunk, anchors, localized, mean_iou

K, SIZES = 3, (6, 12)


def localizer(**arguments: Any) -> Localizer:
    """A small one of stride 4, whose head isn't near 0."""
    model = Localizer(
        Trunk(fusedres.CifarResNet(8), {"layer3": "features"}), K, SIZES, hidden_channels=8, **arguments
    )
    for layer in (model.head.conv, model.head.cls, model.head.reg):
        torch.nn.init.normal_(layer.weight, std=0.1)
        torch.nn.init.normal_(layer.bias, std=0.1)
    return model


def target(boxes: list[list[float]], labels: list[int]) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64)}


TARGETS = [
    target([[1.0, 2, 14, 12], [10, 10, 17, 16]], [2, 0]),
    target([[3.0, 3, 9, 9]], [1]),
    target([], []),
]


def images(n: int = 3, height: int = 20, width: int = 24) -> Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(3))


def iou(a: list[float], b: list[float]) -> float:
    w, h = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    common = max(w, 0) * max(h, 0)
    area = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return common / (sum(area) - common)


def test_anchors_are_squares_around_the_middle_of_each_position():
    found = anchors.square_anchors(2, 3, 4, (2, 6))
    expected = []
    for y in (2, 6):
        for x in (2, 6, 10):
            for half in (1, 3):
                expected.append([x - half, y - half, x + half, y + half])
    assert found.tolist() == expected


def test_anchors_are_translation_invariant():
    found = anchors.square_anchors(5, 7, 16, (8, 20, 31.5)).reshape(5, 7, 3, 4)
    assert torch.equal(found[1:] - found[:-1], torch.tensor([0.0, 16, 0, 16]).expand(4, 7, 3, 4))
    assert torch.equal(found[:, 1:] - found[:, :-1], torch.tensor([16.0, 0, 16, 0]).expand(5, 6, 3, 4))


def test_iou_counts_pixels():
    corners = torch.randint(0, 8, (12, 2), generator=torch.Generator().manual_seed(0))
    sides = torch.randint(1, 8, (12, 2), generator=torch.Generator().manual_seed(1))
    boxes = torch.cat([corners, corners + sides], 1)
    masks = torch.zeros(12, 16, 16, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    common = (masks[:5, None] & masks[5:]).sum((2, 3))
    either = (masks[:5, None] | masks[5:]).sum((2, 3))
    torch.testing.assert_close(anchors.box_iou(boxes[:5].float(), boxes[5:].float()), common / either)


def test_encoding_by_hand():
    """A box shifted by half an anchor to the right, twice as wide and half as high."""
    anchor, box = torch.tensor([0.0, 0, 8, 8]), torch.tensor([0.0, 2, 16, 6])
    expected = torch.tensor([0.5, 0, math.log(2), -math.log(2)])
    torch.testing.assert_close(anchors.encode(box, anchor), expected)
    torch.testing.assert_close(anchors.decode(expected, anchor), box)


def test_decoding_undoes_encoding():
    generator = torch.Generator().manual_seed(0)
    low, sides = (torch.rand(2, 50, 2, generator=generator, dtype=torch.float64) * 50 for _ in range(2))
    boxes = torch.cat([low, low + sides + 1], -1)
    deltas = anchors.encode(boxes[0], boxes[1])
    torch.testing.assert_close(anchors.decode(deltas, boxes[1]), boxes[0])
    assert anchors.decode(torch.full((4,), 1e4), torch.tensor([0.0, 0, 1, 1])).isfinite().all()


def test_encoding_is_torchvisions():
    utils = pytest.importorskip("torchvision.models.detection._utils", exc_type=ImportError)
    generator = torch.Generator().manual_seed(0)
    low, sides = (torch.rand(2, 50, 2, generator=generator) * 50 for _ in range(2))
    boxes = torch.cat([low, low + sides + 1], -1)
    coder = utils.BoxCoder((1.0, 1.0, 1.0, 1.0))
    torch.testing.assert_close(anchors.encode(boxes[0], boxes[1]), coder.encode_single(boxes[0], boxes[1]))
    deltas = torch.randn(50, 4, generator=generator)
    torch.testing.assert_close(anchors.decode(deltas, boxes[0]), coder.decode_single(deltas, boxes[0]))


def test_matching():
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 51, 51]])
    candidates = torch.tensor(
        [
            [0.0, 0, 10, 10],  # the first box
            [0, 0, 10, 7],  # 0.7 of it: just enough
            [0, 0, 10, 6.9],  # 0.69
            [0, 0, 10, 3],  # 0.3: just not background
            [0, 0, 10, 2.9],  # 0.29
            [45, 45, 55, 55],  # 0.01 of the second box, but none has more
            [45, 45, 56, 55],  # less
            [90, 90, 95, 95],  # no overlap
        ]
    )
    expected = [0, 0, anchors.IGNORED, anchors.IGNORED, anchors.BACKGROUND, 1] + 2 * [anchors.BACKGROUND]
    assert anchors.match(candidates, boxes, 0.3, 0.7).tolist() == expected


def test_matching_takes_the_box_with_the_largest_overlap():
    boxes = torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 10]])
    found = anchors.match(torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8.9]]), boxes, 0.3, 0.7)
    assert found.tolist() == [1, 0]


def test_matching_without_objects():
    candidates = anchors.square_anchors(2, 2, 4, (4,))
    assert anchors.match(candidates, torch.zeros(0, 4), 0.3, 0.7).tolist() == [anchors.BACKGROUND] * 4
    far = torch.tensor([[100.0, 100, 110, 110]])
    assert anchors.match(candidates, far, 0.3, 0.7).tolist() == [anchors.BACKGROUND] * 4


@pytest.mark.parametrize(("positives", "negatives", "each"), [(9, 30, 4), (2, 30, 2), (9, 3, 3), (0, 30, 0)])
def test_samples_are_one_to_one(positives, negatives, each):
    matches = torch.full((60,), anchors.IGNORED)
    matches[:positives] = torch.arange(positives) % 2
    matches[20 : 20 + negatives] = anchors.BACKGROUND
    seen: set[int] = set()
    for seed in range(40):
        positive, negative = anchors.sample(matches, 8, torch.Generator().manual_seed(seed))
        assert len(set(positive.tolist())) == len(set(negative.tolist())) == each
        assert (matches[positive] >= 0).all() and (matches[negative] == anchors.BACKGROUND).all()
        seen |= set(positive.tolist())
    assert seen == (set(range(positives)) if each else set())


def test_the_papers_outputs():
    """1,000 logistic outputs and 1,000 x 4 regressions at each anchor."""
    head = RegionHead(16, 1000, 2, hidden_channels=8)
    assert head.cls.weight.shape == (2 * 1000, 8, 1, 1) and head.reg.weight.shape == (2 * 4000, 8, 1, 1)
    logits, deltas = head(torch.randn(2, 16, 3, 5))
    assert logits.shape == (2, 30, 1000) and deltas.shape == (2, 30, 1000, 4)
    # as often as an anchor that it trains with is of a class
    assert logits.sigmoid().mean().item() == pytest.approx(0.5 / 1000, rel=0.05)


def test_some_outputs_are_all_outputs_at_some_anchors():
    head = localizer().head.double()
    features = torch.randn(2, 64, 3, 5, dtype=torch.float64)
    logits, deltas = head(features)
    image, anchor = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 29, 12, 7])
    classes = torch.tensor([2, 0, 1, 1])
    rows = head.rows(head.hidden(features), image, anchor)
    torch.testing.assert_close(head.logits_at(rows, anchor), logits[image, anchor])
    torch.testing.assert_close(head.deltas_at(rows, anchor, classes), deltas[image, anchor, classes])
    # anchors of one position have filters of their own
    assert not torch.equal(logits[0, 0], logits[0, 1])


def test_losses_by_hand():
    model = localizer().double().eval()
    x = images().double()
    found = model.losses(x, TARGETS, torch.Generator().manual_seed(5))

    generator = torch.Generator().manual_seed(5)
    logits, deltas = model.head(model.trunk(x)["features"])
    places = anchors.square_anchors(5, 6, 4, SIZES)
    of_class, of_box, count = 0.0, 0.0, 0
    for n, t in enumerate(TARGETS):
        matches = anchors.match(places, t["boxes"], 0.3, 0.7)
        positive, negative = anchors.sample(matches, 8, generator)
        assert n == 2 or len(positive) > 0
        for a in positive.tolist() + negative.tolist():
            count += 1
            label = int(t["labels"][matches[a]]) if matches[a] >= 0 else None
            for k in range(K):
                p = 1 / (1 + math.exp(-float(logits[n, a, k])))
                of_class -= math.log(p if k == label else 1 - p)
            if label is None:
                continue
            (x1, y1, x2, y2), (u1, v1, u2, v2) = places[a].tolist(), t["boxes"][matches[a]].tolist()
            side = x2 - x1
            wanted = [
                ((u1 + u2) / 2 - (x1 + x2) / 2) / side,
                ((v1 + v2) / 2 - (y1 + y2) / 2) / side,
                math.log((u2 - u1) / side),
                math.log((v2 - v1) / side),
            ]
            for i in range(4):
                error = abs(float(deltas[n, a, label, i]) - wanted[i])
                of_box += error - 1 / 18 if error >= 1 / 9 else 4.5 * error**2
    assert float(found["loss_class"]) == pytest.approx(of_class / count, rel=1e-6)
    assert float(found["loss_box"]) == pytest.approx(of_box / count, rel=1e-6)


def test_only_the_regressors_of_the_objects_class_learn():
    model = localizer().train()
    losses = model(images(2), [TARGETS[1], TARGETS[1]])
    losses["loss_box"].backward()
    gradient = model.head.reg.weight.grad.reshape(len(SIZES), K, 4, -1)
    assert gradient[:, 1].abs().sum() > 0
    assert gradient[:, [0, 2]].abs().sum() == 0
    assert model.trunk.conv1.weight.grad.abs().sum() > 0


def test_no_objects_at_all():
    losses = localizer().losses(images(1), TARGETS[2:])
    assert {name: float(loss.detach()) for name, loss in losses.items()} == {"loss_class": 0, "loss_box": 0}
    sum(losses.values()).backward()


@pytest.mark.parametrize("size", [(20, 24), (17, 33)])
def test_predictions_by_hand(size):
    model = localizer().double().eval()
    x = images(2, *size).double()
    found = model.predict(x, top=2)
    logits, deltas = model.head(model.trunk(x)["features"])
    height, width = size
    places = anchors.square_anchors(-(-height // 4), -(-width // 4), 4, SIZES)
    for n in range(2):
        scores = [max(float(v) for v in logits[n, :, k]) for k in range(K)]
        classes = sorted(range(K), key=lambda k: -scores[k])[:2]
        assert found.classes[n].tolist() == classes
        for t, k in enumerate(classes):
            a = int(logits[n, :, k].argmax())
            assert float(found.scores[n, t]) == pytest.approx(1 / (1 + math.exp(-scores[k])))
            box = anchors.decode(deltas[n, a, k], places[a].double()).tolist()
            cut = [min(max(v, 0), limit) for v, limit in zip(box, 2 * (width, height), strict=True)]
            assert found.boxes[n, t].tolist() == pytest.approx(cut)
    known = model.predict(x, torch.tensor([[2], [0]]))
    every = model.predict(x, top=K)
    for n, k in enumerate((2, 0)):
        torch.testing.assert_close(known.boxes[n, 0], every.boxes[n][every.classes[n] == k][0])
    assert torch.equal(model(x).boxes, every.boxes[:, :1])


def test_boxes_end_with_the_image():
    model = localizer().eval()
    torch.nn.init.constant_(model.head.reg.bias, 3.0)  # far to the right and below, and large
    found = model.predict(images(2), top=K)
    assert (found.boxes[..., 0] <= 24).all() and (found.boxes[..., 2] == 24).all()
    assert (found.boxes[..., 1] <= 20).all() and (found.boxes[..., 3] == 20).all()
    torch.nn.init.constant_(model.head.reg.bias, -1.0)
    torch.nn.init.constant_(model.head.reg.weight, 0)
    model.head.reg.bias.data.reshape(-1, 4)[:, 2:] = 5
    assert (model.predict(images(2)).boxes[..., :2] == 0).all()


def test_localized():
    """The class and half of the area; a second guess counts, too."""
    prediction = Prediction(
        torch.tensor([[1, 0], [1, 0], [2, 0], [0, 1]]),
        torch.ones(4, 2),
        torch.tensor([[[0.0, 0, 10, 5], [0, 0, 1, 1]]] * 3 + [[[0.0, 0, 1, 1], [0, 0, 10, 10]]]),
    )
    true = [target([[0.0, 0, 10, 10]], [1])] * 4
    true[1] = target([[0.0, 0, 10, 10.1]], [1])  # 0.495
    assert localized(prediction, true).tolist() == [True, False, False, True]
    assert localized(prediction, true, iou=0.51).tolist() == [False, False, False, True]
    two = [target([[20.0, 20, 30, 30], [0, 0, 10, 5]], [1, 1])]
    assert localized(Prediction(*(field[:1] for field in prediction)), two).tolist() == [True]
    expected = sum((0.5, iou([0, 0, 10, 5], [0, 0, 10, 10.1]), 0.5, 0.01)) / 4
    assert mean_iou(prediction, true) == pytest.approx(expected)


def test_the_trunk_is_fused():
    model = localizer().train()
    with fusedres.backend("reference"), FusedOps() as ops:
        sum(model(images(), TARGETS).values()).backward()
    assert ops.batch_norms == 7


def test_bf16_autocast():
    model = localizer().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(images(), TARGETS, torch.Generator().manual_seed(0))
    expected = model.losses(images(), TARGETS, torch.Generator().manual_seed(0))
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.05, atol=0.01)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be positive, got 0"),
        ({"anchor_sizes": ()}, r"anchor_sizes must be sides in pixels, got \(\)"),
        ({"samples": 1}, "samples must be 2 or more, half of them positive, got 1"),
        ({"negative_iou": 0.8}, "negative_iou and positive_iou must be .*, got 0.8 and 0.7"),
    ],
)
def test_wrong_arguments(arguments, message):
    trunk = Trunk(fusedres.CifarResNet(8), {"layer3": "features"})
    with pytest.raises(ValueError, match=message):
        Localizer(trunk, **{"num_classes": K, "anchor_sizes": SIZES, **arguments})


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, "targets are needed in training"),
        (TARGETS[:2], "targets must be one for each of 3 images, got 2"),
        (
            [*TARGETS[:2], target([[4.0, 4, 4, 8]], [1])],
            r"boxes must have x1 < x2 .*, got \[4.0, 4.0, 4.0, 8.0\]",
        ),
        ([*TARGETS[:2], target([[4.0, 4, 8, 8]], [K])], "labels must be from 0 to 2, got 3"),
        ([*TARGETS[:2], target([[4.0, 4, 8, 8]], [])], r"targets\[2\] must have boxes \[M, 4\] .* and \[0\]"),
    ],
)
def test_wrong_targets(targets, message):
    with pytest.raises(ValueError, match=message):
        localizer().train()(images(), targets)
