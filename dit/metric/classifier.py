"""A small classifier, trained on the real data, as the judge of generated images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.metric.frechet import frechet_distance
from dit.metric.moments import Moments
from dit.metric.subject import Samples, Subject, rows


class Classifier(nn.Module):
    """A small convolutional network for small images; `features` is its penultimate layer."""

    def __init__(self, channels: int, num_classes: int, num_features: int = 48):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> logits (B, classes)."""
        return self.head(self.features(images))


def train_classifier(
    images: Tensor, labels: Tensor, num_classes: int, *, seed: int, num_steps: int = 600, batch_size: int = 128
) -> Classifier:
    """A classifier trained on uint8 images (N, C, H, W), with noise added, from a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(images.shape[1], num_classes)
        optimizer = torch.optim.Adam(classifier.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=num_steps)
        scaled = to_float(images)
        for _ in range(num_steps):
            rows = torch.randint(len(images), (batch_size,))
            batch = scaled[rows] + 0.3 * torch.randn(scaled[rows].shape)
            loss = F.cross_entropy(classifier(batch), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


class Judge:
    """A classifier trained on the real images with its own seed, and what it sees in others.

    Args:
        train: images and labels for training it and as the reference.
        held_out: the same, kept from training.
        seed: of the classifier.
    """

    def __init__(self, train: Samples, held_out: Samples, seed: int = 1):
        self.train, self.held_out = train, held_out
        images, labels = train["image"], train["label"]
        self.num_classes = int(labels.max()) + 1
        with torch.enable_grad():
            self.classifier = train_classifier(images, labels, self.num_classes, seed=seed)
        self.reference = self.features(images)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images, uint8 (N, C, H, W) -> (N, D)."""
        features: Tensor = self.classifier.features(to_float(images))
        return features

    def frechet(self, images: Tensor) -> float:
        """The Frechet distance of images to the training images, in features."""
        return frechet_distance(Moments.of(self.features(images)), Moments.of(self.reference))

    def figures(self, drawn: Tensor, asked: Tensor) -> dict[str, float]:
        """What is seen in samples, uint8 (N, C, H, W), of the classes (N,) asked for; see `judge`."""
        train, held_out, features = self.train, self.held_out, self.features(drawn)
        spread = _within_class_variance(self.reference, train["label"])
        return {
            "accuracy": _accuracy(self.classifier, drawn, asked),
            "diversity": _within_class_variance(features, asked) / spread,
            "frechet": frechet_distance(Moments.of(features), Moments.of(self.reference)),
            "nearest": _median_nearest(drawn, train["image"]) / _median_nearest(held_out["image"], train["image"]),
        }


def judge(
    subject: Subject,
    train: Samples,
    held_out: Samples,
    *,
    num_images: int = 2000,
    seed: int = 1,
) -> dict[str, float]:
    """Quality of conditional samples, judged by a classifier trained on the training images with its own seed.

    Args:
        subject: the model.
        train: images and labels for training the judge and as the reference.
        held_out: the same, kept from training; the model is told of them what it is told in training.
        num_images: how many samples to judge, the classes in turn, and those of a class in turn.
        seed: of the judge.

    Returns:
        `accuracy`: the share of samples in which the judge sees the class that was asked for.
        `diversity`: the variance of the judge's features within classes, over that of the training images.
        `frechet`: the Frechet distance of the samples' features to the training images'.
        `frechet_floor`: the same of the held-out images; their small number dominates it.
        `frechet_noise`: the same of uniform noise.
        `nearest`: median distance of a sample to its nearest training image in pixels, over that of held-out images:
            much less than 1 is memorising.
        `judge_accuracy`: the judge's own accuracy on the held-out images.
    """
    one = Judge(train, held_out, seed)
    asked = torch.arange(num_images) % one.num_classes
    drawn = subject.draw(rows(held_out, _in_turn(held_out["label"], asked)))
    noise = torch.randint(0, 256, drawn.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return {
        **one.figures(drawn, asked),
        "frechet_floor": one.frechet(held_out["image"]),
        "frechet_noise": one.frechet(noise),
        "judge_accuracy": _accuracy(one.classifier, held_out["image"], held_out["label"]),
    }


judge.fields = ("label",)  # type: ignore[attr-defined]


def _in_turn(labels: Tensor, asked: Tensor) -> Tensor:
    """For each class asked for, the number of the next sample of it.

    Raises:
        ValueError: if there is no sample of a class.
    """
    number = torch.empty_like(asked)
    for label in asked.unique():
        there = (labels == label).nonzero()[:, 0]
        if not len(there):
            raise ValueError(f"metric=classifier: there is no held-out image of class {label}")
        wanted = (asked == label).nonzero()[:, 0]
        number[wanted] = there[torch.arange(len(wanted)) % len(there)]
    return number


def to_float(images: Tensor) -> Tensor:
    """0..255 -> [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def _accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    return (classifier(to_float(images)).argmax(1) == labels).float().mean().item()


def _within_class_variance(features: Tensor, labels: Tensor) -> float:
    classes = [features[labels == label].double() for label in labels.unique()]
    return sum(c.var(dim=0).sum().item() for c in classes) / len(classes)


def _median_nearest(images: Tensor, reference: Tensor) -> float:
    distances = torch.cdist(images.flatten(1).float(), reference.flatten(1).float())
    return distances.min(dim=1).values.median().item()
