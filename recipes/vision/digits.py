"""Handwritten digits: a small convolutional network with BatchNorm and Dropout, scored on held-out images.

This is the second example of docs/extend.md: a model with state beside its parameters, an accuracy while training, and
facts (the scale of the pixels) that the run keeps, so that it can be read on machines without the data.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

from aurora_train.config import Section, setting
from aurora_train.errors import MissingExtra
from aurora_train.recipe import Loss, Recipe

CLASSES = 10


class ModelConfig(Section):
    """Two convolutions, each with BatchNorm and a halving of the image, and two dense layers."""

    channels: int = setting(32, ge=1, help="channels of the first convolution; the second has twice as many")
    dropout: float = setting(0.3, ge=0, lt=1, help="share of the hidden units dropped in training")


class DataConfig(Section):
    """The 1,797 images of 8 x 8 pixels that come with scikit-learn."""

    test: float = setting(0.2, gt=0, lt=0.5, help="share of the images held out for the score, by hash of the image")
    validation: float = setting(0.1, gt=0, lt=0.5, help="share of the images held out for evaluation while training")
    shift: int = setting(1, ge=0, le=3, help="pixels by which an image is moved at random in training")


class Config(Section):
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()


class Images:
    """A `Source`: image float32[B, 8, 8, 1] with values 0 to 16, label int32[B]."""

    def __init__(self, images, labels, split: str):
        self.images, self.labels, self.split = images, labels, split
        content = images.tobytes() + labels.tobytes()
        self.fingerprint = hashlib.sha256(f"digits 1 {split} ".encode() + content).hexdigest()

    def __len__(self):
        return len(self.labels)

    def take(self, indices):
        return {"image": self.images[indices], "label": self.labels[indices]}

    def describe(self):
        return {"source": "scikit-learn's digits", "licence": "BSD-3-Clause", "split": self.split, "images": len(self)}


class Digits(Recipe):
    Config = Config
    couples = "microbatch"  # BatchNorm's statistics are those of all images that are taken at once
    unit, metric = "images", ("accuracy", "max")

    @functools.cache  # noqa: B019 - a recipe lives as long as its run
    def data(self, split):
        """Images of one split: "train", "validation" or "test". An image's own hash decides its split."""
        images, labels = _load()
        draws = np.array([hashlib.sha256(image.tobytes()).digest()[0] / 256 for image in images])
        test, validation = self.config.data.test, self.config.data.validation
        of = np.where(draws < test, "test", np.where(draws < test + validation, "validation", "train"))
        return Images(images[of == split], labels[of == split], split)

    def facts(self):
        """The scale of the pixels, from the training images alone."""
        pixels = self.data("train").images
        return {"mean": float(pixels.mean()), "deviation": float(pixels.std())}

    def model(self, rngs):
        from flax import nnx

        class Network(nnx.Module):
            def __init__(self, channels, dropout, scale, rngs):
                self.scale = scale
                self.first = nnx.Conv(1, channels, (3, 3), rngs=rngs)
                self.first_norm = nnx.BatchNorm(channels, rngs=rngs)
                self.second = nnx.Conv(channels, 2 * channels, (3, 3), rngs=rngs)
                self.second_norm = nnx.BatchNorm(2 * channels, rngs=rngs)
                self.hidden = nnx.Linear(2 * channels * 4, 64, rngs=rngs)
                self.drop = nnx.Dropout(dropout, rngs=rngs)
                self.out = nnx.Linear(64, CLASSES, rngs=rngs)

            def __call__(self, images):
                """float32[B, 8, 8, 1] -> logits float32[B, 10]."""
                mean, deviation = self.scale
                x = nnx.relu(self.first_norm(self.first((images - mean) / deviation)))
                x = nnx.max_pool(x, (2, 2), (2, 2))
                x = nnx.relu(self.second_norm(self.second(x)))
                x = nnx.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
                return self.out(self.drop(nnx.relu(self.hidden(x))))

        config = self.config.model
        return Network(config.channels, config.dropout, (self.known["mean"], self.known["deviation"]), rngs)

    def loss(self, model, batch, key) -> Loss:
        """Cross-entropy, summed over the images; each is shifted by up to `data.shift` pixels in training."""
        import jax
        import jax.numpy as jnp
        import optax

        images, labels = batch["image"], batch["label"]
        if key is not None and self.config.data.shift:
            images = jax.vmap(functools.partial(_moved, most=self.config.data.shift))(images, key)
        logits = model(images)
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        count, right = jnp.float32(len(labels)), (logits.argmax(-1) == labels).sum().astype(jnp.float32)
        return Loss(errors.sum(), count, {"accuracy": (right, count)})

    def predict(self, model, batch):
        """The likeliest digit of each image, int32[B]."""
        return model(batch["image"]).argmax(-1)

    def score(self, predict, split, key, workdir, progress) -> dict:
        source = self.data(split)
        batch = source.take(np.arange(len(source)))
        guessed, labels = np.asarray(predict({"image": batch["image"]})), batch["label"]
        rows = [[digit, *np.bincount(guessed[labels == digit], minlength=CLASSES).tolist()] for digit in range(CLASSES)]
        title = "How often each digit was taken for which"
        table = {"title": title, "columns": ["digit", *range(CLASSES)], "rows": rows}
        return {"accuracy": float((guessed == labels).mean()), "images": len(labels), "tables": [table]}

    def baselines(self, workdir, progress) -> dict:
        """Accuracy on the test images of the nearest class mean, and of a vote of the three nearest training images."""
        train, test = self.data("train"), self.data("test")
        x, y = train.images.reshape(len(train), -1), train.labels
        seen = test.images.reshape(len(test), -1)
        means = np.stack([x[y == digit].mean(0) for digit in range(CLASSES)])
        votes = y[np.argsort(_distances(seen, x), axis=1, kind="stable")[:, :3]]
        nearest = np.array([np.bincount(vote, minlength=CLASSES).argmax() for vote in votes])
        return {
            "nearest_mean": float((_distances(seen, means).argmin(1) == test.labels).mean()),
            "three_nearest": float((nearest == test.labels).mean()),
        }

    def samples(self, model, key) -> list[dict]:
        import jax.numpy as jnp

        batch = self.data("test").take(np.arange(8))
        guessed = np.asarray(model(jnp.asarray(batch["image"])).argmax(-1))
        pairs = zip(batch["label"].tolist(), guessed.tolist(), strict=True)
        return [{"prompt": f"an image of {is_}", "text": str(read), "right": read == is_} for is_, read in pairs]


def _load() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("scikit-learn", "vision", "the recipe vision/digits") from error
    digits = load_digits()
    return digits.images[..., None].astype(np.float32), digits.target.astype(np.int32)


def _moved(image, key, most: int):
    """float32[8, 8, 1] shifted by up to `most` pixels in each direction and filled with zeros."""
    import jax
    import jax.numpy as jnp

    at = jax.random.randint(key, (2,), 0, 2 * most + 1)
    padded = jnp.pad(image, ((most, most), (most, most), (0, 0)))
    return jax.lax.dynamic_slice(padded, (at[0], at[1], 0), image.shape)


def _distances(a, b) -> np.ndarray:
    """Squared Euclidean distances, float64[len(a), len(b)]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
